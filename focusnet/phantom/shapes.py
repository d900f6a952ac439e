"""Shapes as signed distances in mm (negative inside), evaluated only where in a volume they can lie.

Points are (x, y, z) in mm, LPS, relative to the centre of the brainstem.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np

Box = tuple[slice, slice, slice]
Point = tuple[float, float, float]

FAR = 1e3  # distance of everything outside of a shape's region
MARGIN_MM = 8.0  # distances are exact up to this far from a shape, for shells and soft edges


def tilt(degrees: float) -> np.ndarray:
    """Rotation about the x axis into a frame whose anterior end is `degrees` higher."""
    angle = np.deg2rad(degrees)
    return np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])


BASE = np.eye(3)
FACE = tilt(18)  # treatment position: the Frankfort plane is raised by about 18 degrees


def smooth_min(first: np.ndarray, second: np.ndarray, blend: float) -> np.ndarray:
    """Minimum of two distances whose kink is rounded over `blend` mm."""
    if blend <= 0:
        return np.minimum(first, second)
    overlap = np.maximum(blend - np.abs(first - second), 0)
    return np.minimum(first, second) - overlap * overlap / np.float32(4 * blend)


@dataclass(frozen=True)
class Ellipsoid:
    """An ellipsoid in a rotated frame, turned by `pitch` about x and `yaw` about z (degrees)."""

    centre: Point
    semi: Point
    frame: np.ndarray
    pitch: float = 0.0
    yaw: float = 0.0

    @property
    def _axes(self) -> np.ndarray:
        angle = np.deg2rad(self.yaw)
        turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
        return tilt(self.pitch) @ turn @ self.frame

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Corners of the bounding box in the base frame."""
        middle = self.frame.T @ np.array(self.centre)
        half = np.sqrt(((self._axes.T * np.array(self.semi)) ** 2).sum(axis=1))
        return middle - half, middle + half

    def distance(self, points: np.ndarray) -> np.ndarray:
        """First-order signed distance at points (3, ...)."""
        middle = self.frame.T @ np.array(self.centre)
        local = _rotate(self._axes, [points[i] - np.float32(middle[i]) for i in range(3)])
        scaled = [u / np.float32(s) for u, s in zip(local, self.semi, strict=True)]
        value = np.sqrt(sum(u * u for u in scaled))
        slope = np.sqrt(sum((u / np.float32(s)) ** 2 for u, s in zip(scaled, self.semi, strict=True)))
        inner = np.float32(1 / max(self.semi))
        return value * (value - 1) / np.maximum(slope, inner * np.float32(0.2))


