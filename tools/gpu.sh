#!/usr/bin/env bash
# All of the GPU work of the current change, on a machine with an NVIDIA GPU, in one go.
#
#   tools/gpu.sh RESULTS [PROBLEMS [PARTS]]
#
# Needs torch with CUDA, and attnproof and attnproof-reference installed. ATTNPROOF_COMMIT names the
# commit where there is no git checkout. Writes everything under RESULTS as it comes (a calibration
# goes on from what lies there) and prints a short table last:
# 1. conformance on the GPU of the backends that it can run;
# 2. the error budget on torch's CUDA kernels, PROBLEMS random problems per kernel and dtype;
# 3. the same on torch's CPU kernels, with every instruction set that torch offers.
# PARTS is "checks cuda cpu", which are these three, or some of them.
set -u
results=${1:?"usage: tools/gpu.sh RESULTS [PROBLEMS [PARTS]]"}
problems=${2:-1000}
parts=${3:-checks cuda cpu}
mkdir -p "$results"
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1

calibrate() { # DEVICE KERNEL WORKERS INSTRUCTION_SET|"" PROBLEMS
  local name="$1-$2${4:+-$4}"
  ${4:+env ATEN_CPU_CAPABILITY="$4"} timeout 480 python3 -m attnproof.calibration --device "$1" --kernel "$2" \
    --problems "$5" --workers "$3" --timeout 100 --json "$results/$name.jsonl" \
    >"$results/$name.txt" 2>"$results/$name.err" || echo "calibration $name: exit status $?"
}

check() { # BACKEND
  attnproof check "$1" --device cuda --workers 2 --json "$results/check-$1.json" \
    >"$results/check-$1.txt" 2>&1 || echo "check $1: exit status $?"
}

checks() {
  local backend
  for backend in reference eager standard two-pass one-pass tiled-v1 tiled-v2 split-kv ring; do
    check "$backend" &
  done
  wait
  tail -qn 1 "$results"/check-*.txt
}

cuda() {
  calibrate cuda sdpa-flash 2 "" "$problems" &
  calibrate cuda sdpa-efficient 2 "" "$problems" &
  calibrate cuda sdpa-cudnn 4 "" "$problems" &
  calibrate cuda sdpa-math 2 "" "$problems" &
  calibrate cuda flex 4 "" "$problems" &
  wait
}

cpu() {
  local instruction_set kernel
  for instruction_set in avx512 avx2 default; do
    for kernel in sdpa-flash sdpa-math eager; do
      calibrate cpu "$kernel" 2 "$instruction_set" $((problems * 2 / 3 + 1)) & # dtypes: 3, not 2
    done
  done
  wait
}

attnproof doctor --json >"$results/doctor.json"
for part in $parts; do
  "$part"
done

for device in cuda cpu; do
  [[ " $parts " == *" $device "* ]] || continue
  python3 -m attnproof.calibration --summary "$results/$device"-*.jsonl \
    --write "$results/calibration-$device.json" >"$results/summary-$device.txt"
  sed '/^$/q' "$results/summary-$device.txt"
done
