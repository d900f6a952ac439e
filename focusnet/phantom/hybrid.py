"""Hybrid phantoms: real contours with painted HU. The shapes are real; every intensity is synthetic."""

from collections.abc import Mapping

import numpy as np
from scipy import ndimage

from ..data.images import Grid, Volume, cropped_grid
from ..errors import FocusNetError
from . import anatomy
from .render import Patient, base_name, deformed, locals_of, paint
from .shapes import Box, Field, Local

MARGIN_MM = 30.0  # kept around the contours
REACH_MM = 35.0  # how far a landmark pulls the tissues around it
_EXTENDED = {
    "SpinalCord",
    "SpinalCanal",
    "Lung",
    "Brain",
    "Esophagus",
    "Trachea",
}  # their centre depends on what was scanned


def make_hybrid(
    masks: Mapping[str, np.ndarray], grid: Grid, index: int, seed: int
) -> tuple[Volume, dict[str, np.ndarray]]:
    """A CT painted around real contours.

    The phantom's anatomy is placed by the organs it shares with the contours (a similarity, then a smooth warp that
    meets their centres and follows the spinal cord); body and tissues are painted there, and over them the contoured
    organs in their real shape.

    Args:
        masks: Organ (TG-263 name) -> bool (z, y, x); empty ones are left out.
        grid: Their grid, axes along LPS.
        index, seed: Choose HU, texture and noise, as in `make_phantom`.

    Returns:
        CT as int16 HU and the masks, both cropped to the contours and 30 mm around.

    Raises:
        FocusNetError: too few known organs to place the head, or oblique axes.
    """
    if not np.allclose(grid.direction, np.eye(3).ravel(), atol=1e-3):
        raise FocusNetError("hybrid phantoms need label maps with axes along LPS; resample them first")
    present = {name: mask for name, mask in masks.items() if mask.any()}
    box = _crop(present, grid)
    present = {name: mask[box] for name, mask in present.items()}
    grid = cropped_grid(grid, box)
    patient = Patient.sample(seed, index)
    middle = _centre(present["Brainstem"], grid) if "Brainstem" in present else np.zeros(3)
    axes = [np.array(grid.origin)[2 - i] - middle[2 - i] + grid.spacing[i] * np.arange(grid.shape[i]) for i in range(3)]
    field = _placed(present, axes, grid, patient)
    organs = locals_of(field, patient.organs)
    organs |= {name: _local(mask, grid) for name, mask in present.items()}
    return Volume(paint(patient, field, axes, organs), grid), present


def _crop(masks: Mapping[str, np.ndarray], grid: Grid) -> Box:
    shapes = [mask for name, mask in masks.items() if base_name(name) != "Lung"]
    if not shapes:
        raise FocusNetError("no contours to paint, expected at least 3 organs of the head")
    inside = np.logical_or.reduce(shapes)
    sides = []
    for axis in range(3):
        hits = np.flatnonzero(inside.any(axis=tuple(a for a in range(3) if a != axis)))
        margin = round((10.0 if axis == 0 else MARGIN_MM) / grid.spacing[axis])
        sides.append(slice(max(int(hits[0]) - margin, 0), min(int(hits[-1]) + margin + 1, grid.shape[axis])))
    return sides[0], sides[1], sides[2]


def _centre(mask: np.ndarray, grid: Grid) -> np.ndarray:
    return grid.point(np.argwhere(mask).mean(axis=0))


