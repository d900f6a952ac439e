"""Images and label maps on disk and in memory: reading, writing and resampling with their whole geometry.

Arrays and the shape and spacing of a grid are ordered (z, y, x); origin and direction are SimpleITK's (x, y,
z), LPS, in mm.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import FocusNetError
from ..files import atomic_write
from .headers import check_header, itk_name, read_header
from .organs import organ_color
from .series import is_series, series_slices

if TYPE_CHECKING:
    import SimpleITK as sitk

SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
WRITE_SUFFIXES = (".nii.gz", ".nrrd", ".mha")
_INT16 = np.iinfo(np.int16)
_SPACING_MM = (1e-3, 1e3)
_FAR_MM = 1e6


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a volume lie.

    Attributes:
        shape: Voxels along (z, y, x).
        spacing: Voxel size in mm along (z, y, x).
        origin: Position (x, y, z) in mm of the centre of the first voxel, LPS.
        direction: The 9 cosines of SimpleITK's direction matrix, row by row; its columns belong to x, y, z.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    direction: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)

    @property
    def voxel_mm3(self) -> float:
        """Volume of a voxel in mm3."""
        return float(np.prod(self.spacing))

    def difference(self, other: "Grid", tolerance: float = 1e-3) -> str:
        """What differs by more than `tolerance` (mm, or direction cosine), in words; empty where nothing does."""
        if self.shape != other.shape:
            return f"shape {self.shape} against {other.shape}"
        for name in ("spacing", "origin", "direction"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if not np.allclose(mine, theirs, rtol=0, atol=tolerance):
                return f"{name} {_short(mine)} against {_short(theirs)}"
        return ""

    def point(self, voxel: Iterable[float]) -> np.ndarray:
        """Position (x, y, z) in mm of fractional voxel coordinates (z, y, x)."""
        steps = np.array(tuple(voxel))[::-1] * np.array(self.spacing)[::-1]
        return np.array(self.origin) + np.reshape(self.direction, (3, 3)) @ steps


@dataclass
class Volume:
    """Voxel values (z, y, x) and where they lie."""

    array: np.ndarray
    grid: Grid


def read_image(path: Path) -> Volume:
    """Read a CT: a NRRD, NIfTI or MetaImage file, a folder with one DICOM series, or FOLDER/SeriesInstanceUID.

    Returns:
        HU as int16, or as float32 where the file holds fractions or values that int16 cannot.

    Raises:
        FocusNetError: the file is unreadable, truncated or not a 3D scalar image, has NaN or infinite voxels
        or a singular
            direction; a DICOM folder holds no CT or several, or its slices have gaps.
    """
    path = Path(path)
    with _quiet(), _explained(path):
        image = _read_series(path) if is_series(path) else _read_file(path)
        values = _values(image)
        return Volume(_as_hu(values, path), _grid_of(image, path))


def read_labels(path: Path) -> Volume:
    """Read a label map (z, y, x): uint8, or uint16 if a label is above 255.

    Raises:
        FocusNetError: as `read_image`, or the values are no whole numbers from 0 to 65535.
    """
    path = Path(path)
    with _quiet(), _explained(path):
        image = _read_file(path)
        values = _values(image)
        return Volume(_as_labels(values, path), _grid_of(image, path))


def read_grid(path: Path) -> Grid:
    """The grid of an image or label file, from its header alone; of a DICOM folder by reading it.

    Raises:
        FocusNetError: as `read_image`.
    """
    path = Path(path)
    if is_series(path):
        return read_image(path).grid
    _check_name(path)
    with _quiet(), _explained(path):
        reader = read_header(path, check_header(path, voxels=False))
        if reader.GetDimension() != 3:
            return read_image(path).grid
        return _checked_grid(reader.GetSize(), reader.GetSpacing(), reader.GetOrigin(), reader.GetDirection(), path)


def write_labels(path: Path, array: np.ndarray, grid: Grid, organs: Mapping[int, str] | None = None) -> None:
    """Write a label map (z, y, x) atomically and compressed; ".nii.gz", ".nrrd" or ".mha" in the name chooses
    the format.

    Booleans and labels up to 255 are stored as uint8, others as uint16.

    Args:
        path: The file.
        array: The labels.
        grid: Where they lie.
        organs: Names of the labels (TG-263). A name ending in ".seg.nrrd" stores them with their colours as 3D Slicer's
            segments; the other formats have no place for them.

    Raises:
        FocusNetError: the file cannot be written, or its suffix is unknown.
        ValueError: `array` does not have the grid's shape, or holds anything but labels from 0 to 65535.
    """
    if array.dtype.kind not in "bui" or (array.size and not 0 <= array.min() <= array.max() <= 65535):
        raise ValueError(f"labels must be integers from 0 to 65535, got {array.dtype}")
    stored = array.astype(np.uint16 if array.size and array.max() > 255 else np.uint8, copy=False)
    _write(path, stored, grid, _slicer_fields(stored, organs) if organs and path.name.endswith(".seg.nrrd") else None)


def write_image(path: Path, volume: Volume) -> None:
    """Write an image in the dtype of its array, compressed and atomically; suffixes as for `write_labels`.

    Raises:
        FocusNetError: the file cannot be written, or its suffix is unknown.
    """
    _write(path, volume.array, volume.grid)


def _slicer_fields(labels: np.ndarray, organs: Mapping[int, str]) -> dict[str, str]:
    """What makes a NRRD file a segmentation of 3D Slicer, by the names of its developers' guide."""
    from scipy.ndimage import find_objects

    fields = {
        "Segmentation_ContainedRepresentationNames": "Binary labelmap|Closed surface|",
        "Segmentation_SourceRepresentation": "Binary labelmap",
        "Segmentation_ReferenceImageExtentOffset": "0 0 0",
    }
    boxes = find_objects(labels, max_label=max(organs))
    for number, (value, organ) in enumerate(organs.items()):
        box = boxes[value - 1]
        sides = [(0, -1)] * 3 if box is None else [(side.start, side.stop - 1) for side in reversed(box)]
        segment = {
            "ID": organ,
            "Name": organ,
            "NameAutoGenerated": "0",
            "Color": " ".join(f"{part / 255:.6f}" for part in organ_color(organ)),
            "ColorAutoGenerated": "0",
            "Extent": " ".join(f"{low} {high}" for low, high in sides),
            "LabelValue": str(value),
            "Layer": "0",
        }
        fields |= {f"Segment{number}_{name}": text for name, text in segment.items()}
    return fields


