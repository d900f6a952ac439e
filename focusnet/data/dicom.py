"""Label maps as DICOM objects that belong to the CT series they were made from: SEG and RTSTRUCT.

SEG is written by highdicom. The libraries for RTSTRUCT (rt-utils, pydicomrt) trace the centres of the outermost voxels,
which takes half a voxel off all round, so its data set is built here with pydicom, from contourpy's contours. All of
these are the extra `dicom`.
"""

import datetime
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from scipy.ndimage import find_objects
from scipy.spatial.distance import cdist

from ..errors import FocusNetError
from ..files import atomic_write
from .organs import mirror_name, organ_color
from .series import series_slices

if TYPE_CHECKING:
    from highdicom.seg import SegmentDescription
    from pydicom import Dataset

MAKER = "FocusNet"
_SERIES_NUMBERS = {"SEG": 9001, "RTSTRUCT": 9002}
_COPIED = (  # of the patient, study and frame of reference; type 2 elements are there even if empty
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate", "StudyTime",
    "StudyID", "AccessionNumber", "ReferringPhysicianName", "FrameOfReferenceUID", "PositionReferenceIndicator",
)  # fmt: skip
_NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
# keywords of pydicom's SNOMED CT dictionary; what it lacks is an anatomical structure with the organ's name as label
_SNOMED = {
    "A_Carotid": "CarotidArtery", "Bone_Mandible": "Mandible", "Bone_Mastoid": "MastoidBone", "Brain": "Brain",
    "Brainstem": "BrainStem", "BuccalMucosa": "BuccalMucosa", "Cavity_Oral": "OralCavity",
    "ETbone": "PharyngotympanicTube", "Ear_Internal": "InnerEar", "Ear_Middle": "MiddleEar", "Esophagus": "Esophagus",
    "Eye": "Eye", "Glnd_Lacrimal": "LacrimalGland", "Glnd_Submand": "SubmandibularGland", "Glnd_Thyroid": "Thyroid",
    "Glottis": "Glottis", "Hippocampus": "Hippocampus", "IAC": "InternalAuditoryCanal",
    "Joint_TM": "TemporomandibularJoint", "Larynx": "Larynx", "Larynx_SG": "Supraglottis", "Lens": "Lens",
    "Lips": "Lip", "Lobe_Temporal": "TemporalLobe", "Lung": "Lung", "OpticChiasm": "OpticChiasm",
    "OpticNrv": "OpticNerve", "Parotid": "ParotidGland", "Pituitary": "Pituitary",
    "SpinalCanal": "SpinalCanalStructure", "SpinalCord": "SpinalCord", "Trachea": "Trachea",
}  # fmt: skip


def check_dicom_extra() -> None:
    """Raise a FocusNetError if what writes DICOM is not installed."""
    missing = [name for name in ("highdicom", "pydicom", "contourpy") if find_spec(name) is None]
    if missing:
        raise FocusNetError(f'DICOM output needs {", ".join(missing)}: pip install "focuskernels[dicom]"')


def read_slices(series: Path) -> "list[Dataset]":
    """The slices of a CT series without their pixels, in the order of `read_image`'s z.

    Raises:
        FocusNetError: as `series_slices`, or a slice lacks a UID that what is made from it must refer to.
    """
    from pydicom import dcmread

    slices: list[Dataset] = []
    for file in series_slices(series):
        ds = dcmread(file, stop_before_pixels=True)
        if missing := [name for name in _NEEDED if not ds.get(name)]:
            raise FocusNetError(f"cannot refer to {file}: it has no {', '.join(missing)}, which DICOM output needs")
        for name in (name for name in _COPIED if name not in ds):
            setattr(ds, name, None)
        slices.append(ds)
    return slices


