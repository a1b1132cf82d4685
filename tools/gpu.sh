#!/usr/bin/env bash
# All of the GPU work of a change, on a machine with an NVIDIA GPU, in one go.
#
#   tools/gpu.sh RESULTS [PART...]
#
# Needs torch with CUDA, pytest, and the distributions of this repository installed. Writes everything
# under RESULTS as it comes (checks and calibrations go on from what lies there) and prints a short
# table last. PARTs, all but the calibrations unless named:
#   checks     judge every backend that the GPU can run; BACKENDS names some, LEVEL=full judges more
#   tests      the tests of the Triton kernels: against fp64, precision, 250 repeats under load
#   sanitize   compute-sanitizer (memcheck, initcheck, racecheck) on a cover of the Triton kernels
#   cuda, cpu  calibrate the error budget on torch's kernels, PROBLEMS random problems each
# ATTNPROOF_COMMIT names the commit where there is no git checkout, SECONDS_EACH limits a part.
set -u
results=$(mkdir -p "${1:?"usage: tools/gpu.sh RESULTS [PART...]"}" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
parts=("${@:-checks}")
[[ $# -gt 0 ]] || parts=(checks tests sanitize)
problems=${PROBLEMS:-1000}
limit=${SECONDS_EACH:-3000}
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1

checks() {
  local names=() name together=${TOGETHER:-3}
  for name in ${BACKENDS:-}; do names+=("$name=$(command -v attnproof)"); done
  timeout "$limit" python3 tools/check_all.py "$results" "${names[@]}" --together "$together" -- \
    --device cuda --level "${LEVEL:-quick}" --resume >"$results/checks.txt" 2>&1 ||
    echo "checks: exit status $?"
}

tests() {
  # Outside of the checkout, whose settings ask for plugins that need not be here.
  timeout "$limit" python3 -m pytest -q -rf -p no:cacheprovider -c /dev/null --import-mode=importlib \
    -n "${WORKERS:-8}" --rootdir=packages/triton \
    packages/triton/tests/test_{precision,repeats,v1,v2,v2_decoding,mask_rule}.py \
    >"$results/tests.txt" 2>&1 || echo "tests: exit status $?"
}

sanitize() {
  local tool share shares=5
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck initcheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 9 python3 tools/sanitize.py --planted \
      >"$results/planted-$tool.txt" 2>&1
    [[ $? == 9 ]] || echo "sanitize: $tool did not find what was planted"
  done
  for tool in memcheck initcheck racecheck; do
    for ((share = 0; share < shares; share++)); do
      timeout "$limit" compute-sanitizer --tool "$tool" --error-exitcode 9 \
        python3 tools/sanitize.py "$share/$shares" >"$results/sanitize-$tool-$share.txt" 2>&1 &
    done
  done
  wait
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
}

calibrate() { # DEVICE KERNEL WORKERS INSTRUCTION_SET|"" PROBLEMS
  local name="$1-$2${4:+-$4}"
  ${4:+env ATEN_CPU_CAPABILITY="$4"} timeout "$limit" python3 -m attnproof.calibration --device "$1" \
    --kernel "$2" --problems "$5" --workers "$3" --timeout 100 --json "$results/$name.jsonl" \
    >"$results/$name.txt" 2>"$results/$name.err" || echo "calibration $name: exit status $?"
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
for part in "${parts[@]}"; do
  "$part"
done

for part in "${parts[@]}"; do
  case $part in
  checks) python3 tools/backend_table.py "$results" --by chapter ;;
  tests) tail -n 1 "$results/tests.txt" ;;
  sanitize) grep -H "ERROR SUMMARY\|RACECHECK SUMMARY\|calls of" "$results"/{planted,sanitize}-*.txt |
    sed "s#^$results/##" ;;
  cuda | cpu)
    python3 -m attnproof.calibration --summary "$results/$part"-*.jsonl \
      --write "$results/calibration-$part.json" >"$results/summary-$part.txt"
    sed '/^$/q' "$results/summary-$part.txt"
    ;;
  esac
done
