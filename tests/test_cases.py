"""Data set layouts and the reading of contours."""

import json
from pathlib import Path

import numpy as np
import pytest

from focusnet.data.cases import find_cases, iter_masks, read_masks
from focusnet.data.images import Grid, write_labels
from focusnet.errors import FocusNetError
from tests.real_data import REAL, needs_real_data

GRID = Grid((9, 10, 11), (2.5, 1.0, 1.0), (5.0, -3.0, 40.0))


def cube(start: int, size: int = 2) -> np.ndarray:
    mask = np.zeros(GRID.shape, np.uint8)
    mask[start : start + size, start : start + size, start : start + size] = 1
    return mask


def save(path: Path, array: np.ndarray, grid: Grid = GRID) -> Path:
    write_labels(path, array, grid)
    return path


def test_pddca_layout(tmp_path: Path) -> None:
    image = save(tmp_path / "b" / "img.nrrd", cube(0))
    save(tmp_path / "b" / "structures" / "BrainStem.nrrd", cube(1))
    save(tmp_path / "b" / "structures" / "OpticNerve_L.nrrd", cube(4) * 255)
    save(tmp_path / "a" / "img.nii.gz", cube(0))
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b" / "structures" / "landmarks.fcsv").write_text("")
    first, second = find_cases(tmp_path)
    assert (first.name, first.organs) == ("a", [])
    assert (second.name, second.image, second.organs) == ("b", image, ["Brainstem", "OpticNrv_L"])
    masks, grid = read_masks(second)
    assert grid == GRID
    assert all(mask.dtype == bool for mask in masks.values())
    np.testing.assert_array_equal(masks["OpticNrv_L"], cube(4) > 0)
    assert [case.name for case in find_cases(tmp_path / "b")] == ["b"]


def test_the_current_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "p" / "img.nrrd", cube(0))
    monkeypatch.chdir(tmp_path / "p")
    assert [case.name for case in find_cases(Path("."))] == ["p"]


def test_segmentations_without_an_image(tmp_path: Path) -> None:
    save(tmp_path / "p" / "segmentations" / "Lens-Lt.nii.gz", cube(2))
    save(tmp_path / "p" / "segmentations" / "Orbit-Lt.nrrd", np.zeros(GRID.shape, np.uint8))
    (case,) = find_cases(tmp_path)
    assert case.image is None
    assert case.organs == ["Eye_L", "Lens_L"]
    masks, _ = read_masks(case)
    assert masks["Lens_L"].sum() == 8
    assert masks["Eye_L"].sum() == 0


def test_an_image_may_be_a_folder_of_dicom_slices(tmp_path: Path) -> None:
    save(tmp_path / "p" / "structures" / "Chiasm.nrrd", cube(1))
    (tmp_path / "p" / "ct").mkdir()
    assert find_cases(tmp_path)[0].image == tmp_path / "p" / "ct"
    image = save(tmp_path / "p" / "ct.nrrd", cube(0))
    assert find_cases(tmp_path)[0].image == image


def test_a_link_to_nothing_is_a_problem_not_an_absence(tmp_path: Path) -> None:
    save(tmp_path / "p" / "img.nrrd", cube(0))
    save(tmp_path / "p" / "structures" / "Lens_L.nrrd", cube(1))
    (tmp_path / "p" / "structures" / "Chiasm.nrrd").symlink_to(tmp_path / "absent.nrrd")
    (tmp_path / "q").symlink_to(tmp_path / "absent")
    p, q = find_cases(tmp_path)
    with pytest.raises(FocusNetError, match=r"Chiasm\.nrrd: no such file"):
        read_masks(p)
    with pytest.raises(FocusNetError, match=r"case q: .*q is a link to nothing"):
        read_masks(q)


def test_predictions(tmp_path: Path) -> None:
    save(tmp_path / "p" / "labels.nii.gz", cube(1) + 2 * cube(5))
    (tmp_path / "p" / "labels.json").write_text('{"1": "Brainstem", "2": "Lens_L", "3": "Lens_R"}')
    (tmp_path / "p" / "qc.png").write_text("")
    (case,) = find_cases(tmp_path)
    masks, _ = read_masks(case)
    assert {organ: int(mask.sum()) for organ, mask in masks.items()} == {
        "Brainstem": 8,
        "Lens_L": 8,
        "Lens_R": 0,
    }


@pytest.mark.parametrize(
    ("table", "cause"),
    [
        ("{", "no JSON"),
        ("[1]", "no label table"),
        ('{"1": 2.5}', "expected a value and an organ"),
        (None, "cannot read"),
    ],
)
def test_a_bad_label_table_is_a_problem_of_its_case(tmp_path: Path, table: str | None, cause: str) -> None:
    save(tmp_path / "p" / "labels.nii.gz", cube(1))
    if table is not None:
        (tmp_path / "p" / "labels.json").write_text(table)
    (case,) = find_cases(tmp_path)
    with pytest.raises(FocusNetError, match=f"case p: .*{cause}"):
        read_masks(case)


def test_a_label_without_a_name_is_an_error(tmp_path: Path) -> None:
    save(tmp_path / "p" / "labels.nii.gz", 7 * cube(1))
    (tmp_path / "p" / "labels.json").write_text('{"1": "Brainstem"}')
    with pytest.raises(FocusNetError, match="label 7"):
        read_masks(find_cases(tmp_path)[0])


@pytest.mark.parametrize(
    "labels",
    [{"background": 0, "Brainstem": 1, "Chiasm": 2}, {"0": "background", "1": "Brainstem", "2": "Chiasm"}],
)
def test_nnunet_layout(tmp_path: Path, labels: dict[str, object]) -> None:
    for name in ("x", "y"):
        save(tmp_path / "imagesTr" / f"{name}_0000.nii.gz", cube(0))
    save(tmp_path / "labelsTr" / "x.nii.gz", cube(1) + 2 * cube(5))
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    x, y = find_cases(tmp_path)
    assert (y.name, y.organs) == ("y", [])
    assert x.image == tmp_path / "imagesTr" / "x_0000.nii.gz"
    assert {organ: int(mask.sum()) for organ, mask in read_masks(x)[0].items()} == {
        "Brainstem": 8,
        "OpticChiasm": 8,
    }


def test_han_seg_layout(tmp_path: Path) -> None:
    image = save(tmp_path / "case_01" / "case_01_IMG_CT.nrrd", cube(0))
    save(tmp_path / "case_01" / "case_01_IMG_MR_T1.nrrd", cube(0))
    save(tmp_path / "case_01" / "case_01_OAR_Eye_AL.seg.nrrd", cube(2))
    (case,) = find_cases(tmp_path)
    assert case.image == image
    assert list(case.masks) == ["Eye_AL"]
    assert read_masks(case)[0]["Eye_AL"].sum() == 8


def test_unknown_organs_fail_unless_allowed(tmp_path: Path) -> None:
    save(tmp_path / "p" / "structures" / "GTV.nrrd", cube(1))
    save(tmp_path / "p" / "structures" / "Chiasm.nrrd", cube(1))
    (case,) = find_cases(tmp_path)
    with pytest.raises(FocusNetError, match="case p: unknown organ name 'GTV'"):
        read_masks(case)
    assert [organ for organ, _, _ in iter_masks(case, allow_unknown=True)] == ["OpticChiasm"]


def test_two_files_for_one_organ_are_a_problem(tmp_path: Path) -> None:
    save(tmp_path / "p" / "structures" / "Chiasm.nrrd", cube(1))
    save(tmp_path / "p" / "structures" / "OpticChiasm.nrrd", cube(1))
    with pytest.raises(FocusNetError, match="are both OpticChiasm"):
        read_masks(find_cases(tmp_path)[0])


def test_a_mask_on_another_grid_is_an_error(tmp_path: Path) -> None:
    save(tmp_path / "p" / "img.nrrd", cube(0))
    save(
        tmp_path / "p" / "structures" / "Chiasm.nrrd",
        cube(1),
        Grid(GRID.shape, GRID.spacing, (5.0, -2.0, 40.0)),
    )
    (case,) = find_cases(tmp_path)
    with pytest.raises(
        FocusNetError, match=r"Chiasm.nrrd lies on another grid .* origin \(5, -2, 40\) against \(5, -3, 40\)"
    ):
        read_masks(case)
    other = Grid((3, 3, 3))
    with pytest.raises(FocusNetError, match="shape"):
        read_masks(case, other)


def test_a_mask_with_several_labels_is_an_error(tmp_path: Path) -> None:
    save(tmp_path / "p" / "structures" / "Chiasm.nrrd", cube(1) + 2 * cube(5))
    with pytest.raises(FocusNetError, match="no binary mask"):
        read_masks(find_cases(tmp_path)[0])


def test_nothing_to_find(tmp_path: Path) -> None:
    with pytest.raises(FocusNetError, match="no such folder"):
        find_cases(tmp_path / "absent")
    with pytest.raises(FocusNetError, match="no cases in"):
        find_cases(tmp_path)
    save(tmp_path / "p" / "img.nrrd", cube(0))
    masks, grid = read_masks(find_cases(tmp_path)[0])
    assert masks == {}
    assert grid == GRID


@needs_real_data
def test_every_real_case_is_found() -> None:
    counts = {
        "openkbp/train": 170,
        "openkbp/validation": 33,
        "pddca-labels": 11,
        "deepmind-oars/oncologist": 26,
    }
    for folder, count in counts.items():
        cases = find_cases(REAL / folder)
        assert len(cases) == count
        assert not any(case.problems or case.unknown for case in cases)
    organs = {organ for case in find_cases(REAL / "deepmind-oars" / "radiographer") for organ in case.organs}
    assert len(organs) == 21


@needs_real_data
def test_real_masks_have_real_sizes() -> None:
    case = find_cases(REAL / "pddca-labels")[0]
    masks, grid = read_masks(case)
    assert len(masks) == 9
    assert 100 < masks["OpticChiasm"].sum() * grid.voxel_mm3 < 1500
    assert 15_000 < masks["Brainstem"].sum() * grid.voxel_mm3 < 45_000
