"""Training crops: cut from the cached volumes and augmented; the same seed gives the same crops after a resume too."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ..config import AugmentConfig, Config
from ..errors import FocusNetError
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
        epoch, position = divmod(index, self.length)
        case = self._case(epoch, position)
        try:
            return self._crop(case, epoch, position)
        except FocusNetError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise RuntimeError(f"a training crop of case {case.name} failed: {reason}") from error

    def _crop(self, case: CaseRecord, epoch: int, position: int) -> Crop:
        rng = np.random.default_rng([self.config.train.seed, 1, epoch, position])
        image, labels = load_case(self.cache, case)
        size, spacing = self.config.train.crop, self.plan.spacing
        organs = [name for name in case.organs if name in self.focus]
        center = _crop_center(case, organs, size, self.config.train.organ_crops, rng)
        to_source = _random_affine(self.config.train.augment, spacing, rng)
        hu, label = cut(image, labels, center, to_source, size, fill=self.config.data.hu_range[0])
        label = torch.from_numpy(label_values(case, self.plan))[label.long()]
        hu = _change_intensity(hu, self.config.train.augment, rng)
        points = self._points(case, center, to_source, size)
        if self.mirrored_labels is not None and rng.random() < 0.5:
            hu, label, points = _mirror(hu, label, points, self.mirrored_labels)
        small = [points.get(name, np.full(3, np.nan)) for name in self.plan.small_organs]
        return Crop(
            image=normalize(hu, self.config.data)[None],
            labels=label,
            contoured=torch.tensor([True, *(name in points for name in self.plan.organ_names)]),
            centers=torch.from_numpy(np.array(small, dtype=np.float32).reshape(-1, 3)),
        )

    def _case(self, epoch: int, position: int) -> CaseRecord:
        # an epoch longer than the list goes through several shuffled rounds of it
        round_, place = divmod(epoch * self.length + position, len(self.cases))
        order = np.random.default_rng([self.config.train.seed, 0, round_]).permutation(len(self.cases))
        return self.cases[order[place]]

    def _points(
        self, case: CaseRecord, center: np.ndarray, to_source: np.ndarray, size: tuple[int, int, int]
    ) -> dict[str, np.ndarray]:
        inverse, middle = np.linalg.inv(to_source), (np.array(size) - 1) / 2
        return {name: inverse @ (np.array(point) - center) + middle for name, point in case.centers.items()}


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


def cut(
    image: np.ndarray,
    labels: np.ndarray,
    center: np.ndarray,
    to_source: np.ndarray,
    size: tuple[int, int, int],
    fill: float,
) -> tuple[Tensor, Tensor]:
    """Resample a crop of `size` around `center` (voxels of the source).

    A crop voxel at offset `o` from the crop's middle comes from `center + to_source @ o`. Voxels from outside of the
    volume are `fill` and label 0.

    Returns:
        HU (D, H, W) float32 by linear, labels (D, H, W) uint8 by nearest-neighbour interpolation.
    """
    half = (np.array(size) - 1) / 2
    reach = np.abs(to_source) @ half + 1
    low = np.floor(center - reach).astype(int)
    high = np.ceil(center + reach).astype(int) + 1
    hu_box = _padded_box(image, low, high, fill)
    label_box = _padded_box(labels, low, high, 0)
    if np.array_equal(to_source, np.eye(3)):
        start = np.round(center - half).astype(int) - low
        window = tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))
        return hu_box[window].clone(), label_box[window].to(torch.uint8)
    axes = [torch.arange(n, dtype=torch.float64) - h for n, h in zip(size, half, strict=True)]
    offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    voxels = offsets @ torch.from_numpy(to_source).T + torch.from_numpy(center - low)
    extent = torch.tensor(hu_box.shape, dtype=torch.float64) - 1
    grid = (2 * voxels / extent - 1).flip(-1).float()[None]

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


def _random_affine(augment: AugmentConfig, spacing: tuple[float, float, float], rng: np.random.Generator) -> np.ndarray:
    """(3, 3) matrix from voxel offsets in the crop to voxel offsets in the source; rotations act in mm."""
    rotation = np.eye(3)
    for axis, limit in enumerate(augment.rotation_deg):
        angle = np.deg2rad(rng.uniform(-limit, limit))
        a, b = [other for other in range(3) if other != axis]
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        rotation = rotation @ turn
    zoom = np.diag([1 + rng.uniform(-limit, limit) for limit in augment.zoom])
    matrix = np.diag(1 / np.array(spacing)) @ rotation @ zoom @ np.diag(spacing)
    return np.eye(3) if np.allclose(matrix, np.eye(3), atol=1e-12) else matrix


def _change_intensity(hu: Tensor, augment: AugmentConfig, rng: np.random.Generator) -> Tensor:
    shift = rng.uniform(-augment.shift_hu, augment.shift_hu)
    deviation = rng.uniform(0, augment.noise_hu)
    if shift == 0 and deviation == 0:
        return hu
    noise = rng.standard_normal(tuple(hu.shape), dtype=np.float32)
    return hu + torch.from_numpy(noise).mul_(deviation).add_(shift)


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
