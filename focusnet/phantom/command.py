"""`python -m focusnet.phantom OUT`: writes phantoms as a data set in PDDCA's layout."""

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.progress import track

from ..cli import command_parser, parse
from ..data.cases import Case, find_cases, read_masks
from ..data.images import Grid, Volume, resample, resampled_grid, write_image, write_labels
from ..errors import FocusNetError
from ..files import atomic_folder, check_replaceable
from .hybrid import make_hybrid
from .render import FIELDS_OF_VIEW, FieldOfView, check_options, make_phantom

Phantom = tuple[Volume, dict[str, np.ndarray]]
Spacing = tuple[float, float, float]
DEFAULT_SPACING: Spacing = (2.5, 1.0, 1.0)
DEFAULT_CASES = 10
_WRITTEN = ("img.nrrd", "structures")

DESCRIPTION = """Make synthetic head-and-neck CTs with their organs: OUT/<case>/img.nrrd (int16 HU) and
OUT/<case>/structures/<Organ>.nrrd. A case depends on --seed and its number alone, not on how
many are made. With --from-labels, HU are painted around real contours instead: such hybrids have real shapes, but
every intensity is synthetic."""


def _parser() -> ArgumentParser:
    sizes = ", ".join(f"{name} = {z:g} x {y:g} x {x:g}" for name, (z, y, x) in FIELDS_OF_VIEW.items())
    parser = command_parser(
        "phantom", "OUT", DESCRIPTION, ["OUT --cases 20", "OUT --field_of_view head --organs [Lens_L,Lens_R]"]
    )
    option = parser.add_argument
    option("out", type=Path, help="folder for the data set")
    option("--cases", type=int | None, help="how many; default: 10, or all that --from-labels has")
    option("--seed", type=int, default=0, help="another number gives other patients")
    option(
        "--spacing",
        type=Spacing | None,
        help="voxel size [z,y,x] in mm; default: [2.5,1,1], or the labels' own",
    )
    option(
        "--field_of_view",
        type=FieldOfView,
        default="full",
        help=f"name or [z,y,x] in mm; {sizes} mm",
    )
    option("--missing", type=float, default=0.0, help="probability that an organ is in the CT but has no mask")
    option("--organs", type=list[str] | None, help="[Lens_L,Lens_R,...]; default: the paper's")
    option(
        "--from_labels",
        type=Path | None,
        help="paint around this data set's contours instead",
    )
    option("--overwrite", action="store_true", help="write into OUT even if it holds something")
    return parser


def _jobs(options: Namespace) -> list[tuple[str, Callable[[], Phantom]]]:
    """Name and maker of every case.

    Raises:
        FocusNetError: an option out of range, or fewer contours than cases.
    """
    count, seed, labels = options.cases, options.seed, options.from_labels
    if seed < 0 or (count is not None and count < 1):
        raise FocusNetError(f"--cases {count} --seed {seed}: expected 1 case or more and a seed of 0 or more")
    if options.spacing is not None and not all(0 < length < math.inf for length in options.spacing):
        raise FocusNetError(f"--spacing {list(options.spacing)}: expected three lengths above 0 mm")
    if labels is None:
        how = {
            "spacing": options.spacing or DEFAULT_SPACING,
            "field_of_view": options.field_of_view,
            "missing": options.missing,
            "organs": options.organs,
        }
        check_options(**how)
        make = partial(make_phantom, **how)
        return [(f"phantom_{index:04d}", partial(make, index, seed)) for index in range(count or DEFAULT_CASES)]
    found = find_cases(labels)
    if count is not None and count > len(found):
        raise FocusNetError(f"--cases {count}: {labels} has {len(found)}")
    return [
        (f"hybrid_{case.name}", partial(_hybrid, index, seed, case, options.spacing))
        for index, case in enumerate(found[:count])
    ]


def main(argv: list[str] | None = None) -> int:
    """The command."""
    options = parse(_parser(), argv)
    out = options.out
    _check_out(out, options.overwrite)
    jobs = _jobs(options)
    for name, _ in jobs:
        _check_case(out / name)
    what = "phantoms" if options.from_labels is None else "hybrids"
    for name, job in track(jobs, what, console=Console(file=sys.stderr)):
        try:
            write_case(out / name, *job())
        except FocusNetError as error:
            raise FocusNetError(f"{name}: {error}") from error
    print(f"{len(jobs)} cases in {out}")
    return 0


def write_case(folder: Path, image: Volume, masks: dict[str, np.ndarray]) -> None:
    """Write a case in PDDCA's layout: whole or, when the process is killed, not at all. An older one goes.

    Raises:
        FocusNetError: a file cannot be written, or the folder holds something else.
    """
    _check_case(folder)
    with atomic_folder(folder) as unfinished:
        for name, mask in masks.items():
            write_labels(unfinished / "structures" / f"{name}.nrrd", mask, image.grid)
        write_image(unfinished / "img.nrrd", image)


def _hybrid(index: int, seed: int, case: Case, spacing: Spacing | None) -> Phantom:
    masks, grid = read_masks(case)
    if spacing is not None:
        target = resampled_grid(grid, spacing)
        masks = {name: _resampled(mask, grid, target) for name, mask in masks.items()}
        grid = target
    return make_hybrid(masks, grid, index, seed)


def _resampled(mask: np.ndarray, grid: Grid, target: Grid) -> np.ndarray:
    return resample(Volume(mask.astype(np.uint8), grid), target, labels=True).array.astype(bool)


def _check_case(folder: Path) -> None:
    check_replaceable(folder, "phantom", _WRITTEN, _WRITTEN)


def _check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise FocusNetError(f"{out} is a file, expected a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise FocusNetError(f"{out} is not empty; choose another folder, or add --overwrite")