def _write(path: Path, array: np.ndarray, grid: Grid, fields: Mapping[str, str] | None = None) -> None:
    import SimpleITK as sitk

    path = Path(path)
    if not path.name.endswith(WRITE_SUFFIXES):
        raise FocusNetError(f"cannot write {path}: expected a name ending in {', '.join(WRITE_SUFFIXES)}")
    if array.shape != grid.shape:
        raise ValueError(f"an array of shape {array.shape} on a grid of shape {grid.shape}")
    image = _to_itk(array, grid)
    for name, text in (fields or {}).items():
        image.SetMetaData(name, text)
    with atomic_write(path) as temporary, _quiet():
        try:
            sitk.WriteImage(image, itk_name(temporary), useCompression=True)
        except RuntimeError as error:
            raise FocusNetError(f"cannot write {path}: {_reason(error)}") from error
        try:
            _read_file(temporary)  # ITK writes NIfTI to a full disk without a word
        except (RuntimeError, FocusNetError) as error:
            raise FocusNetError(
                f"cannot write {path}: its data could not be written whole; is the disk full?"
            ) from error


def resample(volume: Volume, grid: Grid, *, labels: bool = False, fill: float = 0) -> Volume:
    """Sample `volume` at the voxels of `grid`: linearly, or nearest with `labels`; outside of the volume is
    `fill`.

    Returns:
        A volume of the same dtype; integers are rounded.
    """
    import SimpleITK as sitk

    if volume.grid == grid:
        return volume
    dtype = volume.array.dtype
    source = _to_itk(volume.array, volume.grid)
    image = sitk.Resample(
        source,
        grid.shape[::-1],
        sitk.Transform(3, sitk.sitkIdentity),
        sitk.sitkNearestNeighbor if labels else sitk.sitkLinear,
        grid.origin,
        grid.spacing[::-1],
        grid.direction,
        float(fill),
        # ITK truncates interpolated integers towards zero, so these are rounded here instead
        source.GetPixelID() if labels else sitk.sitkFloat32,
    )
    values = sitk.GetArrayViewFromImage(image)
    return Volume(values.astype(dtype) if labels or dtype.kind == "f" else np.rint(values).astype(dtype), grid)


