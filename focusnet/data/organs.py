"""One vocabulary of organs: AAPM TG-263 names, and the names of the public data sets.

The few substructures without a TG-263 name (of the inner ear, larynx and neck) keep their data set's own.
"""

import colorsys
import difflib
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import FocusNetError


@dataclass(frozen=True)
class Organ:
    """An organ at risk of the head and neck.

    Attributes:
        name: TG-263 name; `_L` and `_R` are the patient's left and right.
        volume_mm3: Typical volume in mm3; where masks overlap, the organ for which it is smaller wins.
        aliases: Other names; case, spaces, "-", "_" and "." do not count.
    """

    name: str
    volume_mm3: float
    aliases: tuple[str, ...] = ()


# typical volumes: means over the public sets' contours, orders of magnitude where these lack the organ
_MIDLINE = (
    Organ("Brain", 1_400_000),
    Organ("Brainstem", 27_400),
    Organ("SpinalCord", 20_500, ("Cord", "Cord_HaN")),
    Organ("SpinalCanal", 60_000),
    Organ("OpticChiasm", 573, ("Chiasm", "OpticalChiasm")),
    Organ("Pituitary", 280, ("PituitaryGland", "Hypophysis")),
    Organ("Bone_Mandible", 58_000, ("Mandible",)),
    Organ("Cavity_Oral", 150_000, ("OralCavity",)),
    Organ("Larynx", 29_000),
    Organ("Glottis", 2_500, ("Larynx_Glottic",)),
    Organ("Larynx_SG", 12_000, ("Larynx_Supraglot", "Larynx_Supraglottic")),
    Organ("Arytenoid", 1_500),
    Organ("Musc_Constrict", 14_000, ("PharynxConst", "PharyngealConstrictors")),
    Organ("Cricopharyngeus", 3_500),
    Organ("Esophagus", 16_000, ("Oesophagus", "Esophagus_HaN")),
    Organ("Esophagus_S", 6_000, ("Esophagus_Cervical",)),
    Organ("Trachea", 20_000, ("Trachea_HaN",)),
    Organ("Glnd_Thyroid", 18_000, ("Thyroid", "ThyroidGland")),
    Organ("BuccalMucosa", 18_000),
    Organ("Lips", 15_000),
)

_PAIRED = (
    Organ("Eye", 8_500, ("Orbit", "Eyeball")),
    Organ("Lens", 204, ("Len",)),
    Organ("OpticNrv", 750, ("OpticNerve", "OpticalNerve")),
    Organ("Glnd_Lacrimal", 620, ("Lacrimal", "LacrimalGland")),
    Organ("Cochlea", 65),
    Organ("Ear_Middle", 4_500, ("MiddleEar",)),
    Organ("Ear_Internal", 700, ("InnerEar",)),
    Organ("IAC", 200, ("InternalAcousticCanal", "InternalAuditoryCanal")),
    Organ("TympanicCavity", 800),
    Organ("VestibulSemi", 350, ("Vestibule",)),
    Organ("ETbone", 250, ("EustachianTubeBone",)),
    Organ("Bone_Mastoid", 9_000, ("Mastoid",)),
    Organ("Joint_TM", 2_900, ("TMJ", "TMjoint", "TemporomandibularJoint")),
    Organ("Parotid", 30_000, ("ParotidGland",)),
    Organ("Glnd_Submand", 8_500, ("Submandibular", "SubmandibularGland")),
    Organ("Lobe_Temporal", 85_000, ("TemporalLobe",)),
    Organ("Hippocampus", 2_800),
    Organ("A_Carotid", 5_000, ("CarotidArtery",)),
    Organ("Bone_Mandible", 29_000, ("Mandible",)),
    Organ("Lung", 1_700_000),
)

# HaN-Seg contours the eyeball's segments; its side is the last letter of one token
_EYE_SEGMENTS = tuple(
    Organ(f"Eye_{part}{side}", volume) for part, volume in (("A", 1_500), ("P", 7_000)) for side in ("L", "R")
)


def _sides(organ: Organ) -> list[Organ]:
    names = (organ.name, *organ.aliases)
    sides = []
    for letter, short, word in (("L", "Lt", "Left"), ("R", "Rt", "Right")):
        aliases = [
            alias
            for name in names
            for alias in (f"{name}_{letter}", f"{name}_{short}", f"{name}_{word}", f"{word}_{name}")
        ]
        sides.append(Organ(aliases[0], organ.volume_mm3, tuple(aliases[1:])))
    return sides


ORGANS: dict[str, Organ] = {
    organ.name: organ for organ in (*_MIDLINE, *(side for pair in _PAIRED for side in _sides(pair)), *_EYE_SEGMENTS)
}


_LONGEST = 100  # far beyond any organ's name


def _key(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


_BY_KEY = {_key(alias): organ.name for organ in ORGANS.values() for alias in (organ.name, *organ.aliases)}


def canonical_name(name: str) -> str:
    """The TG-263 name for a TG-263 name or alias ("Optic-Nerve-Lt" -> "OpticNrv_L").

    Raises:
        FocusNetError: the organ is unknown; names the closest known ones.
    """
    key = _key(name[:_LONGEST])
    if len(name) <= _LONGEST and key in _BY_KEY:
        return _BY_KEY[key]
    close = list(dict.fromkeys(_BY_KEY[match] for match in difflib.get_close_matches(key, _BY_KEY, n=6)))[:3]
    hint = f"closest: {', '.join(close)}" if close else "see `focusnet.data.organs.ORGANS`"
    raise FocusNetError(f"unknown organ name {name[:_LONGEST]!r} ({hint})")


def mirror_name(name: str) -> str:
    """The organ that a left-right mirrored `name` (TG-263) is: "Lens_L" <-> "Lens_R"; midline organs are
    themselves."""
    other = name[:-1] + {"L": "R", "R": "L"}.get(name[-1:], name[-1:])
    return other if other in ORGANS else name


def overlap_order(names: Iterable[str]) -> list[str]:
    """The order in which to paint `names` (TG-263) into one label map: large organs first, so that the
    smaller one wins.

    The order depends on the typical volumes alone, never on a case; equal volumes are painted by name.
    """
    return sorted(names, key=lambda name: (-ORGANS[name].volume_mm3, name))


def organ_color(name: str) -> tuple[int, int, int]:
    """A colour (red, green, blue; 0 to 255) that depends on the name alone, so it is the same for every model."""
    code = zlib.crc32(name.encode())
    hue, saturation, value = code % 360 / 360, 0.55 + code // 360 % 4 * 0.15, 0.75 + code // 1440 % 3 * 0.125
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue
