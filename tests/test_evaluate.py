"""Scores, the paper's table and the command on small made-up cases, and the two observers on real ones."""

import csv
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from focusnet.errors import FocusNetError
from focusnet.evaluate import (
    OrganScore,
    TableRow,
    evaluate,
    evaluate_pair,
    format_table,
    main,
    summarize,
    table_text,
)
from tests.real_data import REAL, needs_real_data

SHAPE = (8, 20, 20)
SPACING = (2.5, 1.0, 1.0)
DIAGONAL = math.sqrt(20**2 + 20**2 + 20**2)


def _box(z: int, y: int, x: int, size: tuple[int, int, int] = (4, 4, 4)) -> np.ndarray:
    mask = np.zeros(SHAPE, np.uint8)
    mask[z : z + size[0], y : y + size[1], x : x + size[2]] = 1
    return mask


def _image(array: np.ndarray, spacing: tuple[float, ...] = SPACING) -> sitk.Image:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    image.SetOrigin((-10.0, 5.0, 30.0))
    return image


def _write_masks(folder: Path, masks: dict[str, np.ndarray], spacing: tuple[float, ...] = SPACING) -> None:
    (folder / "segmentations").mkdir(parents=True)
    for organ, mask in masks.items():
        sitk.WriteImage(_image(mask, spacing), str(folder / "segmentations" / f"{organ}.nrrd"))


