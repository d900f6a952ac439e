"""Finding the CTs to segment: whatever layout they have, with or without contours beside them."""

import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import FocusNetError
from .cases import MASK_FOLDERS, Case, case_in, case_name, image_files, image_stem
from .images import SUFFIXES
from .series import ct_series, holds_ct_slices, is_series

_NNUNET_FOLDERS = ("imagesTs", "imagesTr")


def find_inputs(source: Path) -> tuple[dict[str, Path], list[str]]:
    """The CTs in `source`, by the name of their case.

    `source` is an image file, a folder of image files (contours, label maps and HaN-Seg's MR images among them are
    left out), a case or a folder of cases as `find_cases` knows them, nnU-Net's `imagesTs` or `imagesTr` or the folder
    around these, a DICOM folder, or a folder of patients, each with one CT or a tree of DICOM folders. Where a DICOM
    folder holds several CT series, each is a case, and FOLDER/SeriesInstanceUID one of them. Names starting with a dot
    are passed over.

    Returns:
        The images, sorted by name, and the names of the folders in which there is none.

    Raises:
        FocusNetError: there is no CT, or two would have the same name.
    """
    if not source.exists() and not is_series(source):
        raise FocusNetError(f"{source}: no such file or folder")
    empty: list[str] = []
    found: dict[str, Path] = {}
    cases = _in_folder(source, empty) if source.is_dir() else _in_file(source)
    for name, image in (each for case in cases for each in _each_series(*case)):
        if name in found:
            raise FocusNetError(f"{found[name]} and {image} are both {name}, expected one CT per name")
        found[name] = image
    if not found:
        raise FocusNetError(
            f"no CT in {source}: expected image files ({', '.join(SUFFIXES)}), folders of cases (docs/data.md), "
            f"{' or '.join(_NNUNET_FOLDERS)}, or DICOM folders with the slices of a CT"
        )
    return dict(sorted(found.items())), empty


def _each_series(name: str, image: Path) -> Iterator[tuple[str, Path]]:
    series = ct_series(image) if image.is_dir() else {}
    if len(series) < 2:
        yield name, image
    else:
        yield from ((f"{name}_{uid}", image / uid) for uid in series)


def _in_file(source: Path) -> Iterator[tuple[str, Path]]:
    name = image_stem(source) if source.is_file() else f"{case_name(source.parent)}_{source.name}"
    if not name:
        raise FocusNetError(f"{source}: not an image; expected one of {', '.join(SUFFIXES)} or a DICOM folder")
    yield name, source


def _in_folder(source: Path, empty: list[str]) -> Iterator[tuple[str, Path]]:
    for folder in (source, *(source / name for name in _NNUNET_FOLDERS)):
        if case_name(folder) in _NNUNET_FOLDERS and folder.is_dir():
            yield from _in_nnunet_folder(folder)
            return
    images, own = [path for path in image_files(source) if _may_be_ct(path)], _ct_of(case_in(source))
    if own is not None and (len(images) <= 1 or any((source / name).is_dir() for name in MASK_FOLDERS)):
        yield case_name(source), own
    elif holds_ct_slices(source):
        yield case_name(source), source
    else:
        yield from ((image_stem(path).removesuffix("_IMG_CT"), path) for path in images)
        # links to nothing too, so that a patient is not lost in silence
        folders = [path for path in sorted(source.iterdir()) if path.is_dir() or not path.exists()]
        for folder in (path for path in folders if path not in images and path.name[:1] != "."):
            inside = list(_in_subfolder(folder, lone=not images))
            yield from inside
            if not inside:
                empty.append(folder.name)


def _in_nnunet_folder(folder: Path) -> Iterator[tuple[str, Path]]:
    """The first channel of every case; the others are no CTs."""
    for path in image_files(folder):
        if image_stem(path).endswith("_0000"):
            yield image_stem(path).removesuffix("_0000"), path


def _in_subfolder(folder: Path, lone: bool) -> Iterator[tuple[str, Path]]:
    """A case, with `lone` also a CT of any name that is alone, or all DICOM folders in the tree."""
    if not folder.is_dir():
        return
    image = _ct_of(case_in(folder))
    images = [path for path in image_files(folder) if _may_be_ct(path)]
    if image is None and lone and len(images) == 1:
        image = images[0]
    if image is not None:
        yield folder.name, image
        return
    series = [Path(path) for path, _, files in os.walk(folder) if files and holds_ct_slices(Path(path))]
    for path in series:
        # a patient's only series is the patient
        name = folder.name if len(series) == 1 else "_".join((folder.name, *path.relative_to(folder).parts))
        yield name, path


def _ct_of(case: Case | None) -> Path | None:
    if case is None or case.image is None or (case.image.is_dir() and not holds_ct_slices(case.image)):
        return None
    return case.image


def _may_be_ct(path: Path) -> bool:
    stem = image_stem(path)
    contour = path.name.lower().endswith(".seg.nrrd") or "_OAR_" in stem or stem == "labels"
    return not contour and "_IMG_MR" not in stem
