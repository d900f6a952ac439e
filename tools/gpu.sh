#!/usr/bin/env bash
# usage: gpu.sh PYTHON OUT [tests|ops|bench|sanitize]
# Everything that needs a GPU, or one part of it, with the packages at hand and without a network: 25 minutes in all, a
# part under ten, tests and ops together under 13. Each step has its own time limit, and a failed one does not keep the
# next from running. What is said goes to OUT/PART.log (all.log without a part), which says when each step began.
#   tests     the GPU tests, and the tests of Triton kernels: OUT/tests.xml
#   ops       every op beside its peers, each in a process of its own, since a fault on the GPU ends a process; cuDNN
#             tries the plans it thinks best, and torch.compile, whose search for plans takes longest, is left out
#   bench     what `ops` did not get to, and torch.compile: all that OUT/gpu.json does not hold yet; of all plans
#   sanitize  compute-sanitizer, on the kernels with asynchronous copies and matrix products
# RESUME=1 in the environment lets `ops` too go on from what OUT/gpu.json holds.
set -uo pipefail
cd "$(dirname "$0")/.."
python=$1 out=$2 part=${3:-} status=0
case $part in
    '' | tests | ops | bench | sanitize) ;;
    *) echo "error: PART is $part, expected tests, ops, bench, sanitize or nothing" >&2; exit 2 ;;
esac
mkdir -p "$out"
log=$out/${part:-all}.log
: >"$log"
export FOCUSKERNELS_STRICT=${FOCUSKERNELS_STRICT:-1}

say() { echo "== $*" | tee -a "$log"; }

step() {
    local name=$1 limit=$2 code
    shift 2
    say "$name, after $SECONDS s"
    timeout --kill-after=20 "$limit" "$@" 2>&1 | tee -a "$log"
    code=${PIPESTATUS[0]}
    case $code in
        0) ;;
        124 | 137) failed "$name" "it ran past its limit of $limit s; what it wrote until then is in $out" ;;
        *) failed "$name" "exit code $code" ;;
    esac
}

failed() {
    say "$1 failed: $2"
    status=1
}

wanted() { [ -z "$part" ] || [ "$part" = "$1" ]; }

has() { "$python" -c "import $1" 2>/dev/null; }

# Several processes, where xdist is there: most of the time goes to the compiler.
workers() { if has xdist; then echo "-n ${JOBS:-8} --dist worksteal"; fi; }

run_tests() {
    if ! has pytest; then
        say "pytest is not installed: GPU tests are left out; the check of every benchmark stands in for them"
        step check 120 "$python" -m bench --device cuda --quick --json "$out/check.json"
        failed tests "pytest is not installed"
        return
    fi
    # Only the files with such tests: others may import packages that this machine lacks.
    mapfile -t tests < <(grep -lE 'mark\.(gpu|kernels)' tests/test_*.py | while read -r file; do
        # What compiles most comes last.
        case $file in *linear*) echo "3 $file" ;; *focal* | *dilated*) echo "2 $file" ;; *) echo "1 $file" ;; esac
    done | sort | cut -d' ' -f2)
    # shellcheck disable=SC2046
    step tests 240 "$python" -m pytest -v -m "(gpu or kernels) and not large and not slow" $(workers) \
        --continue-on-collection-errors --junitxml="$out/tests.xml" "${tests[@]}"
    # Each takes much of the memory.
    step tests-large 90 "$python" -m pytest -v -m "gpu and large" --continue-on-collection-errors \
        --junitxml="$out/tests-large.xml" "${tests[@]}"
}

run_ops() {
    local end=$((SECONDS + 330)) left op
    # Else `bench` would take what another run measured beside what this one does.
    if [ -z "${RESUME:-}" ] && [ -e "$out/gpu.json" ]; then mv "$out/gpu.json" "$out/gpu-before.json"; fi
    # Those that take longest come last, when it is known how much time the others left.
    mapfile -t ops < <("$python" -m bench --names | awk '
        /^(dense_aspp3d|dilated_conv3d|focusnet|snet)$/ { late = late $0 "\n"; next } { print } END { printf "%s", late }')
    [ "${#ops[@]}" -gt 0 ] || failed ops "python -m bench --names names none"
    left=${#ops[@]}
    for op in ${ops[@]+"${ops[@]}"}; do
        step "ops-$op" $(((end - SECONDS) / left > 5 ? (end - SECONDS) / left : 5)) "$python" -m bench "$op" \
            --device cuda --without compile --plans 10 --json "$out/gpu.json" ${RESUME:+--resume}
        left=$((left - 1))
    done
}

run_sanitizer() {
    local sanitizer tool kernels
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -1)
    if [ -z "$sanitizer" ]; then
        say "sanitize: compute-sanitizer is not installed"
        return
    fi
    kernels=(-v -m "kernels and not gpu and not slow" -k "passes or (bfloat16 and (forward or weight_gradient))"
        tests/test_dense_aspp3d_triton.py tests/test_dilated_conv3d_triton.py)
    # Compiled outside of the sanitizer, in several processes.
    # shellcheck disable=SC2046
    step sanitize-compile 60 "$python" -m pytest $(workers) "${kernels[@]}"
    for tool in memcheck racecheck; do
        # Without torch's cache every tensor has bounds of its own.
        step "sanitize-$tool" 120 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" \
            --error-exitcode 1 "$python" -m pytest "${kernels[@]}"
    done
}

step build 90 "$python" setup.py -q build_ext --inplace
step info 20 "$python" -m focuskernels.info
if wanted tests; then run_tests; fi
if wanted ops; then run_ops; fi
if wanted bench; then step bench 390 "$python" -m bench --device cuda --json "$out/gpu.json" --resume; fi
if wanted sanitize; then run_sanitizer; fi
exit "$status"
