#!/usr/bin/env bash
# usage: gpu.sh PYTHON OUT
# Everything that needs a GPU, with the packages at hand and without a network. Each step has its own time limit and
# log, and a failed one does not keep the next from running.
set -uo pipefail
cd "$(dirname "$0")/.."
python=$1 out=$2 status=0
mkdir -p "$out"
export FOCUSKERNELS_STRICT=${FOCUSKERNELS_STRICT:-1}

step() {
    local name=$1 limit=$2 code
    shift 2
    echo "== $name"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/$name.log"
    code=${PIPESTATUS[0]}
    if [ "$code" -ne 0 ]; then
        echo "== $name failed with exit code $code" | tee -a "$out/$name.log"
        status=1
    fi
}

# Only the files with GPU tests: others may import packages that this machine lacks.
mapfile -t tests < <(grep -l 'mark\.gpu' tests/test_*.py)

step build 120 "$python" setup.py -q build_ext --inplace
step info 30 "$python" -m focuskernels.info
step tests 240 "$python" -m pytest -m gpu --continue-on-collection-errors --junitxml="$out/tests.xml" "${tests[@]}"
step bench 180 "$python" -m bench --device cuda --json "$out/gpu.json"
exit "$status"
