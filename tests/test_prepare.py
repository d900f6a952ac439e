"""Checking a data set, the cache, and the plan."""

import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from focusnet.config import DataConfig
from focusnet.data import cache as cache_module
from focusnet.data.cache import CaseReport, OrganSize, array_paths, cache_folder
from focusnet.data.crops import label_values
from focusnet.data.images import Grid, Volume, read_labels, write_image, write_labels
from focusnet.data.plan import CaseRecord, Plan
from focusnet.errors import FocusNetError
from focusnet.prepare import main, make_plan, outliers, prepare
from tests.real_data import REAL, needs_real_data
from tests.test_images import dicom_series
from tests.tiny import GRID, SPACING, write_case, write_data

CONFIG = DataConfig(spacing=SPACING, body_margin_mm=4.0)


def arrays(cache: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    image, labels = (np.load(path, mmap_mode="r", allow_pickle=False) for path in array_paths(cache, name))
    return image, labels


def stamps(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (cache / "cases").iterdir()}


def mask(*sides: tuple[int, int]) -> np.ndarray:
    array = np.zeros(GRID.shape, np.uint8)
    array[tuple(slice(*side) for side in sides)] = 1
    return array


def test_plan_and_arrays_hold_what_is_in_the_data(tmp_path: Path) -> None:
    plan = prepare(write_data(tmp_path / "data"), tmp_path / "cache", CONFIG)
    assert plan.organ_names == ["Brainstem", "Eye_L", "Eye_R"]
    assert [organ.cases for organ in plan.organs] == [4, 4, 3]
    assert plan.small_organs == plan.organ_names
    stem, eye, _ = plan.organs
    assert stem.voxels == 4 * 6 * 5
    assert stem.volume_mm3 == pytest.approx(4 * 6 * 5 * 12)
    assert stem.volume_range_mm3 == (stem.volume_mm3, stem.volume_mm3)
    assert stem.extent_mm == (12.0, 12.0, 10.0)
    assert stem.roi_size == (12, 18, 15)
    assert eye.roi_size == (8, 9, 9)
    assert eye.diameter_mm == pytest.approx(7.45, abs=0.01)
    assert 0.25 <= stem.alpha < 1 < eye.alpha <= 8
    assert plan.background_alpha == 0.5
    assert plan.cases[1].organs == ["Brainstem", "Eye_L"]
    for case in plan.cases:
        image, labels = arrays(tmp_path / "cache", case.name)
        assert (image.dtype, labels.dtype) == (np.int16, np.uint8)
        assert image.shape == labels.shape == case.shape
        for organ in case.organs:
            found = labels == case.organs.index(organ) + 1
            assert found.any()
            np.testing.assert_allclose(np.argwhere(found).mean(axis=0), case.centers[organ])
            assert abs(image[found].mean() - (200 if organ == "Brainstem" else 400)) < 10


def test_preparing_again_reuses_every_case(tmp_path: Path) -> None:
    data, cache = write_data(tmp_path / "data"), tmp_path / "cache"
    plan, before = prepare(data, cache, CONFIG), stamps(cache)
    assert prepare(data, cache, CONFIG) == plan
    assert stamps(cache) == before
    wider = prepare(data, cache, replace(CONFIG, roi_scale=5.0))
    assert stamps(cache) == before
    assert wider.organs[0].roi_size == (20, 30, 25)
    assert wider.fingerprint != plan.fingerprint
    prepare(data, cache, replace(CONFIG, spacing=(3.0, 3.0, 3.0)))
    assert all(stamps(cache)[name] != stamp for name, stamp in before.items())


def test_a_changed_case_alone_is_prepared_again(tmp_path: Path) -> None:
    data, cache = write_data(tmp_path / "data"), tmp_path / "cache"
    plan, before = prepare(data, cache, CONFIG), stamps(cache)
    write_case(data / "case_2", 99)
    changed = prepare(data, cache, CONFIG)
    assert {name for name, stamp in stamps(cache).items() if stamp != before[name]} == {
        f"case_2.{part}" for part in ("image.npy", "labels.npy", "json")
    }
    assert changed.fingerprint != plan.fingerprint


def test_the_fingerprint_follows_the_content_wherever_the_data_lie(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", 2)
    plan = prepare(data, tmp_path / "cache", CONFIG)
    copy = shutil.copytree(data, tmp_path / "copy")
    for path in copy.rglob("*.nrrd"):
        os.utime(path, (1, 1))
    assert prepare(copy, tmp_path / "other", CONFIG) == plan
    labels = read_labels(copy / "case_0" / "structures" / "Eye_L.nrrd")
    labels.array[tuple(np.argwhere(labels.array)[0])] = 0
    write_labels(copy / "case_0" / "structures" / "Eye_L.nrrd", labels.array, labels.grid)
    assert prepare(copy, tmp_path / "other", CONFIG).fingerprint != plan.fingerprint


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("part", ["image.npy", "labels.npy", "json"])
@pytest.mark.parametrize("damage", [_truncate, _flip, Path.unlink])
def test_a_damaged_cache_file_is_made_again(tmp_path: Path, part: str, damage: Callable[[Path], None]) -> None:
    data, cache = write_data(tmp_path / "data", 2), tmp_path / "cache"
    plan = prepare(data, cache, CONFIG)
    before = [array.copy() for array in arrays(cache, "case_0")]
    damage(cache / "cases" / f"case_0.{part}")
    assert prepare(data, cache, CONFIG) == plan
    for old, new in zip(before, arrays(cache, "case_0"), strict=True):
        np.testing.assert_array_equal(old, new)


def test_an_interrupted_case_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, cache = write_data(tmp_path / "data", 2), tmp_path / "cache"
    prepare(data, cache, CONFIG)
    write_case(data / "case_0", 50)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cache_module, "_save_record", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(data, cache, CONFIG)
    plan = prepare(data, cache, CONFIG)
    assert plan == prepare(data, tmp_path / "fresh", CONFIG)
    assert not [path for path in cache.rglob("*") if path.name.startswith(".tmp")]


def test_a_new_organ_in_one_case_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    data, cache = write_data(tmp_path / "data", 2), tmp_path / "cache"
    prepare(data, cache, CONFIG)
    before = stamps(cache)
    write_labels(data / "case_1" / "structures" / "Cochlea_L.nrrd", mask((9, 11), (9, 11), (9, 11)), GRID)
    plan = prepare(data, cache, CONFIG)
    assert plan.organ_names == ["Brainstem", "Cochlea_L", "Eye_L", "Eye_R"]
    assert {name for name, stamp in stamps(cache).items() if stamp == before[name]} == {
        f"case_0.{part}" for part in ("image.npy", "labels.npy", "json")
    }
    _, labels = arrays(cache, "case_0")
    assert np.unique(label_values(plan.cases[0], plan)[labels]).tolist() == [0, 1, 3, 4]
    assert plan == prepare(data, tmp_path / "fresh", CONFIG)


def test_every_data_set_and_way_of_preparing_has_its_own_folder(tmp_path: Path) -> None:
    root, one, other = tmp_path / "cache", tmp_path / "a" / "data", tmp_path / "b" / "data"
    folder = cache_folder(root, one, CONFIG)
    assert folder.parent == root and folder.name.startswith("data-3x2x2mm-")
    assert cache_folder(root, one / ".." / "data", CONFIG) == folder
    plans = [replace(CONFIG, roi_scale=5.0), replace(CONFIG, small_organs=["Eye_L"]), replace(CONFIG, small_voxels=9)]
    assert {cache_folder(root, one, config) for config in plans} == {folder}
    arrays_ = [
        replace(CONFIG, spacing=(3.0, 2.0, 2.5)),
        replace(CONFIG, hu_range=(-500.0, 500.0)),
        replace(CONFIG, body_margin_mm=5.0),
        replace(CONFIG, organs=["Eye_L"]),
    ]
    assert len({folder, cache_folder(root, other, CONFIG), *(cache_folder(root, one, c) for c in arrays_)}) == 6
    named = [replace(CONFIG, organs=names) for names in (["Eye_L", "Brainstem"], ["BrainStem", "Eye_L"])]
    assert len({cache_folder(root, one, config) for config in named}) == 1


def test_preparing_two_ways_in_turn_prepares_each_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, cache = write_data(tmp_path / "data[1]", 2), tmp_path / "cache"
    options = [str(data), "--cache", str(cache), "--data.body_margin_mm", "4", "--data.spacing"]
    assert main([*options, "[3,2,2]"]) == 0
    folder = cache_folder(cache, data, CONFIG)
    assert f"saved in {folder}: plan.json" in capsys.readouterr().out
    before = stamps(folder)
    assert main([*options, "[3,3,3]"]) == main([*options, "[3,2,2]"]) == 0
    assert stamps(folder) == before
    assert len(list(cache.iterdir())) == 2


def test_two_processes_give_what_one_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_data(tmp_path / "data", 5)
    two = prepare(data, tmp_path / "two", CONFIG)
    monkeypatch.setattr(cache_module, "POOL_FROM", 100)
    one = prepare(data, tmp_path / "one", CONFIG)
    assert one == two
    for case in one.cases:
        for a, b in zip(arrays(tmp_path / "one", case.name), arrays(tmp_path / "two", case.name), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_smaller_organ_wins_an_overlap(tmp_path: Path, seed: int) -> None:
    write_case(tmp_path / "data" / "p", seed, ())
    folder = tmp_path / "data" / "p" / "structures"
    write_labels(folder / "Orbit-Lt.nrrd", mask((3, 9), (5, 11), (5, 11)), GRID)
    write_labels(folder / "Lens-Lt.nrrd", mask((5, 7), (5, 7), (7, 9)), GRID)
    write_labels(folder / "Brain.nrrd", mask((2, 10), (4, 20), (4, 20)), GRID)
    plan = prepare(tmp_path / "data", tmp_path / "cache", CONFIG)
    _, labels = arrays(tmp_path / "cache", "p")
    counts = dict(zip(["", *plan.cases[0].organs], np.bincount(labels.ravel()).tolist(), strict=True))
    assert counts["Lens_L"] == 8
    assert counts["Eye_L"] == 6 * 36 - 8
    assert counts["Brain"] == 8 * 256 - 6 * 36
    # sizes are the contours', whatever overlaps them
    assert plan.organs[plan.organ_names.index("Eye_L")].voxels == 6 * 36


def test_left_and_right_do_not_depend_on_the_storage_order(tmp_path: Path) -> None:
    write_case(tmp_path / "a" / "p", 0)
    flipped = replace(GRID, origin=(0.0, 0.0, 0.0), direction=(-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0))
    for path in sorted((tmp_path / "a" / "p").rglob("*.nrrd")):
        target = tmp_path / "b" / path.relative_to(tmp_path / "a")
        if path.name == "img.nrrd":
            image = cache_module.read_image(path)
            write_image(target, Volume(np.ascontiguousarray(image.array[:, ::-1, ::-1]), flipped))
        else:
            write_labels(target, read_labels(path).array[:, ::-1, ::-1], flipped)
    first, second = (prepare(tmp_path / name, tmp_path / f"cache-{name}", CONFIG) for name in "ab")
    for organ in first.organ_names:
        np.testing.assert_allclose(first.cases[0].centers[organ], second.cases[0].centers[organ], atol=1e-6)
    np.testing.assert_array_equal(arrays(tmp_path / "cache-a", "p")[1], arrays(tmp_path / "cache-b", "p")[1])


def bad_data(root: Path) -> Path:
    """Six cases, the first of them usable."""
    write_data(root, 6)
    write_labels(root / "case_0" / "structures" / "Lens_L.nrrd", np.zeros(GRID.shape, np.uint8), GRID)
    other = replace(GRID, origin=(0.0, 0.0, 0.0))
    write_labels(root / "case_1" / "structures" / "Eye_L.nrrd", mask((1, 2), (1, 2), (1, 2)), other)
    write_labels(root / "case_1" / "structures" / "Spleen.nrrd", mask((1, 2), (1, 2), (1, 2)), GRID)
    image = np.zeros(GRID.shape, np.float32)
    image[3, 3, 3] = np.nan
    write_image(root / "case_2" / "img.nrrd", Volume(image, GRID))
    _truncate(root / "case_3" / "structures" / "Brainstem.nrrd")
    for path in (root / "case_4" / "structures").iterdir():
        write_labels(path, np.zeros(GRID.shape, np.uint8), GRID)
    thin = Grid((5, 24, 26), SPACING)
    shutil.rmtree(root / "case_5" / "structures")
    write_image(root / "case_5" / "img.nrrd", Volume(np.zeros(thin.shape, np.int16), thin))
    write_labels(root / "case_5" / "structures" / "Brainstem.nrrd", np.ones(thin.shape, np.uint8), thin)
    return root


def test_every_problem_of_every_case_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, cache = bad_data(tmp_path / "data"), tmp_path / "cache"
    told: list[str] = []
    options = [str(data), "--cache", str(cache), "--data.spacing", "[3,2,2]"]
    assert main(options) == 2
    printed = capsys.readouterr().out
    for case, cause in (
        ("case_0", "Lens_L: its mask is empty"),
        ("case_1", "another grid"),
        ("case_1", "unknown organ name 'Spleen'"),
        ("case_2", "1 NaN or infinite"),
        ("case_3", "Brainstem.nrrd"),
        ("case_4", "all its masks are empty"),
        ("case_5", "5 x 24 x 26 voxels"),
    ):
        assert any(case in line and cause in line for line in printed.splitlines()), (case, cause)
    assert "5 unusable" in printed
    assert not list(cache.rglob("plan.json"))
    with pytest.raises(FocusNetError, match=r"5 of 6 cases .* case_1: .* and 2 more") as caught:
        prepare(data, cache, CONFIG)
    assert "\n" not in str(caught.value)
    assert main([*options, "--skip-bad"]) == 0
    printed = capsys.readouterr().out
    assert "Brainstem" in printed
    plan = prepare(data, cache, CONFIG, skip_bad=True, tell=told.append)
    assert [case.name for case in plan.cases] == ["case_0"] and len(told) == 5
    assert "NaN" in told[1]
    (path,) = cache.rglob("plan.json")
    assert [case["name"] for case in json.loads(path.read_text())["cases"]] == ["case_0"]


def test_chosen_organs_alone_are_read(tmp_path: Path) -> None:
    data = bad_data(tmp_path / "data")
    for name in ("case_2", "case_4", "case_5"):
        shutil.rmtree(data / name)
    config = replace(CONFIG, organs=["Eye_R", "Orbit-Lt"], small_organs=[])
    shutil.rmtree(data / "case_1")
    write_labels(data / "case_3" / "structures" / "Spleen.nrrd", mask((1, 2), (1, 2), (1, 2)), GRID)
    plan = prepare(data, tmp_path / "cache", config)
    assert plan.organ_names == ["Eye_R", "Eye_L"]
    assert plan.small_organs == []
    assert [case.name for case in plan.cases] == ["case_0", "case_3"]


def test_brackets_and_colons_in_names_are_printed_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_case(tmp_path / "[red]" / "[b]ob:a:", 0)
    write_labels(tmp_path / "[red]" / "[b]ob:a:" / "structures" / "Lens_L.nrrd", np.zeros(GRID.shape, np.uint8), GRID)
    write_case(tmp_path / "[red]" / "[i]c", 1)
    (tmp_path / "[red]" / "[i]c" / "img.nrrd").write_bytes(b"")
    options = [str(tmp_path / "[red]"), "--cache", str(tmp_path / "[cache]"), "--data.spacing", "[3,2,2]", "--skip-bad"]
    assert main(options) == 0
    printed = capsys.readouterr().out
    assert "note     [b]ob:a:: Lens_L: its mask" in printed
    assert f"unusable [i]c: cannot read {tmp_path}/[red]/[i]c/img.nrrd" in printed
    assert f"saved in {tmp_path / '[cache]'}/[red]-3x2x2mm-" in printed


def test_a_case_without_the_wanted_organs_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, cache = write_data(tmp_path / "data", 3), tmp_path / "cache"
    write_labels(data / "case_0" / "structures" / "Eye_R.nrrd", np.zeros(GRID.shape, np.uint8), GRID)
    config, told = replace(CONFIG, organs=["Eye_R"]), []
    plan = prepare(data, cache, config, tell=told.append)
    assert [case.name for case in plan.cases] == ["case_2"]
    assert [line.partition(":")[0] for line in told] == ["case_0", "case_1"]  # the mask empty, the mask absent
    before = stamps(cache)
    assert prepare(data, cache, config) == plan and stamps(cache) == before
    options = [str(data), "--cache", str(cache), "--data.spacing", "[3,2,2]", "--data.organs", "[Eye_R]"]
    assert main(options) == 0
    printed = capsys.readouterr().out
    assert "case_1: left out: it has none of the organs that data.organs names" in printed
    assert "3 cases: 1 clean, 0 usable with notes, 2 without any of the organs, 0 unusable" in printed
    (data / "case_1" / "img.nrrd").unlink()
    with pytest.raises(FocusNetError, match="case_1: it has no image"):
        prepare(data, cache, config)


def _gap(root: Path, case: Path) -> str:
    (case / "img.nrrd").unlink()
    dicom_series(case / "ct", [0.0, 2.0, 4.0, 8.0])
    return "ct: slices are missing or uneven between 4.00 and 8.00 mm"


def _cut_image(root: Path, case: Path) -> str:
    _truncate(case / "img.nrrd")
    return "img.nrrd: its compressed voxels are truncated or damaged"


def _nan_mask(root: Path, case: Path) -> str:
    write_image(case / "structures" / "Eye_L.nrrd", Volume(np.full(GRID.shape, np.nan, np.float32), GRID))
    return "Eye_L.nrrd has 8736 NaN"


def _air(root: Path, case: Path) -> str:
    write_image(case / "img.nrrd", Volume(np.full(GRID.shape, -1000, np.int16), GRID))
    return "img.nrrd shows nobody"


def _no_image(root: Path, case: Path) -> str:
    (case / "img.nrrd").unlink()
    return "it has no image"


def _dangling(root: Path, case: Path) -> str:
    (case / "structures" / "Lens_L.nrrd").symlink_to(root / "absent")
    return "Lens_L.nrrd: no such file"


@pytest.mark.parametrize("spoil", [_gap, _cut_image, _nan_mask, _air, _no_image, _dangling])
def test_one_cause_is_one_line_and_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path, Path], str]
) -> None:
    data = write_data(tmp_path / "data", 1)
    cause = spoil(tmp_path, data / "case_0")
    assert main([str(data), "--cache", str(tmp_path / "cache")]) == 2
    said = capsys.readouterr()
    (line,) = [line for line in said.out.splitlines() if line.startswith("unusable")]
    assert line.startswith("unusable case_0: ")
    assert cause in line
    assert said.err.strip() == "error: unusable cases; repair them, or leave them out with --skip-bad"
    assert not list((tmp_path / "cache").rglob("*.npy"))


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"organs": ["Larynx"]}, r"none has any of data.organs \(Larynx\)"),
        ({"organs": ["Brainstem", "Larynx"]}, "Larynx, which no usable case has"),
        ({"organs": ["Brainstem", "BrainStem"]}, "twice"),
        ({"organs": []}, "empty"),
        ({"organs": ["Nose"]}, "unknown organ name 'Nose'"),
        ({"small_organs": ["Larynx"]}, "Larynx, which is none of the organs"),
    ],
)
def test_a_configuration_that_does_not_fit_the_data(tmp_path: Path, change: dict[str, list[str]], cause: str) -> None:
    with pytest.raises(FocusNetError, match=cause):
        prepare(write_data(tmp_path / "data", 1), tmp_path / "cache", replace(CONFIG, **change))


