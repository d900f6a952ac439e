"""DICOM series as clinics have them: read, and written as SEG and RTSTRUCT, which other software reads back."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from matplotlib.path import Path as MplPath
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, RTStructureSetStorage

from focusnet.data import dicom
from focusnet.data.dicom import _SNOMED, contours, read_slices, write_rtstruct, write_seg
from focusnet.data.images import Grid, read_grid, read_image, read_labels, resample, write_labels
from focusnet.data.inputs import find_inputs
from focusnet.data.organs import ORGANS as ORGANS_KNOWN
from focusnet.data.organs import organ_color
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


ORGANS = {1: "Brainstem", 2: "OpticNrv_L", 3: "Cochlea_R", 4: "Lens_L"}


def organ_labels() -> np.ndarray:
    """A ring, two parts that touch at a corner with a part at the image's edge, a lone voxel, and an absent organ."""
    labels = np.zeros(UPRIGHT.shape, np.uint8)
    labels[1:4, 4:20, 5:22] = 1
    labels[1:3, 9:14, 8:17] = 0
    labels[2, 11, 11] = 1
    labels[2, 0:4, 24:27] = labels[2, 4:8, 27:30] = 2
    labels[0, 22, 3] = 3
    return labels


@pytest.fixture(params=[UPRIGHT, oblique(UPRIGHT)], ids=["upright", "oblique"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Grid]:
    """A folder with a series in `ct`, `seg.dcm` and `rtstruct.dcm`, and the grid."""
    write_series(tmp_path / "ct", request.param)
    slices = read_slices(tmp_path / "ct")
    write_seg(tmp_path / "seg.dcm", slices, organ_labels(), ORGANS)
    write_rtstruct(tmp_path / "rtstruct.dcm", slices, organ_labels(), ORGANS)
    return tmp_path, request.param


def test_dcmqi_reads_the_same_voxels_from_the_seg(written: tuple[Path, Grid]) -> None:
    folder, grid = written
    assert np.array_equal(read_seg(folder / "seg.dcm", grid), organ_labels())


def test_plastimatch_fills_the_contours_to_the_same_voxels(written: tuple[Path, Grid]) -> None:
    folder, grid = written
    write_labels(folder / "grid.nrrd", organ_labels(), grid)
    call("plastimatch", "convert", "--input", folder / "rtstruct.dcm", "--fixed", folder / "grid.nrrd",
         "--output-prefix", folder / "masks", "--prefix-format", "nrrd")  # fmt: skip
    assert {path.stem for path in (folder / "masks").iterdir()} == {"Brainstem", "OpticNrv_L", "Cochlea_R"}
    for number, name in list(ORGANS.items())[:3]:
        # DSC 1: no contour passes through the centre of a voxel, so how a reader treats its border does not matter
        mask = read_labels(folder / "masks" / f"{name}.nrrd")
        assert np.array_equal(mask.array > 0, organ_labels() == number)
        assert not mask.grid.difference(grid)


def test_contours_enclose_the_centres_of_the_mask_and_no_others() -> None:
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:13, :17]
    centres = np.stack([x.ravel(), y.ravel()], axis=1)
    for share in (0.02, 0.3, 0.6, 0.95, 1.0):
        mask = generator.random((13, 17)) < share  # of many parts, holes in holes, and voxels at the edge
        wound = np.zeros(mask.size, int)
        for points in contours(mask):
            wound += MplPath(np.concatenate([points, points[:1]])).contains_points(centres)
        assert np.array_equal(wound.reshape(mask.shape), mask)


def test_both_objects_belong_to_the_series(written: tuple[Path, Grid]) -> None:
    folder, _ = written
    source = {ds.SOPInstanceUID: ds for ds in read_slices(folder / "ct")}
    segmentation, structures = pydicom.dcmread(folder / "seg.dcm"), pydicom.dcmread(folder / "rtstruct.dcm")
    for ds, modality in ((segmentation, "SEG"), (structures, "RTSTRUCT")):
        assert (ds.StudyInstanceUID, ds.FrameOfReferenceUID, ds.Modality) == (STUDY, FRAME, modality)
        assert (ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex) == (
            "Müller^Anna",
            "4711",
            "19610203",
            "F",
        )
        assert ds.SeriesInstanceUID != SERIES
    assert segmentation.ReferencedSeriesSequence[0].SeriesInstanceUID == SERIES
    frame = structures.ReferencedFrameOfReferenceSequence[0]
    series = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
    assert (frame.FrameOfReferenceUID, series.SeriesInstanceUID) == (FRAME, SERIES)
    assert {item.ReferencedSOPInstanceUID for item in series.ContourImageSequence} == set(source)
    for roi in structures.ROIContourSequence:
        for contour in roi.ContourSequence:
            plane = source[contour.ContourImageSequence[0].ReferencedSOPInstanceUID]
            normal = np.cross(plane.ImageOrientationPatient[:3], plane.ImageOrientationPatient[3:])
            off = (np.reshape(contour.ContourData, (-1, 3)) - np.array(plane.ImagePositionPatient)) @ normal
            assert np.abs(off).max() < 1e-3  # mm; points are written with four decimals


