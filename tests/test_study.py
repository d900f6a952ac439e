"""The paper's tables: what every row is, and all of them from end to end at the smallest size."""

import csv
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from focusnet import predict, train
from focusnet.checkpoint import load_checkpoint
from focusnet.config import Config, DataConfig, total_stride
from focusnet.data.cases import find_cases
from focusnet.data.images import read_labels, write_labels
from focusnet.errors import FocusNetError
from focusnet.memory import assumed_plan, train_estimate
from focusnet.study import atlas, runner
from focusnet.study.atlas import vote
from focusnet.study.command import _test_cases, choose_rows, main, scale_epochs
from focusnet.study.rows import PDDCA_TEST, TABLES, parameters
from focusnet.study.split import choose_test_cases, link_split
from tests.test_cohort import no_picture
from tests.tiny import ORGANS, tiny_config, write_case, write_data

ROI = (8, 64, 64)
ROWS = {row.name: row for rows in TABLES.values() for row in rows if row.change is not None}


def _configured(name: str, base: Config | None = None) -> Config:
    base = base or Config()
    return ROWS[name].config(base, assumed_plan(base, 9, 3, ROI))


def _count(name: str) -> int:
    config = _configured(name)
    small = 3 if config.data.small_organs is None else 0
    return parameters(config, assumed_plan(config, 9, small, ROI))


@pytest.mark.parametrize("name", ROWS)
def test_every_row_leaves_the_preset_alone_and_builds(name: str) -> None:
    base = Config()
    config = _configured(name, base)
    assert base == Config()
    assert parameters(config, assumed_plan(config, 9, 0, ROI)) > 0


@pytest.mark.parametrize("name", ["3D U-Net", "DeepLab-v3+"])
def test_memory_of_other_networks_is_predicted(name: str) -> None:
    base = tiny_config(crop=(8, 16, 16))
    base.model.widths = [[2], [2, 2]]
    plan = assumed_plan(base, 3, 0, ROI)
    config = ROWS[name].config(base, plan)
    assert train_estimate(config, plan, "snet", base.train.crop).saved > 0


def test_fat_unet_has_as_many_parameters_as_focusnet() -> None:
    assert _count("Fat U-Net") == pytest.approx(_count("FocusNet"), rel=0.02)
    widths = _configured("Fat U-Net").model.widths
    assert widths[1][1] / widths[0][0] == pytest.approx(2, rel=0.02) and widths[0][0] > 32


def test_seres_unets_are_snet_without_its_context_and_with_more_downsamplings() -> None:
    one = _configured("SERes U-Net, 1 downsampling").model
    assert one.widths == Config().model.widths and one.downsampling == Config().model.downsampling
    assert not one.aspp_dilations and one.dilated_blocks == 0
    totals = [
        total_stride(_configured(f"SERes U-Net, {n} downsampling{'s' * (n > 1)}").model.downsampling)
        for n in (1, 2, 3, 4)
    ]
    assert totals == [(1, 2, 2), (2, 4, 4), (4, 8, 8), (8, 16, 16)]
    assert _configured("SERes U-Net, 4 downsamplings").model.widths[1:] == [
        [48, 64],
        *([n, n] for n in (128, 256, 256)),
    ]


def test_losses() -> None:
    entropy, focal = _configured("S-Net, cross-entropy").loss, _configured("S-Net, focal").loss
    assert (entropy.gamma, entropy.alpha, entropy.dice_weight) == (0.0, [1.0], 0.0)
    assert (focal.gamma, focal.alpha, focal.dice_weight) == (2.0, None, 0.0)


def test_rois() -> None:
    for scale in (2, 3, 5):
        data = _configured(f"FocusNet, ROI {scale}x", Config(data=DataConfig(roi_size=ROI))).data
        assert (data.roi_scale, data.roi_size, data.small_organs) == (scale, None, None)


def test_published_figures_agree_with_their_published_means() -> None:
    for row in TABLES["table3"]:
        for figures in (row.dsc, row.hd95):
            organs = [value for name, value in figures.items() if name != "mean of all"]
            if len(organs) == 9:
                assert figures["mean of all"] == pytest.approx(np.mean(organs), abs=0.05), row.name


def test_as_long_as_focusnet_takes_as_many_epochs() -> None:
    base = Config()
    stages = [getattr(base.train, stage).epochs for stage in ("snet", "sol", "sos", "joint")]
    assert _configured("S-Net, as long as FocusNet").train.snet.epochs == sum(stages)
    scale_epochs(base, 0.1)
    assert [getattr(base.train, stage).epochs for stage in ("snet", "sol", "sos", "joint")] == [60, 30, 30, 10]
    base.train.joint.epochs = 100
    scale_epochs(base, 1.1)  # of which 100 times is a little above 110
    assert [getattr(base.train, stage).epochs for stage in ("snet", "sol", "sos", "joint")] == [66, 33, 33, 110]


