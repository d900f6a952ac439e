"""What is measured of every organ, and what is flagged."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from focusnet.data.images import Grid, Volume
from focusnet.data.plan import OrganPlan
from focusnet.errors import FocusNetError
from focusnet.inference import Segmentation
from focusnet.measures import flags, measure, write_cohort

# stored from left to right, from posterior to anterior and from superior to inferior, with anisotropic voxels
MIRRORED = Grid((10, 20, 30), (3.0, 1.5, 1.0), (20.0, 30.0, 40.0), (-1.0, 0, 0, 0, -1.0, 0, 0, 0, -1.0))
OBLIQUE = Grid((10, 20, 30), (3.0, 1.5, 1.0), (20.0, 30.0, 40.0), (0.96, -0.28, 0, 0.28, 0.96, 0, 0, 0, 1.0))
ORGANS = ("Brainstem", "Eye_L", "Eye_R", "SpinalCord", "Larynx")


def model(volume_range: tuple[float, float] | None = (200.0, 900.0)) -> SimpleNamespace:
    organs = [OrganPlan(n, 9, 400.0, 0.0, 0.0, (0.0,) * 3, n[:3] == "Eye", None, 1.0, volume_range) for n in ORGANS]
    plan = SimpleNamespace(organs=organs, small_organs=["Eye_L", "Eye_R"])
    return SimpleNamespace(plan=plan, config=SimpleNamespace(predict=SimpleNamespace(min_peak=0.2)))


def labels() -> np.ndarray:
    """A brainstem of two parts, the right eye larger than the left, a cord at the grid's end in z, and no larynx."""
    array = np.zeros(MIRRORED.shape, np.uint8)
    array[2:6, 4:10, 8:14] = 1  # 144 voxels of 4.5 mm3
    array[8, 15, 20:28] = 1
    array[2:5, 12:15, 5:10] = 2
    array[2:6, 12:17, 20:26] = 3
    array[7:10, 2:6, 10:14] = 4
    return array


def measured(
    grid: Grid, volume_range: tuple[float, float] | None = (200.0, 900.0), empty_rois: Sequence[int] = ()
) -> dict[str, dict]:
    hu = np.random.default_rng(0).integers(-100, 100, grid.shape).astype(np.int16)
    confidence = torch.tensor([0.99, 0.9, 0.8, 0.4, 0.7, float("nan")])
    peaks, heights = torch.tensor([[3, 13, 7], [9, 9, 9]]), torch.tensor([0.9, 0.1])
    result = Segmentation(torch.zeros(1), confidence, peaks, heights, list(empty_rois))
    table = measure(model(volume_range), labels(), Volume(hu, grid), result, grid)
    for value, name in enumerate(ORGANS[:4], start=1):
        assert table[name]["mean_hu"] == pytest.approx(hu[labels() == value].mean(), abs=0.06)
        center = grid.point(np.argwhere(labels() == value).mean(axis=0))
        assert table[name]["center_mm"] == pytest.approx(center.tolist(), abs=0.006)
    return table


@pytest.mark.parametrize("grid", [MIRRORED, OBLIQUE], ids=["mirrored", "oblique"])
def test_lengths_and_faces_are_the_patients(grid: Grid) -> None:
    table = measured(grid)
    assert table["Eye_R"]["volume_cm3"] == 4 * 5 * 6 * 4.5 / 1000
    assert table["Eye_R"]["extent_mm"] == [6.0, 7.5, 12.0]
    assert table["SpinalCord"]["at_border"] == ["inferior" if grid is MIRRORED else "superior"]
    assert (table["Brainstem"]["parts"], table["Brainstem"]["largest_part"]) == (2, round(144 / 152, 4))
    assert table["Brainstem"]["training_volume_cm3"] == [0.2, 0.4, 0.9]
    assert "heatmap_peak" not in table["Brainstem"] and table["Eye_L"]["heatmap_peak"] == pytest.approx(0.9)
    assert table["Eye_L"]["heatmap_peak_mm"] == pytest.approx(grid.point((3, 13, 7)).tolist(), abs=0.006)
    assert table["Eye_L"]["peak_to_center_mm"] == 0
    nothing = {"volume_cm3": 0.0, "center_mm": None, "extent_mm": None, "mean_hu": None, "parts": 0, "confidence": None}
    assert {name: table["Larynx"][name] for name in nothing} == nothing
    json.dumps(table, allow_nan=False)


