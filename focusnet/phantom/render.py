"""From anatomy to voxels: a patient's variation and pose, the painting of tissues, what a scanner adds."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal
from zlib import crc32

import numpy as np
from scipy import ndimage

from ..data.images import Grid, Volume
from ..data.organs import canonical_name
from ..errors import FocusNetError
from . import anatomy
from .anatomy import OrganSpec, Tissue
from .shapes import FACE, Box, Field, Local, Shape, smooth_field, smooth_min

FIELDS_OF_VIEW: dict[str, tuple[float, float, float]] = {
    "full": (300.0, 280.0, 340.0),
    "head": (180.0, 192.0, 192.0),
}
PAPER_ORGANS = tuple(
    name for base in anatomy.ORGANS if base != "Glnd_Submand"
    for name in ((f"{base}_L", f"{base}_R") if base in anatomy.PAIRED else (base,))
)  # fmt: skip
ALL_ORGANS = tuple(
    name for base in anatomy.ORGANS for name in ((f"{base}_L", f"{base}_R") if base in anatomy.PAIRED else (base,))
)
POSE_SD = np.deg2rad([8.6, 2.6, 2.4])  # pitch, yaw, roll of heads in planning CTs
PIVOT = np.array([0.0, 12.0, -45.0])  # the head turns about the first vertebrae ...
BEND_MM = (-175.0, -60.0)  # ... and the neck follows, less and less, down to the chest
AIR = -1000.0

_PAINTED_LATE = {"Glnd_Lacrimal", "Cochlea", "SpinalCanal"}

FieldOfView = Literal["full", "head"] | tuple[float, float, float]


@dataclass(frozen=True)
class Patient:
    """What makes one phantom differ from the mean anatomy.

    Attributes:
        seed: Seeds the random streams, one per purpose, so that no choice of organs or grid moves another.
        pose: Pitch, yaw and roll of the head in radians.
        scale: Size relative to the mean along (x, y, z).
        organs: Shape, HU and specification of every organ, whether it gets a mask or not.
        bone: Density of all bones relative to the mean.
        noise: SD of the noise in HU.
    """

    seed: tuple[int, int]
    pose: np.ndarray
    scale: np.ndarray
    organs: dict[str, tuple[Shape, float, OrganSpec]]
    bone: float
    noise: float

    @classmethod
    def sample(cls, seed: int, index: int) -> "Patient":
        """The `index`-th patient of a seed."""
        rng = _stream((seed, index), "patient")
        pose = rng.normal(size=3).clip(-2.2, 2.2) * POSE_SD
        scale = np.exp(rng.normal(scale=0.025) + rng.normal(scale=0.02, size=3))
        return cls(
            (seed, index),
            pose,
            scale,
            _sample_organs((seed, index)),
            rng.uniform(0.88, 1.1),
            rng.uniform(4.8, 6.6),
        )

    def stream(self, purpose: str) -> np.random.Generator:
        """A random generator of its own for each purpose."""
        return _stream(self.seed, purpose)

    def position(self, point: np.ndarray) -> np.ndarray:
        """Where a point (x, y, z) of the head lies after sizing and posing, small deformations apart."""
        return self.turn(np.ones(1))[0].T @ (point * self.scale - PIVOT) + PIVOT

    def turn(self, weights: np.ndarray) -> np.ndarray:
        """Rotations (K, 3, 3) from the posed into the upright frame, with the angles times each weight."""
        pitch, yaw, roll = (angle * weights for angle in self.pose)
        zero, one = np.zeros_like(weights), np.ones_like(weights)

        def matrix(rows: list[list[np.ndarray]]) -> np.ndarray:
            return np.stack([np.stack(row, -1) for row in rows], -2)

        about_x = matrix(
            [[one, zero, zero], [zero, np.cos(pitch), -np.sin(pitch)], [zero, np.sin(pitch), np.cos(pitch)]]
        )
        about_z = matrix([[np.cos(yaw), -np.sin(yaw), zero], [np.sin(yaw), np.cos(yaw), zero], [zero, zero, one]])
        about_y = matrix([[np.cos(roll), zero, np.sin(roll)], [zero, one, zero], [-np.sin(roll), zero, np.cos(roll)]])
        return about_x @ about_y @ about_z

    def field(self, grid: Grid, axes: list[np.ndarray]) -> Field:
        """The phantom's own coordinates at every voxel; `axes` are (z, y, x) positions from the brainstem."""
        z, y, x = axes
        t = np.clip((z - BEND_MM[0]) / (BEND_MM[1] - BEND_MM[0]), 0, 1)
        turn = self.turn(t * t * (3 - 2 * t)).astype(np.float32)
        rest = [(values - shift).astype(np.float32) for values, shift in zip((x, y, z), PIVOT, strict=True)]
        points = np.empty((3, *grid.shape), np.float32)
        for i in range(3):
            line = (turn[:, i, 2] * rest[2] + np.float32(PIVOT[i]))[:, None, None]
            points[i] = turn[:, i, 0, None, None] * rest[0] + turn[:, i, 1, None, None] * rest[1][:, None] + line
            points[i] /= np.float32(self.scale[i])
        return deformed(points, self.stream("deformation"), axes, grid.spacing)


