"""Compare two folders of segmentations: `python -m focusnet.evaluate TRUTH PREDICTION`.

Training and studies use the same scores and table through `evaluate_pair`, `summarize` and `format_table`.
docs/metrics.md defines every number.
"""

import csv
import io
import json
import math
import multiprocessing
import os
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
from jsonargparse.typing import PositiveInt
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from .cli import command_parser, parse, run
from .data.cases import Case, find_cases, iter_masks
from .data.images import Grid
from .data.organs import canonical_name
from .errors import FocusNetError
from .files import atomic_write
from .metrics import (
    Box,
    Mask,
    bounding_box,
    center_distance_mm,
    dice,
    hausdorff95,
    relative_volume_difference,
    union_box,
    volume_diagonal,
)
from .processes import follow_parent

SMALL_MM3 = 2500.0  # 1000 voxels of the default grid, 1 x 1 x 2.5 mm
TABLE_WIDTH = 200  # room for every column

Status = Literal["ok", "missed", "spurious", "absent"]
Group = Literal["small", "other", "mean"]


@dataclass(frozen=True)
class OrganScore:
    """How well one organ of one case was found; a value that does not exist is None.

    Attributes:
        case: Name of the case.
        organ: TG-263 name.
        status: "ok": both masks have voxels; "missed": only the truth's; "spurious": only the prediction's;
            "absent": neither.
        dsc: Dice, 0 to 1; 0 if missed.
        hd95_mm: 95 % Hausdorff distance; the diagonal of the volume if missed.
        center_mm: Distance of the centres of mass.
        truth_mm3: Volume of the truth.
        prediction_mm3: Volume of the prediction.
        volume_difference: (prediction - truth) / truth.
        localisation_mm: Distance from the located to the true centre, for callers that locate organs.
        inside_roi: Whether the ROI held the whole organ, for callers that cut ROIs.
    """

    case: str
    organ: str
    status: Status
    dsc: float | None = None
    hd95_mm: float | None = None
    center_mm: float | None = None
    truth_mm3: float = 0.0
    prediction_mm3: float = 0.0
    volume_difference: float | None = None
    localisation_mm: float | None = None
    inside_roi: bool | None = None


@dataclass(frozen=True)
class Stat:
    """Mean and sample standard deviation; None where there are too few values."""

    mean: float | None
    sd: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Stat":
        """The statistics of all values that are not None."""
        known = [value for value in values if value is not None]
        return cls(statistics.fmean(known) if known else None, statistics.stdev(known) if len(known) > 1 else None)


@dataclass(frozen=True)
class TableRow:
    """One organ over all cases, or the mean over a group of organs (each organ counting once).

    Attributes:
        organ: TG-263 name, or what the mean is over.
        group: "small", "other", or "mean".
        n: Cases whose truth has the organ.
        missed: How many of them the prediction left empty.
        spurious: Cases without the organ in which it was predicted; they enter no mean.
        dsc: Dice over all n cases, 0 for each missed one.
        hd95_mm: 95 % Hausdorff distance over all n cases, the volume's diagonal for each missed one.
        matched_dsc: Dice over the n - missed cases in which both masks have the organ.
        matched_hd95_mm: 95 % Hausdorff distance over the same.
        center_mm: Distance of the centres over the same.
        localisation_mm: Distance from located to true centre, where it was measured.
        inside_roi: Share of the organs that lie wholly inside their ROI, where it was measured.
    """

    organ: str
    group: Group
    n: int
    missed: int
    spurious: int
    dsc: Stat
    hd95_mm: Stat
    matched_dsc: Stat
    matched_hd95_mm: Stat
    center_mm: Stat
    localisation_mm: Stat
    inside_roi: Stat


@dataclass(frozen=True)
class Evaluation:
    """Everything that one comparison of two folders yields; `notes` are one-line remarks for people."""

    scores: list[OrganScore]
    rows: list[TableRow]
    notes: list[str]