def test_what_is_odd_is_flagged() -> None:
    table = measured(MIRRORED)  # whose first voxels are the leftmost
    assert {name: found["flags"] for name, found in table.items()} == {
        "Brainstem": ["in 2 parts, the largest 94.7%"],
        "Eye_L": [],
        "Eye_R": ["low heat-map peak, 0.10", "low confidence, 0.40", "2.7 times the volume of Eye_L"],
        "SpinalCord": [],  # which every CT cuts off
        "Larynx": ["not found"],
    }
    swapped = measured(OBLIQUE)
    assert swapped["Eye_L"]["flags"] == ["on the wrong side of Eye_R"]
    assert "on the wrong side of Eye_L" in swapped["Eye_R"]["flags"]
    assert measured(MIRRORED, empty_rois=[0])["Eye_L"]["flags"] == ["nothing in its ROI"]
    table["Larynx"] |= {"parts": 1, "largest_part": 1.0, "at_border": ["inferior", "left"], "volume_cm3": 0.5}
    assert flags("Larynx", table, 0.2) == ["cut off by the image: inferior, left"]


def test_a_voxel_whose_volume_rounds_to_nothing() -> None:
    table = measured(MIRRORED)
    table["Eye_L"]["volume_cm3"] = 0.0
    assert any(flag.endswith("times the volume of Eye_L") for flag in flags("Eye_R", table, 0.2))


def test_statistics_of_another_program(tmp_path: Path) -> None:
    (tmp_path / "case").mkdir()
    file, whole = tmp_path / "case" / "statistics.json", measured(MIRRORED)["Eye_L"]

    def refused(content: str, problem: str) -> None:
        file.write_text(content)
        with pytest.raises(FocusNetError, match=f"case/statistics.json.*{problem}"):
            write_cohort(tmp_path)

    refused('{"mean": 3}', "none that predict wrote: odd values of 'mean'")
    refused('{"Lens_L": {"parts": NaN}}', "it is no JSON")
    for name in ("volume_cm3", "center_mm", "confidence"):
        refused(json.dumps({"Eye_L": {key: value for key, value in whole.items() if key != name}}), "none that")
    for name in whole:
        for odd in ("x", [1, "x", 2], {}):
            refused(json.dumps({"Eye_L": whole | {name: odd}}), "none that predict wrote: odd values of 'Eye_L'")


@pytest.mark.parametrize(
    ("volume_range", "limits", "known"),
    [((200.0, 900.0), (0.16, 1.125), "0.2 to 0.9 cm3 in training"), (None, (0.16, 1.0), "on average 0.4 in training")],
)
def test_a_volume_is_judged_by_those_of_training(volume_range, limits: tuple[float, float], known: str) -> None:
    stem = measured(MIRRORED, volume_range)["Brainstem"] | {"largest_part": 1.0}
    for limit, outwards in zip(limits, (0.99, 1.01), strict=True):
        inside, outside = ({"Brainstem": stem | {"volume_cm3": limit * f}} for f in (1 / outwards, outwards))
        assert flags("Brainstem", inside, 0.2) == []
        assert flags("Brainstem", outside, 0.2) == [f"volume {limit * outwards:.3g} cm3, {known}"]


def test_the_cohorts_table_has_a_row_for_every_organ(tmp_path: Path) -> None:
    for case, grid in (("b", MIRRORED), ("a", OBLIQUE), (".tmp-00000000-c", OBLIQUE)):
        (tmp_path / case).mkdir()
        (tmp_path / case / "statistics.json").write_text(json.dumps(measured(grid, None if case == "a" else (1, 2))))
    write_cohort(tmp_path)
    with (tmp_path / "statistics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["organ"]) for row in rows] == [(case, organ) for case in "ab" for organ in ORGANS]
    eye, larynx = rows[2], rows[9]
    assert (eye["extent_x_mm"], eye["extent_y_mm"], eye["extent_z_mm"]) == ("6.0", "7.5", "12.0")
    assert (eye["training_smallest_cm3"], eye["training_mean_cm3"], eye["training_largest_cm3"]) == ("", "0.4", "")
    assert rows[7]["training_largest_cm3"] == "0.002" and rows[7]["heatmap_peak_z_mm"] == "13.0"
    assert rows[7]["flags"].count("; ") == 3 and eye["peak_to_center_mm"] != ""
    assert (larynx["volume_cm3"], larynx["center_x_mm"], larynx["parts"]) == ("0.0", "", "0")
    (tmp_path / "a" / "statistics.json").write_text("[]")
    with pytest.raises(FocusNetError, match=r"^cannot read .*a/statistics.json: it is a list or a value"):
        write_cohort(tmp_path)
