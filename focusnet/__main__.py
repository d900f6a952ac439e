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

    command = sys.argv.pop(1) if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        print("usage: focusnet COMMAND [options]\n\ncommands (each has --help):")
        print("\n".join(f"  {name:9} {text}" for name, text in COMMANDS.items()))
        return
    if command not in COMMANDS:
        print(f"error: no command {command}, expected {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    run(importlib.import_module(f"focusnet.{command}").main)


if __name__ == "__main__":
    main()
