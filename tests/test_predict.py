import json

import nibabel
import nrrd
import numpy as np
import pydicom
import pytest
import torch
from matplotlib.image import imread

from focusnet import predict
from focusnet.checkpoint import Model, build_network, load_checkpoint, save_checkpoint
from focusnet.data.cases import find_cases
from focusnet.data.images import Grid, Volume, read_image, read_labels, write_image
from focusnet.data.organs import organ_color
from focusnet.errors import FocusNetError
from focusnet.inference import Segmentation
from focusnet.prepare import prepare
from focusnet.qc import draw_qc
from tests.test_dicom import SERIES, read_seg, write_series
from tests.tiny import GRID, tiny_config, write_case, write_data


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("predict")
    config = tiny_config()
    plan = prepare(write_data(root / "data", cases=2), root / "cache", config.data)
    torch.manual_seed(0)
    model = Model(build_network(config, plan), config, plan, ("snet", "sol", "sos"))
    save_checkpoint(root / "model.pt", model, {})
    return root / "model.pt"


def cases_in(out):
    """The folders of `out`; a folder that is not hidden is a case."""
    return sorted(path.name for path in out.iterdir() if path.is_dir())


def run(checkpoint, source, out, *options):
    return predict.main([str(checkpoint), str(source), "--out", str(out), "--device", "cpu", *options])


OBLIQUE = Grid((14, 24, 26), (3.0, 2.0, 2.0), (10.0, -20.0, 30.0), (0.96, -0.28, 0.0, 0.28, 0.96, 0.0, 0.0, 0.0, 1.0))


@pytest.mark.parametrize("grid", [GRID, OBLIQUE], ids=["axial", "oblique"])
def test_the_mask_lies_on_exactly_the_inputs_grid(checkpoint, tmp_path, grid) -> None:
    write_case(tmp_path / "case", 5, grid=grid)
    image = tmp_path / "case" / "img.nrrd"
    assert run(checkpoint, image, tmp_path / "out") == 0
    folder = tmp_path / "out" / "img"
    labels = read_labels(folder / "labels.nii.gz")
    assert not labels.grid.difference(read_image(image).grid)
    names = json.loads((folder / "labels.json").read_text())
    volumes = {"Brainstem": 1.44, "Eye_L": 0.216, "Eye_R": 0.216}
    assert set(names.values()) == set(volumes)
    assert set(np.unique(labels.array)) <= {0, 1, 2, 3}
    assert (folder / "qc.png").read_bytes().startswith(b"\x89PNG")
    stats = json.loads((folder / "statistics.json").read_text())
    hu = read_image(image).array
    for value, name in names.items():
        mask = labels.array == int(value)
        assert stats[name]["volume_cm3"] == pytest.approx(mask.sum() * grid.voxel_mm3 / 1000, abs=1e-4)
        center = grid.point(np.argwhere(mask).mean(axis=0)).tolist() if mask.any() else None
        assert stats[name]["center_mm"] == (center and pytest.approx(center, abs=0.01))
        assert stats[name]["mean_hu"] == (pytest.approx(hu[mask].mean(), abs=0.06) if mask.any() else None)
        assert stats[name]["training_volume_cm3"] == [volumes[name]] * 3
    assert "heatmap_peak" in stats["Eye_L"] and "heatmap_peak" not in stats["Brainstem"]


def test_stock_pytorch_segments_alike(checkpoint, tmp_path) -> None:
    write_case(tmp_path / "case", 5)
    image, statistics = tmp_path / "case" / "img.nrrd", []
    for backend in ("fused", "reference"):
        assert run(checkpoint, image, tmp_path / backend, "--backend", backend) == 0
        statistics.append(json.loads((tmp_path / backend / "img" / "statistics.json").read_text()))
    for fused, reference in zip(statistics[0].values(), statistics[1].values(), strict=True):
        assert fused["confidence"] == pytest.approx(reference["confidence"], abs=1e-4)  # stored with four digits


def test_one_mask_per_organ_adds_up_to_the_label_map(checkpoint, tmp_path) -> None:
    write_case(tmp_path / "case", 5)
    run(checkpoint, tmp_path / "case" / "img.nrrd", tmp_path / "one")
    run(checkpoint, tmp_path / "case" / "img.nrrd", tmp_path / "many", "--per_organ")
    whole = read_labels(tmp_path / "one" / "img" / "labels.nii.gz").array
    names = json.loads((tmp_path / "one" / "img" / "labels.json").read_text())
    for value, name in names.items():
        mask = read_labels(tmp_path / "many" / "img" / "segmentations" / f"{name}.nii.gz").array
        assert np.array_equal(mask > 0, whole == int(value))