def evaluate_pair(
    truth: Mapping[str, Mask], prediction: Mapping[str, Mask], spacing: Sequence[float], *, case: str = ""
) -> list[OrganScore]:
    """Score every organ that either side names.

    Args:
        truth: Organ to mask (z, y, x), whole volumes of one shape; an organ left out counts as empty.
        prediction: Likewise, on the same grid.
        spacing: (z, y, x) in mm.
        case: Name of the case, passed on to the scores.

    Raises:
        ValueError: masks have different shapes.
    """
    masks = [*truth.values(), *prediction.values()]
    if len({mask.shape for mask in masks}) > 1:
        raise ValueError(f"masks must have one shape, got {sorted({mask.shape for mask in masks})}")
    return [
        _score(case, organ, _crop(truth.get(organ)), _crop(prediction.get(organ)), masks[0].shape, spacing)
        for organ in dict.fromkeys([*truth, *prediction])
    ]


def summarize(scores: Sequence[OrganScore], small: Collection[str]) -> list[TableRow]:
    """The paper's table: small organs, other organs, then the means of both groups and of all.

    Organs keep the order in which `scores` names them first; one that no truth has gets no row.
    """
    by_organ: dict[str, list[OrganScore]] = {}
    for score in scores:
        by_organ.setdefault(score.organ, []).append(score)
    rows = [_organ_row(organ, found, organ in small) for organ, found in by_organ.items()]
    rows = [row for row in rows if row.n]
    groups: dict[str, list[TableRow]] = {
        "mean of small": [row for row in rows if row.group == "small"],
        "mean of others": [row for row in rows if row.group == "other"],
    }
    organs = [row for group in groups.values() for row in group]
    both = all(groups.values())
    means = [_mean_row(name, group) for name, group in groups.items()] if both else []
    return organs + means + ([_mean_row("mean of all", organs)] if organs else [])


def format_table(rows: Sequence[TableRow], title: str | None = None) -> Table:
    """The rows as a table for people: DSC in per cent, distances in mm, mean +- standard deviation.

    "Matched" columns appear if an organ was missed; localisation and ROI columns if they were measured.
    """
    # Text: names are no markup, whatever brackets they have
    table = Table(title=None if title is None else Text(title), box=box.SIMPLE, title_justify="left")
    table.add_column("organ", no_wrap=True)
    columns = _table_columns(rows)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for index, row in enumerate(rows):
        last = index + 1 == len(rows) or rows[index + 1].group != row.group
        cells = [cell(row) for cell in columns.values()]
        table.add_row(Text(row.organ), *cells, style="bold" if row.group == "mean" else None, end_section=last)
    return table


def table_text(rows: Sequence[TableRow], title: str | None = None) -> str:
    """`format_table` as plain text."""
    stream = io.StringIO()
    Console(file=stream, width=TABLE_WIDTH, color_system=None).print(format_table(rows, title))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def print_table(table: Table, console: Console) -> None:
    """Print where `console` does, never narrower than the table: a cut-off number is worse than a wrapped line."""
    width = max(console.width, TABLE_WIDTH)
    Console(file=console.file, width=width, force_terminal=console.is_terminal).print(table)


def evaluate(
    truth: Path,
    prediction: Path,
    *,
    organs: Sequence[str] | None = None,
    small: Sequence[str] | None = None,
    allow_missing_cases: bool = False,
    processes: int | None = None,
) -> Evaluation:
    """Compare all cases of two folders, paired by name, organ by organ.

    Args:
        truth: A folder of any layout that `find_cases` knows.
        prediction: Likewise.
        organs: Organs to compare, by any known name; None takes every organ that the truth has.
        small: Organs to list apart; None takes those of less than 2.5 cm3 in the truth's mean.
        allow_missing_cases: Leave out cases that only one folder has, instead of refusing them.
        processes: Cases compared at a time; None takes one per available core.

    Raises:
        FocusNetError: a folder or file cannot be read, cases or organs are missing, or grids differ.
    """
    listed = None if small is None else {canonical_name(name) for name in small}
    pairs, notes = _pair_cases(truth, prediction, allow_missing_cases)
    names = _choose_organs(pairs, organs, notes)
    jobs = [(one, other, names) for one, other in pairs]
    scores = [score for found in _in_parallel(jobs, processes) for score in found]
    return Evaluation(scores, summarize(scores, _small_organs(scores) if listed is None else listed), notes)