def make_phantom(
    index: int,
    seed: int,
    *,
    spacing: tuple[float, float, float] = (2.5, 1.0, 1.0),
    field_of_view: FieldOfView = "full",
    missing: float = 0.0,
    organs: Collection[str] | None = None,
) -> tuple[Volume, dict[str, np.ndarray]]:
    """A head-and-neck CT and its organs' masks; the same for the same `index` and `seed`.

    Args:
        index: Which patient.
        seed: Which series of patients.
        spacing: Voxel size (z, y, x) in mm.
        field_of_view: "full" (crown to shoulders), "head" (the paper's organs, little else), or (z, y, x) in mm.
        missing: Probability that nobody contoured an organ: it is in the CT, but has no mask.
        organs: Organs that get masks, TG-263 names or aliases; None takes the paper's.

    Returns:
        CT as int16 HU (z, y, x), axes along LPS, and organ -> bool (z, y, x). An eye's mask holds its lens, a joint's
        the condyle of the mandible. An organ outside of the field of view has no mask.

    Raises:
        FocusNetError: an organ is unknown, or a number is out of range.
    """
    wanted, size = check_options(spacing, field_of_view, missing, organs)
    patient = Patient.sample(seed, index)
    grid, axes = _grid(patient, spacing, size)
    field = patient.field(grid, axes)
    locals_ = locals_of(field, patient.organs)
    hu = paint(patient, field, axes, locals_)
    draws = patient.stream("missing").random(len(ALL_ORGANS))
    kept = [name for name, draw in zip(ALL_ORGANS, draws, strict=True) if name in wanted and draw >= missing]
    masks = {name: _mask(name, patient, locals_, grid) for name in kept if locals_.get(name) is not None}
    return Volume(hu, grid), {name: mask for name, mask in masks.items() if mask.any()}


def deformed(
    points: np.ndarray, rng: np.random.Generator, axes: list[np.ndarray], spacing: tuple[float, float, float]
) -> Field:
    """Shift points (3, D, H, W) by smooth random fields: 2 mm over a palm's breadth, 0.5 mm over a finger's."""
    for i in range(3):
        points[i] += np.float32(2.0) * smooth_field(rng, axes, 45.0)
        points[i] += np.float32(0.5) * smooth_field(rng, axes, 16.0)
    return Field(points, spacing)