def report(name: str, **volumes: float) -> CaseReport:
    """A case whose organs are cubes."""
    sizes = {
        organ: OrganSize(round(volume / 2.5), volume, (volume ** (1 / 3),) * 3) for organ, volume in volumes.items()
    }
    return CaseReport(name, "f", sizes=sizes, record=CaseRecord(name, (9, 9, 9), list(sizes), {}))


def test_small_organs_and_weights_are_close_to_the_authors() -> None:
    volumes = {"Brainstem": 27_400.0, "OpticChiasm": 573.0, "Bone_Mandible": 58_000.0, "OpticNrv_L": 750.0,
               "Parotid_L": 30_000.0, "Glnd_Submand_L": 8_500.0}  # fmt: skip
    plan = make_plan([report("a", **volumes)], DataConfig())
    by_hand = {
        "Brainstem": 1,
        "OpticChiasm": 8,
        "Bone_Mandible": 1,
        "OpticNrv_L": 8,
        "Parotid_L": 1,
        "Glnd_Submand_L": 2,
    }
    assert plan.small_organs == ["OpticChiasm", "OpticNrv_L"]
    for organ in plan.organs:
        assert by_hand[organ.name] / 2 < organ.alpha < by_hand[organ.name] * 2
    alone = make_plan([report("a", Brainstem=27_400.0)], DataConfig())
    assert alone.organs[0].alpha == 1


