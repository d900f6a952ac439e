#!/usr/bin/env bash
# usage: gpu.sh PYTHON OUT [tests|ops|bench|sanitize]
# Everything that needs a GPU, or one part of it, with the packages at hand and without a network: 25 minutes in all, a
# part under ten. Each step has its own time limit and log, and a failed one does not keep the next from running.
#   tests     the GPU tests
#   ops       every op beside its peers, each in a process of its own, since a fault on the GPU ends a process;
#             without torch.compile, whose search for plans takes most of a benchmark's time
#   bench     what `ops` did not get to, and torch.compile: all that OUT/gpu.json does not hold yet
#   sanitize  compute-sanitizer
# RESUME=1 in the environment lets `ops` too go on from what OUT/gpu.json holds.
set -uo pipefail
cd "$(dirname "$0")/.."
python=$1 out=$2 part=${3:-} status=0
case $part in
    '' | tests | ops | bench | sanitize) ;;
    *) echo "error: PART is $part, expected tests, ops, bench, sanitize or nothing" >&2; exit 2 ;;
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

run_ops() {
    local end=$((SECONDS + 400)) left op
    # Else `bench` would take what another run measured beside what this one does.
    if [ -z "${RESUME:-}" ] && [ -e "$out/gpu.json" ]; then mv "$out/gpu.json" "$out/gpu-before.json"; fi
    # Those that take longest come last, when it is known how much time the others left.
    mapfile -t ops < <("$python" -m bench --names | awk '
        /^(dense_aspp3d|dilated_conv3d|focusnet|snet)$/ { late = late $0 "\n"; next } { print } END { printf "%s", late }')
    [ "${#ops[@]}" -gt 0 ] || failed ops "python -m bench --names names none"
    left=${#ops[@]}
    for op in ${ops[@]+"${ops[@]}"}; do
        step "ops-$op" $(((end - SECONDS) / left > 5 ? (end - SECONDS) / left : 5)) "$python" -m bench "$op" \
            --device cuda --without compile --json "$out/gpu.json" ${RESUME:+--resume}
        left=$((left - 1))
    done
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
if wanted ops; then run_ops; fi
if wanted bench; then step bench 390 "$python" -m bench --device cuda --json "$out/gpu.json" --resume; fi
if wanted sanitize; then run_sanitizer; fi
exit "$status"
