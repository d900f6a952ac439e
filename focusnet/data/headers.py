"""What the header of an image file promises, checked against what the file holds before ITK believes it.

ITK allocates what a header states, reads zeros where a NIfTI is too short, prints where a MetaImage is, and overruns
its buffers on overlong lines of a NRRD and odd file names in a MetaImage.
"""

import gzip
import itertools
import math
import re
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import numpy as np

from ..errors import FocusNetError

if TYPE_CHECKING:
    import SimpleITK as sitk

_DEFLATE = 1032  # no deflated stream is more than this many times shorter than what it holds
_NRRD_LINE = 1000
_HEAD = 1 << 16
_MHA_BYTES = {"CHAR": 1, "UCHAR": 1, "SHORT": 2, "USHORT": 2, "INT": 4, "UINT": 4, "LONG": 4, "ULONG": 4,
              "LONG_LONG": 8, "ULONG_LONG": 8, "FLOAT": 4, "DOUBLE": 8}  # fmt: skip


def check_header(path: Path, *, voxels: bool = True) -> int:
    """Catch damaged headers and truncated files.

    Args:
        path: A NRRD, NIfTI or MetaImage file.
        voxels: Read a NIfTI file to its end, so that missing and damaged voxels are noticed too.

    Returns:
        Size of the file with the voxels: `path` or one beside it.

    Raises:
        FocusNetError: it is damaged, holds less than it states, or spreads its voxels over several files.
        OSError: it cannot be read.
    """
    name = path.name.lower()
    if name.endswith(".nii.gz"):
        try:
            with gzip.open(path) as file:
                _check_nifti(path, cast(BinaryIO, file), voxels)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise FocusNetError(f"cannot read {path}: the compressed data is truncated or damaged") from error
        return path.stat().st_size
    with path.open("rb") as file:
        if name.endswith(".nii"):
            _check_nifti(path, file, voxels)
            return path.stat().st_size
        return _check_metaimage(path, file) if name.endswith((".mha", ".mhd")) else _check_nrrd(path, file)


def _check_stated_size(reader: "sitk.ImageFileReader", path: Path, held: int) -> None:
    """Check that as much as the header states can be in the file at all, however well it is compressed.

    Args:
        reader: Has read the header.
        path: Its file.
        held: Size of the file with the voxels.

    Raises:
        FocusNetError: it cannot, or an axis has no voxel.
    """
    import SimpleITK as sitk

    size = reader.GetSize()
    shape = "x".join(map(str, size))
    if min(size) < 1:
        raise FocusNetError(f"cannot read {path}: it has {shape} voxels, expected one or more along each axis")
    voxel = sitk.Image([1] * len(size), reader.GetPixelID(), reader.GetNumberOfComponents())
    stated = math.prod(size) * voxel.GetSizeOfPixelComponent() * reader.GetNumberOfComponents()
    if stated > _DEFLATE * held:
        raise FocusNetError(
            f"cannot read {path}: its header states {shape} voxels, {stated} bytes, which {held} cannot hold"
        )


