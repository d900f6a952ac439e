"""Random changes of a training crop: where its voxels come from, and their intensities."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..config import AugmentConfig, Triple

#: Share of the crops that are blurred, and of those with thick slices: the CTs to segment are mostly as sharp as ours.
_BLURRED = 0.25
#: Voxels within which a point's place in the crop is found.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Warp:
    """The voxel of a crop at offset `o` from its middle comes from `center + matrix @ (o + u(o))` of the source.

    `u` is a uniform cubic B-spline, the free-form deformation of Rueckert et al., IEEE TMI 1999.

    Attributes:
        size: Of the crop in voxels (D, H, W).
        center: Voxel coordinates of the source (3,).
        matrix: (3, 3).
        control: Displacements of the control points in voxels of the crop, (l, m, n, 3); None for none. The second
            control point along an axis is at the crop's first voxel.
        pitch: Voxels from one control point to the next (3,).
    """

    size: Triple
    center: np.ndarray
    matrix: np.ndarray
    control: np.ndarray | None = None
    pitch: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @property
    def is_copy(self) -> bool:
        """Whether the crop's voxels are those of the source."""
        return self.control is None and np.array_equal(self.matrix, np.eye(3))

    def box(self) -> tuple[np.ndarray, np.ndarray]:
        """First and last-plus-one voxel (3,) of the source around all that the crop comes from."""
        half = (np.array(self.size) - 1) / 2
        # a B-spline stays within its coefficients
        moved = 0.0 if self.control is None else np.abs(self.control).max(axis=(0, 1, 2))
        reach = np.abs(self.matrix) @ (half + moved) + 1
        return np.floor(self.center - reach).astype(int), np.ceil(self.center + reach).astype(int) + 1

    def voxels(self) -> Tensor:
        """(D, H, W, 3) float32: the source voxel of every voxel of the crop."""
        columns = [np.outer(np.arange(n) - (n - 1) / 2, self.matrix[:, axis]) for axis, n in enumerate(self.size)]
        z, y, x = (torch.from_numpy(column).float() for column in (columns[0] + self.center, *columns[1:]))
        voxels = z[:, None, None] + y[:, None] + x
        if self.control is not None:
            weights = [self._weights(np.arange(n), axis) for axis, n in enumerate(self.size)]
            z, y, x, moved = (torch.from_numpy(w).float() for w in (*weights, self.control @ self.matrix.T))
            in_plane = torch.einsum("hy,wx,zyxc->zhwc", y, x, moved)
            voxels.view(len(z), -1).addmm_(z, in_plane.flatten(1))
        return voxels

    def to_crop(self, points: np.ndarray) -> np.ndarray:
        """Where voxel coordinates (K, 3) of the source lie in the crop, or beyond its faces."""
        middle = (np.array(self.size) - 1) / 2
        straight = (points - self.center) @ np.linalg.inv(self.matrix).T + middle
        found = straight
        for _ in range(100):  # each is a contraction: see `check` of the configuration
            last, found = found, straight - self._displacement(found)
            if np.abs(found - last).max(initial=0) < _TOLERANCE:
                break
        return found

    def _displacement(self, points: np.ndarray) -> np.ndarray:
        """`u` in voxels at voxel coordinates (K, 3) of the crop; beyond its faces as on them."""
        if self.control is None:
            return np.zeros_like(points)
        z, y, x = (self._weights(points[:, axis], axis) for axis in range(3))
        return np.einsum("kz,ky,kx,zyxc->kc", z, y, x, self.control)

    def _weights(self, positions: np.ndarray, axis: int) -> np.ndarray:
        """(positions, control points of the axis)."""
        pitch, last = self.pitch[axis], self.size[axis] - 1
        knots = np.arange(_control_points(self.size[axis], pitch)) - 1
        distance = np.abs(np.clip(positions, 0, last)[:, None] / pitch - knots)
        near = 2 / 3 - distance**2 + distance**3 / 2
        return np.where(distance < 1, near, np.clip(2 - distance, 0, None) ** 3 / 6)


def _control_points(size: int, pitch: float) -> int:
    """That an axis of a crop needs; a cubic B-spline reaches two of them to either side."""
    return int((size - 1) / pitch) + 4


def random_warp(
    size: Triple,
    center: np.ndarray,
    augment: AugmentConfig,
    spacing: tuple[float, float, float],
    rng: np.random.Generator,
) -> Warp:
    """Rotated, zoomed and deformed around `center`, a voxel coordinate of the source; all of it acts in mm."""
    matrix = _random_affine(augment, spacing, rng)
    if augment.elastic_mm == 0:
        return Warp(size, center, matrix)
    z, y, x = pitch = tuple(augment.elastic_grid_mm / side for side in spacing)
    lattice = tuple(_control_points(n, p) for n, p in zip(size, pitch, strict=True))
    control = rng.uniform(-augment.elastic_mm, augment.elastic_mm, (*lattice, 3)) / np.array(spacing)
    return Warp(size, center, matrix, control, (z, y, x))


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


def change_intensity(
    hu: Tensor, augment: AugmentConfig, spacing: tuple[float, float, float], rng: np.random.Generator
) -> Tensor:
    """What another tube voltage, reconstruction kernel, slice thickness, dose and calibration do to HU (D, H, W)."""
    if augment.contrast > 0:
        hu = hu + hu.clamp_min(0) * rng.uniform(-augment.contrast, augment.contrast)
    if augment.blur_mm > 0 and rng.random() < _BLURRED:
        hu = _blurred(hu, rng.uniform(0, augment.blur_mm), spacing)
    if augment.slice_mm > spacing[0] and rng.random() < _BLURRED:
        thickness = rng.uniform(spacing[0], augment.slice_mm)
        slices = thick_slices(len(hu), spacing[0], thickness, first=rng.uniform(-thickness, 0))
        hu = (torch.from_numpy(slices).float() @ hu.flatten(1)).view_as(hu)
    shift = rng.uniform(-augment.shift_hu, augment.shift_hu)
    deviation = rng.uniform(0, augment.noise_hu)
    if shift == 0 and deviation == 0:
        return hu
    noise = rng.standard_normal(tuple(hu.shape), dtype=np.float32)
    return hu + torch.from_numpy(noise).mul_(deviation).add_(shift)


def _blurred(hu: Tensor, deviation_mm: float, spacing: tuple[float, float, float]) -> Tensor:
    from scipy import ndimage

    _, y, x = spacing
    deviations = (0, deviation_mm / y, deviation_mm / x)
    return torch.from_numpy(ndimage.gaussian_filter(hu.numpy(), deviations, mode="nearest", truncate=3))


def thick_slices(count: int, spacing: float, thickness: float, first: float) -> np.ndarray:
    """(count, count) matrix that averages slices over `thickness`, one thick slice beside the other, and interpolates.

    Args:
        count: Number of slices.
        spacing: Of them, in mm.
        thickness: Of the thick ones, in mm, at least `spacing`.
        first: Centre of a thick one in mm from the first slice's centre, above -thickness and at most 0.
    """
    at = np.arange(count) * spacing
    # the outermost ones are centred on the outermost slices, so that none is empty
    thick = np.clip(np.arange(first, at[-1] + thickness, thickness), 0, at[-1])
    share = np.clip((thickness + spacing) / 2 - np.abs(thick[:, None] - at), 0, spacing)
    share /= share.sum(axis=1, keepdims=True)
    return np.stack([np.interp(at, thick, column) for column in share.T], axis=1)
