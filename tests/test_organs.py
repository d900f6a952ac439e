"""The organ vocabulary."""

import pytest

from focusnet.data.organs import ORGANS, _key, canonical_name, mirror_name, overlap_order
from focusnet.errors import FocusNetError

PDDCA = [
    "BrainStem",
    "Chiasm",
    "Mandible",
    "OpticNerve_L",
    "OpticNerve_R",
    "Parotid_L",
    "Parotid_R",
    "Submandibular_L",
    "Submandibular_R",
]
DEEPMIND = [
    "Brain",
    "Brainstem",
    "Cochlea-Lt",
    "Cochlea-Rt",
    "Lacrimal-Lt",
    "Lacrimal-Rt",
    "Lens-Lt",
    "Lens-Rt",
    "Lung-Lt",
    "Lung-Rt",
    "Mandible",
    "Optic-Nerve-Lt",
    "Optic_Nerve_Rt",
    "Orbit-Lt",
    "Orbit-Rt",
    "Parotid-Lt",
    "Parotid-Rt",
    "Spinal-Canal",
    "Spinal_Cord",
    "Submandibular-Lt",
    "Submandibular-Rt",
]
OPENKBP = ["Brainstem", "SpinalCord", "RightParotid", "LeftParotid", "Esophagus", "Larynx", "Mandible"]
SEGRAP = [
    "Brain",
    "BrainStem",
    "Chiasm",
    "TemporalLobe_L",
    "TemporalLobe_R",
    "Hippocampus_L",
    "Hippocampus_R",
    "Eye_L",
    "Eye_R",
    "Lens_L",
    "Lens_R",
    "OpticNerve_L",
    "OpticNerve_R",
    "MiddleEar_L",
    "MiddleEar_R",
    "IAC_L",
    "IAC_R",
    "TympanicCavity_L",
    "TympanicCavity_R",
    "VestibulSemi_L",
    "VestibulSemi_R",
    "Cochlea_L",
    "Cochlea_R",
    "ETbone_L",
    "ETbone_R",
    "Pituitary",
    "OralCavity",
    "Mandible_L",
    "Mandible_R",
    "Submandibular_L",
    "Submandibular_R",
    "Parotid_L",
    "Parotid_R",
    "Mastoid_L",
    "Mastoid_R",
    "TMjoint_L",
    "TMjoint_R",
    "SpinalCord",
    "Esophagus",
    "Larynx",
    "Larynx_Glottic",
    "Larynx_Supraglot",
    "PharynxConst",
    "Thyroid",
    "Trachea",
]
HAN_SEG = [
    "A_Carotid_L",
    "A_Carotid_R",
    "Arytenoid",
    "Bone_Mandible",
    "Brainstem",
    "BuccalMucosa",
    "Cavity_Oral",
    "Cochlea_L",
    "Cochlea_R",
    "Cricopharyngeus",
    "Esophagus_S",
    "Eye_AL",
    "Eye_AR",
    "Eye_PL",
    "Eye_PR",
    "Glnd_Lacrimal_L",
    "Glnd_Lacrimal_R",
    "Glnd_Submand_L",
    "Glnd_Submand_R",
    "Glnd_Thyroid",
    "Glottis",
    "Larynx_SG",
    "Lips",
    "OpticChiasm",
    "OpticNrv_L",
    "OpticNrv_R",
    "Parotid_L",
    "Parotid_R",
    "Pituitary",
    "SpinalCord",
]


@pytest.mark.parametrize(
    ("names", "count"),
    [(PDDCA, 9), (DEEPMIND, 21), (OPENKBP, 7), (SEGRAP, 45), (HAN_SEG, 30)],
    ids=["PDDCA", "DM", "KBP", "SegRap", "HaN"],
)
def test_every_organ_of_a_data_set_has_its_own_name(names: list[str], count: int) -> None:
    assert len({canonical_name(name) for name in names}) == count


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("Orbit-Lt", "Eye_L"),
        ("Lung_Rt", "Lung_R"),
        ("Spinal-Canal", "SpinalCanal"),
        ("RightParotid", "Parotid_R"),
        ("Optic_Nerve_Lt", "OpticNrv_L"),
        ("optic nerve lt", "OpticNrv_L"),
        ("SUBMANDIBULAR_R", "Glnd_Submand_R"),
        ("Mandible", "Bone_Mandible"),
        ("Mandible_L", "Bone_Mandible_L"),
        ("TMjoint_R", "Joint_TM_R"),
    ],
)
def test_aliases(alias: str, name: str) -> None:
    assert canonical_name(alias) == name


def test_every_name_and_alias_leads_to_its_organ_alone() -> None:
    owners: dict[str, set[str]] = {}
    for organ in ORGANS.values():
        assert canonical_name(organ.name) == organ.name
        for alias in (organ.name, *organ.aliases):
            owners.setdefault(_key(alias), set()).add(organ.name)
    assert [key for key, names in owners.items() if len(names) > 1] == []


def test_an_unknown_name_is_an_error_that_names_the_closest() -> None:
    with pytest.raises(FocusNetError, match=r"'Parotit_L'.*Parotid_L"):
        canonical_name("Parotit_L")
    with pytest.raises(FocusNetError, match="unknown organ name ''"):
        canonical_name("")


def test_mirroring_swaps_sides_and_keeps_the_midline() -> None:
    assert mirror_name("Lens_L") == "Lens_R"
    assert mirror_name("Eye_AR") == "Eye_AL"
    assert mirror_name("OpticChiasm") == "OpticChiasm"
    for name, organ in ORGANS.items():
        assert mirror_name(mirror_name(name)) == name
        assert (mirror_name(name) != name) == name.endswith(("_L", "_R", "_AL", "_AR", "_PL", "_PR"))
        assert ORGANS[mirror_name(name)].volume_mm3 == organ.volume_mm3


def test_painting_order_is_large_first_whatever_the_input_order() -> None:
    names = ["Lens_L", "Eye_L", "Brain", "Lens_R"]
    assert overlap_order(names) == overlap_order(reversed(names)) == ["Brain", "Eye_L", "Lens_L", "Lens_R"]
    for inner, outer in (
        ("Lens_L", "Eye_L"),
        ("Glottis", "Larynx"),
        ("Cochlea_L", "Ear_Middle_L"),
        ("SpinalCord", "SpinalCanal"),
    ):
        assert overlap_order([inner, outer]) == [outer, inner]
