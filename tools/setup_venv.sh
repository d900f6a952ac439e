#!/usr/bin/env bash
# usage: setup_venv.sh VENV TORCH_VERSION PYTHON
# The packages of requirements.lock and torch: its CPU build where no NVIDIA GPU is seen, else the CUDA build.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 torch=torch==$2

suitable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

if [ ! -x "$venv/bin/python" ]; then
    for python in "$3" python3 python3.13 python3.12 python3.11 python3.10 ''; do
        if [ -z "$python" ]; then
            echo "error: no Python 3.10 or later was found; name one: make PYTHON=/path/to/python3" >&2
            exit 1
        fi
        if suitable "$python"; then break; fi
    done
    "$python" -m venv "$venv"
fi

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

pip install -q --require-hashes --no-deps -r requirements.lock
if nvidia-smi >/dev/null 2>&1; then
    pip install -q "$torch"
else
    # The lock already holds what a CPU build of torch needs.
    pip install -q --no-deps --retries 0 --index-url https://download.pytorch.org/whl/cpu "$torch" 2>/dev/null ||
        pip install -q "$torch"
fi