def paint(patient: Patient, field: Field, axes: list[np.ndarray], organs: Mapping[str, Local | None]) -> np.ndarray:
    """The CT of a patient.

    Args:
        patient: Whose tissues.
        field: The phantom's coordinates at every voxel.
        axes: The voxels' (z, y, x) positions in mm from the brainstem.
        organs: Distances of the organs to paint.

    Returns:
        int16 HU (z, y, x).
    """
    canvas = Canvas.start(patient, field)

    def tissues(table: tuple[Tissue, ...]) -> None:
        for tissue in table:
            canvas.tissue(tissue)

    def organ(*bases: str) -> None:
        for name in organs:
            if base_name(name) in bases:
                canvas.organ(name, organs[name])

    others = {base_name(name) for name in organs} - set(anatomy.ORGANS) - {"Brain"}
    body = body_distance(field, organs)
    canvas.paint(Local(whole_box(field.shape), body), -98.0, texture=13.0, grain="coarse")
    tissues(anatomy.SOFT_TISSUES)
    organ("Parotid", "Glnd_Submand", "Joint_TM", *(others - _PAINTED_LATE))
    _paint_head(canvas, cavity_distance(field, organs))
    tissues(anatomy.ORBITS)
    organ("Eye", "Lens", "Glnd_Lacrimal")
    tissues(anatomy.BONES)
    tissues(anatomy.VERTEBRAE)
    tissues(anatomy.SPINAL_CANAL)
    organ("SpinalCanal")
    tissues(anatomy.AIR_AND_CARTILAGE)
    organ("Bone_Mandible")
    tissues(anatomy.TEETH)
    organ("Brainstem", "SpinalCord", "Pituitary", "OpticChiasm", "OpticNrv", "Ear_Middle", "Cochlea")
    canvas.skin(body)
    _paint_couch(canvas, body, axes)
    return canvas.scan(patient, axes[0])


def body_distance(field: Field, organs: Mapping[str, Local | None]) -> np.ndarray:
    """Distance to the skin (z, y, x); no organ comes nearer to it than 2.5 mm."""
    body = anatomy.HEAD.distance(field.points)
    ears = [(replace(anatomy.EARS, side=side), 4.0) for side in (1, -1)]
    for shape, blend in [
        (anatomy.FACE_OUTLINE, 14.0),
        (anatomy.NECK, 22.0),
        (anatomy.SHOULDERS, 45.0),
        *ears,
    ]:
        local = field.local(shape, margin=blend + 4)
        if local is not None:
            body[local.box] = smooth_min(body[local.box], local.distance, blend)
    for name, organ in organs.items():
        if organ is not None and name != "SpinalCord":
            cover = np.float32(11.0 if name == "Brain" else 2.5)
            body[organ.box] = smooth_min(body[organ.box], organ.distance - cover, 3.0)
    return body


def cavity_distance(field: Field, organs: Mapping[str, Local | None]) -> np.ndarray:
    """Distance to the inside of the skull (z, y, x)."""
    brain = organs.get("Brain")
    if brain is not None:
        return brain.at(whole_box(field.shape)) - np.float32(1.5)
    cranium = anatomy.CRANIUM.distance(field.points)
    parts = field.local(anatomy.CRANIUM_PARTS)
    if parts is not None:
        cranium[parts.box] = smooth_min(cranium[parts.box], parts.distance, 6.0)
    return cranium


