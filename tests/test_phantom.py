"""Phantoms and hybrids: anatomy, HU, repeatability, options, and what the rest of the package reads of them."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from focusnet import phantom
from focusnet.config import DataConfig
from focusnet.data.cases import find_cases, read_masks
from focusnet.data.images import Grid, Volume, read_image, write_labels
from focusnet.data.organs import ORGANS, mirror_name, overlap_order
from focusnet.errors import FocusNetError
from focusnet.phantom import ALL_ORGANS, PAPER_ORGANS, command, make_hybrid, make_phantom
from focusnet.phantom.render import Patient
from focusnet.prepare import prepare
from tests.real_data import REAL, needs_real_data

COARSE = (2.5, 2.0, 2.0)
CASES = range(3)
Phantom = tuple[Volume, dict[str, np.ndarray]]

# mm3 and mm: what public contours show, widened for differences between patients and for coarse voxels
VOLUMES = {
    "Brainstem": (18_000, 40_000),
    "SpinalCord": (4_000, 25_000),  # as much as the field of view shows
    "OpticChiasm": (350, 850),
    "Pituitary": (180, 450),
    "Eye": (6_000, 12_500),
    "Lens": (110, 300),
    "OpticNrv": (420, 1_100),
    "Ear_Middle": (500, 1_300),
    "Joint_TM": (1_500, 4_600),
    "Parotid": (18_000, 48_000),
    "Glnd_Submand": (5_000, 12_500),
    "Bone_Mandible": (40_000, 75_000),
    "Cavity_Oral": (110_000, 180_000),
    "Larynx": (15_000, 42_000),
}
PLACES = {
    "Eye": (32, -80, 28),
    "Lens": (32, -88, 28),
    "OpticNrv": (22, -56, 24),
    "OpticChiasm": (0, -25, 26),
    "Pituitary": (0, -29, 14),
    "Ear_Middle": (42, -11, -4),
    "Joint_TM": (52, -24, -8),
    "Parotid": (59, -26, -41),
    "Glnd_Submand": (32, -50, -82),
    "Bone_Mandible": (0, -72, -53),
    "Cavity_Oral": (0, -75, -42),
    "Larynx": (1, -36, -115),
}


@cache
def case(index: int, seed: int = 1) -> Phantom:
    return make_phantom(index, seed, spacing=COARSE, field_of_view="head", organs=ALL_ORGANS)


def centre(mask: np.ndarray, grid: Grid) -> np.ndarray:
    return grid.point(np.argwhere(mask).mean(axis=0))


def base(name: str) -> str:
    return name.removesuffix("_L").removesuffix("_R")


def test_the_papers_organs_have_names_of_the_vocabulary() -> None:
    assert set(PAPER_ORGANS) == set(ALL_ORGANS) - {"Glnd_Submand_L", "Glnd_Submand_R"}
    assert set(ALL_ORGANS) <= set(ORGANS)
    assert {base(name) for name in ALL_ORGANS} == set(VOLUMES)
    _, masks = make_phantom(0, 1, spacing=(3.0, 3.0, 3.0), field_of_view="head")
    assert set(masks) == set(PAPER_ORGANS)


@pytest.mark.parametrize("index", CASES)
def test_every_organ_has_its_size(index: int) -> None:
    image, masks = case(index)
    assert set(masks) == set(ALL_ORGANS)
    for name, mask in masks.items():
        low, high = VOLUMES[base(name)]
        assert low < mask.sum() * image.grid.voxel_mm3 < high, name


@pytest.mark.parametrize("index", CASES)
def test_left_is_left_in_lps(index: int) -> None:
    image, masks = case(index)
    assert image.grid.direction == (1, 0, 0, 0, 1, 0, 0, 0, 1)
    for name in ALL_ORGANS:
        if name.endswith("_L"):
            left, right = (centre(masks[side], image.grid) for side in (name, mirror_name(name)))
            assert left[0] > right[0] + 30
            assert abs(left[0] - right[0]) < 140


def test_organs_lie_where_patients_have_them() -> None:
    shifts: dict[str, list[np.ndarray]] = {}
    for image, masks in map(case, CASES):
        stem = centre(masks["Brainstem"], image.grid)
        for name, mask in masks.items():
            if base(name) in PLACES:
                side = [-1, 1, 1] if name.endswith("_R") else [1, 1, 1]
                shifts.setdefault(name, []).append(
                    centre(mask, image.grid) - stem - np.multiply(PLACES[base(name)], side)
                )
    for name, found in shifts.items():
        assert np.abs(np.mean(found, axis=0)).max() < 14, name  # the head's pitch alone moves an eye by 12 mm (1 SD)


@pytest.mark.parametrize("index", CASES)
def test_painted_in_order_every_organ_keeps_its_voxels(index: int) -> None:
    _, masks = case(index)
    labels = np.zeros(next(iter(masks.values())).shape, np.uint8)
    for value, name in enumerate(overlap_order(masks), start=1):
        labels[masks[name]] = value
    for value, name in enumerate(overlap_order(masks), start=1):
        kept = np.count_nonzero(labels == value) / masks[name].sum()
        # only these hold another organ: an eye its lens, a joint the condyle, the mandible's volume is larger
        assert kept > (0.9 if base(name) in ("Eye", "Bone_Mandible") else 0.97), (name, kept)


def test_a_lens_lies_within_its_eye_at_the_front() -> None:
    for image, masks in map(case, CASES):
        for side in "LR":
            lens, eye = masks[f"Lens_{side}"], masks[f"Eye_{side}"]
            assert (lens & eye).sum() > 0.8 * lens.sum()
            assert centre(lens, image.grid)[1] < centre(eye, image.grid)[1] - 4


def test_tissues_have_their_hu() -> None:
    for image, masks in map(case, CASES):
        hu = {name: image.array[mask] for name, mask in masks.items()}
        assert image.array.dtype == np.int16
        assert image.array.min() >= -1024
        assert 22 < np.median(hu["Brainstem"]) < 38
        assert 30 < np.median(hu["SpinalCord"]) < 48
        assert 500 < np.median(hu["Bone_Mandible"]) < 900
        for side in "LR":
            vitreous = masks[f"Eye_{side}"] & ~masks[f"Lens_{side}"]
            assert 2 < np.median(image.array[vitreous]) < 32
            assert 75 < np.median(hu[f"Lens_{side}"]) < 140  # blurred with the vitreous
            assert -55 < np.median(hu[f"Parotid_{side}"]) < 35
            assert 15 < hu[f"Parotid_{side}"].std() < 90
            assert 15 < np.median(hu[f"Glnd_Submand_{side}"]) < 65
            assert np.median(hu[f"Ear_Middle_{side}"]) < -100
            assert 15 < np.median(hu[f"OpticNrv_{side}"]) < 70
        assert -1000 in image.array
        assert hu["Larynx"].min() < -600  # its airway
        quartiles = np.percentile(hu["Brainstem"], [25, 75])
        assert 4 < (quartiles[1] - quartiles[0]) / 1.35 < 9  # the scanner's noise


def test_the_same_seed_gives_the_same_phantom_and_another_seed_another() -> None:
    image, masks = case(0)
    again = make_phantom(0, 1, spacing=COARSE, field_of_view="head", organs=ALL_ORGANS)
    np.testing.assert_array_equal(image.array, again[0].array)
    assert image.grid == again[0].grid
    for name, mask in masks.items():
        np.testing.assert_array_equal(mask, again[1][name])
    for other, _ in (case(1), case(0, seed=2)):
        assert other.grid.origin != image.grid.origin
        assert np.mean(other.array != image.array) > 0.5


def test_poses_differ_as_much_as_patients_do() -> None:
    degrees = np.rad2deg([Patient.sample(0, index).pose for index in range(60)])
    np.testing.assert_allclose(degrees.std(axis=0), [8.6, 2.6, 2.4], rtol=0.3)
    assert np.abs(degrees).max() < 20


def test_a_missing_contour_is_still_in_the_ct() -> None:
    image, masks = case(0)
    fewer, some = make_phantom(0, 1, spacing=COARSE, field_of_view="head", missing=0.5)
    np.testing.assert_array_equal(image.array, fewer.array)
    assert 3 <= len(some) <= 16
    for name, mask in some.items():
        np.testing.assert_array_equal(mask, masks[name])
    assert make_phantom(0, 1, spacing=(5.0, 4.0, 4.0), field_of_view="head", missing=1.0)[1] == {}


def test_spacing_and_field_of_view_are_the_grids() -> None:
    image, masks = make_phantom(0, 1, spacing=(5.0, 3.0, 4.0), field_of_view=(150.0, 180.0, 200.0), organs=["Orbit-Lt"])
    assert image.grid.spacing == (5.0, 3.0, 4.0)
    assert image.grid.shape == image.array.shape == (30, 60, 50)
    assert list(masks) == ["Eye_L"]
    fine, fine_masks = case(0)
    shift = centre(masks["Eye_L"], image.grid) - centre(fine_masks["Eye_L"], fine.grid)
    assert np.abs(shift).max() < 2.5  # the same patient on another grid
    full, _ = make_phantom(0, 1, spacing=(10.0, 8.0, 8.0), organs=["Brainstem"])
    assert np.multiply(full.grid.shape, full.grid.spacing) == pytest.approx([300, 280, 340], abs=8)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"organs": ["Cochlea_L"]}, "phantoms have no Cochlea_L"),
        ({"organs": ["Nose"]}, "unknown organ name 'Nose'"),
        ({"missing": 1.5}, "probability"),
        ({"spacing": (2.0, 0.0, 2.0)}, "at least 8 voxels"),
        ({"field_of_view": (10.0, 100.0, 100.0)}, "at least 8 voxels"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], cause: str) -> None:
    with pytest.raises(FocusNetError, match=cause):
        make_phantom(0, 0, **options)  # type: ignore[arg-type]


# the command

HEAD = ["--spacing", "[5,4,4]", "--field_of_view", "head"]


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_the_command_writes_a_data_set_the_rest_reads(tmp_path: Path) -> None:
    assert phantom.main([str(tmp_path / "a"), "--cases", "2", "--seed", "1", *HEAD]) == 0
    first, second = find_cases(tmp_path / "a")
    assert (first.name, second.name) == ("phantom_0000", "phantom_0001")
    assert set(first.organs) == set(PAPER_ORGANS)
    masks, grid = read_masks(first)
    image, expected = make_phantom(0, 1, spacing=(5.0, 4.0, 4.0), field_of_view="head")
    assert not grid.difference(image.grid)
    np.testing.assert_array_equal(read_image(first.image or tmp_path).array, image.array)
    for name, mask in expected.items():
        np.testing.assert_array_equal(masks[name], mask)
    plan = prepare(tmp_path / "a", tmp_path / "cache", DataConfig(spacing=(5.0, 4.0, 4.0)))
    assert set(plan.organ_names) == set(PAPER_ORGANS)
    assert len(plan.cases) == 2
    assert {"Lens_L", "OpticChiasm", "Pituitary"} <= set(plan.small_organs)


def test_the_command_writes_the_same_bytes_whatever_the_number_of_cases(tmp_path: Path) -> None:
    phantom.main([str(tmp_path / "a"), "--cases", "2", *HEAD])
    phantom.main([str(tmp_path / "b"), "--cases", "1", *HEAD])
    both, alone = files(tmp_path / "a"), files(tmp_path / "b")
    assert {name: content for name, content in both.items() if "phantom_0000" in name} == alone


def test_a_folder_with_something_in_it_is_kept(tmp_path: Path) -> None:
    (tmp_path / "phantom_0000" / "structures").mkdir(parents=True)
    (tmp_path / "phantom_0000" / "structures" / "Glnd_Submand_L.nrrd").write_text("")
    notes = tmp_path / "phantom_0000" / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(FocusNetError, match="not empty"):
        phantom.main([str(tmp_path), "--cases", "1", *HEAD])
    with pytest.raises(FocusNetError, match="is a file"):
        phantom.main([str(notes), *HEAD])
    with pytest.raises(FocusNetError, match=r"^cannot replace .*phantom_0000: it is no phantom \(notes.txt\)"):
        phantom.main([str(tmp_path), "--cases", "1", "--overwrite", *HEAD])
    assert notes.read_text() == "mine"
    notes.unlink()
    phantom.main([str(tmp_path), "--cases", "1", "--overwrite", *HEAD])
    assert set(find_cases(tmp_path)[0].organs) == set(PAPER_ORGANS)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--cases", "0"], "^--cases 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--field_of_view", "leg"], "field_of_view"),
        (["--missing", "x"], "missing"),
        (["--missing", "2"], "^missing is 2.0, expected"),
        (["--organs", "[Nose]"], "^unknown organ name 'Nose'"),
        (["--spacing", "[2,0,2]"], r"^--spacing \[2.0, 0.0, 2.0\]: expected three lengths above 0 mm$"),
        (["--field_of_view", "[10,100,100]"], "^spacing .* expected at least 8 voxels"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path: Path, options: list[str], named: str) -> None:
    with pytest.raises(FocusNetError, match=named) as caught:
        phantom.main([str(tmp_path / "out"), *options])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_stopped_overwrite_leaves_the_older_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command.write_case(tmp_path / "case", *blocks())
    before = files(tmp_path)

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "write_image", stop)
    with pytest.raises(KeyboardInterrupt):
        command.write_case(tmp_path / "case", *blocks())
    assert files(tmp_path) == before


@pytest.mark.parametrize("after", [0, 1, 5, 19])
def test_a_stopped_run_leaves_whole_cases_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    started = []

    def stopping(write: Callable[..., None]) -> Callable[..., None]:
        def stopped(*arguments: object) -> None:
            started.append(arguments)
            if len(started) > 20 + after:  # 19 masks and the image are a case
                raise KeyboardInterrupt
            write(*arguments)

        return stopped

    monkeypatch.setattr(command, "write_labels", stopping(command.write_labels))
    monkeypatch.setattr(command, "write_image", stopping(command.write_image))
    monkeypatch.setattr(command, "make_phantom", lambda index, seed, **_: blocks())
    with pytest.raises(KeyboardInterrupt):
        phantom.main([str(tmp_path), "--cases", "3"])
    assert [path.name for path in tmp_path.iterdir()] == ["phantom_0000"]
    assert len(find_cases(tmp_path)[0].organs) == 19


def blocks() -> Phantom:
    grid = Grid((8, 8, 8))
    return Volume(np.zeros(grid.shape, np.int16), grid), {name: np.ones(grid.shape, bool) for name in PAPER_ORGANS}


# hybrids


@pytest.mark.parametrize("option", ["--from-labels", "--from_labels"])
def test_a_hybrid_paints_the_contours_on_their_own_grid(tmp_path: Path, option: str) -> None:
    image, masks = case(0)
    turned = replace(image.grid, origin=(5.0, -70.0, 900.0))
    for name in ("Brainstem", "Eye_L", "Eye_R", "Parotid_L", "Parotid_R", "Bone_Mandible", "Lens_L"):
        write_labels(tmp_path / "labels" / "p" / "structures" / f"{name}.nrrd", masks[name], turned)
    phantom.main([str(tmp_path / "out"), option, str(tmp_path / "labels")])
    (found,) = find_cases(tmp_path / "out")
    assert found.name == "hybrid_p"
    kept, grid = read_masks(found)
    assert set(kept) == {"Brainstem", "Eye_L", "Eye_R", "Parotid_L", "Parotid_R", "Bone_Mandible", "Lens_L"}
    assert grid.spacing == turned.spacing
    start = np.round((np.array(grid.origin) - turned.origin) / turned.spacing[::-1], 6)[::-1]
    assert (start == np.rint(start)).all()  # a part of the labels' grid, not resampled
    box = tuple(slice(int(a), int(a) + n) for a, n in zip(start, grid.shape, strict=True))
    hu = read_image(found.image or tmp_path).array
    for name, mask in kept.items():
        np.testing.assert_array_equal(mask, masks[name][box])
        assert mask.sum() == masks[name].sum()
    assert 20 < np.median(hu[kept["Brainstem"]]) < 40
    assert np.median(hu[kept["Bone_Mandible"]]) > 450
    assert np.median(hu[kept["Lens_L"]]) > 70
    assert hu.min() < -900


def test_a_hybrid_can_be_painted_on_another_spacing(tmp_path: Path) -> None:
    image, masks = case(0)
    for name in ("Brainstem", "Eye_L", "Parotid_L", "Parotid_R"):
        write_labels(tmp_path / "labels" / "p" / "structures" / f"{name}.nrrd", masks[name], image.grid)
    phantom.main([str(tmp_path / "out"), "--from-labels", str(tmp_path / "labels"), "--spacing", "[3,3,3]"])
    kept, grid = read_masks(find_cases(tmp_path / "out")[0])
    assert grid.spacing == (3.0, 3.0, 3.0)
    volume = masks["Parotid_L"].sum() * image.grid.voxel_mm3
    assert kept["Parotid_L"].sum() * grid.voxel_mm3 == pytest.approx(volume, rel=0.05)


def test_hybrids_need_organs_that_place_the_head() -> None:
    image, masks = case(0)
    with pytest.raises(FocusNetError, match="do not place the head"):
        make_hybrid({name: masks[name] for name in ("Brainstem", "SpinalCord")}, image.grid, 0, 0)
    with pytest.raises(FocusNetError, match="no contours"):
        make_hybrid({"Brainstem": np.zeros(image.grid.shape, bool)}, image.grid, 0, 0)
    oblique = replace(image.grid, direction=(0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, 1.0))
    with pytest.raises(FocusNetError, match="axes along LPS"):
        make_hybrid(masks, oblique, 0, 0)


def test_a_bad_label_folder_is_named_with_its_case(tmp_path: Path) -> None:
    with pytest.raises(FocusNetError, match="no such folder"):
        phantom.main([str(tmp_path / "out"), "--from-labels", str(tmp_path / "absent")])
    write_labels(
        tmp_path / "labels" / "p" / "structures" / "Chiasm.nrrd", np.ones((9, 9, 9), np.uint8), Grid((9, 9, 9))
    )
    with pytest.raises(FocusNetError, match="hybrid_p: OpticChiasm"):
        phantom.main([str(tmp_path / "out"), "--from-labels", str(tmp_path / "labels")])
    with pytest.raises(FocusNetError, match=r"^--cases 2: .*labels has 1$"):
        phantom.main([str(tmp_path / "out"), "--from-labels", str(tmp_path / "labels"), "--cases", "2"])


@needs_real_data
def test_hybrid_of_a_real_patient(tmp_path: Path) -> None:
    shutil.copytree(REAL / "pddca-labels" / "0522c0001", tmp_path / "labels" / "0522c0001")
    phantom.main([str(tmp_path / "out"), "--from-labels", str(tmp_path / "labels")])
    (found,) = find_cases(tmp_path / "out")
    kept, grid = read_masks(found)
    original, source = read_masks(find_cases(tmp_path / "labels")[0])
    assert grid.spacing == pytest.approx(source.spacing)
    assert {name: mask.sum() for name, mask in kept.items()} == {name: mask.sum() for name, mask in original.items()}
    for name, mask in kept.items():
        np.testing.assert_allclose(centre(mask, grid), centre(original[name], source), atol=1e-3)
    hu = read_image(found.image or tmp_path).array
    assert 20 < np.median(hu[kept["Brainstem"]]) < 40
    assert np.median(hu[kept["Bone_Mandible"]]) > 450
