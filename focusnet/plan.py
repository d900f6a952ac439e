"""`python -m focusnet.plan --shape D H W`: memory and FLOPs of every stage, before anything runs; with `--memory`, the
largest volumes that fit.

Not `data/plan.py`, which holds what was measured on a data set.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import get_args

import torch
from jsonargparse import ArgumentParser
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from .cli import add_config, command_parser, config_of, console, parse, run
from .config import Backend, Config, Triple, total_stride
from .data.plan import Plan
from .errors import FocusNetError
from .memory import (
    PREDICT,
    SPARE,
    Estimate,
    assumed_plan,
    bytes_of,
    crop_with,
    largest_crop,
    peaks_of,
    predict_estimate,
    size_of,
    stages_of,
    train_estimate,
    whole_crop,
)

#: The paper's nine organs, three of them small, in ROIs of the size that the authors later used for all of them.
ORGANS, SMALL, ROI = 9, 3, (8, 64, 64)


def _print(out: Console, title: str, rows: dict[str, Estimate]) -> None:
    table = Table("stage", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title)
    for column in ("peak GB", "weights etc.", "saved", "workspace", "forward TFLOP", "backward TFLOP"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage, row in rows.items():
        sizes = (f"{size / 1e9:.3f}" for size in (row.peak, row.weights, row.saved, row.workspace))
        table.add_row(stage, *sizes, *(f"{flops / 1e12:.3f}" for flops in (row.forward, row.backward)))
    out.print(table)


def _print_largest(out: Console, config: Config, plan: Plan, shape: Triple, memory: str, device_type: str) -> None:
    """Memory over volume size, and the largest volumes that fit, with both backends."""
    limit = (1 - SPARE) * bytes_of(memory, torch.device("cpu"))
    names, backends = (*stages_of(plan), PREDICT), get_args(Backend)
    whole = whole_crop(shape, config.model.downsampling)
    sizes = [crop_with(math.prod(whole) * share, whole, config.model.downsampling) for share in (1 / 4, 1 / 2)]
    rows: dict[Triple, list[str]] = {size: [] for size in (*sizes, whole) if size is not None}
    largest: dict[str, list[Triple | None]] = {}
    for name in track(names, "predicting", console=console(stderr=True), transient=True):
        peaks, largest[name] = [], []
        for backend in backends:
            layout = replace(config, model=replace(config.model, backend=backend))
            peak = cache(_volume_peak(layout, plan, name, device_type))
            peaks.append([f"{peak(size) / 1e9:.2f}" for size in rows])
            largest[name].append(_largest_volume(peak, limit, whole, config.model.downsampling))
        for cells, here in zip(rows.values(), zip(*peaks, strict=True), strict=True):
            cells.append(" / ".join(here))
    of = f"a step on {config.train.batch_size} of them, or prediction in one window; {' / '.join(backends)}"
    table = Table("voxels", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=f"Peak GB, {device_type}: {of}")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for size, cells in rows.items():
        table.add_row(size_of(size), *cells)
    out.print(table)
    table = Table("", *backends, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=f"Largest in {memory} GB, a tenth spare")
    for name, found in largest.items():
        table.add_row(name, *(size_of(size) if size else "none" for size in found))
    out.print(table)
    own = [found[backends.index(config.model.backend)] for found in largest.values()]
    fitting = [size for size in (*own, whole) if size is not None]
    crop = ",".join(map(str, min(fitting, key=math.prod)))
    out.print(
        f"{f'--train.crop [{crop}]' if all(own) else 'no crop'} fits all of it, up to {size_of(shape)}", markup=False
    )


def _volume_peak(config: Config, plan: Plan, name: str, device_type: str) -> Callable[[Triple], int]:
    """As of `peaks_of`, but of a prediction in one window, whatever the volume."""
    return lambda size: peaks_of(config, plan, size, device_type)[name](size)


def _largest_volume(peak: Callable[[Triple], int], limit: float, shape: Triple, strides: list[Triple]) -> Triple | None:
    """As `largest_crop`, but it may be larger than `shape`."""
    start = crop_with(1.02 * math.prod(shape) * limit / peak(shape), shape, strides)
    return None if start is None else largest_crop(peak, limit, start, strides)


def _counts(config: Config, organs: int | None, small: int | None) -> tuple[int, int]:
    """Number of organs and of small ones: as asked for, else as configured, else what is usual."""
    if small is None and config.data.small_organs is not None:
        small = len(config.data.small_organs)
    if organs is None:
        organs = max(ORGANS, small or 0) if config.data.organs is None else len(config.data.organs)
    if small is None:
        small = min(SMALL, organs)
    if not 0 <= small <= organs or organs < 1:
        raise FocusNetError(f"{organs} organs, {small} of them small: expected at least one, and no more small ones")
    return organs, small


def _parser() -> ArgumentParser:
    parser = command_parser(
        "plan",
        "--shape D H W",
        "Predict memory and FLOPs of every stage before anything runs: a step of training on crops of that shape and "
        "of train.crop, and the prediction of a CT of that shape. With --memory, how large volumes of these "
        "proportions may be, also with stock PyTorch, and the largest train.crop up to that shape. Nothing of that "
        "size is allocated.",
        ["--shape 160 512 512", "--shape 160 512 512 --amp --memory 80", "--shape 64 128 128 --config demo"],
    )
    parser.add_argument("--shape", type=int, nargs=3, required=True, help="voxels (z, y, x) on the network's grid")
    parser.add_argument("--memory", type=str, metavar="GB", help="of the device: find the largest volumes that fit")
    parser.add_argument("--amp", action="store_true", help="as --train.amp true")
    parser.add_argument("--device", type=str, default="cuda", help="cpu or cuda, which need not be there")
    parser.add_argument("--organs", type=int, help=f"number of organs (default: as in data.organs, else {ORGANS})")
    parser.add_argument(
        "--small", type=int, help=f"how many are small (default: as in data.small_organs, else {SMALL})"
    )
    parser.add_argument("--roi", type=int, nargs=3, default=list(ROI), help="ROI of every small organ, in voxels")
    add_config(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command."""
    arguments = parse(_parser(), argv)
    config = config_of(arguments)
    config.train.amp |= arguments.amp
    if arguments.device not in ("cpu", "cuda"):
        raise FocusNetError(f"--device {arguments.device}: expected cpu or cuda")
    organs, small = _counts(config, arguments.organs, arguments.small)
    shape, roi = tuple(arguments.shape), tuple(arguments.roi)
    least = tuple(2 * stride for stride in total_stride(config.model.downsampling))
    if any(side < minimum for side, minimum in zip(shape, least, strict=True)) or min(roi) < 2:
        raise FocusNetError(f"--shape {shape} --roi {roi}: expected at least {least} and at least 2 voxels")
    plan = assumed_plan(config, organs, small, roi)
    stages = stages_of(plan)
    out = console()
    amp = "bfloat16 where it is safe" if config.train.amp else "float32"
    out.print(
        f"{organs} organs, {small} of them small with an ROI of {config.data.roi_size or roi}; {amp}", markup=False
    )
    if arguments.memory is not None:
        _print_largest(out, config, plan, shape, arguments.memory, arguments.device)
        return 0
    for crop in dict.fromkeys((shape, config.train.crop)):
        rows = {stage: train_estimate(config, plan, stage, crop, arguments.device) for stage in stages}
        _print(out, f"One step, {config.train.batch_size} x {size_of(crop)} voxels, {arguments.device}", rows)
    rows = {PREDICT: predict_estimate(config, plan, shape, arguments.device)}
    _print(out, f"Prediction of {size_of(shape)} voxels in windows of {size_of(config.train.crop)}", rows)
    return 0


if __name__ == "__main__":
    run(main)
