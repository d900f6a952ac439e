"""Reading, writing and resampling with the whole geometry."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from focusnet.data.images import (
    Grid,
    Volume,
    cropped_grid,
    read_grid,
    read_image,
    read_labels,
    resample,
    resampled_grid,
    write_labels,
)
from focusnet.errors import FocusNetError

ANGLE = 0.3
OBLIQUE = (np.cos(ANGLE), -np.sin(ANGLE), 0.0, np.sin(ANGLE), np.cos(ANGLE), 0.0, 0.0, 0.0, 1.0)
GRID = Grid((6, 7, 8), (2.5, 1.25, 0.75), (-10.5, 20.25, 300.0), OBLIQUE)


def write(path: Path, array: np.ndarray, grid: Grid = GRID, compress: bool = True) -> Path:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(grid.spacing[::-1])
    image.SetOrigin(grid.origin)
    image.SetDirection(grid.direction)
    sitk.WriteImage(image, str(path), compress)
    return path


def ct(dtype: type = np.int16) -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1000, GRID.shape).astype(dtype)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_image_keeps_values_and_oblique_geometry(tmp_path: Path, suffix: str) -> None:
    volume = read_image(write(tmp_path / f"ct{suffix}", ct()))
    assert volume.array.dtype == np.int16
    np.testing.assert_array_equal(volume.array, ct())
    assert not volume.grid.difference(GRID, 1e-4)
    assert read_grid(tmp_path / f"ct{suffix}") == volume.grid


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("top", [1, 40, 255, 700])
def test_labels_are_read_back_exactly(tmp_path: Path, suffix: str, top: int) -> None:
    labels = np.random.default_rng(1).integers(0, top + 1, GRID.shape)
    labels.flat[0] = top
    write_labels(tmp_path / "new" / f"labels{suffix}", labels, GRID)
    back = read_labels(tmp_path / "new" / f"labels{suffix}")
    np.testing.assert_array_equal(back.array, labels)
    assert back.array.dtype == (np.uint8 if top <= 255 else np.uint16)
    assert not back.grid.difference(GRID, 1e-4)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [f"labels{suffix}"]


def test_labels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shape"):
        write_labels(tmp_path / "a.nrrd", np.zeros((2, 2, 2), np.uint8), GRID)
    with pytest.raises(ValueError, match="integers"):
        write_labels(tmp_path / "a.nrrd", np.full(GRID.shape, -1), GRID)
    with pytest.raises(FocusNetError, match="ending in"):
        write_labels(tmp_path / "a.png", np.zeros(GRID.shape, np.uint8), GRID)
    (tmp_path / "a.nrrd").mkdir()
    with pytest.raises(FocusNetError, match="cannot write"):
        write_labels(tmp_path / "a.nrrd", np.zeros(GRID.shape, np.uint8), GRID)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.97])
def test_a_truncated_file_is_one_line(
    tmp_path: Path, suffix: str, compress: bool, kept: float, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(
        tmp_path / f"ct{suffix}",
        np.random.default_rng(0).integers(-999, 999, (20, 21, 22)).astype(np.int16),
        compress=compress,
    )
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    for read in (read_image, read_labels):
        with pytest.raises(FocusNetError) as caught:
            read(path)
        assert "\n" not in str(caught.value)
        assert path.name in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_damaged_gzip_nifti_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "ct.nii.gz", ct())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(FocusNetError, match=r"ct\.nii\.gz"):
        read_image(path)


def test_bad_images_are_named_with_their_cause(tmp_path: Path) -> None:
    values = ct(np.float32)
    values[0, 0, 0], values[1, 1, 1] = np.nan, np.inf
    cases = {
        "2 NaN or infinite": write(tmp_path / "nan.nrrd", values),
        "no such file": tmp_path / "absent.nrrd",
        "no DICOM images": tmp_path,
        "3D with 1": _flat(tmp_path / "flat.nrrd"),
        "ending in": _text(tmp_path / "ct.txt"),
        "not a slice": _text(tmp_path / "ct.dcm"),
        "not in the format": _text(tmp_path / "ct.nrrd"),
        "is empty": _empty(tmp_path / "empty.nrrd"),
    }
    for cause, path in cases.items():
        with pytest.raises(FocusNetError, match=cause) as caught:
            read_image(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def _flat(path: Path) -> Path:
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((5, 5), np.int16)), str(path))
    return path


def _empty(path: Path) -> Path:
    path.touch()
    return path


def _text(path: Path) -> Path:
    path.write_text("this is no image\n")
    return path


def test_a_singular_direction_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "ct.nrrd", ct(), compress=False)
    head, _, voxels = path.read_bytes().partition(b"\n\n")
    lines = [
        b"space directions: (1,0,0) (1,0,0) (0,0,1)" if line.startswith(b"space directions") else line
        for line in head.split(b"\n")
    ]
    path.write_bytes(b"\n".join(lines) + b"\n\n" + voxels)
    with pytest.raises(FocusNetError, match=r"ct\.nrrd") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def test_label_maps_must_be_whole_numbers(tmp_path: Path) -> None:
    whole = np.arange(GRID.shape[0] * 56, dtype=np.float32).reshape(GRID.shape) % 3
    np.testing.assert_array_equal(read_labels(write(tmp_path / "a.nrrd", whole)).array, whole)
    for cause, labels in (("fractions", whole + 0.5), ("from -1", (whole - 1).astype(np.int16))):
        with pytest.raises(FocusNetError, match=cause):
            read_labels(write(tmp_path / "b.nrrd", labels))


def test_values_beyond_int16_are_kept_as_float(tmp_path: Path) -> None:
    array = ct(np.int32)
    array[0, 0, 0] = 70_000
    volume = read_image(write(tmp_path / "ct.nrrd", array))
    assert volume.array.dtype == np.float32
    assert volume.array[0, 0, 0] == 70_000


def test_a_4d_nifti_with_one_volume_is_3d(tmp_path: Path) -> None:
    image = sitk.JoinSeries(sitk.GetImageFromArray(ct()))
    sitk.WriteImage(image, str(tmp_path / "ct.nii.gz"))
    np.testing.assert_array_equal(read_image(tmp_path / "ct.nii.gz").array, ct())
    assert read_grid(tmp_path / "ct.nii.gz").shape == GRID.shape


def test_grids_match_within_the_tolerance_and_say_what_differs() -> None:
    near = Grid(GRID.shape, GRID.spacing, (-10.5004, 20.25, 300.0), GRID.direction)
    assert not GRID.difference(near)
    assert GRID.difference(near, 1e-4)
    assert GRID.difference(Grid((6, 7, 9), GRID.spacing)) == "shape (6, 7, 8) against (6, 7, 9)"
    assert "direction" in GRID.difference(Grid(GRID.shape, GRID.spacing, GRID.origin))
    assert GRID.voxel_mm3 == pytest.approx(2.5 * 1.25 * 0.75)


def linear_field(grid: Grid) -> np.ndarray:
    """HU that are a linear function of the position, which linear interpolation must reproduce."""
    points = np.stack([grid.point(voxel) for voxel in np.ndindex(grid.shape)])
    return (3 * points[:, 0] - 2 * points[:, 1] + points[:, 2]).reshape(grid.shape).astype(np.float32)


def test_resampling_is_right_in_physical_space() -> None:
    volume = Volume(linear_field(GRID), GRID)
    finer = resampled_grid(GRID, (1.0, 1.0, 1.0))
    values = resample(volume, finer).array
    inner = (slice(2, -2), slice(2, -2), slice(2, -2))
    np.testing.assert_allclose(values[inner], linear_field(finer)[inner], rtol=1e-4, atol=1e-3)


def test_resampled_integers_are_rounded_not_truncated() -> None:
    grid = Grid((1, 1, 4))
    volume = Volume(np.array([[[-10, -9, -8, -6]]], np.int16), grid)
    shifted = Grid((1, 1, 3), origin=(0.75, 0.0, 0.0))
    assert resample(volume, shifted).array.tolist() == [[[-9, -8, -6]]]


def test_outside_is_filled_and_labels_stay_labels() -> None:
    labels = Volume((np.arange(336).reshape(GRID.shape) % 5).astype(np.uint8), GRID)
    far = Grid((2, 2, 2), origin=(1000.0, 0.0, 0.0))
    assert (resample(labels, far, labels=True, fill=0).array == 0).all()
    assert (resample(Volume(ct(), GRID), far, fill=-1024).array == -1024).all()
    finer = resample(labels, resampled_grid(GRID, (0.5, 0.5, 0.5)), labels=True)
    np.testing.assert_array_equal(resample(finer, GRID, labels=True).array, labels.array)
    mask = resample(Volume(labels.array > 2, GRID), resampled_grid(GRID, (2.0, 2.0, 2.0)), labels=True)
    assert mask.array.dtype == bool


@settings(max_examples=50, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 40)] * 3),
    old=st.tuples(*[st.floats(0.3, 5)] * 3),
    new=st.tuples(*[st.floats(0.3, 5)] * 3),
)
def test_a_resampled_grid_covers_the_same_box(
    shape: tuple[int, ...], old: tuple[float, ...], new: tuple[float, ...]
) -> None:
    grid = Grid(shape, old, GRID.origin, GRID.direction)  # type: ignore[arg-type]
    other = resampled_grid(grid, new)  # type: ignore[arg-type]
    extents = [np.array(g.shape) * np.array(g.spacing) for g in (grid, other)]
    assert (extents[1] - extents[0] > -1e-2 * np.array(new)).all()
    assert (extents[1] - extents[0] < np.array(new)).all()
    middles = [g.point((np.array(g.shape) - 1) / 2) for g in (grid, other)]
    np.testing.assert_allclose(middles[0], middles[1], atol=1e-6)


def test_a_cropped_grid_keeps_every_voxel_in_place() -> None:
    box = (slice(1, 5), slice(2, 7), slice(3, 4))
    grid = cropped_grid(GRID, box)
    assert grid.shape == (4, 5, 1)
    np.testing.assert_allclose(grid.point((1, 2, 0)), GRID.point((2, 4, 3)))


def dicom_series(
    folder: Path, positions: list[float], modality: str = "CT", tilt: float = 0.0, uid: str = "1.2.3"
) -> None:
    folder.mkdir(exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number, z in enumerate(positions):
        image = sitk.GetImageFromArray(np.full((1, 8, 9), 100 * number, np.int16))
        image.SetSpacing((0.5, 0.75, 2.0))
        for key, value in {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2" if modality == "CT" else "1.2.840.10008.5.1.4.1.1.4",
            "0008|0060": modality,
            "0020|000e": uid,
            "0020|000d": "1.2",
            "0008|0018": f"{uid}.{number + 1}",
            "0020|0032": f"-5\\{-7 + tilt * number}\\{z}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0013": str(len(positions) - number),
            "0028|1052": "-1024",
            "0028|1053": "1",
        }.items():
            image.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{modality}{uid}-{(number * 7) % 10}{number}.dcm"))
        writer.Execute(image)


def test_a_dicom_folder_is_read_in_order_of_position(tmp_path: Path) -> None:
    dicom_series(tmp_path, [10.0, 12.0, 14.0, 16.0])
    dicom_series(tmp_path, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], modality="MR", uid="1.2.5")
    volume = read_image(tmp_path)
    assert volume.grid.shape == (4, 8, 9)
    assert volume.grid.spacing == pytest.approx((2.0, 0.75, 0.5))
    assert volume.grid.origin == pytest.approx((-5, -7, 10))
    assert (np.diff(volume.array[:, 0, 0].astype(int)) == 100).all()


@pytest.mark.parametrize(
    ("positions", "tilt", "modality", "cause"),
    [
        ([0.0, 2.0, 4.0, 8.0, 10.0], 0.0, "CT", "between 4.00 and 8.00 mm"),
        ([0.0, 2.0, 4.0, 4.0, 6.0], 0.0, "CT", "same position, 4.00 mm"),
        ([0.0, 2.0, 4.0, 6.0], 0.6, "CT", "tilted gantry"),
        ([0.0, 2.0, 4.0, 6.0], 0.0, "MR", "only MR"),
    ],
)
def test_a_bad_dicom_folder_names_the_cause(
    tmp_path: Path, positions: list[float], tilt: float, modality: str, cause: str
) -> None:
    dicom_series(tmp_path, positions, modality, tilt)
    with pytest.raises(FocusNetError, match=cause) as caught:
        read_image(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("which", [0, 2, 5])
@pytest.mark.parametrize("kept", [0.4, 0.97])
def test_a_truncated_dicom_slice_is_named(tmp_path: Path, which: int, kept: float) -> None:
    dicom_series(tmp_path, [2.0 * i for i in range(6)])
    slices = sorted(tmp_path.iterdir(), key=lambda path: path.stem[-1])
    slices[which].write_bytes(slices[which].read_bytes()[: int(kept * slices[which].stat().st_size)])
    with pytest.raises(FocusNetError, match=slices[which].name) as caught:
        read_image(tmp_path)
    assert "\n" not in str(caught.value)


def test_other_files_beside_the_slices_do_not_matter(tmp_path: Path) -> None:
    dicom_series(tmp_path, [0.0, 2.0, 4.0])
    (tmp_path / "notes.txt").write_text("no slice")
    (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM" + bytes(200))
    assert read_image(tmp_path).grid.shape == (3, 8, 9)


@pytest.mark.parametrize(
    ("suffix", "change", "cause"),
    [
        (".nrrd", (b"encoding: raw", b"encoding: " + b"x" * 2000), "a line of 2010 bytes"),
        (".nrrd", (b"sizes: 8 7 6", b"sizes: 8000 7000 6000"), "states 8000x7000x6000 voxels"),
        (".nrrd", (b"encoding: raw", b"encoding: raw\ndata file: /dev/zero"), "'/dev/zero', does not exist"),
        (".nrrd", (b"encoding: raw", b"encoding: raw\ndata file: a%n.raw 1 9 1"), "in several files"),
        (".mha", (b"ElementDataFile = LOCAL", b"ElementDataFile = %s%n 1 9 1"), "in several files"),
        (".mha", (b"ElementDataFile = LOCAL", b"ElementDataFile = LIST"), "in several files"),
        (".mha", (b"DimSize = 8 7 6", b"DimSize = 8 7 -1"), "damaged near"),
        (".mha", (b"ElementSpacing = 0.75 1.25 2.5", b"ElementSpacing = 0.75 1.25 1e9"), "expected voxels of 0.001 to"),
    ],
)
def test_a_header_is_not_believed(tmp_path: Path, suffix: str, change: tuple[bytes, bytes], cause: str) -> None:
    path = write(tmp_path / f"ct{suffix}", ct(), compress=False)
    content = path.read_bytes()
    assert change[0] in content, content[:500]
    path.write_bytes(content.replace(*change))
    for read in (read_image, read_grid):
        with pytest.raises(FocusNetError, match=cause):
            read(path)
