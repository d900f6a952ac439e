#!/usr/bin/env bash
# usage: gpu.sh PYTHON OUT [tests|bench|sanitize]
# Everything that needs a GPU, or one part of it, with the packages at hand and without a network. Each step has its
# own time limit and log, and a failed one does not keep the next from running: 19 minutes in all, a part under ten.
# RESUME=1 in the environment lets the benchmarks go on from what OUT/gpu.json holds.
set -uo pipefail
cd "$(dirname "$0")/.."
python=$1 out=$2 part=${3:-} status=0
case $part in
    '' | tests | bench | sanitize) ;;
    *) echo "error: PART is $part, expected tests, bench, sanitize or nothing" >&2; exit 2 ;;
esac
mkdir -p "$out"
export FOCUSKERNELS_STRICT=${FOCUSKERNELS_STRICT:-1}

step() {
    local name=$1 limit=$2 code
    shift 2
    echo "== $name"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/$name.log"
    code=${PIPESTATUS[0]}
    case $code in
        0) ;;
        124 | 137) failed "$name" "it ran past its limit of $limit s; what it wrote until then is in $out" ;;
        *) failed "$name" "exit code $code" ;;
    esac
}

failed() {
    echo "== $1 failed: $2" | tee -a "$out/$1.log"
    status=1
}

wanted() { [ -z "$part" ] || [ "$part" = "$1" ]; }

has() { "$python" -c "import $1" 2>/dev/null; }

run_tests() {
    # Only the files with GPU tests: others may import packages that this machine lacks.
    mapfile -t tests < <(grep -l 'mark\.gpu' tests/test_*.py)
    if [ "${#tests[@]}" -eq 0 ]; then
        echo "== tests: no file has GPU tests" | tee "$out/tests.log"
    elif has pytest; then
        step tests 240 "$python" -m pytest -m gpu --continue-on-collection-errors --junitxml="$out/tests.xml" \
            "${tests[@]}"
    else
        echo "== pytest is not installed: GPU tests are left out; the check of every benchmark stands in for them"
        step check 120 "$python" -m bench --device cuda --quick --json "$out/check.json"
        failed tests "pytest is not installed"
    fi
}

run_sanitizer() {
    local sanitizer tool
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -1)
    if [ -z "$sanitizer" ]; then
        echo "== sanitize: compute-sanitizer is not installed" | tee "$out/sanitize.log"
        return
    fi
    for tool in memcheck racecheck; do
        # Without torch's cache every tensor has bounds of its own.
        step "sanitize-$tool" 150 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" \
            --error-exitcode 1 "$python" -m bench --device cuda --quick --json "$out/sanitize-$tool.json"
    done
}

step build 120 "$python" setup.py -q build_ext --inplace
step info 30 "$python" -m focuskernels.info
if wanted tests; then run_tests; fi
if wanted bench; then step bench 400 "$python" -m bench --device cuda --json "$out/gpu.json" ${RESUME:+--resume}; fi
if wanted sanitize; then run_sanitizer; fi
exit "$status"