def write_seg(path: Path, slices: "list[Dataset]", labels: np.ndarray, organs: dict[int, str]) -> None:
    """Write a label map as a DICOM Segmentation, one binary segment per organ, atomically.

    Args:
        path: The file.
        slices: Of the CT (`read_slices`).
        labels: Label map (z, y, x) on the CT's grid.
        organs: TG-263 name of every label, from 1 on; label and segment have the same number.

    Raises:
        FocusNetError: the file cannot be written, or highdicom refuses the series.
        ValueError: `labels` does not have the shape of the series.
    """
    from highdicom.seg import Segmentation, SegmentationTypeValues
    from pydicom.uid import generate_uid

    _check_shape(slices, labels)
    found = bool(labels.any())
    if not found:  # a SEG has a frame at least, and highdicom would write all of them
        slices, labels = slices[:1], labels[:1]
    try:
        segmentation = Segmentation(
            slices,
            labels,
            SegmentationTypeValues.BINARY,
            [_segment(number, name) for number, name in organs.items()],
            series_instance_uid=generate_uid(),
            series_number=_SERIES_NUMBERS["SEG"],
            sop_instance_uid=generate_uid(),
            instance_number=1,
            manufacturer=MAKER,
            manufacturer_model_name=MAKER,
            software_versions=version("focuskernels"),
            device_serial_number="0",
            omit_empty_frames=found,
            content_label="ORGANS",
            series_description=f"{MAKER} organs",
        )
    except (AttributeError, KeyError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise FocusNetError(f"cannot write {path}: no SEG can be made for this series: {reason}") from error
    with atomic_write(path) as temporary:
        segmentation.save_as(temporary)


def write_rtstruct(path: Path, slices: "list[Dataset]", labels: np.ndarray, organs: dict[int, str]) -> None:
    """Write a label map as an RT Structure Set, atomically; arguments and errors as for `write_seg`.

    Contours are closed and planar, one or more per slice, and run half way between the centres of voxels inside and
    outside. A hole is joined to its outline by a channel without width, so that a reader fills neither. Organs without
    a voxel are left out.
    """
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid

    _check_shape(slices, labels)
    first, now = slices[0], datetime.datetime.now()
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = RTStructureSetStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid()
    for name in ("SpecificCharacterSet", *_COPIED):
        if name in first:
            setattr(ds, name, first[name].value)
    ds.InstanceCreationDate = ds.SeriesDate = ds.StructureSetDate = now.strftime("%Y%m%d")
    ds.InstanceCreationTime = ds.SeriesTime = ds.StructureSetTime = now.strftime("%H%M%S")
    ds.Modality, ds.SeriesInstanceUID, ds.SeriesNumber = "RTSTRUCT", generate_uid(), _SERIES_NUMBERS["RTSTRUCT"]
    ds.SeriesDescription, ds.OperatorsName, ds.InstanceNumber = f"{MAKER} organs", None, 1
    ds.Manufacturer = ds.ManufacturerModelName = MAKER
    ds.SoftwareVersions = version("focuskernels")
    ds.StructureSetLabel, ds.ApprovalStatus = MAKER, "UNAPPROVED"
    ds.ReferencedFrameOfReferenceSequence = [_referenced_frame(slices)]
    ds.StructureSetROISequence, ds.ROIContourSequence, ds.RTROIObservationsSequence = [], [], []
    boxes = dict(enumerate(find_objects(labels), start=1))
    for number, name in organs.items():
        if box := boxes.get(number):
            roi, contours, observation = Dataset(), Dataset(), Dataset()
            roi.ROINumber, roi.ReferencedFrameOfReferenceUID = number, first.FrameOfReferenceUID
            roi.ROIName, roi.ROIGenerationAlgorithm = name, "AUTOMATIC"
            contours.ROIDisplayColor, contours.ReferencedROINumber = list(organ_color(name)), number
            contours.ContourSequence = list(_contour_items(labels[box] == number, box, slices))
            observation.ObservationNumber = observation.ReferencedROINumber = number
            observation.RTROIInterpretedType, observation.ROIInterpreter = "ORGAN", None
            ds.StructureSetROISequence.append(roi)
            ds.ROIContourSequence.append(contours)
            ds.RTROIObservationsSequence.append(observation)
    with atomic_write(path) as temporary:
        ds.save_as(temporary, enforce_file_format=True)


def contours(mask: np.ndarray) -> list[np.ndarray]:
    """Closed contours around the True voxels of a slice (y, x): an array of (x, y) in voxels each, first point once.

    They run half way between the centres of voxels inside and outside, so the centres inside of them are those of the
    mask; voxels that touch at a corner alone are apart. A hole is part of its outline, at the end of a channel of no
    width.
    """
    from contourpy import contour_generator

    inside = np.pad(mask, 1).astype(np.float64)
    generator = contour_generator(z=inside, fill_type="OuterOffset")
    lines, offsets = cast("tuple[list[np.ndarray], list[np.ndarray]]", generator.filled(0.5, 2.0))
    found = []
    for points, starts in zip(lines, offsets):
        loops = [points[start : end - 1] - 1 for start, end in pairwise(starts)]
        joined = loops[0]
        for hole in loops[1:]:
            at, nearest = np.unravel_index(cdist(joined, hole).argmin(), (len(joined), len(hole)))
            around = np.roll(hole, -int(nearest), axis=0)
            joined = np.concatenate([joined[: at + 1], around, around[:1], joined[at:]])
        found.append(joined)
    return found


def _check_shape(slices: "list[Dataset]", labels: np.ndarray) -> None:
    shape = (len(slices), slices[0].Rows, slices[0].Columns)
    if labels.shape != shape:
        raise ValueError(f"labels of shape {labels.shape} for a series of shape {shape}")


def _segment(number: int, name: str) -> "SegmentDescription":
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentAlgorithmTypeValues, SegmentDescription
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes

    side = name[-1] if mirror_name(name) != name else ""
    keyword = _SNOMED.get(name[:-2] if side else name, "AnatomicalStructure")
    segment = SegmentDescription(
        number,
        name,
        codes.SCT.AnatomicalStructure,
        getattr(codes.SCT, keyword),
        SegmentAlgorithmTypeValues.AUTOMATIC,
        AlgorithmIdentificationSequence(MAKER, codes.DCM.ArtificialIntelligence, version("focuskernels")),
        display_color=CIELabColor.from_rgb(*organ_color(name)),
    )
    if side:
        laterality = {"L": codes.SCT.Left, "R": codes.SCT.Right}[side]
        modifier = CodedConcept(laterality.value, laterality.scheme_designator, laterality.meaning)
        segment.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [modifier]
    return segment


def _referenced_frame(slices: "list[Dataset]") -> "Dataset":
    from pydicom.dataset import Dataset

    series, study, frame = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID = slices[0].SeriesInstanceUID
    series.ContourImageSequence = [_reference(ds) for ds in slices]
    study.ReferencedSOPClassUID = "1.2.840.10008.3.1.2.3.1"  # Detached Study Management: retired, but expected here
    study.ReferencedSOPInstanceUID = slices[0].StudyInstanceUID
    study.RTReferencedSeriesSequence = [series]
    frame.FrameOfReferenceUID = slices[0].FrameOfReferenceUID
    frame.RTReferencedStudySequence = [study]
    return frame


def _reference(source: "Dataset") -> "Dataset":
    from pydicom.dataset import Dataset

    reference = Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = source.SOPClassUID, source.SOPInstanceUID
    return reference


def _contour_items(mask: np.ndarray, box: tuple[slice, slice, slice], slices: "list[Dataset]") -> "Iterator[Dataset]":
    from pydicom.dataelem import RawDataElement
    from pydicom.dataset import Dataset
    from pydicom.tag import Tag

    for plane, source in zip(mask, slices[box[0]], strict=True):
        along_x, along_y = np.reshape(np.array(source.ImageOrientationPatient, float), (2, 3))
        row_mm, column_mm = map(float, source.PixelSpacing)
        for points in contours(plane):
            x, y = points[:, :1] + box[2].start, points[:, 1:] + box[1].start
            mm = np.array(source.ImagePositionPatient, float) + x * column_mm * along_x + y * row_mm * along_y
            text = "\\".join(f"{value:.4f}" for value in mm.ravel()).encode()
            text += b" " * (len(text) % 2)
            item, tag = Dataset(), Tag("ContourData")
            item.ContourImageSequence, item.ContourGeometricType = [_reference(source)], "CLOSED_PLANAR"
            item.NumberOfContourPoints = len(mm)
            # as it will lie in the file: pydicom takes most of a minute to check a patient's million numbers
            item[tag] = RawDataElement(tag, "DS", len(text), text, 0, False, True)
            yield item
