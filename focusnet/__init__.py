"""FocusNet: segmentation of organs in head-and-neck CT, small ones too (Gao et al., MICCAI 2019)."""

import sys
from importlib.util import find_spec

_EXTRA = ("numpy", "scipy", "SimpleITK", "jsonargparse", "yaml", "rich", "matplotlib", "jinja2", "PIL")


def require_extra() -> None:
    """Exit with one line if what the commands need is not installed."""
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        print(f'error: focusnet needs {", ".join(missing)}: pip install "focuskernels[focusnet]"', file=sys.stderr)
        sys.exit(2)


# `python -m focusnet.COMMAND` imports this first, and would end in a traceback at the command's own imports
if sys.argv[:1] == ["-m"]:
    require_extra()
