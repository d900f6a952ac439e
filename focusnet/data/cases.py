"""Finding the cases of a data set and reading their contours, whatever layout it has.

Layouts (every `.nrrd` may also be `.nii.gz`, `.nii` or `.mha`; the image may be absent, except in HaN-Seg's):

- PDDCA: `<case>/img.nrrd`, `<case>/structures/<Organ>.nrrd`
- masks: `<case>/segmentations/<Organ>.nrrd`, with `img`, `image` or `ct` beside it: a file, or a folder of DICOM slices
- predictions: `<case>/labels.nii.gz` and `labels.json` ({"1": "Brainstem", ...})
- nnU-Net: `imagesTr/<case>_0000.nii.gz`, `labelsTr/<case>.nii.gz`, `dataset.json`
- HaN-Seg: `<case>/<case>_IMG_CT.nrrd`, `<case>/<case>_OAR_<Organ>.seg.nrrd`
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import FocusNetError
from ..files import load_json
from .images import SUFFIXES, Grid, read_grid, read_labels
from .organs import canonical_name

_IMAGE_STEMS = ("img", "image", "ct")
_LABEL = re.compile("[0-9]{1,5}")
MASK_FOLDERS = ("structures", "segmentations")


@dataclass(frozen=True)
class Case:
    """One patient's files.

    Attributes:
        name: Unique within the data set.
        image: The CT, if there is one.
        masks: One binary file per organ (TG-263 name).
        multilabel: One label map instead.
        label_values: Organ of every label value of `multilabel`.
        problems: What is wrong with the case's file names and label tables, one line each.
        unknown: Unknown organ names among its files or labels, one line each.
    """

    name: str
    image: Path | None
    masks: dict[str, Path] = field(default_factory=dict)
    multilabel: Path | None = None
    label_values: dict[int, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def organs(self) -> list[str]:
        """Names of the organs that have a file or a label value, sorted."""
        return sorted({*self.masks, *self.label_values.values()})

    @property
    def files(self) -> list[Path]:
        """All of the case's files; a DICOM folder stands for itself."""
        files = [self.image, self.multilabel, *(self.masks[organ] for organ in sorted(self.masks))]
        return [file for file in files if file is not None]


def find_cases(root: Path) -> list[Case]:
    """The cases in a folder, sorted by name; nothing but file names and label tables is read.

    `root` may be a data set or a single case. What is wrong with a case becomes its `problems` and `unknown`,
    so that one odd file does not hide the rest.

    Raises:
        FocusNetError: the folder does not exist or holds no case.
    """
    root = Path(root)
    if not root.is_dir():
        raise FocusNetError(
            f"cannot read {root}: {'it is a file, expected a folder of cases' if root.exists() else 'no such folder'}"
        )
    if (root / "labelsTr").is_dir() or (root / "imagesTr").is_dir():
        cases = _nnunet_cases(root)
    else:
        folders = sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
        cases = [case for folder in folders if (case := case_in(folder)) is not None] + _broken_links(root)
        own = case_in(root) if not cases else None
        cases = cases or ([own] if own is not None else [])
    if not cases:
        raise FocusNetError(
            f"no cases in {root}: expected <case>/img.nrrd with <case>/structures/<Organ>.nrrd, "
            "<case>/segmentations/, <case>/labels.nii.gz with labels.json, HaN-Seg's names, or imagesTr/ and labelsTr/"
        )
    return sorted(cases, key=lambda case: case.name)


def iter_masks(
    case: Case, grid: Grid | None = None, *, allow_unknown: bool = False
) -> Iterator[tuple[str, np.ndarray, Grid]]:
    """Yield (organ, mask, grid) one by one, sorted by organ, so that large data sets need not fit into
    memory.

    Args:
        case: The case.
        grid: Grid on which the masks must lie; by default the image's, or without an image the first mask's.
        allow_unknown: Leave out organs of unknown name instead of failing.

    Yields:
        TG-263 name, mask (z, y, x) bool that may be empty, and its grid.

    Raises:
        FocusNetError: the case has problems, a file is unreadable or no binary mask, or lies on another grid.
    """
    for problem in case.problems + (() if allow_unknown else case.unknown):
        raise FocusNetError(f"case {case.name}: {problem}")
    if grid is None and case.image is not None:
        grid = read_grid(case.image)
    if case.multilabel is not None:
        yield from _multilabel_masks(case, case.multilabel, grid)
    for organ in sorted(case.masks):
        path = case.masks[organ]
        volume = read_labels(path)
        grid = _same_grid(path, volume.grid, grid)
        yield organ, _binary(volume.array, path), grid


def read_masks(case: Case, grid: Grid | None = None) -> tuple[dict[str, np.ndarray], Grid]:
    """All masks of a case: organ (TG-263) -> bool (z, y, x), and the grid they share. Empty masks are kept.

    Raises:
        FocusNetError: as `iter_masks`; also if the case has neither image nor masks nor `grid`.
    """
    masks = {}
    for organ, mask, found in iter_masks(case, grid):
        masks[organ], grid = mask, found
    if grid is None and case.image is not None:
        grid = read_grid(case.image)
    if grid is None:
        raise FocusNetError(f"case {case.name} has neither image nor contours")
    return masks, grid