def _placed(masks: Mapping[str, np.ndarray], axes: list[np.ndarray], grid: Grid, patient: Patient) -> Field:
    """The phantom's coordinates at every voxel, such that its organs lie where the contours are."""
    origin = np.array([axes[2][0], axes[1][0], axes[0][0]])
    local = Grid(grid.shape, grid.spacing, (float(origin[0]), float(origin[1]), float(origin[2])))
    known = [name for name in sorted(masks) if base_name(name) in anatomy.ORGANS and base_name(name) not in _EXTENDED]
    if len(known) < 3:
        raise FocusNetError(
            f"{', '.join(sorted(masks))} do not place the head, expected 3 organs or more besides the cord"
        )
    sources = np.array([_centre(masks[name], local) for name in known])
    targets = np.array([_mean_place(name) for name in known])
    matrix, shift = _similarity(sources, targets)
    z, y, x = (values.astype(np.float32) for values in axes)
    points = np.empty((3, *grid.shape), np.float32)
    for i in range(3):
        points[i] = (matrix[i, 2] * z + shift[i])[:, None, None] + (matrix[i, 1] * y)[:, None] + matrix[i, 0] * x
    cord = masks.get("SpinalCord", masks.get("SpinalCanal"))
    if cord is not None:
        along = _cord_landmarks(cord, local)
        placed = along @ matrix.T + shift
        sources = np.concatenate([sources, along])
        targets = np.concatenate([targets, [[0, anatomy.cord_at(p[2]), p[2]] for p in placed]])
    _pull(points, (z, y, x), sources, targets - (sources @ matrix.T + shift))
    return deformed(points, patient.stream("deformation"), axes, grid.spacing)


def _mean_place(name: str) -> np.ndarray:
    return anatomy.centre(base_name(name)) * ([-1, 1, 1] if name.endswith("_R") else [1, 1, 1])


def _similarity(sources: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rotation with scale (3, 3) and shift that map the sources best onto the targets (Umeyama 1991)."""
    a, b = sources - sources.mean(axis=0), targets - targets.mean(axis=0)
    u, values, vt = np.linalg.svd(b.T @ a)
    sign = np.array([1, 1, np.sign(np.linalg.det(u @ vt))])
    matrix = (u * sign) @ vt * ((values * sign).sum() / (a**2).sum())
    return matrix, targets.mean(axis=0) - matrix @ sources.mean(axis=0)


def _cord_landmarks(mask: np.ndarray, grid: Grid) -> np.ndarray:
    """Points (K, 3) on the cord's axis, 20 mm apart."""
    slices = np.flatnonzero(mask.any(axis=(1, 2)))
    step = max(1, round(20 / grid.spacing[0]))
    return np.array([grid.point([k, *np.argwhere(mask[k]).mean(axis=0)]) for k in slices[::step]])


def _pull(points: np.ndarray, axes: tuple[np.ndarray, ...], sources: np.ndarray, shifts: np.ndarray) -> None:
    """Add the landmarks' shifts to the points around them: a normalised sum of Gaussians, fading out far away."""
    z, y, x = axes
    total = np.full(points.shape[1:], 0.3, np.float32)
    pulled = np.zeros_like(points)
    for source, shift in zip(sources, shifts, strict=True):
        wx, wy, wz = (np.exp(-0.5 * ((u - s) / REACH_MM) ** 2) for u, s in zip((x, y, z), source, strict=True))
        weight = (wz[:, None, None] * wy[:, None] * wx).astype(np.float32)
        total += weight
        for i in range(3):
            pulled[i] += np.float32(shift[i]) * weight
    points += pulled / total


def _local(mask: np.ndarray, grid: Grid) -> Local:
    """Signed distance of a mask's surface in mm, in its box and 12 mm around."""
    inside = np.argwhere(mask)
    margin = [round(12 / s) + 1 for s in grid.spacing]
    low = np.maximum(inside.min(axis=0) - margin, 0)
    high = np.minimum(inside.max(axis=0) + np.array(margin) + 1, mask.shape)
    box = (
        slice(int(low[0]), int(high[0])),
        slice(int(low[1]), int(high[1])),
        slice(int(low[2]), int(high[2])),
    )
    part = mask[box]
    half = 0.5 * min(grid.spacing)  # the surface runs between voxel centres
    outer = ndimage.distance_transform_edt(~part, grid.spacing)
    inner = ndimage.distance_transform_edt(part, grid.spacing) if not part.all() else np.full(part.shape, 10.0)
    return Local(box, np.where(part, half - inner, outer - half).astype(np.float32))
