"""CT series in DICOM folders: which there are, and their slices in order.

A series is named by its folder, or, where a folder holds several, by FOLDER/UID with its SeriesInstanceUID, as if it
were a folder in there.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..errors import FocusNetError
from .headers import itk_name, read_header

_UID = re.compile(r"[0-9]+(\.[0-9]+)+")
# the class of a CT slice, in the file's meta information, or in the data set where there is none
_CT_STORAGE = re.compile(rb"(?:\x02\0\x02\0|\x08\0\x16\0)....1\.2\.840\.10008\.5\.1\.4\.1\.1\.2[\0 ]", re.DOTALL)
_HEAD = 2048  # bytes in which class and ImageType, a slice's first elements, lie


def is_series(path: Path) -> bool:
    """Whether `path` is a folder, or one with a SeriesInstanceUID behind it."""
    return path.is_dir() or (path.parent.is_dir() and not path.exists() and bool(_UID.fullmatch(path.name)))


def holds_ct_slices(folder: Path) -> bool:
    """Whether slices of a CT series, localizers apart, lie in the folder itself."""
    return any(_is_ct_slice(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name[:1] != ".")


def ct_series(folder: Path) -> dict[str, list[str]]:
    """The slices' files of every CT series in a folder by SeriesInstanceUID, the longest first.

    Localizers, series of one slice, and other objects (MR, RTSTRUCT, SEG, ...) are left out.
    """
    found = {uid: [file for file in files if _is_ct_slice(Path(file))] for uid, files in _all_series(folder).items()}
    volumes = ((uid, files) for uid, files in found.items() if len(files) > 1)
    return dict(sorted(volumes, key=lambda item: -len(item[1])))


def series_slices(path: Path) -> list[str]:
    """The files of a CT series in order of position along the slices' normal.

    Raises:
        FocusNetError: there is no such series, or several to choose from; slices are damaged, missing, doubled, uneven,
            not parallel or sheared (tilted gantry).
    """
    folder, uid = (path, "") if path.is_dir() else (path.parent, path.name)
    series = ct_series(folder)
    _check_damage(folder)
    if uid and uid not in series:
        known = f"has {', '.join(series)}" if series else "has none"
        raise FocusNetError(f"cannot read {path}: no CT series of that UID; {folder} {known}")
    if not series:
        raise FocusNetError(f"cannot read {folder}: it holds {_contents(folder)}, expected the slices of a CT series")
    if not uid and len(series) > 1:
        choices = ", ".join(f"{uid} ({_describe(files)})" for uid, files in series.items())
        many = f"it holds {len(series)} CT series"
        raise FocusNetError(f"cannot read {folder}: {many}; choose one by adding its UID to the path: {choices}")
    return _sorted_slices(path, series[uid or next(iter(series))])


def _all_series(folder: Path) -> dict[str, tuple[str, ...]]:
    import SimpleITK as sitk

    reader, name = sitk.ImageSeriesReader, itk_name(folder)
    return {uid: reader.GetGDCMSeriesFileNames(name, uid) for uid in reader.GetGDCMSeriesIDs(name)}


def _is_ct_slice(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(_HEAD)
    return b"LOCALIZER" not in head and bool(_CT_STORAGE.search(head))


def _check_damage(folder: Path) -> None:
    """GDCM passes over damaged slices in silence; this names the first one."""
    known = {Path(file).name for files in _all_series(folder).values() for file in files}
    for path in sorted(folder.iterdir()):
        if path.name not in known and path.is_file() and _is_ct_slice(path):
            raise FocusNetError(f"cannot read {path}: the CT slice is truncated or damaged")


def _tags(file: str) -> dict[str, str]:
    reader = read_header(Path(file), Path(file).stat().st_size)
    return {key: reader.GetMetaData(key).strip() for key in reader.GetMetaDataKeys()}


def _contents(folder: Path) -> str:
    modalities = {_modality(files[0]) for files in _all_series(folder).values()}
    return f"only {', '.join(sorted(modalities))}" if modalities else "no DICOM images"


def _modality(file: str) -> str:
    modality = _tags(file).get("0008|0060", "unknown")
    return "single slices or localizers of CT" if modality == "CT" else modality


def _describe(files: list[str]) -> str:
    description = _tags(files[0]).get("0008|103e", "")
    return f"{len(files)} slices" + (f", {description}" if description else "")


def _sorted_slices(path: Path, files: Iterable[str]) -> list[str]:
    positions, names = [], []
    for file in files:
        tags = _tags(file)
        try:
            position = [float(v) for v in tags["0020|0032"].split("\\")]
            axes = np.array([float(v) for v in tags["0020|0037"].split("\\")]).reshape(2, 3)
        except (KeyError, ValueError) as error:
            raise FocusNetError(f"cannot read {file}: no image position or orientation, expected a CT slice") from error
        positions.append(np.array(position))
        names.append(file)
        if len(names) == 1:
            first = axes
        elif not np.allclose(axes, first, atol=1e-3):
            raise FocusNetError(f"cannot read {path}: the slices are not parallel ({file})")
    normal = np.cross(first[0], first[1])
    along = np.array(positions) @ normal
    order = np.argsort(along, kind="stable")
    along = along[order]
    steps = np.diff(along)
    spacing = float(np.median(steps))
    if spacing < 1e-3 or steps.min() < 1e-3:
        at = along[int(np.argmin(steps))]
        raise FocusNetError(f"cannot read {path}: two slices lie at the same position, {at:.2f} mm along the normal")
    uneven = np.abs(steps - spacing) > max(0.02 * spacing, 0.01)
    if uneven.any():
        at = int(np.argmax(uneven))
        raise FocusNetError(
            f"cannot read {path}: slices are missing or uneven between {along[at]:.2f} and "
            f"{along[at + 1]:.2f} mm along the normal (a step of {steps[at]:.2f} mm, {spacing:.2f} mm elsewhere)"
        )
    shift = positions[order[-1]] - positions[order[0]]
    drift = float(np.linalg.norm(shift - (shift @ normal) * normal))
    if drift > 1.0:
        raise FocusNetError(
            f"cannot read {path}: each slice is shifted in its plane ({drift:.1f} mm in all, a tilted gantry); "
            "resample it to an upright grid first"
        )
    return [names[index] for index in order]
