#!/usr/bin/env bash
# All of the GPU work of a change, on a machine with an NVIDIA GPU, in one go.
#
#   tools/gpu.sh RESULTS [PART...]
#
# Needs torch with CUDA, pytest, and the distributions of this repository installed. Writes everything
# under RESULTS as it comes, last junit.xml and summary.md, which is added to GITHUB_STEP_SUMMARY where
# that is set. What an earlier run found there is removed first, unless RESUME=1 says to go on from it:
# it may be of other code. Calibrations always go on. The exit status is 1 when something failed, 2 for a
# part that there is none of, and then nothing was touched.
# PARTs, all but the benchmark and the calibrations unless named:
#   checks     judge every backend that the GPU can run; BACKENDS names some, LEVEL=full judges more,
#              and one of MUST_RUN (names and commas) that cannot be judged here is a failure
#   golden     the golden vectors, recomputed, and each backend judged on them
#   tests      the tests of the Triton kernels: against fp64, precision, 250 repeats under load
#   sanitize   compute-sanitizer (memcheck, initcheck, racecheck) on a cover of the Triton kernels
#   bench      how fast BACKENDS are, side by side; BENCH holds further options of attnproof bench, such
#              as "--baseline flex --only forward". What is left after SECONDS_EACH, RESUME=1 does
#   cuda, cpu  calibrate the error budget on torch's kernels, PROBLEMS random problems each
# ATTNPROOF_COMMIT names the commit where there is no git checkout, SECONDS_EACH limits a part.
set -u
if [[ -z ${1:-} ]]; then
  echo "usage: tools/gpu.sh RESULTS [PART...]" >&2
  exit 2
fi
for part in "${@:2}"; do
  case $part in # before anything is removed or run
  checks | golden | tests | sanitize | bench | cuda | cpu) ;;
  *)
    echo "tools/gpu.sh: part '$part': unknown; accepted are checks, golden, tests, sanitize," \
      "bench, cuda, cpu" >&2
    exit 2
    ;;
  esac
done
results=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
shift
cd "$(dirname "$0")/.."
parts=("$@")
[[ $# -gt 0 ]] || parts=(checks golden tests sanitize)
failed=0
problems=${PROBLEMS:-1000}
limit=${SECONDS_EACH:-3000}
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
export FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1 # else every process compiles FlashAttention-4 anew

names=()
for name in ${BACKENDS:-}; do names+=("$name=$(command -v attnproof)"); done

fail() { # PART STATUS: a part that failed
  echo "$1: exit status $2"
  failed=1
}

checks() {
  timeout "$limit" python3 tools/check_all.py "$results" "${names[@]}" --together "${TOGETHER:-3}" \
    --must-run "${MUST_RUN:-}" -- --device cuda --level "${LEVEL:-quick}" ${RESUME:+--resume} \
    >"$results/checks.txt" 2>&1 || fail checks $?
}

golden() {
  timeout "$limit" python3 tools/check_all.py "$results/golden" "${names[@]}" --golden -- \
    --device cuda >"$results/golden.txt" 2>&1 || fail golden $?
}

tests() {
  # Outside of the checkout, whose settings ask for plugins that need not be here.
  timeout "$limit" python3 -m pytest -q -rf -p no:cacheprovider -c /dev/null --import-mode=importlib \
    -n "${WORKERS:-8}" -p attnproof.spread --rootdir=packages/triton \
    packages/triton/tests/test_{precision,repeats,v1,v2,v2_decoding,mask_rule}.py \
    packages/triton/tests/test_{operators,sdpa,flash_attn,flash_attn_cache,graphs}.py \
    >"$results/tests.txt" 2>&1 || fail tests $?
}

sanitize() {
  local tool share shares=5 job jobs=()
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck initcheck racecheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 9 python3 tools/sanitize.py --planted \
      >"$results/planted-$tool.txt" 2>&1
    [[ $? == 9 ]] || fail "sanitize: $tool did not find what was planted" $?
  done
  for tool in memcheck initcheck racecheck; do
    for ((share = 0; share < shares; share++)); do
      timeout "$limit" compute-sanitizer --tool "$tool" --error-exitcode 9 \
        python3 tools/sanitize.py "$share/$shares" >"$results/sanitize-$tool-$share.txt" 2>&1 &
      jobs+=($!)
    done
  done
  for job in "${jobs[@]}"; do wait "$job" || fail sanitize $?; done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
}

bench() {
  mkdir -p "$results/bench"
  # shellcheck disable=SC2086 # BACKENDS and BENCH are lists of words
  attnproof bench ${BACKENDS:-} --device cuda --seconds "$limit" ${RESUME:+--resume} ${BENCH:-} \
    --json "$results/bench/bench.json" --plot "$results/bench/bench.svg" \
    >"$results/bench/bench.txt" 2>"$results/bench/progress.txt" || fail bench $?
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

if [[ -z ${RESUME:-} ]]; then
  for old in "$results"/*.json "$results"/*.jsonl "$results"/{golden,bench}/*.json; do
    case ${old##*/} in cuda-* | cpu-*) ;; *) rm -f "$old" ;; esac
  done
fi
attnproof doctor --json >"$results/doctor.json"
for part in "${parts[@]}"; do
  "$part"
done

for part in "${parts[@]}"; do
  case $part in
  checks) python3 tools/backend_table.py "$results" --by chapter --judge || failed=1 ;;
  golden) python3 tools/backend_table.py "$results/golden" --by chapter --judge || failed=1 ;;
  tests) tail -n 1 "$results/tests.txt" ;;
  bench) cat "$results/bench/bench.txt" ;;
  sanitize) grep -H "ERROR SUMMARY\|RACECHECK SUMMARY\|calls of" "$results"/{planted,sanitize}-*.txt |
    sed "s#^$results/##" ;;
  cuda | cpu)
    python3 -m attnproof.calibration --summary "$results/$part"-*.jsonl \
      --write "$results/calibration-$part.json" >"$results/summary-$part.txt"
    sed '/^$/q' "$results/summary-$part.txt"
    ;;
  esac
done

if [[ " ${parts[*]} " == *" checks "* || " ${parts[*]} " == *" golden "* ]]; then
  python3 tools/junit.py "$results" "$results/golden" >"$results/junit.xml" || failed=1
  python3 tools/step_summary.py "$results" >"$results/summary.md" || failed=1
  [[ -z ${GITHUB_STEP_SUMMARY:-} ]] || cat "$results/summary.md" >>"$GITHUB_STEP_SUMMARY"
fi
exit "$failed"