def resampled_grid(grid: Grid, spacing: tuple[float, float, float]) -> Grid:
    """A grid of the given spacing (z, y, x; mm) with the same centre and orientation that covers `grid`.

    It reaches over the volume by less than half a voxel on each side.
    """
    extent = np.array(grid.shape) * np.array(grid.spacing)
    shape = np.maximum(np.ceil(extent / np.array(spacing) - 1e-3), 1).astype(int)
    if tuple(shape) == grid.shape and np.allclose(spacing, grid.spacing, rtol=0, atol=1e-6):
        return grid
    # voxel of the old grid in whose coordinates the first voxel of the new grid lies
    first = (extent - (shape - 1) * np.array(spacing)) / (2 * np.array(grid.spacing)) - 0.5
    return Grid(
        _triple(shape.tolist()),
        _triple(map(float, spacing)),
        _triple(grid.point(first).tolist()),
        grid.direction,
    )


def cropped_grid(grid: Grid, box: tuple[slice, slice, slice]) -> Grid:
    """The grid of `array[box]`."""
    start = [side.start or 0 for side in box]
    shape = [len(range(*side.indices(size))) for side, size in zip(box, grid.shape, strict=True)]
    return Grid(_triple(shape), grid.spacing, _triple(grid.point(start).tolist()), grid.direction)


def _triple(values: Iterable[Any]) -> tuple[Any, Any, Any]:
    z, y, x = values
    return z, y, x


def _short(values: Iterable[float]) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in values) + ")"


def _to_itk(array: np.ndarray, grid: Grid) -> "sitk.Image":
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(array.view(np.uint8) if array.dtype == bool else array)
    image.SetSpacing(grid.spacing[::-1])
    image.SetOrigin(grid.origin)
    image.SetDirection(grid.direction)
    return image


def _values(image: "sitk.Image") -> np.ndarray:
    import SimpleITK as sitk

    return sitk.GetArrayViewFromImage(image)


def _as_hu(values: np.ndarray, path: Path) -> np.ndarray:
    if values.dtype.kind == "f":
        _check_finite(values, path)
        return values.astype(np.float32)
    fits = _INT16.min <= values.min() and values.max() <= _INT16.max
    return values.astype(np.int16 if fits else np.float32)


def _as_labels(values: np.ndarray, path: Path) -> np.ndarray:
    if values.dtype == np.uint8:
        return values.copy()
    if values.dtype.kind == "f":
        _check_finite(values, path)
    low, high = values.min(), values.max()
    if low < 0 or high > 65535:
        raise FocusNetError(f"{path} is no label map: its values reach from {low:g} to {high:g}, expected 0 to 65535")
    labels = values.astype(np.uint8 if high <= 255 else np.uint16)
    if values.dtype.kind == "f" and not np.array_equal(labels, values):
        raise FocusNetError(f"{path} is no label map: it holds fractions, expected whole numbers")
    return labels


def _check_finite(values: np.ndarray, path: Path) -> None:
    bad = values.size - np.count_nonzero(np.isfinite(values))
    if bad:
        raise FocusNetError(f"{path} has {bad} NaN or infinite voxels of {values.size}, expected numbers")


