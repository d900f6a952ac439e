"""`python -m focusnet.phantom OUT`: writes phantoms as a data set in PDDCA's layout."""

import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from ..cli import command_parser, parse
from ..data.cases import Case, find_cases, read_masks
from ..data.images import Grid, Volume, resample, resampled_grid, write_image, write_labels
from ..errors import FocusNetError
from .hybrid import make_hybrid
from .render import FIELDS_OF_VIEW, FieldOfView, make_phantom

Phantom = tuple[Volume, dict[str, np.ndarray]]
Spacing = tuple[float, float, float]
DEFAULT_SPACING: Spacing = (2.5, 1.0, 1.0)
DEFAULT_CASES = 10

DESCRIPTION = """Make synthetic head-and-neck CTs with their organs: OUT/<case>/img.nrrd (int16 HU) and
OUT/<case>/structures/<Organ>.nrrd. A case depends on --seed and its number alone, not on how
many are made. With --from-labels, HU are painted around real contours instead: such hybrids have real shapes, but
every intensity is synthetic."""


def main(argv: list[str] | None = None) -> int:
    """The command."""
    sizes = ", ".join(f"{name} = {z:g} x {y:g} x {x:g}" for name, (z, y, x) in FIELDS_OF_VIEW.items())
    parser = command_parser(
        "phantom", "OUT", DESCRIPTION, ["DATA --cases 20", "DATA --field_of_view head --organs [Lens_L,Lens_R]"]
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
    options = parse(parser, argv)
    out, count, seed, labels = options.out, options.cases, options.seed, options.from_labels
    if seed < 0 or (count is not None and count < 1):
        raise FocusNetError(f"--cases {count} --seed {seed}: expected 1 case or more and a seed of 0 or more")
    _check_out(out, options.overwrite)

    if labels is None:
        make = partial(
            make_phantom,
            spacing=options.spacing or DEFAULT_SPACING,
            field_of_view=options.field_of_view,
            missing=options.missing,
            organs=options.organs,
        )
        jobs = [(f"phantom_{index:04d}", partial(make, index, seed)) for index in range(count or DEFAULT_CASES)]
    else:
        jobs = [
            (f"hybrid_{case.name}", partial(_hybrid, index, seed, case, options.spacing))
            for index, case in enumerate(find_cases(labels)[:count])
        ]
    for name, job in track(jobs, "phantoms" if labels is None else "hybrids", console=Console(file=sys.stderr)):
        try:
            write_case(out / name, *job())
        except FocusNetError as error:
            raise FocusNetError(f"{name}: {error}") from error
    print(f"{len(jobs)} cases in {out}")
    return 0


def write_case(folder: Path, image: Volume, masks: dict[str, np.ndarray]) -> None:
    """Write a case in PDDCA's layout: whole or, when the process is killed, not at all. Its older files go.

    Raises:
        FocusNetError: a file cannot be written.
    """
    partial = folder.with_name(f".tmp-{folder.name}")  # hidden, so that nothing takes it for a case
    try:
        shutil.rmtree(partial, ignore_errors=True)
        for name, mask in masks.items():
            write_labels(partial / "structures" / f"{name}.nrrd", mask, image.grid)
        write_image(partial / "img.nrrd", image)
        _replace(folder, partial)
    except OSError as error:
        raise FocusNetError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(folder: Path, partial: Path) -> None:
    if not folder.exists():
        partial.rename(folder)
        return
    shutil.rmtree(folder / "structures", ignore_errors=True)
    for part in partial.iterdir():
        part.replace(folder / part.name)


def _hybrid(index: int, seed: int, case: Case, spacing: Spacing | None) -> Phantom:
    masks, grid = read_masks(case)
    if spacing is not None:
        target = resampled_grid(grid, spacing)
        masks = {name: _resampled(mask, grid, target) for name, mask in masks.items()}
        grid = target
    return make_hybrid(masks, grid, index, seed)


def _resampled(mask: np.ndarray, grid: Grid, target: Grid) -> np.ndarray:
    return resample(Volume(mask.astype(np.uint8), grid), target, labels=True).array.astype(bool)


def _check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise FocusNetError(f"{out} is a file, expected a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise FocusNetError(f"{out} is not empty; choose another folder, or add --overwrite")
