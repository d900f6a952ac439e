"""DICOM series as clinics have them: read, and written as SEG and RTSTRUCT, which other software reads back."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, RTStructureSetStorage

from focusnet.data.images import Grid, read_grid, read_image
from focusnet.data.inputs import find_inputs
from focusnet.errors import FocusNetError

STUDY, FRAME, SERIES = "1.2.826.0.1.3680043.8.498.1", "1.2.826.0.1.3680043.8.498.2", "1.2.826.0.1.3680043.8.498.3"
UPRIGHT = Grid((5, 24, 30), (3.0, 0.9, 1.1), (-12.0, -20.0, 40.0))


def oblique(grid: Grid) -> Grid:
    """`grid` turned about two axes."""
    a, b = np.radians((20, -35))
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    return Grid(grid.shape, grid.spacing, grid.origin, tuple((about_z @ about_x).ravel().tolist()))


def slice_of(values: np.ndarray, grid: Grid, index: int, uid: str) -> Dataset:
    """One slice (y, x) of stored values, as a scanner would write it."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = CTImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = UID(f"{uid}.{index + 1}")
    ds.ImageType, ds.Modality = ["ORIGINAL", "PRIMARY", "AXIAL"], "CT"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = "Müller^Anna", "4711", "19610203", "F"
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = STUDY, uid, FRAME
    ds.StudyID, ds.AccessionNumber, ds.StudyDate, ds.StudyTime = "7", "A1", "20261124", "101500"
    ds.ReferringPhysicianName = ds.PositionReferenceIndicator = ds.PatientPosition = ""
    ds.Manufacturer, ds.SeriesDescription = "none", f"s{uid[-1]}"
    ds.SeriesNumber, ds.InstanceNumber = 3, index + 1
    direction = np.reshape(grid.direction, (3, 3))
    ds.ImageOrientationPatient = [f"{value:.12f}" for value in (*direction[:, 0], *direction[:, 1])]
    ds.ImagePositionPatient = [f"{value:.10f}" for value in grid.point((index, 0, 0))]
    ds.PixelSpacing, ds.SliceThickness = [grid.spacing[1], grid.spacing[2]], grid.spacing[0]
    ds.Rows, ds.Columns = values.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    ds.RescaleSlope, ds.RescaleIntercept = 1, 0
    ds.PixelData = values.astype("<i2").tobytes()
    return ds


def write_series(folder: Path, grid: Grid, uid: str = SERIES, values: np.ndarray | None = None) -> np.ndarray:
    """A series in files without suffix, in no order of theirs; returns its HU (z, y, x)."""
    folder.mkdir(exist_ok=True, parents=True)
    if values is None:
        values = np.random.default_rng(0).integers(-1000, 1000, grid.shape).astype(np.int16)
    for index, plane in enumerate(values):
        slice_of(plane, grid, index, uid).save_as(
            folder / f"I{(index * 7) % 10}{index}{uid[-1]}", enforce_file_format=True
        )
    return values


def change(folder: Path, index: int, **values: object) -> None:
    """Set attributes of the slice at `index`."""
    for path in sorted(folder.iterdir()):
        ds = pydicom.dcmread(path)
        if ds.InstanceNumber == index + 1:
            for name, value in values.items():
                setattr(ds, name, value)
            ds.save_as(path, enforce_file_format=True)


@pytest.mark.parametrize("grid", [UPRIGHT, oblique(UPRIGHT)], ids=["upright", "oblique"])
def test_files_without_suffix_lie_where_their_positions_say(tmp_path: Path, grid: Grid) -> None:
    values = write_series(tmp_path, grid)
    volume = read_image(tmp_path)
    assert np.array_equal(volume.array, values)
    assert not volume.grid.difference(grid)
    assert not read_grid(tmp_path).difference(grid)


