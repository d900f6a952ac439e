#!/usr/bin/env bash
# usage: install_torch.sh PYTHON VERSION
# torch: its CPU build where no NVIDIA GPU is seen, else the CUDA build. The rest of what a CPU build needs stands in
# requirements.in and is installed by the caller.
set -euo pipefail
python=$1 torch=torch==$2

pip() { "$python" -m pip --disable-pip-version-check "$@"; }

if nvidia-smi >/dev/null 2>&1; then
    pip install -q "$torch"
else
    pip install -q --no-deps --retries 0 --index-url https://download.pytorch.org/whl/cpu "$torch" || {
        echo "the CPU build of $torch was not to be had (see above); taking the default build" >&2
        pip install -q "$torch"
    }
fi
