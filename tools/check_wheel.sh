#!/usr/bin/env bash
# usage: check_wheel.sh PYTHON TORCH...
# Builds one wheel with PYTHON, which has torch, and runs the tests of csrc with that file under every TORCH: a
# version, installed into a throw-away environment, or the path of a Python that has a torch and pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
builder=$(realpath -s "$1")
shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# One test file a source file; outside the tree, where only the wheel's focuskernels can be imported.
mkdir "$work/tests"
cp tests/compare.py tests/conftest.py "$work/tests"
cp pyproject.toml "$work"  # pytest's settings
for source in csrc/*.cpp; do cp "tests/test_$(basename "$source" .cpp).py" "$work/tests"; done

FOCUSKERNELS_BUILD=1 "$builder" -m pip wheel -q --no-build-isolation --no-deps --wheel-dir "$work" .
wheel=$(echo "$work"/*.whl)
echo "== $(basename "$wheel"), built with torch $("$builder" -c 'import torch; print(torch.__version__)')"

for torch in "$@"; do
    if [[ $torch == */* ]]; then
        python=$(realpath -s "$torch")
    else
        "$builder" -m venv "$work/venv"
        python=$work/venv/bin/python
        "$python" -m pip install -q --disable-pip-version-check -r requirements.in numpy pytest
        tools/install_torch.sh "$python" "$torch"
    fi
    "$python" -m pip install -q --disable-pip-version-check --no-deps --target "$work/installed" "$wheel"
    (
        cd "$work"
        export PYTHONPATH=$work/installed FOCUSKERNELS_STRICT=1
        echo "== torch $("$python" -c 'import torch; print(torch.__version__)')," \
            "$(sha256sum "$work"/installed/focuskernels/_C.*so | cut -c 1-16)"
        "$python" -m focuskernels.info | grep 'C++ (csrc)'
        "$python" -m pytest -q --show-capture=no -p no:cacheprovider tests
    )
    rm -rf "$work/installed" "$work/venv"
done
