"""`python -m focusnet.prepare DATA`: check a data set, fill the cache, print the plan."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .cli import EXIT_ERROR, add_config, command_parser, config_of, parse, run
from .config import DataConfig, Triple
from .data.cache import DEFAULT_CACHE, CaseReport, OrganSize, cache_folder, digest_of, prepare_cases, wanted_organs
from .data.cases import find_cases
from .data.organs import canonical_name
from .data.plan import FloatTriple, OrganPlan, Plan
from .errors import FocusNetError

BACKGROUND_ALPHA = 0.5
ALPHA_RANGE = (0.25, 8.0)
MIN_ROI = 8
ROI_OVER_LARGEST = 1.25
OUTLYING = 3.0
_SHOWN = 3


def prepare(
    data: Path,
    cache: Path,
    config: DataConfig,
    *,
    skip_bad: bool = False,
    tell: Callable[[str], object] | None = None,
) -> Plan:
    """Check and prepare every case of a data set; what the cache holds already is not prepared again.

    Args:
        data: A folder of any layout that `find_cases` knows, with images.
        cache: Folder for the arrays and records of this data set and these settings: see `cache_folder`.
        config: How to prepare.
        skip_bad: Leave out unusable cases instead of failing.
        tell: Called with one line for every case that is left out.

    Returns:
        The plan.

    Raises:
        FocusNetError: a case is unusable (the first ones are named), or the plan cannot be made.
    """
    reports = prepare_cases(find_cases(data), cache, config)
    bad = [report for report in reports if report.problems]
    if bad and not skip_bad:
        named = "; ".join(f"{report.name}: {report.problems[0]}" for report in bad[:_SHOWN])
        more = f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise FocusNetError(
            f"{len(bad)} of {len(reports)} cases in {data} are unusable (--skip-bad leaves them out): {named}{more}"
        )
    for report in reports:
        if tell is not None and report.record is None:
            tell(f"{report.name}: {(report.problems or report.notes)[-1]}")
    return _plan_of(data, reports, config)


def make_plan(reports: list[CaseReport], config: DataConfig) -> Plan:
    """Derive the plan from usable cases' reports.

    - Small: named in `config.small_organs`, else fewer than `config.small_voxels` voxels on the original
      grids on average.
    - ROI of a small organ: per axis `config.roi_scale` times the mean side of its bounding box, but at least
      1.25 times the largest side seen, rounded to prepared voxels and at least 8 of them; or
      `config.roi_size`. Sides above three times the median (stray voxels) count for neither.
    - alpha: sqrt(mean volume of all organs / volume of this organ), clipped to [0.25, 8]; background 0.5. The
      paper's weights are "inverse to the average size"; the square root gives about the values the authors
      later set by hand (8 for the chiasm and optic nerves, 2 for submandibular glands, 1 for large organs),
      where the plain inverse spans 150:1.

    Raises:
        FocusNetError: no usable case is left, or an organ of the configuration is in none of them.
    """
    usable = [report for report in reports if report.record is not None]
    if not usable:
        wanted = f", or none has any of data.organs ({', '.join(config.organs)})" if config.organs else ""
        raise FocusNetError(f"no usable case is left{wanted}")
    present = {organ for report in usable for organ in report.sizes}
    names = wanted_organs(config) or sorted(present)
    absent = [name for name in names if name not in present]
    if absent:
        raise FocusNetError(
            f"data.organs has {absent[0]}, which no usable case has; found: {', '.join(sorted(present))}"
        )
    sizes = {name: [report.sizes[name] for report in usable if name in report.sizes] for name in names}
    small = _small_organs(sizes, config)
    volumes = {name: float(np.mean([size.volume_mm3 for size in found])) for name, found in sizes.items()}
    reference = float(np.mean(list(volumes.values())))
    organs = [_organ_plan(name, sizes[name], name in small, reference, config) for name in names]
    return Plan(
        spacing=config.spacing,
        background_alpha=BACKGROUND_ALPHA,
        organs=organs,
        cases=[report.record for report in usable if report.record is not None],
        fingerprint=_fingerprint(usable, names, config),
    )


def outliers(reports: list[CaseReport]) -> dict[str, list[str]]:
    """Contours that look wrong against the same organ in the other cases: case name -> notes.

    A volume beyond five times, or below a fifth of, the organ's median, or a side of the box beyond three
    times its median.
    """
    notes: dict[str, list[str]] = {}
    for organ in sorted({organ for report in reports for organ in report.sizes}):
        found = {report.name: report.sizes[organ] for report in reports if organ in report.sizes}
        middle = float(np.median([size.volume_mm3 for size in found.values()]))
        sides = np.median([size.extent_mm for size in found.values()], axis=0)
        for name, size in found.items():
            ratio = size.volume_mm3 / middle
            if not 0.2 <= ratio <= 5:
                notes.setdefault(name, []).append(
                    f"{organ}: its volume, {size.volume_mm3:.0f} mm3, is {ratio:.2g} of the median"
                )
            elif (np.array(size.extent_mm) > OUTLYING * sides).any():
                box = " x ".join(f"{side:.0f}" for side in size.extent_mm)
                notes.setdefault(name, []).append(
                    f"{organ}: its box of {box} mm is far above the median, stray voxels?"
                )
    return notes


def _plan_of(data: Path, reports: list[CaseReport], config: DataConfig) -> Plan:
    try:
        return make_plan(reports, config)
    except FocusNetError as error:
        raise FocusNetError(f"{error} (in {data})") from error


def _small_organs(sizes: dict[str, list[OrganSize]], config: DataConfig) -> set[str]:
    if config.small_organs is None:
        return {name for name, found in sizes.items() if np.mean([size.voxels for size in found]) < config.small_voxels}
    small = {canonical_name(name) for name in config.small_organs}
    absent = sorted(small.difference(sizes))
    if absent:
        raise FocusNetError(f"data.small_organs has {absent[0]}, which is none of the organs: {', '.join(sizes)}")
    return small


def _organ_plan(name: str, found: list[OrganSize], small: bool, reference: float, config: DataConfig) -> OrganPlan:
    volumes = [size.volume_mm3 for size in found]
    volume = float(np.mean(volumes))
    sides = np.array([size.extent_mm for size in found])
    sides = np.where(sides <= OUTLYING * np.median(sides, axis=0), sides, np.nan)
    extent, largest = np.nanmean(sides, axis=0), np.nanmax(sides, axis=0)
    return OrganPlan(
        name=name,
        cases=len(found),
        volume_mm3=volume,
        voxels=float(np.mean([size.voxels for size in found])),
        diameter_mm=(6 * volume / math.pi) ** (1 / 3),
        extent_mm=_floats(extent),
        small=small,
        roi_size=_roi_size(extent, largest, config) if small else None,
        alpha=float(np.clip(math.sqrt(reference / volume), *ALPHA_RANGE)),
        volume_range_mm3=(min(volumes), max(volumes)),
    )


def _roi_size(extent: np.ndarray, largest: np.ndarray, config: DataConfig) -> Triple:
    if config.roi_size is not None:
        return config.roi_size
    side = np.maximum(config.roi_scale * extent, ROI_OVER_LARGEST * largest)
    z, y, x = np.maximum(np.rint(side / np.array(config.spacing)), MIN_ROI).astype(int).tolist()
    return z, y, x


def _floats(values: np.ndarray) -> FloatTriple:
    z, y, x = values.tolist()
    return z, y, x


def _fingerprint(usable: list[CaseReport], names: list[str], config: DataConfig) -> str:
    cases = [(report.record.name, report.record.organs, report.checksums) for report in usable if report.record]
    return digest_of([dataclasses.asdict(config), names, cases])


def _print_reports(console: Console, reports: list[CaseReport]) -> None:
    odd = outliers(reports)
    for report in reports:
        for problem in report.problems:
            console.print("[red]unusable[/]", escape(f"{report.name}: {problem}"), emoji=False)
        for note in report.notes + odd.get(report.name, []):
            console.print("[yellow]note[/]    ", escape(f"{report.name}: {note}"), emoji=False)
    bad = sum(bool(report.problems) for report in reports)
    left_out = sum(report.record is None for report in reports) - bad
    noted = sum(bool(report.notes or report.name in odd) and report.record is not None for report in reports)
    console.print(
        f"{len(reports)} cases: {len(reports) - bad - left_out - noted} clean, {noted} usable with notes, "
        f"{left_out} without any of the organs, {bad} unusable"
    )


def _print_plan(console: Console, plan: Plan) -> None:
    spacing = " x ".join(f"{side:g}" for side in plan.spacing)
    table = Table("#", "organ", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=f"Plan at {spacing} mm (z, y, x)")
    table.columns[1].no_wrap = True
    for column in ("cases", "mm3", "voxels", "diam.", "box", "ROI", "alpha"):
        table.add_column(column, justify="right", no_wrap=True)
    for value, organ in enumerate(plan.organs, start=1):
        table.add_row(
            str(value),
            organ.name,
            str(organ.cases),
            f"{organ.volume_mm3:.0f}",
            f"{organ.voxels:.0f}",
            f"{organ.diameter_mm:.1f}",
            "x".join(f"{side:.0f}" for side in organ.extent_mm),
            "x".join(str(side) for side in organ.roi_size or ()) or "-",
            f"{organ.alpha:.2f}",
        )
    console.print(table)
    console.print(
        "means over the cases with the organ: voxels on the original grids, diameter and box in mm; "
        f"ROI of the small organs in prepared voxels; alpha of the background {plan.background_alpha:g}"
    )


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, or 2 if a case is unusable and `--skip-bad` was not given."""
    parser = command_parser(
        "prepare",
        "DATA",
        "Check a data set, measure its organs, fill the cache and print the plan.",
        ["DATA", "DATA --skip_bad --data.organs [Brainstem,Parotid_L,Parotid_R]"],
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="DATA",
        help="folder of cases with images and contours (see docs/data.md)",
    )
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder for prepared data, shared with train")
    parser.add_argument("--skip_bad", action="store_true", help="leave out unusable cases instead of failing")
    add_config(parser, shown=("data",))
    arguments = parse(parser, argv)
    config = config_of(arguments).data
    console = Console(soft_wrap=True)
    folder = cache_folder(arguments.cache, arguments.source, config)
    reports = prepare_cases(find_cases(arguments.source), folder, config)
    _print_reports(console, reports)
    if any(report.problems for report in reports) and not arguments.skip_bad:
        Console(stderr=True, soft_wrap=True).print(
            "error: unusable cases; repair them, or leave them out with --skip-bad"
        )
        return EXIT_ERROR
    plan = _plan_of(arguments.source, reports, config)
    plan.save(folder / "plan.json")
    _print_plan(console, plan)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    console.print(
        f"saved in {folder}: plan.json, and {size / 1e6:.0f} MB that train will use", markup=False, emoji=False
    )
    return 0


if __name__ == "__main__":
    run(main)