def test_pddca_split(tmp_path) -> None:
    names = [f"0522c{number:04}" for number in range(1, 39)] + list(PDDCA_TEST)
    pairs = [f"{organ}_{side}" for organ in ("OpticNerve", "Parotid", "Submandibular") for side in "LR"]
    structures = ["BrainStem", "Chiasm", "Mandible", *pairs]
    for name in names:
        (tmp_path / "pddca" / name / "structures").mkdir(parents=True)
        for organ in structures:
            (tmp_path / "pddca" / name / "structures" / f"{organ}.nrrd").touch()
    cases = find_cases(tmp_path / "pddca")
    published = next(row for row in TABLES["table3"] if row.name == "FocusNet").dsc
    assert {*cases[0].organs, "mean of all"} == set(published)
    assert choose_test_cases(cases, PDDCA_TEST, 0.25, 0) == list(PDDCA_TEST)
    trains, tests = link_split(tmp_path / "pddca", PDDCA_TEST, tmp_path / "out")
    assert len(os.listdir(trains)) == 38 and sorted(os.listdir(tests)) == sorted(PDDCA_TEST)
    made = [path.lstat().st_ino for path in sorted(trains.iterdir())]
    link_split(tmp_path / "pddca", PDDCA_TEST, tmp_path / "out")  # another study may be reading them
    assert made == [path.lstat().st_ino for path in sorted(trains.iterdir())]
    link_split(tmp_path / "pddca", PDDCA_TEST[:3], tmp_path / "out")
    assert sorted(os.listdir(tests)) == sorted(PDDCA_TEST[:3])
    assert (tmp_path / "pddca" / PDDCA_TEST[0] / "structures" / "Chiasm.nrrd").exists()
    (tests / "mine.txt").touch()
    with pytest.raises(FocusNetError, match="holds mine.txt, expected links alone"):
        link_split(tmp_path / "pddca", PDDCA_TEST, tmp_path / "out")
    with pytest.raises(FocusNetError, match="no case named 0522c0746"):
        choose_test_cases(cases[:47], PDDCA_TEST, 0.25, 0)


def test_drawn_split_and_nnunet_layout(tmp_path) -> None:
    root = tmp_path / "nnunet"
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    for name in "abcd":
        (root / "imagesTr" / f"{name}_0000.nii.gz").write_text(name)
        (root / "labelsTr" / f"{name}.nii.gz").write_text(name)
    (root / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "Brainstem": 1}}))
    cases = find_cases(root)
    chosen = choose_test_cases(cases, None, 0.25, 0)
    assert len(chosen) == 1 and choose_test_cases(cases, None, 0.25, 0) == chosen
    for folder, names in zip(link_split(root, chosen, tmp_path / "out"), (set("abcd") - set(chosen), set(chosen))):
        assert {case.name for case in find_cases(folder)} == names
        assert all(case.image.read_text() == case.name and case.organs == ["Brainstem"] for case in find_cases(folder))


def test_rows_by_name_or_option() -> None:
    chosen = choose_rows(TABLES["table2"], ["focusnet", "SERes U-Net, 1 downsampling"])
    assert [row.name for row in chosen] == ["SERes U-Net, 1 downsampling", "FocusNet"]
    with pytest.raises(FocusNetError, match="no row s-nett, expected seres-u-net-1-downsampling, "):
        choose_rows(TABLES["table2"], ["s-nett"])
    for table in TABLES.values():
        assert len({row.slug for row in table}) == len(table)
        assert {row.starts_from for row in table} <= {row.name for row in table} | {None}