def test_a_roi_holds_the_largest_organ_seen_but_no_stray_voxels() -> None:
    cases = [report(str(i), Lens_L=8.0**3) for i in range(8)]
    largest, stray = report("l", Lens_L=1.0), report("s", Lens_L=1.0)
    largest.sizes["Lens_L"] = OrganSize(80, 200, (8.0, 20.0, 8.0))
    stray.sizes["Lens_L"] = OrganSize(80, 200, (8.0, 8.0, 300.0))
    config = DataConfig(spacing=(1.0, 1.0, 1.0), roi_scale=2.0)
    organ = make_plan([*cases, largest, stray], config).organs[0]
    assert organ.roi_size == (16, 25, 16)
    assert organ.extent_mm == pytest.approx((8, 9.2, 8))
    assert "stray" in outliers([*cases, largest, stray])["s"][0]
    fixed = make_plan(cases, replace(config, roi_size=(8, 64, 64)))
    assert fixed.organs[0].roi_size == (8, 64, 64)


def test_outlying_volumes_are_noted() -> None:
    cases = [report(str(i), Larynx=29_000.0) for i in range(5)]
    notes = outliers([*cases, report("x", Larynx=500.0), report("y", Larynx=290_000.0)])
    assert set(notes) == {"x", "y"}
    assert "0.017 of the median" in notes["x"][0]