def test_dicom_objects_hold_the_label_map(checkpoint, tmp_path) -> None:
    write_case(tmp_path / "case", 5)
    image = read_image(tmp_path / "case" / "img.nrrd")
    for uid in (SERIES, SERIES + "4"):
        write_series(tmp_path / "scan", image.grid, uid, image.array)
    assert run(checkpoint, tmp_path / "scan" / f"{SERIES}4", tmp_path / "out", "--dicom") == 0
    folder = tmp_path / "out" / f"scan_{SERIES}4"
    labels = read_labels(folder / "labels.nii.gz")
    assert labels.array.any()
    assert np.array_equal(read_seg(folder / "seg.dcm", image.grid), labels.array)
    names = json.loads((folder / "labels.json").read_text())
    contoured = {roi.ROIName for roi in pydicom.dcmread(folder / "rtstruct.dcm").StructureSetROISequence}
    assert contoured == {names[str(value)] for value in np.unique(labels.array) if value}
    with pytest.raises(FocusNetError, match=r"--dicom needs a DICOM series to refer to, and .*img\.nrrd is none"):
        run(checkpoint, tmp_path / "case" / "img.nrrd", tmp_path / "none", "--dicom")
    assert not (tmp_path / "none").exists()


def test_a_ct_of_nobody_is_noted(checkpoint, tmp_path, capsys) -> None:
    write_image(tmp_path / "air.nrrd", Volume(np.full(GRID.shape, -1000, np.int16), GRID))
    assert run(checkpoint, tmp_path / "air.nrrd", tmp_path / "out") == 0
    assert "air.nrrd shows nobody" in capsys.readouterr().err


def test_a_folder_of_cases(checkpoint, tmp_path) -> None:
    write_data(tmp_path / "data", cases=2)
    run(checkpoint, tmp_path / "data", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *(".claims", "case_0", "case_1", "statistics.csv")
    ]