def test_organs_are_named_coded_and_coloured(written: tuple[Path, Grid]) -> None:
    folder, _ = written
    structures = pydicom.dcmread(folder / "rtstruct.dcm")
    rois = {roi.ROINumber: roi.ROIName for roi in structures.StructureSetROISequence}
    assert rois == {1: "Brainstem", 2: "OpticNrv_L", 3: "Cochlea_R"}  # nothing is contoured of the lens
    colors = {roi.ReferencedROINumber: tuple(roi.ROIDisplayColor) for roi in structures.ROIContourSequence}
    assert colors == {number: organ_color(name) for number, name in rois.items()}
    segments = pydicom.dcmread(folder / "seg.dcm").SegmentSequence
    assert {segment.SegmentNumber: segment.SegmentLabel for segment in segments} == ORGANS
    kinds = [segment.SegmentedPropertyTypeCodeSequence[0] for segment in segments]
    assert [kind.CodeMeaning for kind in kinds] == ["Brain Stem", "optic nerve", "Anatomical Structure", "Lens"]
    assert kinds[1].SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"
    assert "SegmentedPropertyTypeModifierCodeSequence" not in kinds[0]


def test_every_code_is_in_the_dictionary_and_every_organ_has_its_colour() -> None:
    assert set(_SNOMED) <= {name.removesuffix("_L") for name in ORGANS_KNOWN}
    for keyword in _SNOMED.values():
        assert getattr(codes.SCT, keyword).scheme_designator == "SCT"
    assert organ_color("Brainstem") == (140, 0, 191)
    assert len({organ_color(name) for name in ORGANS_KNOWN}) > 0.9 * len(ORGANS_KNOWN)


def test_an_empty_label_map_is_written(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", UPRIGHT)
    slices, nothing = read_slices(tmp_path / "ct"), np.zeros(UPRIGHT.shape, np.uint8)
    write_seg(tmp_path / "seg.dcm", slices, nothing, ORGANS)
    write_rtstruct(tmp_path / "rtstruct.dcm", slices, nothing, ORGANS)
    assert not read_seg(tmp_path / "seg.dcm", UPRIGHT).any()
    assert pydicom.dcmread(tmp_path / "seg.dcm").NumberOfFrames == len(ORGANS)  # not of every slice
    assert len(pydicom.dcmread(tmp_path / "rtstruct.dcm").StructureSetROISequence) == 0


def test_elements_that_anonymised_series_lack(tmp_path: Path) -> None:
    write_series(tmp_path, UPRIGHT)
    for path in tmp_path.iterdir():
        ds = pydicom.dcmread(path)
        del (
            ds.PatientBirthDate,
            ds.AccessionNumber,
            ds.ReferringPhysicianName,
            ds.StudyID,
            ds.PositionReferenceIndicator,
        )
        ds.save_as(path)
    slices = read_slices(tmp_path)
    write_seg(tmp_path / "seg.dcm", slices, organ_labels(), ORGANS)
    write_rtstruct(tmp_path / "rtstruct.dcm", slices, organ_labels(), ORGANS)
    assert pydicom.dcmread(tmp_path / "rtstruct.dcm").PatientBirthDate == ""
    change(tmp_path, 2, FrameOfReferenceUID="")
    with pytest.raises(FocusNetError, match=r"cannot refer to .*: it has no FrameOfReferenceUID, which DICOM output"):
        read_slices(tmp_path)


def test_labels_on_another_grid_are_refused(tmp_path: Path) -> None:
    write_series(tmp_path, UPRIGHT)
    for write in (write_seg, write_rtstruct):
        with pytest.raises(ValueError, match=r"shape \(4, 24, 30\) for a series of shape \(5, 24, 30\)"):
            write(tmp_path / "out.dcm", read_slices(tmp_path), organ_labels()[1:], ORGANS)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom, "find_spec", lambda name: None if name == "highdicom" else "found")
    with pytest.raises(FocusNetError, match=r'needs highdicom: pip install "focuskernels\[dicom\]"'):
        dicom.check_dicom_extra()


def read_seg(path: Path, grid: Grid) -> np.ndarray:
    """The label map (z, y, x) of a SEG on `grid`, as dcmqi reads it."""
    call("segimage2itkimage", "--inputDICOM", path, "--outputDirectory", path.parent, "-t", "nrrd", "--prefix", "part")
    labels = np.zeros(grid.shape, np.uint8)
    for part in path.parent.glob("part-*.nrrd"):  # cropped to where something is
        labels[resample(read_labels(part), grid, labels=True).array > 0] = int(part.stem.partition("-")[2])
    return labels


def call(tool: str, *arguments: object) -> None:
    command = [str(Path(sys.executable).with_name(tool)), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
