"""`focusnet COMMAND ...`: the same commands as `python -m focusnet.COMMAND`."""

import importlib
import sys

from . import require_extra

COMMANDS = {
    "prepare": "check a data set, print the plan, fill the cache",
    "plan": "predict memory and FLOPs of training and prediction",
    "train": "train all stages",
    "predict": "segment CTs",
    "evaluate": "compare two folders of segmentations",
    "report": "one HTML page about a cohort that predict segmented",
    "study": "the tables of the paper",
    "phantom": "make synthetic CTs with their organs",
    "demo": "all of it on phantoms",
}


def main() -> None:
    """Dispatch to a command's own `main`."""
    require_extra()
    from .cli import run

    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print("usage: focusnet COMMAND [options]\n\ncommands (each has --help):")
        print("\n".join(f"  {name:9} {text}" for name, text in COMMANDS.items()))
        sys.exit(0 if sys.argv[1:2] in ([], ["-h"], ["--help"]) else 2)
    command = sys.argv.pop(1)
    run(importlib.import_module(f"focusnet.{command}").main)


if __name__ == "__main__":
    main()
