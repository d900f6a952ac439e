"""Training crops: cut from the cached volumes and augmented; the same seed gives the same crops after a resume too."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ..config import Config
from ..errors import FocusNetError
from .augment import Warp, change_intensity, random_warp
from .cache import array_paths
from .organs import mirror_name
from .plan import CaseRecord, Plan
from .preprocess import normalize


class Crop(NamedTuple):
    """One training crop, or a batch of them with a leading axis.

    Attributes:
        image: Normalised intensities (1, D, H, W), float32.
        labels: Label map (D, H, W), uint8; 0 is the background.
        contoured: (1 + organs,) bool; whether the case has this organ's contour. Class 0 is always True.
        centers: (small organs, 3) voxel coordinates of the organs' centres, maybe outside of the crop; NaN if absent.
    """

    image: Tensor
    labels: Tensor
    contoured: Tensor
    centers: Tensor


class CropDataset(Dataset[Crop]):
    """Random crops of the given cases; item `i` depends on the seed and `i` alone.

    Args:
        plan: The plan of the data set.
        cache: Folder of the prepared data set: see `cache_folder`.
        cases: The cases to draw from.
        config: The configuration.
        length: Number of crops per epoch; item `i` belongs to epoch `i // length`.
        focus: The organs near which `train.organ_crops` of the crops lie.
    """

    def __init__(
        self, plan: Plan, cache: Path, cases: list[CaseRecord], config: Config, length: int, focus: list[str]
    ) -> None:
        self.plan, self.cache, self.cases, self.config, self.length = plan, cache, cases, config, length
        self.focus = focus
        self.mirrored_labels = _mirrored_labels(plan) if config.train.augment.mirror else None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Crop:
        case = self.case(index)
        try:
            return self._crop(case, *divmod(index, self.length))
        except FocusNetError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise RuntimeError(f"a training crop of case {case.name} failed: {reason}") from error

    def _crop(self, case: CaseRecord, epoch: int, position: int) -> Crop:
        rng = np.random.default_rng([self.config.train.seed, 1, epoch, position])
        image, labels = load_case(self.cache, case)
        size, augment, spacing = self.config.train.crop, self.config.train.augment, self.plan.spacing
        organs = [name for name in case.organs if name in self.focus]
        center = _crop_center(case, organs, size, self.config.train.organ_crops, rng)
        warp = random_warp(size, center, augment, spacing, rng)
        hu, label = cut(image, labels, warp, fill=self.config.data.hu_range[0])
        label = torch.from_numpy(label_values(case, self.plan))[label.long()]
        hu = change_intensity(hu, augment, spacing, rng)
        places = np.array(list(case.centers.values())).reshape(-1, 3)
        points = dict(zip(case.centers, warp.to_crop(places), strict=True))
        if self.mirrored_labels is not None and rng.random() < 0.5:
            hu, label, points = _mirror(hu, label, points, self.mirrored_labels)
        small = [points.get(name, np.full(3, np.nan)) for name in self.plan.small_organs]
        return Crop(
            image=normalize(hu, self.config.data)[None],
            labels=label,
            contoured=torch.tensor([True, *(name in points for name in self.plan.organ_names)]),
            centers=torch.from_numpy(np.array(small, dtype=np.float32).reshape(-1, 3)),
        )

    def case(self, index: int) -> CaseRecord:
        """The case from which item `index` is cut."""
        # an epoch longer than the list goes through several shuffled rounds of it
        round_, place = divmod(index, len(self.cases))
        order = np.random.default_rng([self.config.train.seed, 0, round_]).permutation(len(self.cases))
        return self.cases[order[place]]


def load_case(cache: Path, case: CaseRecord) -> tuple[np.ndarray, np.ndarray]:
    """Memory-mapped HU (int16) and stored labels (uint8) of a prepared case, both (D, H, W).

    Raises:
        FocusNetError: they were deleted, damaged or replaced since the case was prepared.
    """
    image_path, labels_path = array_paths(cache, case.name)
    return _array(image_path, np.dtype(np.int16), case), _array(labels_path, np.dtype(np.uint8), case)


def _array(path: Path, dtype: np.dtype, case: CaseRecord) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy raises many kinds for a damaged header
        cause = error.strerror if isinstance(error, OSError) and error.strerror else "it is damaged"
        raise FocusNetError(f"case {case.name}: cannot read {path}: {cause}; prepare the data again") from error
    if array.shape != case.shape or array.dtype != dtype:
        raise FocusNetError(
            f"case {case.name}: {path} has {array.dtype} {array.shape}, expected {dtype} {case.shape}; "
            "prepare the data again"
        )
    return array


def label_values(case: CaseRecord, plan: Plan) -> np.ndarray:
    """Lookup table (256,), uint8: label value in the cache -> label value of the plan."""
    table = np.zeros(256, np.uint8)
    for value, organ in enumerate(case.organs, start=1):
        table[value] = plan.organ_names.index(organ) + 1
    return table


def cut(image: np.ndarray, labels: np.ndarray, warp: Warp, fill: float) -> tuple[Tensor, Tensor]:
    """Resample a crop. Voxels from outside of the volume are `fill` and label 0.

    Returns:
        HU (D, H, W) float32 by linear, labels (D, H, W) uint8 by nearest-neighbour interpolation.
    """
    low, high = warp.box()
    hu_box = _padded_box(image, low, high, fill)
    label_box = _padded_box(labels, low, high, 0)
    if warp.is_copy:
        start = np.round(warp.center - (np.array(warp.size) - 1) / 2).astype(int) - low
        window = tuple(slice(s, s + n) for s, n in zip(start, warp.size, strict=True))
        return hu_box[window].clone(), label_box[window].to(torch.uint8)
    # grid_sample counts from -1 to 1 and wants (x, y, z)
    to_grid = 2 / torch.tensor([n - 1 for n in hu_box.shape])
    grid = warp.voxels().sub_(torch.from_numpy(low)).mul_(to_grid).sub_(1).flip(-1)[None]

    def sample(box: Tensor, mode: str) -> Tensor:
        return F.grid_sample(box[None, None], grid, mode=mode, padding_mode="border", align_corners=True)[0, 0]

    return sample(hu_box, "bilinear"), sample(label_box, "nearest").to(torch.uint8)


def _padded_box(array: np.ndarray, low: np.ndarray, high: np.ndarray, fill: float) -> Tensor:
    box = torch.full(tuple(high - low), fill, dtype=torch.float32)
    inside_low = np.maximum(low, 0)
    inside_high = np.minimum(high, array.shape)
    if (inside_high <= inside_low).any():
        return box
    source = tuple(slice(a, b) for a, b in zip(inside_low, inside_high, strict=True))
    target = tuple(slice(a, b) for a, b in zip(inside_low - low, inside_high - low, strict=True))
    box[target] = torch.from_numpy(array[source].astype(np.float32))
    return box


def _crop_center(
    case: CaseRecord,
    organs: list[str],
    size: tuple[int, int, int],
    organ_share: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Middle of a crop in voxels: near one of `organs` or anywhere, inside the volume where that is large enough."""
    shape, extent = np.array(case.shape, dtype=float), np.array(size, dtype=float)
    middle = (shape - 1) / 2
    room = np.maximum(shape - extent, 0) / 2
    near_organ = rng.random() < organ_share and bool(organs)
    spread = rng.uniform(-1, 1, 3)
    if near_organ:
        organ = organs[rng.integers(len(organs))]
        center = np.array(case.centers[organ]) + spread * extent / 4
    else:
        center = middle + spread * room
    # whole voxels between crop and source make an unaugmented crop an exact copy
    return np.round(np.clip(center, middle - room, middle + room) - (extent - 1) / 2) + (extent - 1) / 2


def _mirror(
    hu: Tensor, labels: Tensor, points: dict[str, np.ndarray], mirrored_labels: Tensor
) -> tuple[Tensor, Tensor, dict[str, np.ndarray]]:
    """Mirror along x (left-right, since prepared volumes lie along LPS) and swap the labels of paired organs."""
    last = hu.shape[2] - 1
    swapped = {mirror_name(name): np.array([z, y, last - x]) for name, (z, y, x) in points.items()}
    return hu.flip(2), mirrored_labels[labels.flip(2).long()], swapped


def _mirrored_labels(plan: Plan) -> Tensor:
    """Lookup table: label value -> label value after a left-right mirror."""
    names = plan.organ_names
    alone = [name for name in names if mirror_name(name) not in names]
    if alone:
        raise FocusNetError(
            f"train.augment.mirror needs both sides of paired organs, but {mirror_name(alone[0])} is not segmented"
        )
    return torch.tensor([0, *(names.index(mirror_name(name)) + 1 for name in names)], dtype=torch.uint8)