@dataclass
class Canvas:
    """The CT while it is painted.

    Attributes:
        hu: (D, H, W) float32.
        field: Coordinates.
        noises: Textures of unit SD, by grain.
        edge: Width in mm over which edges go from one tissue to the other: a voxel.
        bone: Relative density of bones.
        organs: HU and specification of the organs.
    """

    hu: np.ndarray
    field: Field
    noises: dict[str, np.ndarray]
    edge: float
    bone: float
    organs: dict[str, tuple[Shape, float, OrganSpec]]

    @classmethod
    def start(cls, patient: Patient, field: Field) -> "Canvas":
        """Nothing but air."""
        rng = patient.stream("texture")
        noises = {grain: _noise(rng, field, mm) for grain, mm in (("fine", 0.9), ("coarse", 3.0))}
        edge = float(np.mean(field.spacing[1:]))
        return cls(np.full(field.shape, AIR, np.float32), field, noises, edge, patient.bone, patient.organs)

    def paint(
        self,
        local: Local,
        hu: float,
        *,
        texture: float = 0.0,
        grain: str = "fine",
        cortex: tuple[float, float] | None = None,
    ) -> None:
        """Cover the inside of a shape."""
        edge, distance = np.float32(self.edge), local.distance
        cover = np.clip(0.5 - distance / edge, 0, 1)
        value = np.float32(texture) * self.noises[grain][local.box] + np.float32(hu)
        if cortex is not None:
            thickness, density = cortex
            value += np.float32(density - hu) * np.clip(0.5 + (distance + np.float32(thickness)) / edge, 0, 1)
        self.hu[local.box] += cover * (value - self.hu[local.box])

    def tissue(self, tissue: Tissue) -> None:
        """Paint a tissue, on both sides if it is paired."""
        density = self.bone if tissue.hu > 250 else 1.0
        cortex = None if tissue.cortex is None else (tissue.cortex[0], tissue.cortex[1] * density)
        for side in (1, -1) if tissue.paired else (1,):
            local = self.field.local(replace(tissue.shape, side=side))
            if local is not None:
                self.paint(local, tissue.hu * density, texture=tissue.texture, grain=tissue.grain, cortex=cortex)

    def organ(self, name: str, local: Local | None) -> None:
        """Paint an organ with the patient's HU for it."""
        if local is None:
            return
        if name not in self.organs:
            hu, texture = anatomy.OTHER_HU.get(base_name(name), (40.0, 5.0))
            self.paint(local, hu, texture=texture)
            return
        _, hu, spec = self.organs[name]
        if spec.painted:
            density = self.bone if hu > 250 else 1.0
            self.paint(local, hu * density, texture=spec.texture, grain=spec.grain, cortex=spec.cortex)

    def skin(self, body: np.ndarray) -> None:
        """Lay 1.8 mm of skin over the body and air around it."""
        edge = np.float32(self.edge)
        rim = np.clip(0.5 + (body + np.float32(1.8)) / edge, 0, 1) * (self.hu > -300)
        self.hu += rim * np.float32(0.8) * (15 - self.hu)
        self.hu += np.clip(0.5 + body / edge, 0, 1) * (np.float32(AIR) - self.hu)

    def scan(self, patient: Patient, z: np.ndarray) -> np.ndarray:
        """What the scanner makes of it: a blurred image as int16 HU with noise, more of it at the shoulders."""
        dz, dy, dx = self.field.spacing
        hu = ndimage.gaussian_filter(self.hu, (0.75 / dz, 0.5 / dy, 0.5 / dx), truncate=3)
        noise = ndimage.gaussian_filter(
            patient.stream("noise").standard_normal(hu.shape, np.float32), (0.3, 0.65, 0.65), truncate=3
        )
        level = 1 + 0.9 / (1 + np.exp((z + 165) / 12))
        hu += noise * np.float32(patient.noise / noise.std()) * level.astype(np.float32)[:, None, None]
        return np.clip(np.rint(hu), -1024, 3071).astype(np.int16)


def _paint_head(canvas: Canvas, cavity: np.ndarray) -> None:
    """Skull, fluid, grey and white matter, by the distance from the inside of the skull."""
    near = np.flatnonzero((cavity < 12).any(axis=(1, 2)))
    if not near.size:
        return
    box = (slice(int(near[0]), int(near[-1]) + 1), slice(0, cavity.shape[1]), slice(0, cavity.shape[2]))
    distance, coarse = cavity[box], canvas.noises["coarse"][box]
    thickness = np.float32(6.2) + np.float32(0.8) * coarse
    inner, outer = Local(box, -distance), Local(box, distance - thickness)
    skull = Local(box, np.maximum(inner.distance, outer.distance))
    canvas.paint(skull, 520 * canvas.bone, texture=70, cortex=(1.9, 1250 * canvas.bone))
    canvas.paint(Local(box, distance), 9.0, texture=2.0)
    sulci = np.float32(1.6) * np.abs(coarse) + np.float32(1.0)
    canvas.paint(Local(box, distance + sulci), 38.0, texture=2.0)
    canvas.paint(Local(box, distance + np.float32(6.5) + np.float32(2.5) * coarse), 29.0, texture=2.0)
    for tissue in (Tissue(anatomy.VENTRICLES, 8.0, 2.0), Tissue(anatomy.CISTERNS, 8.0, 2.0)):
        canvas.tissue(tissue)