def _multilabel_masks(case: Case, path: Path, grid: Grid | None) -> Iterator[tuple[str, np.ndarray, Grid]]:
    volume = read_labels(path)
    grid = _same_grid(path, volume.grid, grid)
    unnamed = [value for value in np.unique(volume.array).tolist() if value and value not in case.label_values]
    if unnamed and not case.unknown:
        raise FocusNetError(f"{path} holds label {unnamed[0]}, which its label table does not name")
    for organ in sorted(set(case.label_values.values())):
        values = [value for value, name in case.label_values.items() if name == organ]
        yield organ, np.isin(volume.array, values), grid


def _same_grid(path: Path, found: Grid, expected: Grid | None) -> Grid:
    if expected is None:
        return found
    difference = found.difference(expected)
    if difference:
        raise FocusNetError(f"{path} lies on another grid than the rest of its case: {difference}")
    return expected


def _binary(array: np.ndarray, path: Path) -> np.ndarray:
    top = int(array.max())
    if top <= 1 and array.dtype == np.uint8:
        return array.view(np.bool_)
    mask = array == top
    if np.count_nonzero(array) != np.count_nonzero(mask):
        raise FocusNetError(f"{path} is no binary mask: it holds several labels up to {top}")
    return mask


def image_stem(path: Path) -> str:
    """File name without an image suffix; empty if it has none."""
    for suffix in (".seg.nrrd", *SUFFIXES):
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return ""


def image_files(folder: Path) -> list[Path]:
    """Files with an image's name; links to nothing too, so that reading them fails instead of losing an organ."""
    return sorted(
        path for path in folder.iterdir() if not path.is_dir() and not path.name.startswith(".") and image_stem(path)
    )


def _broken_links(root: Path) -> list[Case]:
    links = sorted(path for path in root.iterdir() if not path.exists() and not path.name.startswith("."))
    return [Case(link.name, None, problems=(f"{link} is a link to nothing",)) for link in links]


def case_name(folder: Path) -> str:
    """The folder's own name, also where it is given as `.` or `..`."""
    return os.path.basename(os.path.abspath(folder))


def case_in(folder: Path) -> Case | None:
    """The case whose files lie in `folder`; None if there is none."""
    files, name = image_files(folder), case_name(folder)
    images = [path for stem in _IMAGE_STEMS for path in files if image_stem(path).lower() == stem]
    images += [folder / stem for stem in _IMAGE_STEMS if (folder / stem).is_dir()]  # of DICOM slices
    image = images[0] if images else None
    masks = [path for kind in MASK_FOLDERS if (folder / kind).is_dir() for path in image_files(folder / kind)]
    if masks:
        return _mask_case(name, image, [(image_stem(path), path) for path in masks])
    labels = next((path for path in files if image_stem(path) == "labels"), None)
    if labels is not None:
        return _multilabel_case(name, image, labels, folder / "labels.json")
    han_seg = next((path for path in files if image_stem(path).endswith("_IMG_CT")), None)
    if han_seg is not None:
        parts = [(image_stem(path).partition("_OAR_")[2], path) for path in files]
        return _mask_case(name, han_seg, [(organ, path) for organ, path in parts if organ])
    return Case(name, image) if image is not None else None


def _mask_case(name: str, image: Path | None, files: list[tuple[str, Path]]) -> Case:
    masks: dict[str, Path] = {}
    problems, unknown = [], []
    for organ, path in files:
        try:
            known = canonical_name(organ)
        except FocusNetError as error:
            unknown.append(f"{error}, in {path}")
            continue
        if known in masks:
            problems.append(f"{masks[known].name} and {path.name} are both {known}")
        masks[known] = path
    return Case(name, image, masks, problems=tuple(problems), unknown=tuple(unknown))


def _multilabel_case(name: str, image: Path | None, labels: Path, table: Path) -> Case:
    try:
        values, unknown = _label_values(table, load_json(table))
    except FocusNetError as error:
        return Case(name, image, multilabel=labels, problems=(str(error),))
    return Case(name, image, multilabel=labels, label_values=values, unknown=unknown)


def _label_values(path: Path, table: object) -> tuple[dict[int, str], tuple[str, ...]]:
    """{value: organ} from {"1": "Brainstem"} or {"Brainstem": 1} without the background; and the unknown
    organs' errors."""
    if not isinstance(table, dict):
        raise FocusNetError(f"{path} holds no label table, expected {{value: organ}}")
    values, unknown = {}, []
    for key, entry in table.items():
        value, organ = (entry, key) if isinstance(entry, int) else (key, entry)
        if not _LABEL.fullmatch(str(value)) or not isinstance(organ, str):
            label = f"{key!r}: {entry!r}"
            raise FocusNetError(f"{path} has the label {label[:100]}, expected a value and an organ")
        if int(value) == 0:
            continue
        try:
            values[int(value)] = canonical_name(organ)
        except FocusNetError as error:
            unknown.append(f"{error}, in {path}")
    return values, tuple(unknown)


def _nnunet_cases(root: Path) -> list[Case]:
    table = root / "dataset.json"
    content = load_json(table)
    labels = {image_stem(path): path for path in image_files(root / "labelsTr")} if (root / "labelsTr").is_dir() else {}
    images = {}
    if (root / "imagesTr").is_dir():
        images = {
            image_stem(path).removesuffix("_0000"): path
            for path in image_files(root / "imagesTr")
            if image_stem(path).endswith("_0000")
        }
    values, unknown = _label_values(table, content.get("labels") if isinstance(content, dict) else None)
    unlabelled = [Case(name, images[name]) for name in images if name not in labels]
    return unlabelled + [
        Case(name, images.get(name), multilabel=path, label_values=values, unknown=unknown)
        for name, path in labels.items()
    ]