def _grid_of(image: "sitk.Image", path: Path) -> Grid:
    return _checked_grid(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection(), path)


def _checked_grid(size: Any, spacing: Any, origin: Any, direction: Any, path: Path) -> Grid:
    low, high = _SPACING_MM
    geometry = np.array([*spacing, *origin, *direction])
    plausible = all(low <= side <= high for side in spacing) and all(abs(value) <= _FAR_MM for value in origin)
    if not np.isfinite(geometry).all() or not plausible:
        raise FocusNetError(
            f"{path} has spacing {_short(spacing)} and origin {_short(origin)}, expected voxels of {low:g} to {high:g} "
            f"mm within {_FAR_MM:g} mm of the zero point"
        )
    columns = np.reshape(direction, (3, 3))
    determinant = np.linalg.det(columns)
    if abs(abs(determinant) - 1) > 1e-2 or np.abs(np.linalg.norm(columns, axis=0) - 1).max() > 1e-2:
        raise FocusNetError(f"{path} has a direction matrix of determinant {determinant:.3g}, expected a rotation")
    return Grid(_triple(size[::-1]), _triple(spacing[::-1]), _triple(origin), tuple(direction))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep ITK's warnings (harmless rounding of NIfTI headers and the like) off stderr."""
    import SimpleITK as sitk

    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the readers' exceptions into one line that names the file."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise FocusNetError(f"cannot read {path}: {_reason(error)}") from error
    except MemoryError as error:
        raise FocusNetError(f"cannot read {path}: it does not fit into memory") from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else type(error).__name__
    if "Unable to determine ImageIO reader" in last:
        return "it is not in the format its name tells, or its header is damaged"
    if last.endswith("data read error"):
        return "its compressed voxels are truncated or damaged"
    if found := re.search(r"expected (\d+) bytes but received (\d+)", last):
        return f"truncated, {found[2]} bytes of {found[1]}"
    return re.sub(r"^(\[nrrd\]\s*\w+:\s*|(itk::|sitk::|ITK )?ERROR:\s*(\w+\(0x[0-9a-f]+\):\s*)?)", "", last)


def _check_name(path: Path) -> None:
    if not path.is_file():  # nor a pipe or device, which never ends
        raise FocusNetError(f"cannot read {path}: no such file")
    if not path.name.lower().endswith(SUFFIXES):
        hint = "; give the folder of a DICOM series, not a slice" if path.suffix.lower() in ("", ".dcm", ".ima") else ""
        raise FocusNetError(f"cannot read {path}: expected a name ending in {', '.join(SUFFIXES)}{hint}")
    if not path.stat().st_size:
        raise FocusNetError(f"cannot read {path}: the file is empty")


def _read_file(path: Path) -> "sitk.Image":
    _check_name(path)
    image = read_header(path, check_header(path)).Execute()
    if image.GetDimension() == 4 and image.GetSize()[3] == 1:
        image = image[:, :, :, 0]
    channels = image.GetNumberOfComponentsPerPixel()
    if image.GetDimension() != 3 or channels != 1:
        shape = "x".join(map(str, image.GetSize()))
        raise FocusNetError(f"{path} is {image.GetDimension()}D ({shape}) with {channels} channels, expected 3D with 1")
    return image


def _read_series(path: Path) -> "sitk.Image":
    import SimpleITK as sitk

    reader = sitk.ImageSeriesReader()
    files = series_slices(path)
    reader.SetFileNames(files)
    reader.MetaDataDictionaryArrayUpdateOn()
    image = reader.Execute()
    slope = "0028|1053"
    if len({reader.GetMetaData(i, slope) for i in range(len(files)) if reader.HasMetaDataKey(i, slope)}) > 1:
        reader.SetOutputPixelType(sitk.sitkFloat32)  # ITK takes the type, so whole HU, from the first slice
        image = reader.Execute()
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise FocusNetError(f"{path} holds {image.GetSize()} voxels of a CT series, expected a 3D stack of slices")
    return image