def _write_prediction(folder: Path, masks: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True)
    labels = np.zeros(SHAPE, np.uint8)
    for value, mask in enumerate(masks.values(), start=1):
        labels[mask > 0] = value
    sitk.WriteImage(_image(labels), str(folder / "labels.nii.gz"))
    (folder / "labels.json").write_text(json.dumps({str(i): name for i, name in enumerate(masks, start=1)}))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two cases; in the second the prediction misses the lens and finds a parotid that the truth lacks."""
    truth, prediction = tmp_path / "truth", tmp_path / "prediction"
    brainstem, lens, nothing = _box(2, 8, 8), _box(1, 1, 1, (1, 4, 4)), np.zeros(SHAPE, np.uint8)
    parotid = _box(1, 12, 2, (5, 6, 6))
    _write_masks(truth / "a", {"Brainstem": brainstem, "Lens-Lt": lens, "Parotid-Lt": parotid})
    _write_masks(truth / "b", {"Brainstem": brainstem, "Lens-Lt": lens, "Parotid-Lt": nothing})
    moved = {"Brainstem": _box(2, 8, 10), "Lens_L": lens, "Parotid_L": parotid}
    _write_prediction(prediction / "a", moved)
    _write_prediction(prediction / "b", {**moved, "Lens_L": nothing})
    return truth, prediction


def test_each_status_and_its_values() -> None:
    truth = {
        "Brainstem": _box(2, 8, 8),
        "Lens_L": _box(1, 1, 1),
        "Eye_L": np.zeros(SHAPE),
        "Eye_R": np.zeros(SHAPE),
    }
    prediction = {"Brainstem": _box(2, 8, 10), "Eye_L": _box(3, 3, 3), "Eye_R": np.zeros(SHAPE, bool)}
    scores = {score.organ: score for score in evaluate_pair(truth, prediction, SPACING, case="a")}
    assert {organ: score.status for organ, score in scores.items()} == {
        "Brainstem": "ok",
        "Lens_L": "missed",
        "Eye_L": "spurious",
        "Eye_R": "absent",
    }
    ok, missed, spurious = scores["Brainstem"], scores["Lens_L"], scores["Eye_L"]
    assert (ok.dsc, ok.hd95_mm, ok.center_mm) == pytest.approx((0.5, 2.0, 2.0))
    assert (ok.truth_mm3, ok.volume_difference) == pytest.approx((64 * 2.5, 0.0))
    assert missed.dsc == 0
    assert missed.hd95_mm == pytest.approx(DIAGONAL)
    assert missed.center_mm is None
    assert spurious.dsc is None
    assert spurious.hd95_mm is None
    assert spurious.prediction_mm3 == pytest.approx(160)


def test_masks_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        evaluate_pair({"Eye_L": np.ones((2, 2, 2))}, {"Eye_L": np.ones((2, 2, 3))}, SPACING)


def test_table_counts_and_penalises_a_missed_organ() -> None:
    scores = [
        OrganScore("a", "Brainstem", "ok", 0.8, 2.0, 1.0),
        OrganScore("b", "Brainstem", "ok", 0.9, 4.0, 1.0),
        OrganScore("a", "Lens_L", "ok", 0.7, 1.0, 1.0),
        OrganScore("b", "Lens_L", "missed", 0.0, 500.0),
        OrganScore("c", "Lens_L", "spurious"),
        OrganScore("c", "Brainstem", "absent"),
    ]
    small, other, mean_small, mean_other, mean_all = summarize(scores, {"Lens_L"})
    assert (small.organ, small.n, small.missed, small.spurious) == ("Lens_L", 2, 1, 1)
    assert small.dsc.mean == pytest.approx(0.35)
    assert small.hd95_mm.mean == pytest.approx(250.5)
    assert small.matched_dsc.mean == pytest.approx(0.7)
    assert small.matched_dsc.sd is None
    assert other.dsc.mean == pytest.approx(0.85)
    assert other.dsc.sd == pytest.approx(0.1 / math.sqrt(2))
    assert (mean_small.dsc.mean, mean_other.dsc.mean) == pytest.approx((0.35, 0.85))
    assert mean_all.organ == "mean of all"
    assert mean_all.dsc.mean == pytest.approx(0.6)
    assert (mean_all.n, mean_all.missed, mean_all.spurious) == (4, 1, 1)


def test_an_organ_that_no_truth_has_gets_no_row() -> None:
    assert summarize([OrganScore("a", "Lens_L", "spurious"), OrganScore("b", "Lens_L", "absent")], set()) == []


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 16)] * 4), min_size=1, max_size=4), st.data())
def test_missing_an_organ_never_improves_the_mean(starts: list[tuple[int, ...]], data: st.DataObject) -> None:
    def row(dropped: int | None) -> TableRow:
        scores = []
        for case, (y, x, v, u) in enumerate(starts):
            found = np.zeros(SHAPE) if case == dropped else _box(2, v, u)
            scores += evaluate_pair({"Eye_L": _box(1, y, x)}, {"Eye_L": found}, SPACING, case=str(case))
        return summarize(scores, set())[0]

    complete, lacking = row(None), row(data.draw(st.integers(0, len(starts) - 1)))
    assert lacking.dsc.mean <= complete.dsc.mean
    assert lacking.hd95_mm.mean > complete.hd95_mm.mean
    assert lacking.missed == 1
    assert lacking.n == complete.n


def test_text_shows_optional_columns_only_where_there_is_something_to_show() -> None:
    found = [
        OrganScore("a", "Lens_L", "ok", 0.8765, 2.345, 1.0),
        OrganScore("b", "Lens_L", "ok", 0.8, 2.0, 1.0),
    ]
    plain = table_text(summarize(found, {"Lens_L"}))
    assert "83.8 ± 5.4" in plain
    assert "2.17 ± 0.24" in plain
    assert "matched" not in plain
    assert "ROI" not in plain
    assert "localisation" not in plain
    located = [
        OrganScore("a", "Lens_L", "ok", 0.8, 2.0, 1.0, localisation_mm=1.5, inside_roi=True),
        OrganScore("b", "Lens_L", "missed", 0.0, 99.0, localisation_mm=2.5, inside_roi=False),
    ]
    full = table_text(summarize(located, {"Lens_L"}))
    assert "matched" in full
    assert "…" not in full
    assert "2.00 ± 0.71" in full
    assert "50" in full
    assert format_table(summarize(located, set())).row_count == 2


def test_folders_of_different_layouts(folders: tuple[Path, Path]) -> None:
    evaluation = evaluate(*folders, processes=1)
    rows = {row.organ: row for row in evaluation.rows}
    # 40 and 450 mm3 are small, and in such tiny volumes so is the brainstem
    assert list(rows) == ["Brainstem", "Lens_L", "Parotid_L", "mean of all"]
    assert {row.group for row in rows.values()} == {"small", "mean"}
    assert rows["Brainstem"].dsc.mean == pytest.approx(0.5)
    assert rows["Brainstem"].n == 2
    assert rows["Lens_L"].missed == 1
    assert rows["Lens_L"].dsc.mean == pytest.approx(0.5)
    assert rows["Parotid_L"].spurious == 1
    assert rows["Parotid_L"].dsc.mean == 1
    assert rows["Parotid_L"].n == 1
    penalty = next(s.hd95_mm for s in evaluation.scores if s.status == "missed")
    assert penalty == pytest.approx(DIAGONAL)


def test_several_processes_give_the_same(folders: tuple[Path, Path]) -> None:
    assert evaluate(*folders, processes=2) == evaluate(*folders, processes=1)


def test_command_writes_all_files(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "new" / "out"
    options = ["--out", str(out), "--small", "Lens-Lt", "--organs", "Brainstem", "Lens_L", "--processes", "1"]
    assert main([*map(str, folders), *options]) == 0
    assert "DSC %" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "cases.csv",
        "results.json",
        "table.csv",
        "table.txt",
    ]
    results = json.loads((out / "results.json").read_text())
    assert [row["organ"] for row in results["table"]][:2] == ["Lens_L", "Brainstem"]
    cases = list(csv.DictReader((out / "cases.csv").open()))
    assert len(cases) == len(results["scores"]) == 4
    assert {(c["case"], c["organ"]): c["status"] for c in cases}["b", "Lens_L"] == "missed"
    table = list(csv.DictReader((out / "table.csv").open()))
    assert float(table[0]["dsc_mean"]) == pytest.approx(0.5)
    assert table[0]["missed"] == "1"
    assert "mean of all" in (out / "table.txt").read_text(encoding="utf-8")


def test_cases_on_one_side_only(folders: tuple[Path, Path]) -> None:
    truth, prediction = folders
    (prediction / "b").rename(prediction / "c")
    with pytest.raises(FocusNetError, match=r"prediction lacks b; .*truth lacks c; --allow-missing-cases"):
        evaluate(truth, prediction, processes=1)
    evaluation = evaluate(truth, prediction, processes=1, allow_missing_cases=True)
    assert {score.case for score in evaluation.scores} == {"a"}
    assert any("lacks b" in note for note in evaluation.notes)


def test_no_common_case_is_an_error_even_if_missing_ones_are_allowed(folders: tuple[Path, Path]) -> None:
    truth, prediction = folders
    for name in "ab":
        (prediction / name).rename(prediction / f"x{name}")
    with pytest.raises(FocusNetError, match="lacks a, b"):
        evaluate(truth, prediction, allow_missing_cases=True)


def test_different_grids_name_both_files(folders: tuple[Path, Path]) -> None:
    truth, prediction = folders
    for file in (truth / "a" / "segmentations").iterdir():
        image = sitk.ReadImage(str(file))
        image.SetSpacing((1.0, 1.0, 3.0))
        sitk.WriteImage(image, str(file))
    with pytest.raises(FocusNetError, match=r"labels\.nii\.gz lies on another grid than .*Brainstem\.nrrd: spacing"):
        evaluate(truth, prediction, processes=1)


def test_an_error_crosses_the_process_border(folders: tuple[Path, Path]) -> None:
    truth, prediction = folders
    (prediction / "b" / "labels.nii.gz").write_bytes(b"no image")
    with pytest.raises(FocusNetError, match=r"labels\.nii\.gz"):
        evaluate(truth, prediction, processes=2)


def test_an_organ_without_any_prediction_is_missed_and_said(folders: tuple[Path, Path]) -> None:
    truth, prediction = folders
    for name in "ab":
        (prediction / name / "labels.json").write_text('{"1": "Brainstem", "2": "Lens_L", "3": "Eye_L"}')
    evaluation = evaluate(truth, prediction, processes=1)
    assert any("no prediction names Parotid_L" in note for note in evaluation.notes)
    assert any("Eye_L" in note for note in evaluation.notes)
    rows = {row.organ: row for row in evaluation.rows}
    assert rows["Parotid_L"].missed == rows["Parotid_L"].n == 1
    assert "Eye_L" not in rows


def test_wrong_organs_are_named(folders: tuple[Path, Path]) -> None:
    with pytest.raises(FocusNetError, match="no case of the truth has Eye_L; it has Brainstem"):
        evaluate(*folders, organs=["Eye_L", "Brainstem"])
    with pytest.raises(FocusNetError, match="unknown organ name 'Foo'"):
        evaluate(Path("no folder that would be read"), folders[1], small=["Foo"])
    with pytest.raises(FocusNetError, match="Branstem"):
        evaluate(*folders, organs=["Branstem"])


def test_a_label_value_without_a_name_is_refused(folders: tuple[Path, Path]) -> None:
    truth, prediction = folders
    (prediction / "a" / "labels.json").write_text('{"1": "Brainstem"}')
    with pytest.raises(FocusNetError, match=r"labels\.nii\.gz holds label 2"):
        evaluate(truth, prediction, processes=1)


def test_results_into_a_file_are_refused_first(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FocusNetError, match="it is a file"):
        main([str(tmp_path / "unread"), str(folders[1]), "--out", str(tmp_path / "file")])


@needs_real_data
def test_two_observers_agree_as_published_with_the_data() -> None:
    lenses = ["Lens_L", "Lens_R"]
    observers = REAL / "deepmind-oars" / "oncologist", REAL / "deepmind-oars" / "radiographer"
    rows = evaluate(*observers, organs=lenses, processes=1).rows
    found = {row.organ: row for row in rows}
    assert [round(found[lens].matched_dsc.mean or 0, 3) for lens in lenses] == [0.878, 0.858]
    assert all(found[lens].n == 26 and found[lens].group == "small" for lens in lenses)


def test_brackets_are_no_markup() -> None:
    mask = _box(2, 5, 5)
    text = table_text(summarize(evaluate_pair({"Eye[red]": mask}, {"Eye[red]": mask}, SPACING), []), "run [bold]")
    assert "Eye[red]" in text and "run [bold]" in text


def _die(job: object) -> None:
    os._exit(9)


def test_a_killed_process_is_one_line(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("focusnet.evaluate._score_case", _die)
    with pytest.raises(FocusNetError, match="one of 2 processes was killed"):
        evaluate(*folders, processes=2)