def is_detached(path: Path) -> bool:
    """Whether the voxels of an image file that can be read lie in another one, which its header names."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if path.name.lower().endswith((".mha", ".mhd")):
        return not re.search(rb"^ElementDataFile\s*=\s*LOCAL", head, re.MULTILINE)
    lines = head.splitlines() if head.startswith(b"NRRD") else []
    header = itertools.takewhile(bool, lines)
    return any(line.partition(b":")[0].replace(b" ", b"") == b"datafile" for line in header)


def itk_name(path: Path) -> str:
    """`path` for ITK, whose bindings end the process at one that is no UTF-8.

    Raises:
        FocusNetError: it is none.
    """
    name = str(path)
    try:
        name.encode()
    except UnicodeEncodeError as error:
        shown = name.encode(errors="backslashreplace").decode()
        raise FocusNetError(f"cannot open {shown}: its name is not in UTF-8; rename it") from error
    return name


def read_header(path: Path, held: int) -> "sitk.ImageFileReader":
    """A reader that has read the header, which states no more than the `held` bytes of its voxels' file can hold.

    Raises:
        FocusNetError: it states more, or its name is not in UTF-8.
        RuntimeError: ITK cannot read it.
    """
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(itk_name(path))
    reader.ReadImageInformation()
    _check_stated_size(reader, path, held)
    return reader


def _check_nifti(path: Path, file: BinaryIO, voxels: bool) -> None:
    header = file.read(540)
    order = "<" if header[:4] in (b"\x5c\x01\0\0", b"\x1c\x02\0\0") else ">"
    size = int.from_bytes(header[:4], "little" if order == "<" else "big")
    # NIfTI-1 and NIfTI-2: types and places of dim, bitpix, vox_offset
    layout = {348: ("i2", 40, 72, "f4", 108), 540: ("i8", 16, 14, "i8", 168)}.get(size)
    if layout is None or len(header) < size:
        raise FocusNetError(f"cannot read {path}: its NIfTI header is truncated or damaged")
    kind, dim_at, bits_at, offset_kind, offset_at = layout
    dims = [int(value) for value in np.frombuffer(header, f"{order}{kind}", 8, dim_at)]
    bits = int(np.frombuffer(header, f"{order}i2", 1, bits_at)[0])
    offset = float(np.frombuffer(header, f"{order}{offset_kind}", 1, offset_at)[0])
    if not 1 <= dims[0] <= 7 or min(dims[1 : 1 + dims[0]]) < 1 or bits < 1 or not 0 <= offset < 1e9:
        raise FocusNetError(
            f"cannot read {path}: its NIfTI header is damaged: dim {dims}, bitpix {bits}, at {offset:g}"
        )
    if not voxels:
        return
    expected = max(int(offset), size) + math.prod(dims[1 : 1 + dims[0]]) * bits // 8
    found = len(header)
    while chunk := file.read(1 << 20):  # to the end, so that gzip's checksum is verified too
        found += len(chunk)
    if found < expected:
        raise FocusNetError(f"cannot read {path}: truncated, {found} bytes of {expected}")


def _check_metaimage(path: Path, file: BinaryIO) -> int:
    fields: dict[str, str] = {}
    while "ElementDataFile" not in fields:
        line = file.readline(4096)
        if b"=" not in line:
            raise FocusNetError(f"cannot read {path}: its MetaImage header is truncated or damaged")
        name, _, value = line.decode("latin-1").partition("=")
        fields[name.strip()] = value.strip()
    data = fields["ElementDataFile"]
    held = path.stat().st_size - file.tell() if data == "LOCAL" else _detached(path, data)
    try:
        dims = [int(n) for n in fields["DimSize"].split()]
        size = _MHA_BYTES[fields["ElementType"].removeprefix("MET_").removesuffix("_ARRAY")]
        voxels = math.prod(dims) * int(fields.get("ElementNumberOfChannels", 1))
        compressed = fields.get("CompressedData", "False")
        packed = int(fields.get("CompressedDataSize", 0))
        if min(dims) < 1 or voxels < 1 or packed < 0 or compressed not in ("True", "False"):
            raise ValueError(f"{dims} voxels, CompressedData {compressed[:20]}, CompressedDataSize {packed}")
    except (KeyError, ValueError) as error:
        raise FocusNetError(f"cannot read {path}: its MetaImage header is damaged near {str(error)[:200]}") from error
    expected = packed if compressed == "True" else voxels * size
    if held < expected:
        raise FocusNetError(f"cannot read {path}: truncated, {held} bytes of voxels, expected {expected}")
    return held


def _check_nrrd(path: Path, file: BinaryIO) -> int:
    for line in iter(lambda: file.readline(1 << 20), b""):
        if not (line := line.rstrip(b"\r\n")):
            break
        name, _, value = line.partition(b":")
        free = line.startswith(b"#") or value.startswith(b"=") or name == b"content"
        if len(line) > _NRRD_LINE and not free:
            start = name[:40].decode("ascii", "replace")
            raise FocusNetError(f"cannot read {path}: its NRRD header has a line of {len(line)} bytes: {start!r} ...")
        if name.replace(b" ", b"") == b"datafile":
            return _detached(path, value.strip().decode("utf-8", "replace"))
    return path.stat().st_size


def _detached(path: Path, name: str) -> int:
    """Size of the file with the voxels."""
    if name.startswith("LIST") or "%" in name:  # which ITK takes for a pattern of printf
        raise FocusNetError(f"cannot read {path}: its voxels lie in several files, {name[:200]!r}, expected one")
    data = path.parent / name
    if not data.is_file():  # nor a device, which never ends
        raise FocusNetError(f"cannot read {path}: its voxels' file, {name[:200]!r}, does not exist")
    return data.stat().st_size
