"""The cache: every case prepared once, as memory-mappable arrays beside a record of what was found.

A cache has one folder per data set and set of settings (`cache_folder`). In it lie
`cases/<name>.image.npy` (int16 HU), `<name>.labels.npy` (uint8, `n` is the n-th of the record's organs) and
`<name>.json`. The record is written last and holds the arrays' checksums and its own, so that an interrupted,
changed or damaged case is noticed and prepared again. What is stored of a case depends on that case and these settings
alone, so that runs with other plans share it.
"""

import dataclasses
import hashlib
import json
import multiprocessing
import sys
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DataConfig
from ..errors import FocusNetError
from ..files import atomic_write, clear_unfinished
from ..processes import follow_parent
from .cases import Case, iter_masks
from .images import Grid, Volume, read_image, resample
from .organs import canonical_name, overlap_order
from .plan import CaseRecord, FloatTriple, case_record
from .preprocess import BODY_HU, body_box, prepare_image, reorient

DEFAULT_CACHE = Path("runs/cache")
FORMAT = 2
WORKERS = 2
POOL_FROM = 5
MIN_VOXELS = 8
# fields of DataConfig that shape the plan, not the arrays
_PLAN_FIELDS = ("small_organs", "small_voxels", "roi_scale", "roi_size")


@dataclass
class OrganSize:
    """One organ of one case on its original grid: voxels, mm3, and the sides (z, y, x) of its bounding box in
    mm."""

    voxels: int
    volume_mm3: float
    extent_mm: FloatTriple


@dataclass
class CaseReport:
    """What preparing a case found.

    Attributes:
        name: Name of the case.
        fingerprint: Names, sizes and times of its source files, and the settings: while they stay, so do the arrays.
        problems: What is wrong with the case, one line each; with any of them it cannot be used.
        notes: What a person should know, though nothing is wrong.
        sizes: The contoured organs on the original grid.
        record: The prepared case; None if it has problems, or none of the organs that `DataConfig.organs` names.
        checksums: Of the files with its prepared HU and labels.
    """

    name: str
    fingerprint: str
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sizes: dict[str, OrganSize] = field(default_factory=dict)
    record: CaseRecord | None = None
    checksums: list[int] = field(default_factory=list)


def cache_folder(root: Path, data: Path, config: DataConfig) -> Path:
    """The folder within the cache `root` for one data set, as prepared with the settings that shape arrays.

    Raises:
        FocusNetError: the configuration names an unknown organ.
    """
    source = Path(data).resolve()
    digest = digest_of([FORMAT, str(source), _array_settings(config)])
    return Path(root) / f"{source.name}-{'x'.join(f'{side:g}' for side in config.spacing)}mm-{digest[:8]}"


def prepare_cases(cases: list[Case], cache: Path, config: DataConfig) -> list[CaseReport]:
    """Check and prepare cases, reusing what the folder `cache` holds; two processes share the work when there
    is much of it.

    Returns:
        One report per case, in the order of `cases`; one without a record has no arrays.

    Raises:
        FocusNetError: the configuration names an unknown organ, or the cache cannot be written.
    """
    fingerprints = {case.name: _fingerprint(case, config) for case in cases}
    if (cache / "cases").is_dir():
        clear_unfinished(cache / "cases")
    reports: dict[str, CaseReport] = {}
    for case in cases:
        cached = _load(cache, case.name, fingerprints[case.name])
        if cached is not None:
            reports[case.name] = cached
    jobs = [(case, cache, config, fingerprints[case.name]) for case in cases if case.name not in reports]
    for report in _progress(_run(jobs), len(jobs)):
        reports[report.name] = report
    return [reports[case.name] for case in cases]


def array_paths(cache: Path, name: str) -> tuple[Path, Path]:
    """Files of a prepared case: HU and labels."""
    folder = Path(cache) / "cases"
    return folder / f"{name}.image.npy", folder / f"{name}.labels.npy"


