"""From a CT to the network's grid and back.

The prepared grid runs along the patient's axes (z to superior, y to posterior, x to the patient's left, as
far as the scan's own direction allows), so that left and right organs look the same whatever way a file
stores its voxels.
"""

import math
from itertools import permutations
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np

from ..config import DataConfig
from ..errors import FocusNetError
from .images import Grid, Volume, cropped_grid, resample, resampled_grid

if TYPE_CHECKING:
    from torch import Tensor

Box = tuple[slice, slice, slice]
Array = TypeVar("Array", "np.ndarray", "Tensor")

BODY_HU = -300
_COARSE_MM = 4.0
_SIZABLE = 0.01
_MOST_GROWTH = 1000


def body_box(volume: Volume, margin_mm: float = 10.0) -> Box:
    """The box (z, y, x) of the patient, found from HU alone, with a margin around it.

    The largest part above -300 HU on a coarse copy, after an opening that cuts off the couch. Along z every
    part of at least 1 % of its size counts, so that a CT that was masked to the planned region keeps its thin
    ends. The whole volume if there is no body.
    """
    from scipy import ndimage

    spacing = np.array(volume.grid.spacing)
    step = np.maximum(1, np.round(_COARSE_MM / spacing).astype(int))
    tissue = volume.array[:: step[0], :: step[1], :: step[2]] > BODY_HU
    # padded with True: erosion must not eat a body that the volume's faces cut
    core, count = ndimage.label(ndimage.binary_erosion(tissue, border_value=1))
    if count == 0:
        return _whole(volume)
    core = core == 1 + np.argmax(np.bincount(core.ravel())[1:])
    parts, _ = ndimage.label(tissue)
    volumes = np.bincount(parts.ravel())
    volumes[0] = 0
    sizable = (volumes >= max(1, _SIZABLE * volumes.max()))[parts]
    body = ndimage.binary_dilation(core, iterations=2, mask=tissue)
    margin = np.ceil(margin_mm / spacing).astype(int)
    sides = []
    for axis, size in enumerate(volume.array.shape):
        part = sizable if axis == 0 else body
        used = np.flatnonzero(part.any(axis=tuple(a for a in range(3) if a != axis)))
        start = max(0, int(used[0] * step[axis] - margin[axis]))
        stop = min(size, int((used[-1] + 1) * step[axis] + margin[axis]))
        sides.append(slice(start, stop))
    return sides[0], sides[1], sides[2]


def reorient(volume: Volume) -> Volume:
    """The same voxels (a view) ordered along the patient's axes: z to superior, y to posterior, x to the
    left."""
    columns = np.reshape(volume.grid.direction, (3, 3))
    order = max(permutations(range(3)), key=lambda axes: sum(abs(columns[row, axis]) for row, axis in enumerate(axes)))
    flip = [columns[row, axis] < 0 for row, axis in enumerate(order)]
    if list(order) == [0, 1, 2] and not any(flip):
        return volume
    # `order` and `flip` are along (x, y, z), arrays along (z, y, x)
    array_order = [2 - order[2], 2 - order[1], 2 - order[0]]
    array_flip = flip[::-1]
    array = volume.array.transpose(array_order)
    array = array[tuple(slice(None, None, -1 if flipped else 1) for flipped in array_flip)]
    first = [0.0, 0.0, 0.0]
    for axis, flipped in zip(array_order, array_flip, strict=True):
        first[axis] = volume.grid.shape[axis] - 1 if flipped else 0
    signs = np.where(flip, -1.0, 1.0)
    shape = [volume.grid.shape[axis] for axis in array_order]
    spacing = [volume.grid.spacing[axis] for axis in array_order]
    grid = Grid(
        shape=(shape[0], shape[1], shape[2]),
        spacing=(spacing[0], spacing[1], spacing[2]),
        origin=cast(tuple[float, float, float], tuple(volume.grid.point(first).tolist())),
        direction=tuple((columns[:, list(order)] * signs).ravel().tolist()),
    )
    return Volume(array, grid)


def prepare_image(volume: Volume, config: DataConfig) -> Volume:
    """Crop a CT to the body, clip it to `config.hu_range` and resample it linearly to `config.spacing`.

    Returns:
        int16 HU; its grid is the prepared grid, along the patient's axes.

    Raises:
        FocusNetError: `volume` would grow more than 1000-fold, so that its spacing or `config.spacing` must be wrong.
    """
    volume = reorient(volume)
    box = body_box(volume, config.body_margin_mm)
    dtype = volume.array.dtype
    low, high = (dtype.type(limit) for limit in np.clip(config.hu_range, -32768, 32767))
    # clipped first, so that padding at -3024 or metal at 30000 HU does not bleed into its neighbours
    body = Volume(np.clip(volume.array[box], low, high), cropped_grid(volume.grid, box))
    grid = resampled_grid(body.grid, config.spacing)
    if math.prod(grid.shape) > _MOST_GROWTH * body.array.size:
        raise FocusNetError(
            f"its spacing, {volume.grid.spacing} mm (z, y, x), gives more than {_MOST_GROWTH} voxels of data.spacing, "
            f"{config.spacing} mm, for each of its own: one of them must be wrong"
        )
    prepared = resample(body, grid, fill=float(low))
    return Volume(np.rint(prepared.array).astype(np.int16, copy=False), prepared.grid)


def normalize(hu: Array, config: DataConfig) -> Array:
    """(clip(HU, hu_range) + 100) / 1000 as float32, of an array or a tensor."""
    low, high = config.hu_range
    if isinstance(hu, np.ndarray):
        return (np.clip(hu.astype(np.float32), low, high) + np.float32(100)) / np.float32(1000)
    return (hu.float().clamp(low, high) + 100) / 1000


def restore_labels(labels: np.ndarray, prepared: Grid, original: Grid) -> np.ndarray:
    """Labels on the prepared grid -> labels (uint8) on the original grid by nearest neighbour; 0 outside."""
    return resample(Volume(labels.astype(np.uint8, copy=False), prepared), original, labels=True).array


def _whole(volume: Volume) -> Box:
    z, y, x = volume.array.shape
    return slice(0, z), slice(0, y), slice(0, x)