def test_slope_and_intercept_of_every_slice_count(tmp_path: Path) -> None:
    values = write_series(tmp_path, UPRIGHT)
    for index in range(len(values)):
        change(tmp_path, index, RescaleSlope="1", RescaleIntercept="-1024")
    assert np.array_equal(read_image(tmp_path).array, values - 1024)
    change(tmp_path, 3, RescaleSlope="0.5", RescaleIntercept="10.25")
    expected = values - 1024.0
    expected[3] = values[3] * 0.5 + 10.25
    assert np.array_equal(read_image(tmp_path).array, expected.astype(np.float32))


def test_several_series_are_listed_and_one_is_chosen(tmp_path: Path) -> None:
    folder, other = tmp_path / "scan", SERIES + "4"
    values = write_series(folder, UPRIGHT)[::-1]
    write_series(folder, UPRIGHT, other, values)
    listed = rf"choose one by adding its UID to the path: {SERIES} \(5 slices, s3\), {other} \(5 slices, s4\)"
    with pytest.raises(FocusNetError, match=listed):
        read_image(folder)
    assert np.array_equal(read_image(folder / other).array, values)
    assert find_inputs(tmp_path)[0] == {f"scan_{uid}": folder / uid for uid in (SERIES, other)}
    assert find_inputs(folder)[0] == find_inputs(tmp_path)[0]
    assert find_inputs(folder / other)[0] == {f"scan_{other}": folder / other}
    with pytest.raises(FocusNetError, match=rf"cannot read .*scan/1\.2\.3: no CT series of that UID; .*{SERIES}"):
        read_image(folder / "1.2.3")


def test_what_lies_beside_a_ct_is_passed_over(tmp_path: Path) -> None:
    values = write_series(tmp_path, UPRIGHT)
    write_series(tmp_path, Grid((2, 40, 30), (1.0, 1.0, 1.0)), SERIES + "5")
    for path in tmp_path.glob("*5"):
        ds = pydicom.dcmread(path)
        ds.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        ds.save_as(path, enforce_file_format=True)
    contours = slice_of(values[0], UPRIGHT, 0, SERIES + "6")
    contours.file_meta.MediaStorageSOPClassUID = contours.SOPClassUID = RTStructureSetStorage
    contours.Modality = "RTSTRUCT"
    contours.ReferencedSeriesSequence = [Dataset()]
    contours.ReferencedSeriesSequence[0].ReferencedSOPClassUID = CTImageStorage
    del contours.PixelData, contours.Rows, contours.Columns
    contours.save_as(tmp_path / "RS.dcm", enforce_file_format=True)
    assert np.array_equal(read_image(tmp_path).array, values)
    assert list(find_inputs(tmp_path)[0]) == [tmp_path.name]


def test_a_localizer_within_the_series_is_passed_over(tmp_path: Path) -> None:
    values = write_series(tmp_path, UPRIGHT)
    scout = slice_of(values[0], Grid((1, 24, 30), direction=(1, 0, 0, 0, 0, -1, 0, 1, 0)), 0, SERIES)
    scout.ImageType, scout.SOPInstanceUID = ["ORIGINAL", "PRIMARY", "LOCALIZER"], SERIES + ".99"
    scout.save_as(tmp_path / "scout", enforce_file_format=True)
    assert np.array_equal(read_image(tmp_path).array, values)


def test_a_missing_slice_of_an_oblique_series_is_named(tmp_path: Path) -> None:
    write_series(tmp_path, oblique(UPRIGHT))
    next(path for path in tmp_path.iterdir() if pydicom.dcmread(path).InstanceNumber == 3).unlink()
    with pytest.raises(FocusNetError, match=r"missing or uneven between .* \(a step of 6\.00 mm, 3\.00 mm elsewhere\)"):
        read_image(tmp_path)


def test_a_tilted_gantry_is_refused(tmp_path: Path) -> None:
    shear = (1.0, 0, 0, 0, 1.0, 0.3, 0, 0, np.sqrt(1 - 0.09))
    write_series(tmp_path, Grid(UPRIGHT.shape, UPRIGHT.spacing, UPRIGHT.origin, shear))
    with pytest.raises(FocusNetError, match="tilted gantry"):
        read_image(tmp_path)