def write_results(evaluation: Evaluation, out: Path) -> None:
    """Write cases.csv, table.txt, table.csv and results.json; DSC in files other than table.txt is 0 to 1.

    Raises:
        FocusNetError: a file cannot be written.
    """
    scores = [asdict(score) for score in evaluation.scores]
    rows = [asdict(row) for row in evaluation.rows]
    content = {"table": rows, "notes": evaluation.notes, "scores": scores}
    _write_text(out / "cases.csv", _csv_text([field.name for field in fields(OrganScore)], scores))
    flat = [_flatten(row) for row in rows]
    _write_text(out / "table.csv", _csv_text(list(flat[0]) if flat else [], flat))
    _write_text(out / "table.txt", table_text(evaluation.rows))
    _write_text(out / "results.json", json.dumps(content, indent=1, allow_nan=False) + "\n")


@dataclass(frozen=True)
class _Crop:
    """A mask cut down to its bounding box."""

    box: Box
    mask: Mask

    def within(self, box: Box) -> Mask:
        """The mask in a box that holds its own."""
        mask = np.zeros([side.stop - side.start for side in box], bool)
        mask[
            tuple(slice(own.start - side.start, own.stop - side.start) for own, side in zip(self.box, box, strict=True))
        ] = self.mask
        return mask


def _crop(mask: Mask | None) -> _Crop | None:
    found = None if mask is None else bounding_box(mask)
    # a copy, so that the whole volume can be freed
    return None if mask is None or found is None else _Crop(found, mask[found] != 0)


def _score(
    case: str,
    organ: str,
    truth: _Crop | None,
    prediction: _Crop | None,
    shape: Sequence[int],
    spacing: Sequence[float],
) -> OrganScore:
    volumes = [
        0.0 if crop is None else np.count_nonzero(crop.mask) * math.prod(spacing) for crop in (truth, prediction)
    ]
    if truth is None:
        return OrganScore(case, organ, "spurious" if prediction else "absent", prediction_mm3=volumes[1])
    if prediction is None:
        diagonal = volume_diagonal(shape, spacing)
        return OrganScore(case, organ, "missed", 0.0, diagonal, truth_mm3=volumes[0], volume_difference=-1.0)
    both = union_box(truth.box, prediction.box)
    masks = truth.within(both), prediction.within(both)
    return OrganScore(
        case,
        organ,
        "ok",
        dsc=dice(*masks),
        hd95_mm=hausdorff95(*masks, spacing),
        center_mm=center_distance_mm(*masks, spacing),
        truth_mm3=volumes[0],
        prediction_mm3=volumes[1],
        volume_difference=relative_volume_difference(*masks),
    )


def _organ_row(organ: str, scores: Sequence[OrganScore], small: bool) -> TableRow:
    matched = [score for score in scores if score.status == "ok"]
    missed = [score for score in scores if score.status == "missed"]
    return TableRow(
        organ=organ,
        group="small" if small else "other",
        n=len(matched) + len(missed),
        missed=len(missed),
        spurious=sum(score.status == "spurious" for score in scores),
        dsc=Stat.of(score.dsc for score in matched + missed),
        hd95_mm=Stat.of(score.hd95_mm for score in matched + missed),
        matched_dsc=Stat.of(score.dsc for score in matched),
        matched_hd95_mm=Stat.of(score.hd95_mm for score in matched),
        center_mm=Stat.of(score.center_mm for score in matched),
        localisation_mm=Stat.of(score.localisation_mm for score in scores),
        inside_roi=Stat.of(score.inside_roi for score in scores),
    )


def _mean_row(name: str, rows: Sequence[TableRow]) -> TableRow:
    def over_organs(column: str) -> Stat:
        return Stat.of(getattr(row, column).mean for row in rows)

    return TableRow(
        organ=name,
        group="mean",
        n=sum(row.n for row in rows),
        missed=sum(row.missed for row in rows),
        spurious=sum(row.spurious for row in rows),
        dsc=over_organs("dsc"),
        hd95_mm=over_organs("hd95_mm"),
        matched_dsc=over_organs("matched_dsc"),
        matched_hd95_mm=over_organs("matched_hd95_mm"),
        center_mm=over_organs("center_mm"),
        localisation_mm=over_organs("localisation_mm"),
        inside_roi=over_organs("inside_roi"),
    )


