"""Which CTs `predict` finds in a file or folder, and what it calls them."""

import os
from pathlib import Path

import pytest

from focusnet.data.inputs import find_inputs
from focusnet.errors import FocusNetError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def slices(folder: Path, storage: str = "1.2.840.10008.5.1.4.1.1.2") -> None:
    """Two files with the head of a DICOM slice."""
    folder.mkdir(parents=True)
    for number in range(2):
        meta = b"DICM" + b"\2\0\2\0UI\x1a\0" + storage.encode() + b"\0"
        (folder / f"{number}").write_bytes(bytes(128) + meta)


def found(source: Path, root: Path | None = None) -> dict[str, str]:
    inputs, _ = find_inputs(source)
    return {name: os.path.relpath(path, root or source) for name, path in inputs.items()}


def test_image_files(tmp_path: Path) -> None:
    touch(tmp_path, "b.nii.gz", "a.nrrd", "c.MHA", ".a.nrrd", "._b.nii.gz", "notes.txt", "x.seg.nrrd", "labels.nii.gz")
    assert found(tmp_path) == {"a": "a.nrrd", "b": "b.nii.gz", "c": "c.MHA"}
    assert found(tmp_path / "b.nii.gz", tmp_path) == {"b": "b.nii.gz"}


def test_cases_with_contours(tmp_path: Path) -> None:
    touch(tmp_path, "p/img.nrrd", "p/structures/Chiasm.nrrd", "q/segmentations/Lens_L.nii.gz", "q/ct.nii.gz", "r/r.mha")
    touch(tmp_path, "s/labels.nii.gz", "s/image.nii.gz", "t/labels.nii.gz", "u/segmentations/Lens_L.nii.gz")
    inputs, empty = find_inputs(tmp_path)
    assert {name: path.name for name, path in inputs.items()} == {
        "p": "img.nrrd",
        "q": "ct.nii.gz",
        "r": "r.mha",
        "s": "image.nii.gz",
    }
    assert empty == ["t", "u"]
    assert found(tmp_path / "p") == {"p": "img.nrrd"}
    assert found(tmp_path / "q") == {"q": "ct.nii.gz"}


def test_han_seg(tmp_path: Path) -> None:
    parts = ("_IMG_CT.nrrd", "_IMG_MR_T1.nrrd", "_OAR_Brainstem.seg.nrrd")
    touch(tmp_path / "set_1", *(f"case_{n}/case_{n}{part}" for n in (1, 2) for part in parts))
    assert found(tmp_path / "set_1") == {f"case_{n}": f"case_{n}/case_{n}_IMG_CT.nrrd" for n in (1, 2)}
    assert found(tmp_path / "set_1" / "case_1") == {"case_1": "case_1_IMG_CT.nrrd"}
    touch(tmp_path / "flat", *(f"case_{n}{part}" for n in (1, 2) for part in parts))
    assert found(tmp_path / "flat") == {f"case_{n}": f"case_{n}_IMG_CT.nrrd" for n in (1, 2)}


def test_nnunet(tmp_path: Path) -> None:
    touch(tmp_path, "dataset.json", "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    assert found(tmp_path) == {"a": "imagesTr/a_0000.nii.gz"}
    touch(tmp_path, "imagesTs/b_0000.nii.gz", "imagesTs/b_0001.nii.gz", "imagesTs/c_0000.nii.gz")
    assert found(tmp_path) == {"b": "imagesTs/b_0000.nii.gz", "c": "imagesTs/c_0000.nii.gz"}
    assert found(tmp_path / "imagesTs") == {"b": "b_0000.nii.gz", "c": "c_0000.nii.gz"}
    assert found(tmp_path / "imagesTr") == {"a": "a_0000.nii.gz"}


def test_numbered_patients_are_no_channels(tmp_path: Path) -> None:
    touch(tmp_path, "patient_0000.nii.gz", "patient_0001.nii.gz")
    assert list(found(tmp_path)) == ["patient_0000", "patient_0001"]


def test_dicom_folders(tmp_path: Path) -> None:
    slices(tmp_path / "p")
    slices(tmp_path / "q" / "study" / "series")
    slices(tmp_path / "r" / "1")
    slices(tmp_path / "r" / "2")
    slices(tmp_path / "s" / "mr", "1.2.840.10008.5.1.4.1.1.4")
    slices(tmp_path / "t" / "ct")
    slices(tmp_path / ".cache")
    inputs, empty = find_inputs(tmp_path)
    assert {name: str(path.relative_to(tmp_path)) for name, path in inputs.items()} == {
        "p": "p",
        "q": "q/study/series",
        "r_1": "r/1",
        "r_2": "r/2",
        "t": "t/ct",
    }
    assert empty == ["s"]
    assert found(tmp_path / "p") == {"p": "."}
    assert found(tmp_path / "t") == {"t": "ct"}


def test_a_folder_of_cts_is_no_case(tmp_path: Path) -> None:
    slices(tmp_path / "ct" / "p")
    slices(tmp_path / "ct" / "q")
    assert found(tmp_path) == {"ct_p": "ct/p", "ct_q": "ct/q"}


def test_the_current_folder_has_a_name(tmp_path: Path, monkeypatch) -> None:
    slices(tmp_path / "patient")
    monkeypatch.chdir(tmp_path / "patient")
    assert list(find_inputs(Path("."))[0]) == ["patient"]
    touch(tmp_path, "case/img.nrrd", "case/structures/Chiasm.nrrd")
    monkeypatch.chdir(tmp_path / "case" / "structures")
    assert list(find_inputs(Path(".."))[0]) == ["case"]


def test_two_cts_of_one_name(tmp_path: Path) -> None:
    touch(tmp_path, "a.nrrd", "a.nii.gz")
    with pytest.raises(FocusNetError, match=r"a.nii.gz and .*a.nrrd are both a,"):
        find_inputs(tmp_path)


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "p/img.nrrd")
    (tmp_path / "q").symlink_to(tmp_path / "absent")
    assert find_inputs(tmp_path)[1] == ["q"]
    (tmp_path / "r.nrrd").symlink_to(tmp_path / "absent.nrrd")
    inputs, empty = find_inputs(tmp_path)
    assert list(inputs) == ["p", "r"] and empty == ["q"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "absent: no such file or folder"),
        ("notes.txt", "notes.txt: not an image; expected one of .nii.gz"),
        ("empty", "no CT in .*empty: expected image files .*docs/data.md.*imagesTs.*DICOM"),
    ],
)
def test_nothing_to_segment(tmp_path: Path, name: str, message: str) -> None:
    touch(tmp_path, "notes.txt", "empty/a/readme.txt")
    with pytest.raises(FocusNetError, match=message):
        find_inputs(tmp_path / name)
