#!/usr/bin/env bash
# All of the GPU work of the current change, on a machine with an NVIDIA GPU, in one go.
#
#   tools/gpu.sh RESULTS [PROBLEMS]
#
# Needs torch with CUDA, and attnproof and attnproof-reference installed. Writes everything under
# RESULTS as it comes (a calibration goes on from what lies there) and prints a short table last:
# 1. conformance on the GPU of every registered backend that declares it;
# 2. the error budget on torch's CUDA kernels, PROBLEMS random problems per kernel and dtype;
# 3. the same on torch's CPU kernels, with every instruction set that torch offers.
set -u
results=${1:?"usage: tools/gpu.sh RESULTS [PROBLEMS]"}
problems=${2:-1000}
mkdir -p "$results"
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1

calibrate() { # DEVICE KERNEL WORKERS [INSTRUCTION_SET]
  local name="$1-$2${4:+-$4}"
  ${4:+env ATEN_CPU_CAPABILITY="$4"} python3 -m attnproof.calibration --device "$1" --kernel "$2" \
    --problems "$problems" --workers "$3" --json "$results/$name.jsonl" \
    >"$results/$name.txt" 2>"$results/$name.err" || echo "calibration $name: exit status $?"
}

check() { # BACKEND
  attnproof check "$1" --device cuda --json "$results/check-$1.json" >"$results/check-$1.txt" 2>&1 \
    || echo "check $1: exit status $?"
}

attnproof doctor --json >"$results/doctor.json"
check reference &
check eager &
calibrate cuda sdpa-flash 2 &
calibrate cuda sdpa-efficient 2 &
calibrate cuda sdpa-cudnn 4 &
calibrate cuda sdpa-math 2 &
calibrate cuda flex 4 &
wait
for instruction_set in avx512 avx2 default; do
  for kernel in sdpa-flash sdpa-math eager; do
    calibrate cpu "$kernel" 2 "$instruction_set" &
  done
done
wait

tail -qn 1 "$results"/check-*.txt
python3 -m attnproof.calibration --summary "$results"/c*.jsonl | tee "$results/summary.txt" | sed '/^$/q'
