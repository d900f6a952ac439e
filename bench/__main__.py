"""`python -m bench [op ...] [--device cpu|cuda] [--quick] [--json FILE]`."""

import argparse
import difflib
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import environment
from .case import Op, ops
from .results import BadResults, Results, Row
from .sources import ROOT

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


class UsageError(Exception):
    """Something the user can fix, in one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = _Parser(prog="python -m bench", description="Speed and memory of every op beside its peers.")
    result.add_argument("ops", nargs="*", metavar="op", help="what to measure; default: everything (see --list)")
    result.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    result.add_argument("--quick", action="store_true", help="tiny sizes: shows that all of it works, not how fast")
    result.add_argument("--json", type=Path, metavar="FILE", help="default: bench/results/<device>-<its name>.json")
    result.add_argument("--resume", action="store_true", help="keep what FILE holds already and is not outdated")
    result.add_argument(
        "--without",
        action="append",
        default=[],
        choices=("compile", "peer", "other"),
        metavar="WHO",
        help="leave out torch.compile (compile), other packages and formulas (peer) or work that differs (other)",
    )
    result.add_argument("--threads", type=int, help="CPU threads; default: as many as torch takes")
    result.add_argument("--plans", type=int, default=0, help="that cuDNN tries of a convolution; default: 0, all")
    result.add_argument("--heap", choices=("warm", "default"), default="warm", help="of the C library, on a CPU")
    result.add_argument("--list", action="store_true", help="only list ops, cases and providers")
    result.add_argument("--names", action="store_true", help="only name the ops, a line each")
    return result


def main(argv: list[str] | None = None) -> int:
    """Parse, measure, report; returns the exit code."""
    try:
        arguments = parser().parse_args(argv)
        return run(arguments)
    except (UsageError, BadResults) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE


def run(arguments: argparse.Namespace) -> int:
    """What the command does, given parsed arguments."""
    device = pick_device(arguments.device)
    size = "quick" if arguments.quick else "full"
    chosen = pick_ops(arguments.ops)
    if arguments.names:
        print("\n".join(op.name for op in chosen))
        return 0
    if arguments.list:
        print_list(chosen, device, size)
        return 0
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise UsageError(f"--threads must be positive, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    if arguments.plans < 0:
        raise UsageError(f"--plans must be at least 0, got {arguments.plans}")
    with environment.settings(arguments.plans):
        return measure(arguments, chosen, device, size)


def measure(arguments: argparse.Namespace, chosen: list[Op], device: str, size: str) -> int:
    """Run the benchmark; whatever stops it, the rows so far are in the file."""
    from .runner import Runner
    from .table import print_group

    path = arguments.json or ROOT / "bench" / "results" / f"{default_name(device, size)}.json"
    store = Results(path)

    def report(rows: list[Row]) -> None:
        if rows:
            print_group(rows)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    before = signal.signal(signal.SIGTERM, _interrupt)
    runner = Runner(device, size, store, resume=arguments.resume, without=arguments.without, report=report, say=say)
    try:
        runner.measure(chosen)
    except KeyboardInterrupt:
        print(f"stopped; {path} holds what was measured, --resume goes on from there", file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    return finish(runner.run["id"], store, runner.failed)


def finish(run: int, store: Results, failed: bool) -> int:
    """Say what did not work and where the results are."""
    bad = [row for row in store.rows if row["run"] == run and row["status"] in ("wrong", "failed")]
    for row in bad:
        where = f"{row['op']}, {row['case']}, {row['mode']}, {row['provider']}"
        print(f"{row['status']}: {where}: {row['reason']}", file=sys.stderr)
    print(f"results: {store.path}", file=sys.stderr)
    return EXIT_FAILED if failed else 0


def pick_device(name: str | None) -> str:
    """The device asked for, or the best there is."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device cuda: torch {torch.__version__} finds no GPU")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def pick_ops(names: list[str]) -> list[Op]:
    """Ops by name, in the order given; all without a name."""
    known = ops()
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UsageError(f"no op named {name}{hint} Known: {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)] if names else list(known.values())


def print_list(chosen: list[Op], device: str, size: str) -> None:
    """Ops, cases and providers."""
    for op in chosen:
        print(op.name)
        for case in op.cases(device, size):
            print(f"  {case.name}  ({', '.join(case.cost)})")
            print(f"    {', '.join(provider.name for provider in case.providers)}")


def default_name(device: str, size: str) -> str:
    """A file name from the device's."""
    words = re.sub(r"[^a-z0-9]+", "-", environment.device_name(device).lower()).strip("-")
    return f"{device}-{words}" + ("-quick" if size == "quick" else "")


def _interrupt(*_: Any) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` sends it twice: to the process and to its group
    raise KeyboardInterrupt


def _with_warm_heap() -> None:
    """Start again with the allocator's settings, which it reads only at the start."""
    wanted = parser().parse_args()
    device = wanted.device or ("cuda" if torch.cuda.is_available() else "cpu")
    wants_warm = device == "cpu" and wanted.heap == "warm" and not (wanted.list or wanted.names)
    if wants_warm and environment.heap() != "warm" and sys.platform == "linux":
        os.execve(sys.executable, [sys.executable, "-m", "bench", *sys.argv[1:]], os.environ | environment.WARM_HEAP)


if __name__ == "__main__":
    try:
        _with_warm_heap()
    except UsageError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    sys.exit(main())