def test_one_bad_case_does_not_stop_the_others(checkpoint, tmp_path, capsys) -> None:
    write_data(tmp_path / "data", cases=2)
    whole = (tmp_path / "data" / "case_0" / "img.nrrd").read_bytes()
    (tmp_path / "data" / "case_0" / "img.nrrd").write_bytes(whole[: len(whole) // 2])
    assert run(checkpoint, tmp_path / "data", tmp_path / "out") == 2
    assert cases_in(tmp_path / "out") == ["case_1"]
    printed = capsys.readouterr()
    assert "segmented 1 of 2" in printed.out
    assert printed.err.count("error: ") == 1 and "error: case_0: cannot read" in printed.err


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nSee the manual"), "the GPU has too little memory"),
        (RuntimeError("CUDA error: launch failed\nCompile with ..."), "CUDA error: launch failed\n"),
        (MemoryError(), "it does not fit into memory"),
        (ValueError("an axis of 0"), "an axis of 0"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
    ],
)
def test_one_case_that_fails_does_not_stop_the_others(checkpoint, tmp_path, monkeypatch, capsys, error, reason) -> None:
    write_data(tmp_path / "data", cases=2)
    work = predict.predict_volume

    def fail_first(*arguments):
        monkeypatch.setattr(predict, "predict_volume", work)
        raise error

    monkeypatch.setattr(predict, "predict_volume", fail_first)
    assert run(checkpoint, tmp_path / "data", tmp_path / "out") == 2
    assert cases_in(tmp_path / "out") == ["case_1"]
    assert reason in capsys.readouterr().err.partition("error: case_0: ")[2]


def test_a_case_is_written_as_a_whole(checkpoint, tmp_path, monkeypatch) -> None:
    write_case(tmp_path / "case", 5)
    run(checkpoint, tmp_path / "case" / "img.nrrd", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out" / "img").iterdir()}

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(predict, "draw_qc", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint, tmp_path / "case" / "img.nrrd", tmp_path / "out", "--per_organ")
    assert cases_in(tmp_path / "out") == ["img"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / "img").iterdir()} == before
    run(checkpoint, tmp_path / "case" / "img.nrrd", tmp_path / "out", "--per_organ")
    assert {path.name for path in (tmp_path / "out" / "img").iterdir()} == {
        "segmentations",
        "statistics.json",
        "prediction.json",
        "qc.png",
    }


def test_the_data_set_is_never_replaced(checkpoint, tmp_path) -> None:
    write_data(tmp_path / "data", cases=1)
    before = sorted((tmp_path / "data").rglob("*"))
    with pytest.raises(FocusNetError, match=r"^cannot replace .*case_0: it is no prediction \(img.nrrd\)"):
        run(checkpoint, tmp_path / "data", tmp_path / "data")
    assert sorted((tmp_path / "data").rglob("*")) == before


@pytest.mark.parametrize("name", ["file", "file/out"])
def test_a_folder_that_cannot_be_written_is_noticed_before_the_first_ct(
    checkpoint, tmp_path, monkeypatch, name
) -> None:
    write_data(tmp_path / "data", cases=1)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(predict, "predict_case", lambda *arguments: pytest.fail("segmented"))
    with pytest.raises(FocusNetError, match=f"^cannot write into {tmp_path / name}: [^/]+$"):
        run(checkpoint, tmp_path / "data", tmp_path / name)


def test_options_of_prediction(checkpoint, tmp_path, capsys) -> None:
    write_case(tmp_path / "case", 5)
    image = tmp_path / "case" / "img.nrrd"
    run(checkpoint, image, tmp_path / "default")
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(f"{checkpoint}: S-Net, SOL-Net, SOS-Net; overlap 0.5, min_peak 0.2, largest_component True")
    assert line.endswith("device cpu")
    run(
        checkpoint, image, tmp_path / "out", "--overlap", "0", "--predict.min_peak", "1", "--largest_component", "false"
    )
    assert "overlap 0.0, min_peak 1.0, largest_component False" in capsys.readouterr().out
    default, changed = (read_labels(tmp_path / out / "img" / "labels.nii.gz").array for out in ("default", "out"))
    assert not np.array_equal(default, changed)
    with pytest.raises(FocusNetError, match="predict.overlap is 1.0"):
        run(checkpoint, image, tmp_path / "out", "--overlap", "1")


@pytest.mark.parametrize("name", ["../../evil", "/evil", ".."])
def test_no_checkpoint_names_a_file_elsewhere(checkpoint, tmp_path, name) -> None:
    state = torch.load(checkpoint)
    state["plan"]["organs"][0]["name"] = name
    torch.save(state, tmp_path / "hostile.pt")
    with pytest.raises(FocusNetError, match=f"hostile.pt: damaged checkpoint: the name '{name}'$"):
        run(tmp_path / "hostile.pt", tmp_path, tmp_path / "out", "--per_organ")


def test_wrong_inputs_are_named(checkpoint, tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(FocusNetError, match="notes.txt"):
        run(checkpoint, tmp_path / "notes.txt", tmp_path / "out")
    with pytest.raises(FocusNetError, match="nowhere"):
        run(checkpoint, tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(FocusNetError, match="no.pt"):
        run(tmp_path / "no.pt", tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [(3, 9, 10), (1, 24, 26), (14, 1, 26), (14, 24, 1), (2, 1, 1), (1, 1, 1)])
def test_volumes_smaller_than_the_window_or_the_stride(checkpoint, tmp_path, shape) -> None:
    small = Grid(shape, GRID.spacing, GRID.origin, GRID.direction)
    hu = np.random.default_rng(0).integers(-50, 50, shape).astype(np.int16)
    write_image(tmp_path / "small.nii.gz", Volume(hu, small))
    run(checkpoint, tmp_path / "small.nii.gz", tmp_path / "out")
    assert not read_labels(tmp_path / "out" / "small" / "labels.nii.gz").grid.difference(small)


@pytest.mark.parametrize("shape", [(1, 9, 10), (9, 1, 10), (9, 10, 1), (1, 1, 1), (6, 7, 8)])
def test_outlines_are_drawn_in_thin_volumes_too(checkpoint, tmp_path, shape) -> None:
    model, _ = load_checkpoint(checkpoint, torch.device("cpu"))
    labels = torch.ones(shape, dtype=torch.uint8)
    peaks = torch.tensor([[0, 0, 0], [n - 1 for n in shape]])
    result = Segmentation(labels, torch.ones(4), peaks, torch.tensor([0.1, 0.9]), [])
    volume = Volume(np.zeros(shape, np.int16), Grid(shape, GRID.spacing))
    draw_qc(tmp_path / "qc.png", volume, result, model)
    picture = imread(tmp_path / "qc.png")
    assert (picture[..., :3].max(axis=-1) - picture[..., :3].min(axis=-1) > 0.5).sum() > 1000  # coloured outlines


@pytest.mark.parametrize("grid", [GRID, OBLIQUE], ids=["axial", "oblique"])
@pytest.mark.parametrize("kind", ["nii.gz", "nrrd"])
def test_other_libraries_read_the_same_voxels_in_the_same_place(checkpoint, tmp_path, grid, kind) -> None:
    write_case(tmp_path / "case", 5, grid=grid)
    for options in ([], ["--per_organ"]):
        out = tmp_path / f"out{len(options)}"
        assert run(checkpoint, tmp_path / "case" / "img.nrrd", out, "--format", kind, *options) == 0
    suffix = ".nii.gz" if kind == "nii.gz" else ".seg.nrrd"
    whole = read_labels(tmp_path / "out0" / "img" / f"labels{suffix}").array
    assert len(np.unique(whole)) > 2
    names = json.loads((tmp_path / "out0" / "img" / "labels.json").read_text())
    expected = {tmp_path / "out0" / "img" / f"labels{suffix}": whole}
    for value, name in names.items():
        expected[tmp_path / "out1" / "img" / "segmentations" / f"{name}{suffix}"] = whole == int(value)
    for path, labels in expected.items():
        voxels, to_lps = read_nifti(path) if kind == "nii.gz" else read_nrrd(path)
        assert np.array_equal(voxels, labels)
        for voxel in ((0, 0, 0), (13, 23, 25), (3, 11, 7)):
            assert to_lps @ (*voxel[::-1], 1) == pytest.approx([*grid.point(voxel), 1], abs=1e-4)  # float32 in NIfTI
    cases = find_cases(tmp_path / "out0") + find_cases(tmp_path / "out1")
    assert [case.organs for case in cases] == [sorted(names.values())] * 2


def read_nifti(path):
    """Voxels (z, y, x) and the matrix from (x, y, z) voxels to LPS, as nibabel reads them."""
    image = nibabel.load(path)
    return np.asarray(image.dataobj).T, np.diag([-1, -1, 1, 1]) @ image.affine


def read_nrrd(path):
    """Likewise, as pynrrd reads them."""
    voxels, header = nrrd.read(str(path))
    assert header["space"] == "left-posterior-superior"
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = header["space directions"].T, header["space origin"]
    return voxels.T, matrix


def test_slicer_finds_names_colours_and_extents(checkpoint, tmp_path) -> None:
    write_case(tmp_path / "case", 5)
    for options in ([], ["--per_organ"]):
        run(checkpoint, tmp_path / "case" / "img.nrrd", tmp_path / f"out{len(options)}", "--format", "nrrd", *options)
    voxels, header = nrrd.read(str(tmp_path / "out0" / "img" / "labels.seg.nrrd"))
    names = json.loads((tmp_path / "out0" / "img" / "labels.json").read_text())
    assert header["Segmentation_SourceRepresentation"] == "Binary labelmap"
    for number, (value, name) in enumerate(names.items()):
        segment = {field: header[f"Segment{number}_{field}"] for field in ("ID", "Name", "LabelValue", "Layer")}
        assert segment == {"ID": name, "Name": name, "LabelValue": value, "Layer": "0"}
        color = [float(part) * 255 for part in header[f"Segment{number}_Color"].split()]
        assert color == pytest.approx(organ_color(name), abs=1e-3)
        extent = list(map(int, header[f"Segment{number}_Extent"].split()))
        found = np.argwhere(voxels == int(value))  # x, y, z, as the extent
        sides = zip(found.min(axis=0), found.max(axis=0)) if len(found) else [(0, -1)] * 3
        assert extent == [end for side in sides for end in side]
    assert "Segment3_ID" not in header
    header = nrrd.read_header(str(tmp_path / "out1" / "img" / "segmentations" / "Eye_R.seg.nrrd"))
    assert (header["Segment0_Name"], header["Segment0_LabelValue"]) == ("Eye_R", "1") and "Segment1_ID" not in header
