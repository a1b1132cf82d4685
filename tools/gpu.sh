#!/usr/bin/env bash
# All of the GPU work of the current change, on a machine with an NVIDIA GPU, in one go.
#
#   tools/gpu.sh RESULTS [PROBLEMS [DEVICES]]
#
# Needs torch with CUDA, and attnproof and attnproof-reference installed. ATTNPROOF_COMMIT names the
# commit where there is no git checkout. Writes everything under RESULTS as it comes (a calibration
# goes on from what lies there) and prints a short table last:
# 1. conformance on the GPU of every registered backend that declares it;
# 2. the error budget on torch's CUDA kernels, PROBLEMS random problems per kernel and dtype;
# 3. the same on torch's CPU kernels, with every instruction set that torch offers.
# DEVICES is "cuda cpu", or one of the two: 1 and 2 are cuda, 3 is cpu.
set -u
results=${1:?"usage: tools/gpu.sh RESULTS [PROBLEMS [DEVICES]]"}
problems=${2:-1000}
devices=${3:-cuda cpu}
mkdir -p "$results"
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1

calibrate() { # DEVICE KERNEL WORKERS INSTRUCTION_SET|"" PROBLEMS
  local name="$1-$2${4:+-$4}"
  ${4:+env ATEN_CPU_CAPABILITY="$4"} timeout 480 python3 -m attnproof.calibration --device "$1" --kernel "$2" \
    --problems "$5" --workers "$3" --timeout 100 --json "$results/$name.jsonl" \
    >"$results/$name.txt" 2>"$results/$name.err" || echo "calibration $name: exit status $?"
}

check() { # BACKEND
  attnproof check "$1" --device cuda --json "$results/check-$1.json" >"$results/check-$1.txt" 2>&1 \
    || echo "check $1: exit status $?"
}

on_cuda() {
  check reference &
  check eager &
  calibrate cuda sdpa-flash 2 "" "$problems" &
  calibrate cuda sdpa-efficient 2 "" "$problems" &
  calibrate cuda sdpa-cudnn 4 "" "$problems" &
  calibrate cuda sdpa-math 2 "" "$problems" &
  calibrate cuda flex 4 "" "$problems" &
  wait
}

on_cpu() {
  local instruction_set kernel
  for instruction_set in avx512 avx2 default; do
    for kernel in sdpa-flash sdpa-math eager; do
      calibrate cpu "$kernel" 2 "$instruction_set" $((problems * 2 / 3 + 1)) & # dtypes: 3, not 2
    done
  done
  wait
}

attnproof doctor --json >"$results/doctor.json"
for device in $devices; do
  "on_$device"
done

for device in $devices; do
  python3 -m attnproof.calibration --summary "$results/$device"-*.jsonl \
    --write "$results/calibration-$device.json" >"$results/summary-$device.txt"
  sed '/^$/q' "$results/summary-$device.txt"
done
tail -qn 1 "$results"/check-*.txt 2>/dev/null