def wanted_organs(config: DataConfig) -> list[str] | None:
    """`config.organs` by their TG-263 names; None if every organ is wanted.

    Raises:
        FocusNetError: an organ is unknown or named twice.
    """
    if config.organs is None:
        return None
    names = [canonical_name(name) for name in config.organs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise FocusNetError(
            f"data.organs names {twice[0]} twice" if twice else "data.organs is empty, expected names or null"
        )
    return names


Job = tuple[Case, Path, DataConfig, str]


def _run(jobs: list[Job]) -> Iterator[CaseReport]:
    if len(jobs) < POOL_FROM:
        yield from map(_build, jobs)
        return
    # not fork: ITK's and torch's threads do not survive it
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(WORKERS, mp_context=context, initializer=_start_worker)
    try:
        for future in as_completed([pool.submit(_build, job) for job in jobs]):
            yield future.result()
    except BrokenProcessPool as error:
        raise FocusNetError(
            "a process that prepares cases died: memory ran out, or a script calls this "
            "without `if __name__ == '__main__':`"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    import SimpleITK as sitk

    follow_parent()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)


def _progress(reports: Iterator[CaseReport], total: int) -> Iterable[CaseReport]:
    from rich.console import Console
    from rich.progress import track

    if not total:
        return reports
    return track(reports, "preparing", total, console=Console(file=sys.stderr), transient=True)


def _build(job: Job) -> CaseReport:
    case, cache, config, fingerprint = job
    report = CaseReport(case.name, fingerprint, list(case.problems))
    (report.problems if config.organs is None else report.notes).extend(case.unknown)
    image, grid = _read_ct(case, report)
    order = overlap_order(wanted_organs(config) or case.organs)
    painted = _paint(case, grid, order, report)
    if not report.sizes and not report.problems:
        if config.organs is not None:
            report.notes.append("left out: it has none of the organs that data.organs names")
            _save_record(cache, report)
            return report
        report.problems.append("it has none of the organs' masks" if painted is None else "all its masks are empty")
    if report.problems or image is None or painted is None:
        return report
    try:
        prepared = prepare_image(image, config)
    except FocusNetError as error:
        report.problems.append(f"{case.image}: {error}")
        return report
    if min(prepared.array.shape) < MIN_VOXELS:
        size, spacing = _times(prepared.array.shape), _times(config.spacing)
        report.problems.append(f"its body is only {size} voxels at {spacing} mm, expected {MIN_VOXELS} or more")
        return report
    _check_cropping(painted, body_box(image, config.body_margin_mm), order, report)
    ranks = resample(Volume(painted, image.grid), prepared.grid, labels=True).array
    report.record = _record(ranks, order, report)
    if not report.record.organs:
        report.problems.append("no organ is contoured within the body")
        return report
    image_path, labels_path = array_paths(cache, case.name)
    _save_array(image_path, prepared.array)
    _save_array(labels_path, _numbered(ranks, order, report.record.organs))
    report.checksums = [_checksum(path) for path in (image_path, labels_path)]
    _save_record(cache, report)
    return report


def _read_ct(case: Case, report: CaseReport) -> tuple[Volume | None, Grid | None]:
    """The image along the patient's axes, and its grid as stored."""
    if case.image is None:
        report.problems.append("it has no image")
        return None, None
    try:
        volume = read_image(case.image)
    except FocusNetError as error:
        report.problems.append(str(error))
        return None, None
    if min(volume.array.shape) < MIN_VOXELS:
        report.problems.append(
            f"{case.image} has only {_times(volume.array.shape)} voxels (z, y, x), "
            f"expected {MIN_VOXELS} or more along each axis"
        )
    if not (volume.array > BODY_HU).any():
        report.problems.append(f"{case.image} shows nobody: no voxel is above {BODY_HU} HU")
    return reorient(volume), volume.grid


def _paint(case: Case, grid: Grid | None, order: list[str], report: CaseReport) -> np.ndarray | None:
    """Label map (uint8) along the patient's axes of each organ's rank in `order`, where the larger rank wins;
    None if no mask could be read."""
    from ..metrics import bounding_box  # here, because who reads the cache alone does without scipy

    ranks = {organ: rank for rank, organ in enumerate(order, start=1)}
    painted: np.ndarray | None = None
    for part in _parts(case, order):
        try:
            for organ, stored, mask_grid in iter_masks(part, grid, allow_unknown=True):
                if organ not in ranks:
                    continue
                grid = mask_grid
                mask = reorient(Volume(stored, grid))
                if painted is None:
                    painted = np.zeros(mask.array.shape, np.uint8)
                box = bounding_box(mask.array)
                if box is None:
                    report.notes.append(f"{organ}: its mask is empty, it counts as not contoured")
                    continue
                inside = mask.array[box]
                report.sizes[organ] = _size(inside, mask.grid)
                np.maximum(painted[box], np.where(inside, np.uint8(ranks[organ]), np.uint8(0)), out=painted[box])
        except FocusNetError as error:
            report.problems.append(str(error))
    return painted


def _parts(case: Case, organs: list[str]) -> Iterator[Case]:
    """The case's files one by one, so that each of them is checked whatever the others are like.

    They go without the image: its grid is known by now, or its problem is reported already.
    """
    case = dataclasses.replace(case, image=None, problems=())
    if case.multilabel is not None:
        yield dataclasses.replace(case, masks={})
    for organ in sorted(case.masks):
        if organ in organs:
            yield dataclasses.replace(case, masks={organ: case.masks[organ]}, multilabel=None, label_values={})


def _size(inside: np.ndarray, grid: Grid) -> OrganSize:
    z, y, x = (float(n * s) for n, s in zip(inside.shape, grid.spacing, strict=True))
    voxels = int(np.count_nonzero(inside))
    return OrganSize(voxels, voxels * grid.voxel_mm3, (z, y, x))


def _check_cropping(painted: np.ndarray, box: tuple[slice, ...], order: list[str], report: CaseReport) -> None:
    before, after = (np.bincount(part.ravel(), minlength=256) for part in (painted, painted[box]))
    for rank, organ in enumerate(order, start=1):
        lost = 1 - after[rank] / before[rank] if before[rank] else 0
        if lost > 0.01:
            report.notes.append(f"{organ}: {lost:.0%} of it lies outside of the body and is cut off")


def _numbered(ranks: np.ndarray, order: list[str], organs: list[str]) -> np.ndarray:
    """The label map in which `n` is the n-th of `organs`."""
    table = np.zeros(256, np.uint8)
    for value, organ in enumerate(organs, start=1):
        table[order.index(organ) + 1] = value
    return table[ranks]


def _record(ranks: np.ndarray, order: list[str], report: CaseReport) -> CaseRecord:
    from scipy import ndimage

    z, y, x = ranks.shape
    record = CaseRecord(report.name, (z, y, x), [], {})
    boxes = ndimage.find_objects(ranks, max_label=len(order))
    for organ in sorted(order):
        rank = order.index(organ) + 1
        box = boxes[rank - 1]
        if box is None:
            if report.sizes.pop(organ, None) is not None:
                report.notes.append(f"{organ}: nothing of it is left on the prepared grid, it counts as not contoured")
            continue
        points = np.nonzero(ranks[box] == rank)
        center = [float(along.mean() + side.start) for along, side in zip(points, box, strict=True)]
        record.organs.append(organ)
        record.centers[organ] = (center[0], center[1], center[2])
    return record


def _times(numbers: Iterable[float]) -> str:
    return " x ".join(f"{number:g}" for number in numbers)


def _fingerprint(case: Case, config: DataConfig) -> str:
    return digest_of([FORMAT, _array_settings(config), *source_of(case)])


def source_of(case: Case) -> list[Any]:
    """What changes with a case's content: its files' names, sizes and times, and what its label table tells."""
    files = [part for file in case.files for part in (sorted(file.iterdir()) if file.is_dir() else [file])]
    stamps = [(f"{file.parent.name}/{file.name}", *_stamp(file)) for file in files]
    return [stamps, sorted(case.label_values.items()), case.problems, case.unknown]


def _array_settings(config: DataConfig) -> dict[str, Any]:
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in _PLAN_FIELDS}
    return {**settings, "organs": sorted(wanted_organs(config) or [])}


