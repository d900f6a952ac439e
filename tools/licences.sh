#!/usr/bin/env bash
# usage: licences.sh PYTHON OUT.md
# The licences of what the packages need at run time, as uv resolves it within requirements.lock and as PYTHON, which
# has it installed, declares it. Needs uv.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 out=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m pip install -q --disable-pip-version-check --target "$work" pip-licenses==5.5.5
# torch's own packages are listed in requirements.in; setuptools only builds
mapfile -t names < <(echo torch | uv pip compile -q --no-annotate --no-header --excludes - --extra focusnet \
    -c requirements.lock pyproject.toml requirements.in | sed 's/==.*//' | grep -vx setuptools)
{
    echo "# Licences of run-time dependencies"
    echo
    echo "Made by \`make licences\` from what each package declares; \`focuskernels\` needs torch alone, \`focusnet\` the rest too."
    echo
    PYTHONPATH=$work "$python" -m piplicenses --from=mixed --format=markdown --packages torch "${names[@]}"
} > "$out"