@dataclass(frozen=True)
class Tube:
    """A tube of changing radius along a polyline; `stretch` divides its thickness along the frame's axes."""

    points: tuple[Point, ...]
    radii: tuple[float, ...]
    frame: np.ndarray
    stretch: Point = (1.0, 1.0, 1.0)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Corners of the bounding box in the base frame."""
        points = np.array(self.points)
        half = np.array(self.radii)[:, None] / np.array(self.stretch)
        corners = np.array([np.where([i & 1, i & 2, i & 4], points + half, points - half) for i in range(8)])
        corners = corners.reshape(-1, 3) @ self.frame
        return corners.min(axis=0), corners.max(axis=0)

    def distance(self, points: np.ndarray) -> np.ndarray:
        """Signed distance at points (3, ...), in units that are stretched as the tube is."""
        local = [u * np.float32(s) for u, s in zip(_rotate(self.frame, points), self.stretch, strict=True)]
        stops = np.array(self.points) * np.array(self.stretch)
        parts = (
            _segment(local, stops[i], stops[i + 1], self.radii[i], self.radii[i + 1]) for i in range(len(stops) - 1)
        )
        return reduce(np.minimum, parts)


@dataclass(frozen=True)
class HalfSpace:
    """Everything beyond a plane: normal . point > offset is outside."""

    normal: Point
    offset: float
    frame: np.ndarray

    def distance(self, points: np.ndarray) -> np.ndarray:
        """Signed distance at points (3, ...)."""
        normal = self.frame.T @ np.array(self.normal)
        length = np.linalg.norm(normal)
        return sum(points[i] * np.float32(normal[i] / length) for i in range(3)) - np.float32(self.offset / length)


Primitive = Ellipsoid | Tube


@dataclass(frozen=True)
class Shape:
    """A smooth union of primitives, cut by half-spaces, then varied: scaled, shifted, with a bumpy surface.

    Attributes:
        parts: What is united.
        blend: Rounding of the joints in mm.
        cut: Half-spaces the union is intersected with.
        side: 1 for midline shapes and the left one of a pair, -1 for the mirror image.
        scale, shift: Variation of the whole shape.
        bumps: Amplitude (mm) of the surface's bumps; `waves`: wave vectors (rad/mm) and phases, (K, 4).
    """

    parts: tuple[Primitive, ...]
    blend: float = 0.0
    cut: tuple[HalfSpace, ...] = ()
    side: int = 1
    scale: float = 1.0
    shift: Point = (0.0, 0.0, 0.0)
    bumps: float = 0.0
    waves: np.ndarray | None = None

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Corners of the bounding box in the base frame, before `side`, `scale` and `shift`."""
        corners = [part.bounds() for part in self.parts]
        return np.min([low for low, _ in corners], axis=0), np.max([high for _, high in corners], axis=0)

    def placed_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Corners of the bounding box in the base frame."""
        low, high = self.bounds()
        middle = (low + high) / 2
        half = (high - low) / 2 * self.scale + self.bumps
        middle = middle * [self.side, 1, 1] + np.array(self.shift)
        return middle - half, middle + half

    def distance(self, points: np.ndarray) -> np.ndarray:
        """Signed distance at points (3, ...)."""
        low, high = self.bounds()
        middle = (low + high) / 2
        sign = np.array([self.side, 1, 1])
        local = np.stack(
            [
                ((points[i] - np.float32(self.shift[i] + sign[i] * middle[i])) * np.float32(sign[i] / self.scale))
                + np.float32(middle[i])
                for i in range(3)
            ]
        )
        result = reduce(lambda a, b: smooth_min(a, b, self.blend), (part.distance(local) for part in self.parts))
        for plane in self.cut:
            result = np.maximum(result, plane.distance(local))
        if self.waves is not None:
            result = result + np.float32(self.bumps) * _bumps(local, self.waves)
        return result * np.float32(self.scale)

    def varied(self, rng: np.random.Generator, *, size: float, place: float, bumps: float = 0.06) -> "Shape":
        """The shape of one patient: `size` is the SD of its scale's logarithm, `place` that of its shift in mm."""
        low, high = self.bounds()
        extent = float((high - low).min())
        directions = rng.normal(size=(5, 3))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        wavelength = rng.uniform(0.8, 2.0, (5, 1)) * extent
        waves = np.concatenate([directions * 2 * np.pi / wavelength, rng.uniform(0, 2 * np.pi, (5, 1))], axis=1)
        shift = rng.normal(scale=place, size=3)
        scale = float(np.exp(np.clip(rng.normal(), -2.5, 2.5) * size))
        return replace(
            self,
            scale=scale,
            shift=(shift[0], shift[1], shift[2]),
            bumps=bumps * extent / 2,
            waves=waves.astype(np.float32),
        )


@dataclass
class Field:
    """A volume's voxels in the phantom's own space.

    Attributes:
        points: (3, D, H, W) float32 coordinates of every voxel.
        spacing: Voxel size (z, y, x) in mm.
    """

    points: np.ndarray
    spacing: tuple[float, float, float]

    def __post_init__(self) -> None:
        self._step = [max(1, round(8 / s)) for s in self.spacing]
        z, y, x = self._step
        self._coarse = self.points[:, ::z, ::y, ::x]

    @property
    def shape(self) -> tuple[int, ...]:
        """(D, H, W)."""
        return self.points.shape[1:]

    def region(self, shape: Shape, margin: float = MARGIN_MM) -> Box | None:
        """The box of voxels within `margin` mm of a shape's bounding box, None if there are none."""
        low, high = shape.placed_bounds()
        reach = margin + 8
        near = np.ones(self._coarse.shape[1:], bool)
        for axis in range(3):
            near &= (self._coarse[axis] > low[axis] - reach) & (self._coarse[axis] < high[axis] + reach)
        if not near.any():
            return None
        sides = []
        for axis, step in enumerate(self._step):
            hits = np.flatnonzero(near.any(axis=tuple(a for a in range(3) if a != axis)))
            sides.append(slice(int(hits[0]) * step, min((int(hits[-1]) + 1) * step, self.shape[axis])))
        return sides[0], sides[1], sides[2]

    def local(self, shape: Shape, margin: float = MARGIN_MM) -> "Local | None":
        """A shape's distances in its region."""
        box = self.region(shape, margin)
        return None if box is None else Local(box, shape.distance(self.points[:, box[0], box[1], box[2]]))