def _paint_couch(canvas: Canvas, body: np.ndarray, axes: list[np.ndarray]) -> None:
    """A couch with a thin shell and a foam head rest, behind everything."""
    z, y, x = (values.astype(np.float32) for values in axes)
    outside = np.clip(body / np.float32(canvas.edge), 0, 1)
    top = 112.0
    slab = np.broadcast_to(np.maximum(np.abs(y - top - 11)[:, None] - 11, np.abs(x) - 240), body.shape[1:])
    rest = np.maximum(np.abs(y - top + 16)[:, None] - 16, np.abs(x) - 85 - 0.35 * (y - top)[:, None])
    rest = np.maximum(rest, (-60 - z)[:, None, None])
    for distance, core, rim in ((rest, -955.0, -930.0), (slab, -935.0, -420.0)):
        cover = np.clip(0.5 - distance / canvas.edge, 0, 1) * outside
        value = np.where(distance > -1.5, np.float32(rim), np.float32(core))
        canvas.hu += cover.astype(np.float32) * (value - canvas.hu)


def check_options(
    spacing: tuple[float, float, float], field_of_view: FieldOfView, missing: float, organs: Collection[str] | None
) -> tuple[set[str], tuple[float, float, float]]:
    """The organs (TG-263) that get masks and the lengths (z, y, x) of the field of view in mm.

    Raises:
        FocusNetError: as `make_phantom`.
    """
    wanted = _wanted(organs)
    if not 0 <= missing <= 1:
        raise FocusNetError(f"missing is {missing}, expected a probability from 0 to 1")
    size = FIELDS_OF_VIEW.get(field_of_view) if isinstance(field_of_view, str) else tuple(field_of_view)
    if size is None:
        raise FocusNetError(
            f"unknown field of view {field_of_view!r}, expected {', '.join(FIELDS_OF_VIEW)} or 3 lengths in mm"
        )
    if (
        len(spacing) != 3
        or len(size) != 3
        or min(spacing) <= 0
        or min(n / s for n, s in zip(size, spacing, strict=True)) < 8
    ):
        raise FocusNetError(
            f"spacing {spacing} mm and field of view {size} mm, expected at least 8 voxels along z, y and x"
        )
    return wanted, size


def _grid(
    patient: Patient, spacing: tuple[float, float, float], size: tuple[float, float, float]
) -> tuple[Grid, list[np.ndarray]]:
    """The scan's grid: from the crown down, or from above the eyes if the field of view is small."""
    shape = [round(n / s) for n, s in zip(size, spacing, strict=True)]
    eye = max(patient.position(FACE.T @ np.array([side * 32, -84.7, 14.0]))[2] for side in (1, -1))
    crown, front = (
        patient.position(np.array([0, 10, 119.0]))[2] + 12,
        patient.position(np.array([0, -128.0, 2.0]))[1] - 6,
    )
    top = min(crown, eye + 10 + max(0.0, size[0] - 185))
    rng = patient.stream("grid")
    start = np.array([top - size[0], front - 0.25 * max(0.0, size[1] - 205), -size[2] / 2]) + rng.normal(
        scale=[0.6, 1.5, 1.5]
    )
    axes = [start[i] + spacing[i] * (np.arange(shape[i]) + 0.5) for i in range(3)]
    centre = rng.normal(
        loc=[0.0, -120.0, 0.0], scale=[40.0, 12.0, 6.0]
    )  # where the brainstem lies from the scanner's isocentre
    origin = tuple(round(float(axes[i][0] + centre[i]), 3) for i in (2, 1, 0))
    return Grid((shape[0], shape[1], shape[2]), spacing, (origin[0], origin[1], origin[2])), axes


