#!/usr/bin/env bash
# usage: setup_venv.sh VENV TORCH_VERSION PYTHON
# A virtual environment with the packages of requirements.lock and torch. An interrupted run is taken up again.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 torch=$2

suitable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

# Not "is it there": an interrupted creation leaves an environment without pip.
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    for python in "$3" python3 python3.13 python3.12 python3.11 python3.10 ''; do
        if [ -z "$python" ]; then
            echo "error: no Python 3.10 or later was found; name one: make PYTHON=/path/to/python3" >&2
            exit 1
        fi
        if suitable "$python"; then break; fi
    done
    "$python" -m venv --clear "$venv"
fi

"$venv/bin/python" -m pip --disable-pip-version-check install -q --require-hashes --no-deps -r requirements.lock
tools/install_torch.sh "$venv/bin/python" "$torch"