@dataclass
class Local:
    """Signed distances inside a box of voxels; outside of the box they are `FAR`."""

    box: Box
    distance: np.ndarray

    def at(self, box: Box) -> np.ndarray:
        """The distances in another box."""
        result = np.full([side.stop - side.start for side in box], FAR, np.float32)
        common = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(self.box, box, strict=True)]
        if all(side.start < side.stop for side in common):
            into, out_of = (
                tuple(slice(c.start - b.start, c.stop - b.start) for c, b in zip(common, other, strict=True))
                for other in (box, self.box)
            )
            result[into] = self.distance[out_of]
        return result

    def without(self, other: "Local | None") -> "Local":
        """This shape with another one taken out of it."""
        if other is None:
            return self
        return Local(self.box, np.maximum(self.distance, -other.at(self.box)))

    def mask(self, shape: tuple[int, ...], voxels: float | None = None) -> np.ndarray:
        """Voxels inside the shape, bool (D, H, W); with `voxels`, the level set that has that many."""
        level = 0.0
        if voxels is not None:
            count = int(np.clip(round(voxels), 1, self.distance.size - 1))
            level = float(np.partition(self.distance, count, axis=None)[count])
        mask = np.zeros(shape, bool)
        mask[self.box] = self.distance < level
        return mask


def smooth_field(rng: np.random.Generator, axes: Sequence[np.ndarray], pitch: float) -> np.ndarray:
    """A smooth random field of unit SD, the same on every grid: cubic B-splines on a lattice.

    Args:
        axes: Positions (mm) of the grid along each of its axes.
        pitch: Distance of the lattice's points in mm.
    """
    reach = 320.0  # fixed, so that the same patient on another grid is the same
    knots = np.arange(-reach, reach + pitch, pitch)
    lattice = rng.standard_normal((len(knots),) * 3).astype(np.float32)
    for positions in axes:
        weights = _cubic((np.asarray(positions)[:, None] - knots) / pitch).astype(np.float32)
        lattice = np.moveaxis(np.tensordot(weights, lattice, axes=(1, 0)), 0, -1)
    return lattice / np.float32(0.479**1.5)  # SD of a sum of three-dimensional B-splines, averaged over positions


def _cubic(t: np.ndarray) -> np.ndarray:
    t = np.abs(t)
    return np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.where(t < 2, (2 - t) ** 3 / 6, 0))


def _rotate(frame: np.ndarray, points: Sequence[np.ndarray] | np.ndarray) -> list[np.ndarray]:
    if np.array_equal(frame, BASE):
        return [points[0], points[1], points[2]]
    return [sum(points[j] * np.float32(frame[i, j]) for j in range(3) if abs(frame[i, j]) > 1e-9) for i in range(3)]


def _segment(points: list[np.ndarray], start: np.ndarray, end: np.ndarray, first: float, last: float) -> np.ndarray:
    along = end - start
    rest = [p - np.float32(s) for p, s in zip(points, start, strict=True)]
    t = sum(r * np.float32(a) for r, a in zip(rest, along, strict=True)) / np.float32(along @ along)
    t = np.clip(t, 0, 1)
    square = sum((r - t * np.float32(a)) ** 2 for r, a in zip(rest, along, strict=True))
    return np.sqrt(square) - (np.float32(first) + t * np.float32(last - first))


def _bumps(points: np.ndarray, waves: np.ndarray) -> np.ndarray:
    total = sum(np.sin(points[0] * wave[0] + points[1] * wave[1] + points[2] * wave[2] + wave[3]) for wave in waves)
    return total * np.float32(np.sqrt(2 / len(waves)))