def _sample_organs(seed: tuple[int, int]) -> dict[str, tuple[Shape, float, OrganSpec]]:
    """Every organ's variation; the two of a pair share their HU and half of the variance."""
    organs = {}
    for base, spec in anatomy.ORGANS.items():
        common = _stream(seed, base)
        hu, size = float(common.uniform(*spec.hu)), common.normal() * spec.size * 0.7
        for side, suffix in ((1, "_L"), (-1, "_R")) if base in anatomy.PAIRED else ((1, ""),):
            name = base + suffix
            share = 0.7 if suffix else 1.0
            shape = spec.shape.varied(_stream(seed, name), size=spec.size * share, place=spec.place, bumps=spec.bumps)
            scale = shape.scale * float(np.exp(size)) if suffix else shape.scale
            organs[name] = (replace(shape, side=side, scale=scale), hu, spec)
    return organs


def locals_of(field: Field, organs: Mapping[str, tuple[Shape, float, OrganSpec]]) -> dict[str, Local | None]:
    """Distances of the organs, each without those that take precedence."""
    plain = {name: field.local(shape) for name, (shape, _, _) in organs.items()}
    result: dict[str, Local | None] = {}
    for name, (_, _, spec) in organs.items():
        local, side = plain[name], name[len(base_name(name)) :]
        for other in spec.without if local is not None else ():
            local = local.without(plain.get(other) or plain.get(other + side))  # type: ignore[union-attr]
        result[name] = local
    return result


def _mask(name: str, patient: Patient, locals_: Mapping[str, Local | None], grid: Grid) -> np.ndarray:
    shape, _, spec = patient.organs[name]
    local = locals_[name]
    assert local is not None
    voxels = None
    if spec.keep_volume and not _touches_edge(local, grid.shape):
        volume = anatomy.volume_mm3(base_name(name)) * shape.scale**3 * float(np.prod(patient.scale))
        voxels = volume / grid.voxel_mm3
    return local.mask(grid.shape, voxels)


def _touches_edge(local: Local, shape: tuple[int, ...]) -> bool:
    """Whether a shape reaches the volume's edge, so that part of it is missing."""
    inside = np.argwhere(local.distance < 1.0)
    if not len(inside):
        return True
    start = np.array([side.start for side in local.box])
    return bool((inside.min(axis=0) + start <= 0).any() or (inside.max(axis=0) + start >= np.array(shape) - 1).any())


def _wanted(organs: Collection[str] | None) -> set[str]:
    if organs is None:
        return set(PAPER_ORGANS)
    names = {canonical_name(name) for name in organs}
    unknown = sorted(names - set(ALL_ORGANS))
    if unknown:
        raise FocusNetError(f"phantoms have no {unknown[0]}, expected some of {', '.join(ALL_ORGANS)}")
    return names


def _noise(rng: np.random.Generator, field: Field, mm: float) -> np.ndarray:
    noise = ndimage.gaussian_filter(
        rng.standard_normal(field.shape, np.float32), [mm / s for s in field.spacing], truncate=3
    )
    return noise / np.float32(noise.std())


def whole_box(shape: tuple[int, ...]) -> Box:
    """The box of all voxels."""
    return slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2])


def base_name(organ: str) -> str:
    """An organ's name without its side."""
    return organ.removesuffix("_L").removesuffix("_R")


def _stream(seed: tuple[int, int], purpose: str) -> np.random.Generator:
    return np.random.default_rng([*seed, crc32(purpose.encode())])