def _table_columns(rows: Sequence[TableRow]) -> dict[str, Callable[[TableRow], str]]:
    columns: dict[str, Callable[[TableRow], str]] = {
        "DSC %": lambda row: spread(row.dsc, 100, 1),
        "95HD mm": lambda row: spread(row.hd95_mm, 1, 2),
        "n": lambda row: str(row.n),
        "missed": lambda row: str(row.missed),
        "spurious": lambda row: str(row.spurious),
    }
    if any(row.missed for row in rows):
        columns["matched\nDSC %"] = lambda row: spread(row.matched_dsc, 100, 1)
        columns["matched\n95HD mm"] = lambda row: spread(row.matched_hd95_mm, 1, 2)
    if any(row.localisation_mm.mean is not None for row in rows):
        columns["localisation\nmm"] = lambda row: spread(row.localisation_mm, 1, 2)
    if any(row.inside_roi.mean is not None for row in rows):
        columns["in ROI\n%"] = lambda row: spread(Stat(row.inside_roi.mean, None), 100, 0)
    return columns


def spread(stat: Stat, scale: float = 1.0, digits: int = 2, missing: str = "-") -> str:
    """Mean and standard deviation in words, both times `scale`; `missing` where there is no mean."""
    if stat.mean is None:
        return missing
    mean = f"{stat.mean * scale:.{digits}f}"
    return mean if stat.sd is None else f"{mean} ± {stat.sd * scale:.{digits}f}"


def _pair_cases(truth: Path, prediction: Path, allow_missing: bool) -> tuple[list[tuple[Case, Case]], list[str]]:
    sides = [{case.name: case for case in find_cases(folder)} for folder in (truth, prediction)]
    lacking = [(prediction, sides[0].keys() - sides[1].keys()), (truth, sides[1].keys() - sides[0].keys())]
    remarks = [f"{folder} lacks {', '.join(sorted(names))}" for folder, names in lacking if names]
    common = sorted(sides[0].keys() & sides[1].keys())
    if remarks and not (allow_missing and common):
        hint = "; --allow-missing-cases leaves these out" if common else ""
        raise FocusNetError("cases differ: " + "; ".join(remarks) + hint)
    return [(sides[0][name], sides[1][name]) for name in common], [f"left out: {text}" for text in remarks]


def _choose_organs(
    pairs: Sequence[tuple[Case, Case]], organs: Sequence[str] | None, notes: list[str]
) -> tuple[str, ...]:
    """Organs to compare; what one side never names is added to `notes`, and refused if asked for."""
    in_truth: set[str] = set().union(*(truth.organs for truth, _ in pairs))
    in_prediction: set[str] = set().union(*(prediction.organs for _, prediction in pairs))
    chosen = in_truth if organs is None else {canonical_name(name) for name in organs}
    if not chosen or chosen - in_truth:
        wanted = ", ".join(sorted(chosen - in_truth)) or "organs"
        raise FocusNetError(f"no case of the truth has {wanted}; it has {', '.join(sorted(in_truth))}")
    if chosen - in_prediction:
        names = ", ".join(sorted(chosen - in_prediction))
        notes.append(f"no prediction names {names}: counted as missed (--organs chooses what is compared)")
    if organs is None and in_prediction - in_truth:
        notes.append(f"not compared, the truth never has them: {', '.join(sorted(in_prediction - in_truth))}")
    return tuple(sorted(chosen))


def _small_organs(scores: Sequence[OrganScore]) -> set[str]:
    volumes: dict[str, list[float]] = {}
    for score in scores:
        if score.truth_mm3:
            volumes.setdefault(score.organ, []).append(score.truth_mm3)
    return {organ for organ, found in volumes.items() if statistics.fmean(found) < SMALL_MM3}