def test_the_plan_goes_through_a_checkpoint(tmp_path: Path) -> None:
    plan = prepare(write_data(tmp_path / "data", 2), tmp_path / "cache", CONFIG)
    buffer = io.BytesIO()
    torch.save(plan.to_dict(), buffer)
    buffer.seek(0)
    assert Plan.from_dict(torch.load(buffer, weights_only=True)) == plan


def test_the_plan_of_an_older_checkpoint(tmp_path: Path) -> None:
    plan = prepare(write_data(tmp_path / "data", 1), tmp_path / "cache", CONFIG)
    content = plan.to_dict()
    content["cases"][0]["voxels"] = {"Eye_L": 7}
    assert Plan.from_dict(content) == plan


@needs_real_data
def test_real_cases(tmp_path: Path) -> None:
    for name in ("pt_163", "pt_22", "pt_4"):  # the first one lacks two organs and has a stray contour
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).symlink_to((REAL / "openkbp" / "train" / name).resolve())
    config = DataConfig(spacing=(3.0, 3.0, 3.0), small_organs=["Brainstem"])
    plan = prepare(tmp_path / "data", tmp_path / "cache", config)
    assert [case.name for case in plan.cases] == ["pt_163", "pt_22", "pt_4"]
    assert [len(case.organs) for case in plan.cases] == [5, 7, 7]
    stem = plan.organs[plan.organ_names.index("Brainstem")]
    assert 5_000 < stem.volume_mm3 < 45_000
    case = plan.cases[1]
    left, right = case.centers["Parotid_L"], case.centers["Parotid_R"]
    assert left[2] - right[2] > 80 / 3