def test_atlases_vote() -> None:
    maps = [np.array([[[1, 1, 2, 0, 2]]]), np.array([[[1, 0, 2, 0, 1]]]), np.array([[[2, 0, 0, 0, 1]]])]
    # the third atlas has no organ 2: what it says of it does not count, and of two voices one is enough
    found = vote(maps, [[True, True], [True, True], [True, False]])
    assert found.tolist() == [[[1, 0, 2, 0, 1]]]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Runs tables on four tiny cases, one of them for the test."""
    root = tmp_path_factory.mktemp("study")
    write_data(root / "data", cases=4)
    config = tiny_config(crop=(16, 32, 32), steps_per_epoch=1, validate_every=1)
    config.model.widths = [[2], [2, 2]]
    for stage in ("snet", "sol", "sos", "joint"):
        getattr(config.train, stage).epochs = 1
    (root / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(config.to_dict()))))

    def run(table: str, *options: str):
        fixed = ["--out", str(root / "out"), "--cache", str(root / "cache"), "--config", str(root / "config.yaml")]
        assert main([table, str(root / "data"), *fixed, "--device", "cpu", "--test", "case_0", *options]) == 0
        return root / "out"

    run.data = root / "data"
    return run


def test_table2_shares_snet_and_goes_on(study, capsys) -> None:
    out = study("table2", "--rows", "s-net", "focusnet", "focusnet-roi-3x", "--seeds", "2")
    assert sorted(os.listdir(out / "seed_1")) == ["focusnet", "s-net"]  # the preset's ROI is 3x
    (_, snet), (_, focusnet) = (
        load_checkpoint(out / "seed_1" / name / "last.pt", torch.device("cpu")) for name in ("s-net", "focusnet")
    )
    # each stage once: S-Net's epoch is the first of FocusNet's, not trained again
    assert [entry["stage"] for entry in focusnet["state"]["history"]] == ["snet", "sol", "sos", "joint"]
    assert focusnet["state"]["history"][0] == snet["state"]["history"][0]
    rows = list(csv.DictReader((out / "table2.csv").open()))
    eye = next(r for r in rows if (r["method"], r["metric"], r["organ"]) == ("FocusNet", "dsc", "Eye_L"))
    assert (eye["group"], eye["n"], eye["seeds"], eye["published"]) == ("small", "2", "2", "") and eye["sd_over_seeds"]
    small = next(r for r in rows if (r["method"], r["metric"], r["organ"]) == ("S-Net", "dsc", "mean of small"))
    assert small["published"] == "61.5"
    lines = (out / "table2.md").read_text().splitlines()
    header = next(line for line in lines if line.startswith("| DSC %"))
    assert header.startswith("| DSC % | S-Net | S-Net, published | FocusNet | FocusNet, published | FocusNet, ROI 3x |")
    row = next(line for line in lines if line.startswith("| mean of small"))
    assert row.split(" | ")[2] == "61.5" and row.count("|") == header.count("|")
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("seed_*/*/*.*")}
    capsys.readouterr()
    study("table2", "--rows", "s-net", "focusnet", "--seeds", "2")
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    assert "is complete" in capsys.readouterr().out


@pytest.mark.nightly
@pytest.mark.parametrize("average", ["0.0", "0.5"])
def test_shared_snet_is_the_same_computation(study, tmp_path, average: str) -> None:
    cache = study("table2", "--rows", "focusnet", "--out", str(tmp_path), "--train.ema", average).parent / "cache"
    shared, _ = load_checkpoint(tmp_path / "seed_0" / "focusnet" / "last.pt", torch.device("cpu"))
    whole = tmp_path / "whole"
    train.start_training(tmp_path / "split" / "train", whole, shared.config, cache=cache, device=torch.device("cpu"))
    expected, _ = load_checkpoint(whole / "last.pt", torch.device("cpu"))
    for name, value in expected.network.state_dict().items():
        assert torch.equal(value, shared.network.state_dict()[name]), name


def test_another_study_in_the_same_folder_is_refused(study) -> None:
    study("table2", "--rows", "s-net")
    with pytest.raises(FocusNetError, match="train.snet.lr|loss.gamma"):
        study("table2", "--rows", "s-net", "--loss.gamma", "1.0")


def test_test_cases_may_change_between_commands(study, tmp_path, monkeypatch) -> None:
    predicted, work, tests = [], predict.predict_case, tmp_path / "tests"

    def note(job: predict.Job, name: str, path: Path) -> None:
        predicted.append(name)
        work(job, name, path)

    monkeypatch.setattr(predict, "predict_case", note)
    monkeypatch.setattr(predict, "draw_qc", no_picture)
    for seed, name in enumerate("xyz"):
        write_case(tests / name, seed)

    def run() -> tuple[list[str], dict[str, str]]:
        predicted.clear()
        study("table2", "--rows", "s-net", "--out", str(tmp_path / "out"), "--test", str(tests))
        lines = csv.DictReader((tmp_path / "out" / "table2.csv").open())
        return predicted.copy(), next(r for r in lines if (r["metric"], r["organ"]) == ("dsc", "Brainstem"))

    first, scored = run()
    assert first == ["x", "y", "z"] and scored["n"] == "3"
    row = tmp_path / "out" / "seed_0" / "s-net" / "row.json"
    row.unlink()
    shutil.rmtree(row.parent / "predictions" / "y")
    assert run() == (["y"], scored)  # one that was interrupted
    assert run() == ([], scored)
    contour = tests / "x" / "structures" / "Brainstem.nrrd"
    write_labels(contour, np.ones_like(read_labels(contour).array), read_labels(contour).grid)
    again, changed = run()
    assert again == [] and changed["mean"] != scored["mean"]  # other contours
    shutil.rmtree(tests / "z")
    assert run()[1]["n"] == "2"


def test_test_cases_are_checked_before_anything_is_trained(study, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(runner, "start_training", lambda *arguments, **options: pytest.fail("trains"))

    def refused(**options) -> None:
        with pytest.raises(FocusNetError, **options):
            study("table2", "--rows", "s-net", "--out", str(tmp_path / "out"), "--test", str(tmp_path / "tests"))

    write_case(tmp_path / "tests" / "x", 0)
    (tmp_path / "tests" / "y").symlink_to(study.data / "case_1", target_is_directory=True)
    refused(match=r"^y in .*tests: also among the training cases in ")
    (tmp_path / "tests" / "y").unlink()
    shutil.copytree(tmp_path / "tests" / "x", tmp_path / "tests" / "z")
    (tmp_path / "tests" / "z" / "img.nrrd").unlink()
    refused(match=r"^test cases in .*tests have no CT, or several: z$")
    shutil.rmtree(tmp_path / "tests" / "z")
    (tmp_path / "tests" / "x" / "structures" / "Nose.nrrd").touch()
    refused(match=r"^test case x: unknown organ name 'Nose'")


def test_a_test_case_is_no_folder_of_that_name(study, monkeypatch) -> None:
    monkeypatch.chdir(study.data)
    assert _test_cases(study.data, ["case_0"], None, 0) == ["case_0"]
    assert _test_cases(study.data, ["./case_0"], None, 0) == Path("case_0")


def test_without_small_organs_focusnet_is_snet(study, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(predict, "draw_qc", no_picture)
    study("table2", "--rows", "s-net", "focusnet", "--out", str(tmp_path), "--data.small_organs", "[]")
    content = list(csv.DictReader((tmp_path / "table2.csv").open()))
    means = [r["mean"] for r in content if (r["metric"], r["organ"]) == ("hd95", "mean of all")]
    assert len(means) == 2 and means[0] == means[1] != ""


@pytest.mark.parametrize("table", [pytest.param("table1"), pytest.param("table2", marks=pytest.mark.nightly), "table3"])
def test_every_row_of_every_table(study, table: str) -> None:
    rows = [row for row in TABLES[table] if not row.atlas]
    out = study(table, "--rows", *(row.slug for row in rows))
    content = list(csv.DictReader((out / f"{table}.csv").open()))
    for row in rows:
        scored = {line["organ"] for line in content if line["method"] == row.name and line["mean"]}
        assert scored >= set() if row.only_published else scored >= set(ORGANS)


def test_atlas_without_ants_is_one_line(study, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ants", None)
    with pytest.raises(FocusNetError, match=r"pip install 'focuskernels\[atlas\]'"):
        study("table1", "--rows", "atlas")


def test_an_atlas_row_of_other_atlases_is_registered_anew(study, tmp_path, monkeypatch) -> None:
    registered = []

    def transferred(ants, fixed, case, *arguments):
        registered.append(case.name)
        return np.zeros(fixed, np.uint8)

    monkeypatch.setattr(atlas, "_ants", lambda: None)
    monkeypatch.setattr(atlas, "_image", lambda ants, array, plan: array.shape)
    monkeypatch.setattr(atlas, "_transferred", transferred)

    def run(*options: str) -> int:
        registered.clear()
        study("table1", "--rows", "atlas", "--out", str(tmp_path), "--atlases", "2", *options)
        return len(registered)

    assert run() == 2 and run() == 0
    (tmp_path / "seed_0" / "atlas" / "row.json").unlink()
    assert run() == 0
    assert run("--data.hu_range", "[-1000,1000]") == 2


def test_atlas(study, tmp_path) -> None:
    pytest.importorskip("ants", reason="needs the extra atlas: pip install antspyx")
    out = study("table1", "--rows", "atlas", "--atlases", "2")
    found = read_labels(out / "seed_0" / "atlas" / "predictions_of_2" / "case_0" / "labels.nii.gz")
    write_case(tmp_path / "case_0", 0)
    assert found.array.any() and not found.grid.difference(
        read_labels(tmp_path / "case_0/structures/Brainstem.nrrd").grid
    )
