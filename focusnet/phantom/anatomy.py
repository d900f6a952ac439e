"""A mean head and neck as tables: where every organ and tissue lies, how large and how dense it is.

Positions are (x, y, z) in mm, LPS, relative to the centre of the brainstem; shapes in the `FACE` frame are
level with the Frankfort plane. Paired shapes are given for the patient's left. Sizes, places and HU follow what
contours and CTs of public data sets show (PDDCA, the DeepMind TCIA contours, OpenKBP); the rest of the anatomy is
only as exact as a plausible background needs.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from .shapes import BASE, FACE, Ellipsoid, HalfSpace, Point, Primitive, Shape, Tube


@dataclass(frozen=True)
class OrganSpec:
    """An organ that gets a mask.

    Attributes:
        shape: Mean shape; the left one of a pair.
        hu: Range of its mean HU between patients.
        texture: SD in HU of its own texture, over `grain` ("fine": 1.5 mm, "coarse": 5 mm).
        without: Organs whose voxels are taken out of it.
        size, place: SD of the logarithm of its scale, and of its position in mm, between patients.
        painted: Whether its own HU is painted; else its mask only encloses what the tissues show.
        bumps: Roughness of its surface relative to its half-thickness.
        cortex: Thickness (mm) and HU of a denser rim.
        keep_volume: Choose the level set that has the shape's volume, so that it does not drift on coarse voxels.
    """

    shape: Shape
    hu: tuple[float, float] = (40.0, 40.0)
    texture: float = 3.0
    grain: Literal["fine", "coarse"] = "fine"
    without: tuple[str, ...] = ()
    size: float = 0.05
    place: float = 1.0
    painted: bool = True
    bumps: float = 0.06
    cortex: tuple[float, float] | None = None
    keep_volume: bool = False


@dataclass(frozen=True)
class Tissue:
    """Something that is painted but has no mask.

    Attributes:
        shape: Mean shape; the left one of a pair.
        hu: HU inside.
        texture: SD in HU of its texture.
        cortex: Thickness (mm) and HU of a denser rim, as bones have.
        paired: Whether the right one is painted too.
        grain: As in `OrganSpec`.
    """

    shape: Shape
    hu: float
    texture: float = 4.0
    cortex: tuple[float, float] | None = None
    paired: bool = False
    grain: Literal["fine", "coarse"] = "fine"


def _e(centre: Point, semi: Point, frame: np.ndarray = BASE, pitch: float = 0, yaw: float = 0) -> Ellipsoid:
    return Ellipsoid(centre, semi, frame, pitch, yaw)


def _t(points: list[Point], radii: list[float] | float, frame: np.ndarray = BASE, stretch: Point = (1, 1, 1)) -> Tube:
    several = tuple(radii) if isinstance(radii, list) else (float(radii),) * len(points)
    return Tube(tuple(points), several, frame, stretch)


def _shape(*parts: Primitive, blend: float = 0.0, cut: tuple[HalfSpace, ...] = ()) -> Shape:
    return Shape(parts, blend, cut)


def _bone(shape: Shape, paired: bool = False) -> Tissue:
    return Tissue(shape, 380.0, 60.0, (2.0, 1150.0), paired)


def _mirror(points: list[Point]) -> list[Point]:
    """A curve that starts at the midline, continued on the right: right end to left end."""
    return [(-x, y, z) for x, y, z in reversed(points[1:])] + points


# curves that several shapes share

_JAW: list[Point] = [(0, -90, -93), (14, -87, -93), (27, -74, -92), (37, -56, -90), (45, -36, -86)]
_TEETH: list[Point] = [(0, -90, 0), (9, -87.5, 0), (16.5, -80, 0), (21.5, -70, 0), (25, -58, 0), (27, -46, 0)]
_CORD: list[Point] = [
    (0, 4, -28),
    (0, 9, -60),
    (0, 12, -90),
    (0, 15, -115),
    (-1, 24, -150),
    (-1, 36, -180),
    (-1, 56, -225),
    (-1, 76, -300),
]
_AIRWAY: list[Point] = [
    (0, -44, -14),
    (0, -36, -24),
    (0, -33, -45),
    (0, -34, -75),
    (0, -36, -98),
    (0, -38, -113),
    (0, -37, -122),
    (0, -36, -134),
    (0, -32, -165),
    (0, -16, -225),
    (0, -2, -280),
]
_AIRWAY_RADII = [9.0, 8.0, 7.0, 8.0, 7.0, 3.5, 6.0, 8.0, 8.5, 8.5, 8.5]


def cord_at(z: float) -> float:
    """y of the cord at a height."""
    return float(np.interp(-z, [-p[2] for p in _CORD], [p[1] for p in _CORD]))


# the outline

HEAD = _shape(_e((0, 4, 49), (76, 96, 71), pitch=20))
FACE_OUTLINE = _shape(
    _e((0, -42, -36), (67, 64, 66), FACE),
    _e((0, -16, -44), (75, 48, 62), FACE),
    _t([(-45, -36, -86), (-27, -74, -92), (0, -90, -93), (27, -74, -92), (45, -36, -86)], 17, FACE),
    _t([(0, -92, -4), (0, -106, -22), (0, -115, -32)], [6, 8, 11], FACE),
    _e((0, -94, -60), (28, 15, 20), FACE),
    _e((0, -70, 12), (56, 34, 24), FACE),
    blend=14,
)
NECK = _shape(
    _t(
        [(0, 8, -30), (0, 6, -70), (0, 4, -115), (0, 12, -150), (0, 30, -220), (0, 30, -320)],
        [56, 58, 58, 62, 75, 80],
    ),
)
SHOULDERS = _shape(_e((0, 34, -262), (225, 84, 104)))
EARS = _shape(_e((73, 8, 2), (5, 15, 29), pitch=-10, yaw=-24))

# brain and skull

CRANIUM = _shape(_e((0, 4, 50), (66, 84, 58), pitch=20), cut=(HalfSpace((0, -0.55, -1), -5.5, BASE),))
CRANIUM_PARTS = _shape(
    _e((40, -20, 27), (25, 35, 20)),
    _e((-40, -20, 27), (25, 35, 20)),
    _e((0, 27, 4), (50, 38, 34)),
    _e((0, -1, 2), (19, 17, 33)),
    _t([(0, 2, -20), (0, 4, -34)], [14, 11]),
    blend=6,
)
VENTRICLES = _shape(
    _t([(0, -18, 62), (0, 2, 68), (0, 20, 60)], [4, 5, 4], stretch=(0.5, 1, 1)),
    _t([(12, -22, 58), (13, 5, 66), (18, 28, 52)], [5, 5, 6]),
    _t([(-12, -22, 58), (-13, 5, 66), (-18, 28, 52)], [5, 5, 6]),
    _e((0, -6, 40), (2.5, 11, 9)),
    _e((0, 15, 0), (8, 3.5, 10)),
)
CISTERNS = _shape(
    _e((0, -24, 24), (15, 9, 7)),
    _e((0, -6, 2), (21, 15, 31)),
    _e((0, 8, 26), (17, 12, 9)),
    _e((0, 24, -27), (16, 9, 7)),
)

# organs with masks

ORGANS: dict[str, OrganSpec] = {
    "Brainstem": OrganSpec(
        _shape(
            _e((0, -4, 1), (17.6, 12.8, 14.4)),
            _e((0, 2, 16), (15.2, 10.4, 11.6)),
            _t([(0, 2, -11), (0, 5, -31)], [8.6, 6.2], stretch=(0.8, 1, 1)),
            blend=6,
        ),
        (27, 32),
        2.0,
        size=0.04,
        place=0.3,
        bumps=0.05,
    ),
    "SpinalCord": OrganSpec(
        _shape(_t(_CORD, 4.7, stretch=(0.82, 1, 1))),
        (32, 42),
        2.0,
        without=("Brainstem",),
        size=0.03,
        place=0.6,
        bumps=0.03,
    ),
    "OpticChiasm": OrganSpec(
        _shape(
            _t([(8, -31, 25), (0, -25, 26), (-9, -18, 28)], [1.7, 2.3, 1.7]),
            _t([(-8, -31, 25), (0, -25, 26), (9, -18, 28)], [1.7, 2.3, 1.7]),
            blend=1.5,
        ),
        (36, 46),
        2.0,
        place=0.4,
        keep_volume=True,
    ),
    "Pituitary": OrganSpec(
        _shape(_e((0, -29, 14), (5.6, 4.2, 2.85))),
        (48, 75),
        2.0,
        without=("OpticChiasm",),
        size=0.07,
        place=0.4,
        keep_volume=True,
    ),
    "Eye": OrganSpec(
        _shape(_e((32, -84.7, 1.9), (12.5, 12.8, 12.6), FACE)),
        (5, 25),
        1.5,
        size=0.025,
        place=0.7,
        bumps=0.02,
        cortex=(1.2, 55),
    ),
    "Lens": OrganSpec(
        _shape(_e((32, -92.9, 1.9), (4.6, 2.35, 4.6), FACE)),
        (100, 135),
        2.0,
        size=0.05,
        place=0.3,
        bumps=0.04,
        keep_volume=True,
    ),
    "OpticNrv": OrganSpec(
        _shape(
            _t(
                [(30.5, -73, 2.2), (27, -64, 4), (21, -54, 8), (15, -44, 12), (12.5, -41, 13.5)],
                [3.1, 2.6, 2.4, 2.1, 2.0],
                FACE,
            )
        ),
        (30, 60),
        2.0,
        without=("Eye", "OpticChiasm"),
        place=0.4,
        keep_volume=True,
    ),
    "Ear_Middle": OrganSpec(
        _shape(_e((42.5, -11, -3), (4.6, 5, 6)), _t([(43, -12, -7), (37, -19, -9)], [3, 2.2]), blend=2),
        (-650, -350),
        220.0,
        size=0.06,
        place=0.6,
        bumps=0.15,
        keep_volume=True,
    ),
    "Joint_TM": OrganSpec(_shape(_e((52, -24, -8), (9.1, 8.3, 8.3))), (40, 55), 8.0, size=0.06, place=0.8),
    "Parotid": OrganSpec(
        _shape(_e((61, -17, -47), (9, 23, 28), FACE, yaw=9), _e((53, -3, -46), (11, 9, 18), FACE), blend=5),
        (-45, 25),
        37.0,
        "coarse",
        without=("Bone_Mandible",),
        size=0.05,
        place=1.2,
        bumps=0.12,
    ),
    "Glnd_Submand": OrganSpec(
        _shape(_e((32, -50, -82), (10.5, 14.5, 14), pitch=-15, yaw=-25)),
        (25, 60),
        9.0,
        without=("Bone_Mandible",),
        size=0.05,
        place=1.5,
        bumps=0.1,
    ),
    "Bone_Mandible": OrganSpec(
        _shape(
            _t(_mirror(_JAW), [4.5, 4.6, 4.7, 4.9, 5.4, 4.9, 4.7, 4.6, 4.5], FACE, (1, 1, 0.43)),
            _t(_mirror([(x * 1.08, y + 3, -79) for x, y, _ in _TEETH]), [3.8] * 11, FACE, (1, 1, 0.55)),
            *(
                part
                for s in (1, -1)
                for part in (
                    _t(
                        [(45 * s, -34, -86), (49 * s, -27, -68), (50 * s, -25, -46)],
                        [4.8, 4.4, 3.4],
                        FACE,
                        (1, 0.34, 0.8),
                    ),
                    _t(
                        [(50 * s, -22, -46), (51.5 * s, -20, -28), (52 * s, -20.5, -17)],
                        [4.2, 4.2, 5.4],
                        FACE,
                        (0.85, 0.8, 1),
                    ),
                    _t([(49 * s, -32, -46), (47 * s, -40, -26)], [3.6, 2.2], FACE, (1, 0.5, 1)),
                )
            ),
            blend=3,
        ),
        (260, 420),
        70.0,
        size=0.03,
        place=0.6,
        bumps=0.008,
        cortex=(1.8, 1000),
    ),
    "Cavity_Oral": OrganSpec(
        _shape(_e((0, -63, -60), (30, 35, 28), FACE), _e((0, -50, -61), (33, 25, 25), FACE), blend=5),
        without=("Bone_Mandible",),
        size=0.03,
        place=0.8,
        painted=False,
        bumps=0.03,
    ),
    "Larynx": OrganSpec(
        _shape(_e((0, -36, -104), (15, 15, 11)), _e((0, -37, -120), (18, 17.5, 14.5)), blend=6),
        size=0.04,
        place=1.0,
        painted=False,
        bumps=0.04,
    ),
}
PAIRED = {"Eye", "Lens", "OpticNrv", "Ear_Middle", "Joint_TM", "Parotid", "Glnd_Submand"}

# tissues, painted in this order

_MUSCLE, _BLOOD = 56.0, 45.0


SOFT_TISSUES: tuple[Tissue, ...] = (
    # neck: a core of muscle and the long muscles around it
    Tissue(
        _shape(
            _e((0, 34, -52), (46, 26, 28)),
            _t(
                [(0, 20, -60), (0, 24, -115), (0, 34, -160), (0, 48, -300)],
                [40, 39, 42, 50],
                stretch=(0.9, 1, 1),
            ),
            blend=20,
        ),
        _MUSCLE,
        5.0,
    ),
    Tissue(
        _shape(_t([(22, 46, -45), (21, 52, -110), (32, 66, -170)], [3.4, 3.2, 3.2], stretch=(0.18, 1, 0.5))),
        -80.0,
        12.0,
        paired=True,
    ),
    Tissue(
        _shape(_t([(0, 30, -50), (0, 60, -110), (0, 74, -170)], [2.2, 2.2, 2.2], stretch=(1, 0.2, 0.5))),
        -70.0,
        12.0,
    ),
    Tissue(
        _shape(
            _t(
                [(60, 12, -22), (50, -10, -85), (38, -26, -135), (22, -28, -175)],
                [7, 8, 8, 7],
                stretch=(1, 0.7, 0.7),
            )
        ),
        _MUSCLE,
        paired=True,
    ),
    Tissue(_shape(_e((0, 30, -262), (200, 62, 82))), _MUSCLE, 6.0),
    Tissue(_shape(_t([(90, 25, -240), (170, 30, -262)], [16, 20])), -90.0, 10.0, paired=True),
    # face: chewing muscles, tongue, floor of the mouth, cheeks, walls of the pharynx
    Tissue(_shape(_e((60.5, -44, 10), (9, 27, 34), FACE, yaw=8)), _MUSCLE, paired=True),
    Tissue(_shape(_e((57, -39, -58), (7.5, 15, 29), FACE)), _MUSCLE, paired=True),
    Tissue(_shape(_t([(26, -40, -24), (40, -32, -62), (43, -28, -78)], [9, 6, 5], FACE)), _MUSCLE, paired=True),
    Tissue(_shape(_t([(20, -46, -16), (46, -24, -20)], [9, 6], FACE)), _MUSCLE, paired=True),
    Tissue(
        _shape(
            _t(
                [(0, -96, -60), (22, -88, -60), (36, -66, -58), (40, -46, -56)],
                [7, 5, 4, 4],
                FACE,
                (1, 1, 0.3),
            )
        ),
        _MUSCLE,
        paired=True,
    ),
    Tissue(
        _shape(_e((0, -57, -65), (24, 33, 22), FACE), _e((0, -34, -70), (22, 18, 24), FACE), blend=8),
        50.0,
        22.0,
        grain="coarse",
    ),
    Tissue(_shape(_e((0, -60, -90), (25, 30, 8), FACE)), _MUSCLE, 10.0),
    Tissue(_shape(_t([(0, -66, -72), (0, -44, -90)], [1.6, 1.6], FACE, (1, 1, 0.15))), -60.0),
    Tissue(_shape(_t(_AIRWAY, [r + 4.5 for r in _AIRWAY_RADII], stretch=(0.72, 1, 1))), _MUSCLE, 5.0),
    Tissue(_shape(_e((0, -37, -116), (23, 19, 24))), _MUSCLE, 6.0),
    Tissue(
        _shape(_t([(10, -14, -40), (10, -9, -115), (11, -2, -150), (12, 20, -210)], 5.5)),
        _MUSCLE,
        paired=True,
    ),
    # vessels, thyroid, oesophagus
    Tissue(
        _shape(_t([(27, -16, -34), (29, -22, -95), (24, -24, -150), (22, -14, -190)], 3.4)),
        _BLOOD + 15,
        paired=True,
    ),
    Tissue(
        _shape(_t([(33, -8, -36), (37, -16, -95), (33, -24, -150), (30, -14, -190)], 5.2)),
        _BLOOD,
        paired=True,
    ),
    Tissue(_shape(_e((17, -28, -148), (8, 9, 20), pitch=-12)), 105.0, 8.0, paired=True),
    Tissue(_shape(_t([(0, -18, -138), (0, -14, -165), (3, 2, -225), (3, 16, -280)], 6.5)), 40.0),
)

ORBITS: tuple[Tissue, ...] = (
    # bony walls, fat that hollows them out, the straight muscles as four bands, the lacrimal gland
    Tissue(
        _shape(
            _t([(31, -84, 1.5), (27, -70, 3), (20, -54, 8)], [18.5, 16.3, 7.5], FACE),
            cut=(HalfSpace((0.35, -1, 0), 98, FACE),),
        ),
        900.0,
        80.0,
        paired=True,
    ),
    Tissue(
        _shape(_t([(31, -84, 1.5), (27, -70, 3), (20, -54, 8)], [16.5, 14.5, 6], FACE)),
        -92.0,
        6.0,
        paired=True,
    ),
    Tissue(
        _shape(_t([(44.5, -82, 1), (36, -66, 4), (20, -50, 9)], [1.6, 2.6, 1.8], FACE, (1, 1, 0.6))),
        52.0,
        paired=True,
    ),
    Tissue(
        _shape(_t([(19, -82, 1.5), (17.5, -66, 4), (16, -50, 9)], [1.6, 2.6, 1.8], FACE, (1, 1, 0.6))),
        52.0,
        paired=True,
    ),
    Tissue(
        _shape(_t([(31, -83, 14), (27, -66, 13.5), (18, -50, 12)], [1.5, 2.4, 1.8], FACE, (0.6, 1, 1))),
        52.0,
        paired=True,
    ),
    Tissue(
        _shape(_t([(31, -83, -11), (27, -66, -7.5), (18, -50, 6)], [1.5, 2.4, 1.8], FACE, (0.6, 1, 1))),
        52.0,
        paired=True,
    ),
    Tissue(_shape(_e((43, -82, 11), (4, 7, 6), FACE, yaw=-40)), 40.0, paired=True),
)

BONES: tuple[Tissue, ...] = (
    # orbital walls, brow, cheekbone, upper jaw, nose
    _bone(
        _shape(
            _t(
                [(0, -96, 18), (12, -96, 21), (28, -92, 22), (42, -82, 17), (48, -74, 2), (46, -77, -10)],
                [5, 5, 4.5, 4, 3.5, 3.5],
                FACE,
            )
        ),
        paired=True,
    ),
    _bone(
        _shape(
            _t(
                [
                    (16, -90, -17),
                    (32, -88, -17),
                    (46, -78, -14),
                    (57, -60, -14),
                    (63, -42, -14),
                    (61, -22, -11),
                ],
                [3.5, 4, 5.5, 3.5, 2.8, 3.5],
                FACE,
                (1, 1, 0.75),
            )
        ),
        paired=True,
    ),
    _bone(_shape(_t([(0, -95, 12), (0, -104, -10)], [5, 3], FACE))),
    Tissue(
        _shape(_e((24, -66, -26), (14.5, 19, 19), FACE, yaw=-12)),
        600.0,
        60.0,
        cortex=(1.6, 900.0),
        paired=True,
    ),
    _bone(_shape(_t(_mirror([(x, y, -47.0) for x, y, _ in _TEETH]), 6.0, FACE, (1, 1, 0.75)))),
    Tissue(_shape(_e((0, -66, -41), (24, 27, 3.0), FACE)), 700.0, 60.0),
    # base of the skull: sphenoid, clivus, temporal bone, pterygoid plates, ring around the foramen magnum
    Tissue(
        _shape(
            _e((0, -38, 6), (17, 18, 11)),
            _t([(0, -26, 5), (0, -17, -12), (0, -11, -33)], [8, 6, 4], stretch=(0.55, 1, 1)),
            blend=5,
        ),
        420.0,
        70.0,
        cortex=(2.0, 1000.0),
    ),
    _bone(_shape(_t([(10, -36, 27), (34, -48, 33), (50, -46, 36)], [3, 3, 4])), paired=True),
    Tissue(
        _shape(
            _t([(18, -22, 3), (36, -10, -2), (56, 4, -9)], [7, 10, 13]),
            _e((58, 12, -16), (11, 12, 17)),
            blend=8,
        ),
        750.0,
        130.0,
        cortex=(2.0, 1200.0),
        paired=True,
    ),
    Tissue(_shape(_e((34, -6, 0), (5, 5, 5))), 1700.0, 60.0, paired=True),
    Tissue(
        _shape(_t([(60, -24, 2), (50, -28, 4), (42, -26, 2)], [3.5, 3, 3], stretch=(1, 0.5, 1))),
        850.0,
        60.0,
        paired=True,
    ),
    Tissue(_shape(_t([(14, -46, -4), (15, -44, -34)], [2.5, 1.5], stretch=(1, 0.5, 1))), 700.0, paired=True),
    _bone(_shape(_t([(15, 2, -33), (17, 14, -33), (12, 28, -32)], [4.5, 4, 4])), paired=True),
    Tissue(_shape(_t(_mirror([(0, -58, -88), (13, -53, -88), (20, -38, -84)]), [2.4] * 5)), 350.0, 40.0),
)

AIR_AND_CARTILAGE: tuple[Tissue, ...] = (
    # sinuses and nose
    Tissue(_shape(_e((24, -66, -24), (11.5, 16, 15.5), FACE, yaw=-12)), -990.0, 8.0, paired=True),
    Tissue(
        _shape(
            _e((0, -72, -20), (11, 31, 17), FACE),
            _t([(5, -104, -34), (4, -112, -40)], [5, 4], FACE),
            _t([(-5, -104, -34), (-4, -112, -40)], [5, 4], FACE),
            blend=2,
        ),
        -960.0,
        25.0,
    ),
    Tissue(
        _shape(
            _t([(6.5, -88, -30), (7, -56, -28)], [4.2, 4.2], FACE, (1, 1, 0.8)),
            _t([(6, -80, -16), (6.5, -56, -15)], [2.8, 2.8], FACE),
        ),
        35.0,
        8.0,
        paired=True,
    ),
    Tissue(_shape(_t([(0, -98, -20), (0, -46, -20)], [1.1, 1.1], FACE, (1, 1, 0.07))), 150.0, 20.0),
    Tissue(_shape(_e((5.5, -68, 4), (5, 18, 9), FACE)), -700.0, 230.0, paired=True),
    Tissue(_shape(_e((6, -42, 5), (6, 9, 6.5))), -980.0, 10.0, paired=True),
    Tissue(_shape(_e((9, -98, 22), (7, 3, 6), FACE)), -940.0, 20.0, paired=True),
    # ears
    Tissue(_shape(_t([(47, -9, -4), (62, -7, -3), (80, -4, 0)], [2.4, 3.2, 3.4])), -950.0, 20.0, paired=True),
    Tissue(_shape(_e((57, 12, -15), (8, 9, 13))), -150.0, 330.0, paired=True),
    # throat and windpipe, mouth
    Tissue(_shape(_t(_AIRWAY, _AIRWAY_RADII, stretch=(0.78, 1, 1))), -1000.0, 3.0),
    Tissue(
        _shape(_t([(0, -84, -47), (0, -58, -43.5), (0, -36, -47)], [1.8, 2.4, 2.2], FACE, (0.14, 1, 1))),
        -930.0,
        30.0,
    ),
    Tissue(_shape(_e((0, -43, -88), (10, 2.2, 9), pitch=30)), 60.0),
    Tissue(
        _shape(_t(_mirror([(0, -56, -110), (13, -46, -112), (20, -30, -114)]), [1.7] * 5, stretch=(1, 1, 0.14))),
        210.0,
        70.0,
    ),
    Tissue(
        _shape(
            _t(
                [(0, -48, -131), (10, -44, -130), (12, -34, -129), (8, -25, -127), (0, -22, -126)],
                2.2,
                stretch=(1, 1, 0.5),
            )
        ),
        230.0,
        70.0,
        paired=True,
    ),
    Tissue(_shape(_t([(5, -30, -113), (4, -48, -113)], [3.2, 2.2])), 60.0, paired=True),
)


def _vertebrae() -> tuple[Tissue, ...]:
    """C1 to T5: body, arch, transverse and spinous processes at every level, along the cord."""
    bones = [
        _bone(_shape(_t([(0, -9, -40), (0, -10, -58)], [5, 6.5]))),
        _bone(
            _shape(
                _t(
                    [(0, -16, -42), (14, -10, -42), (25, 6, -42), (15, 20, -43), (0, 25, -43)],
                    [3, 5, 6, 3.5, 3.5],
                )
            ),
            paired=True,
        ),
    ]
    for level in range(12):
        z = -62.0 - 17.5 * level
        y, size = cord_at(z), 1 + 0.035 * level
        body = _e((0, y - 17.5 * size, z), (12.5 * size, 8.5 * size, 7.2), pitch=-12 if z < -130 else -2)
        arch = _t(
            [(13 * size, y - 7, z), (14.5, y + 2, z - 2), (9, y + 11, z - 4), (0, y + 14, z - 6)],
            [5, 4.2, 3, 3],
        )
        wing = _t([(14, y - 6, z), (26, y - 2, z - 2)], [4.5, 3])
        spine = _t([(0, y + 14, z - 6), (0, y + 32 + 2 * level, z - 14)], [3, 3.6])
        bones.append(_bone(_shape(body, spine)))
        bones.append(_bone(_shape(arch, wing), paired=True))
    return tuple(bones)


VERTEBRAE = _vertebrae()
SPINAL_CANAL = (Tissue(_shape(_t(_CORD, 8.4, stretch=(0.82, 1, 1))), 8.0, 6.0),)


def _teeth() -> tuple[Tissue, ...]:
    """Seven teeth per side and jaw."""
    arch = np.array([(x, y) for x, y, _ in _TEETH])
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(arch, axis=0), axis=1))])
    teeth = []
    for z, inset, half in ((-55.0, 0.0, 7.0), (-68.5, 1.0, 7.5)):
        for stop in np.linspace(3.5, length[-1], 7):
            x, y = (float(np.interp(stop, length, arch[:, i])) for i in range(2))
            teeth.append(
                Tissue(
                    _shape(_e((x - 0.5 * inset, y + 2 * inset, z), (3.3, 3.3, half), FACE)),
                    1500.0,
                    120.0,
                    cortex=(1.3, 2200.0),
                    paired=True,
                )
            )
    return tuple(teeth)


TEETH = _teeth()

# HU and texture of organs that only real label maps have
OTHER_HU: dict[str, tuple[float, float]] = {
    "Cochlea": (120.0, 10.0),
    "Glnd_Lacrimal": (40.0, 6.0),
    "Lung": (-820.0, 40.0),
    "SpinalCanal": (10.0, 5.0),
    "Glnd_Thyroid": (105.0, 8.0),
    "Trachea": (-990.0, 5.0),
}


def volume_mm3(organ: str) -> float:
    """Volume of an organ's mean shape."""
    return _measured(organ)[0]


def centre(organ: str) -> np.ndarray:
    """Centre of mass (x, y, z) of an organ's mean shape, in mm; of the left one of a pair."""
    return _measured(organ)[1]


@cache
def _measured(organ: str) -> tuple[float, np.ndarray]:
    """Volume and centre of mass, on a grid of 40 points or more along each side."""
    spec = ORGANS[organ]
    low, high = spec.shape.bounds()
    step = max(0.35, float((high - low).max()) / 60)
    points = np.stack(
        np.meshgrid(*(np.arange(a - 1, b + 1, step) for a, b in zip(low, high, strict=True)), indexing="ij")
    )
    points = points.astype(np.float32)
    inside = spec.shape.distance(points) < 0
    for other in spec.without:
        inside &= ORGANS[other].shape.distance(points) >= 0
    return float(inside.sum()) * step**3, points[:, inside].mean(axis=1)