def digest_of(content: list[Any]) -> str:
    """Identifies lists, strings and numbers by their content."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _stamp(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except OSError:  # reading it later names file, case and cause
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _save_array(path: Path, array: np.ndarray) -> None:
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.save(file, np.ascontiguousarray(array), allow_pickle=False)


def _record_path(cache: Path, name: str) -> Path:
    return Path(cache) / "cases" / f"{name}.json"


def _save_record(cache: Path, report: CaseReport) -> None:
    with atomic_write(_record_path(cache, report.name)) as temporary:
        content = dataclasses.asdict(report)
        content["digest"] = digest_of([content])
        temporary.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")


def _load(cache: Path, name: str, fingerprint: str) -> CaseReport | None:
    """The report of a cached case; None if it is absent, outdated or damaged."""
    try:
        content: dict[str, Any] = json.loads(_record_path(cache, name).read_text(encoding="utf-8"))
        digest = content.pop("digest")
        if content["fingerprint"] != fingerprint or digest != digest_of([content]):
            return None
        record = case_record(content["record"]) if content["record"] else None
        if content["checksums"] != [_checksum(path) for path in (array_paths(cache, name) if record else ())]:
            return None
        sizes = {
            organ: OrganSize(int(size["voxels"]), float(size["volume_mm3"]), tuple(size["extent_mm"]))
            for organ, size in content["sizes"].items()
        }
        return CaseReport(name, fingerprint, [], content["notes"], sizes, record, content["checksums"])
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return None
