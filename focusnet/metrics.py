"""Agreement of two masks of one organ: Dice, 95 % Hausdorff distance, centres and volumes.

Masks are arrays (z, y, x) of one shape, bool or numbers (everything but 0 is organ); spacings are (z, y, x)
in mm. docs/metrics.md gives the definitions and how they compare with those of other packages.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, center_of_mass, distance_transform_edt

Mask = NDArray[Any]
Box = tuple[slice, ...]
PERCENTILE = 95.0


def bounding_box(mask: Mask) -> Box | None:
    """The smallest box that holds the whole mask, as slices; None if the mask is empty."""
    slices: list[slice] = []
    for axis in range(mask.ndim):
        # later axes only look at what the earlier ones left, which is little for an organ in a whole CT
        view = mask[tuple(slices)]
        filled = np.flatnonzero(view.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        if filled.size == 0:
            return None
        slices.append(slice(int(filled[0]), int(filled[-1]) + 1))
    return tuple(slices)


def union_box(first: Box, second: Box) -> Box:
    """The smallest box that holds both boxes."""
    return tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(first, second, strict=True))


def dice(truth: Mask, prediction: Mask) -> float:
    """Dice similarity coefficient 2 |T and P| / (|T| + |P|), 0 to 1; NaN if both masks are empty.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(truth, prediction)
    truth, prediction = truth.astype(bool, copy=False), prediction.astype(bool, copy=False)
    total = np.count_nonzero(truth) + np.count_nonzero(prediction)
    return 2 * np.count_nonzero(truth & prediction) / total if total else float("nan")


def hausdorff95(truth: Mask, prediction: Mask, spacing: Sequence[float]) -> float:
    """95 % Hausdorff distance in mm: the larger of the two directed 95th percentiles of surface distances.

    A mask's surface is its voxels with at least one 6-neighbour outside the mask; beyond the array's border
    is outside. Each surface voxel's distance runs from its centre to the centre of the nearest surface voxel
    of the other mask (exact, anisotropic). Percentiles interpolate linearly. If one mask is empty the result
    is the penalty `volume_diagonal(truth.shape, spacing)`, so pass whole volumes, not crops; if both: NaN.

    Raises:
        ValueError: the shapes differ, or the spacing does not fit them.
    """
    _check_shapes(truth, prediction)
    if len(spacing) != truth.ndim:
        raise ValueError(f"spacing {tuple(spacing)} has {len(spacing)} values, shape {truth.shape} needs {truth.ndim}")
    boxes = bounding_box(truth), bounding_box(prediction)
    if boxes[0] is None or boxes[1] is None:
        return float("nan") if boxes == (None, None) else volume_diagonal(truth.shape, spacing)
    # exact: what lies outside this box is neither mask nor nearest surface
    box = union_box(boxes[0], boxes[1])
    surfaces = _surface(truth[box]), _surface(prediction[box])
    return max(_directed(*surfaces, spacing), _directed(*surfaces[::-1], spacing))


def volume_diagonal(shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Length in mm of a volume's diagonal: the 95 % Hausdorff distance a missed organ is given."""
    return float(np.linalg.norm(np.multiply(shape, spacing)))


def center_distance_mm(truth: Mask, prediction: Mask, spacing: Sequence[float]) -> float:
    """Distance in mm of the two centres of mass; NaN if a mask is empty.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(truth, prediction)
    if not truth.any() or not prediction.any():
        return float("nan")
    centers = [np.asarray(center_of_mass(mask != 0)) for mask in (truth, prediction)]
    return float(np.linalg.norm((centers[0] - centers[1]) * np.asarray(spacing)))


def relative_volume_difference(truth: Mask, prediction: Mask) -> float:
    """(|P| - |T|) / |T|: -1 for a missed organ, NaN if the truth is empty."""
    expected = np.count_nonzero(truth)
    return (np.count_nonzero(prediction) - expected) / expected if expected else float("nan")


def _surface(mask: Mask) -> NDArray[np.bool_]:
    mask = mask.astype(bool, copy=False)
    return mask & ~binary_erosion(mask)


def _directed(start: NDArray[np.bool_], goal: NDArray[np.bool_], spacing: Sequence[float]) -> float:
    distances = distance_transform_edt(~goal, sampling=spacing)
    return float(np.percentile(distances[start], PERCENTILE))


def _check_shapes(truth: Mask, prediction: Mask) -> None:
    if truth.shape != prediction.shape:
        raise ValueError(f"masks must have one shape, got {truth.shape} and {prediction.shape}")