def _in_parallel(
    jobs: Sequence[tuple[Case, Case, tuple[str, ...]]], processes: int | None
) -> Iterator[list[OrganScore]]:
    workers = min(processes or _available_cores(), len(jobs))
    bar = Console(stderr=True)
    if workers == 1:
        yield from track(map(_score_case, jobs), "comparing", total=len(jobs), console=bar)
        return
    # spawn: a forked child of a process that has used threads (torch, SimpleITK) may hang
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), follow_parent) as pool:
        try:
            yield from track(pool.map(_score_case, jobs), "comparing", total=len(jobs), console=bar)
        except BrokenProcessPool as error:
            raise FocusNetError(
                f"one of {workers} processes was killed, maybe for lack of memory; try --processes 1"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _score_case(job: tuple[Case, Case, tuple[str, ...]]) -> list[OrganScore]:
    truth_case, prediction_case, organs = job
    truth, truth_grid = _read_crops(truth_case, organs)
    prediction, prediction_grid = _read_crops(prediction_case, organs)
    grid = truth_grid or prediction_grid
    if grid is None:
        return [OrganScore(truth_case.name, organ, "absent") for organ in organs]
    difference = prediction_grid.difference(grid) if prediction_grid else ""
    if difference:
        files = [str(_file(case, organs)) for case in (prediction_case, truth_case)]
        raise FocusNetError(f"{files[0]} lies on another grid than {files[1]}: {difference}")
    return [
        _score(truth_case.name, organ, truth.get(organ), prediction.get(organ), grid.shape, grid.spacing)
        for organ in organs
    ]


def _read_crops(case: Case, organs: Sequence[str]) -> tuple[dict[str, _Crop | None], Grid | None]:
    """Masks cut to their boxes as soon as they are read (a CT's own are too large to keep), and the grid."""
    crops: dict[str, _Crop | None] = {}
    grid: Grid | None = None
    wanted = {organ: path for organ, path in case.masks.items() if organ in organs}
    for organ, mask, found in iter_masks(replace(case, image=None, masks=wanted)):
        crops[organ], grid = _crop(mask), found
    return crops, grid


def _file(case: Case, organs: Sequence[str]) -> Path | None:
    return case.multilabel or next((case.masks[organ] for organ in organs if organ in case.masks), None)


def _flatten(row: Mapping[str, object]) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat.update({f"{name}_{key}": part for key, part in value.items()})
        else:
            flat[name] = value
    return flat


def _csv_text(header: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, header, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
        writer.writerow(rounded)
    return stream.getvalue()


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = command_parser(
        "evaluate",
        "TRUTH PREDICTION",
        "Compare two folders of segmentations: DSC and 95HD of every organ.",
        ["DATA OUT --out RESULTS", "DATA OUT --allow_missing_cases --organs Brainstem Parotid_L Parotid_R"],
    )
    parser.add_argument("truth", type=Path, help="folder of true segmentations, in any known layout")
    parser.add_argument("prediction", type=Path, help="folder of segmentations to judge, cases of the same names")
    parser.add_argument("--out", type=Path | None, help="folder for cases.csv, table.txt, table.csv, results.json")
    parser.add_argument(
        "--organs",
        type=str,
        nargs="+",
        help="after the folders: organs to compare (default: all of the truth)",
    )
    parser.add_argument(
        "--small",
        type=str,
        nargs="+",
        help="after the folders: organs to list apart (default: mean volume below 2.5 cm3)",
    )
    parser.add_argument("--allow_missing_cases", action="store_true", help="leave out cases that only one folder has")
    parser.add_argument("--processes", type=PositiveInt | None, help="cases compared at a time (default: all cores)")
    arguments = parse(parser, argv)
    if arguments.out is not None and arguments.out.exists() and not arguments.out.is_dir():
        raise FocusNetError(f"cannot write into {arguments.out}: it is a file, expected a folder")
    evaluation = evaluate(
        arguments.truth,
        arguments.prediction,
        organs=arguments.organs,
        small=arguments.small,
        allow_missing_cases=arguments.allow_missing_cases,
        processes=arguments.processes,
    )
    for note in evaluation.notes:
        Console(stderr=True).print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    print_table(format_table(evaluation.rows), Console())
    if arguments.out is not None:
        write_results(evaluation, arguments.out)
        print(f"written: {arguments.out}/{{cases.csv,table.txt,table.csv,results.json}}")
    return 0


if __name__ == "__main__":
    run(main)
