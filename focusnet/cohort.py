"""One cohort, any number of processes: who works on which case, and which predictions are there already.

Processes do not talk to each other. Each goes through all cases and claims one at a time by a lock that ends with its
owner, however that ends, so a killed one's case is free for the others; on a shared folder they may be on several
machines. What is done is told by `prediction.json` in the case's folder, which takes its place as a whole. What failed
is told by `<case>.error.txt` beside it, until the case succeeds.
"""

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .data.headers import is_detached
from .data.images import Volume
from .errors import FocusNetError
from .files import atomic_write
from .measures import read_json

try:
    import fcntl
except ImportError:  # Windows: one process at a time
    fcntl = None  # type: ignore[assignment]

RECORD = "prediction.json"
CLAIMS = ".claims"
ERROR_SUFFIX = ".error.txt"
WAIT_SECONDS = 0.5


class Cohort:
    """The cases of one command that works into `out`.

    Args:
        out: Folder of the predictions.
        shared: Other processes work on the same cases, so that there must be locks.

    Raises:
        FocusNetError: `shared`, and there are no locks on this system.
    """

    def __init__(self, out: Path, *, shared: bool) -> None:
        self._out, self._shared = out, shared
        if shared and fcntl is None:
            raise FocusNetError("this system has no file locks, which several processes need to share a cohort")
        # one byte of one file for each case: record locks, unlike those of whole files, work on NFS too
        self._claims = os.open(out / CLAIMS, os.O_RDWR | os.O_CREAT, 0o666)
        os.utime(out / CLAIMS)
        self._started = os.fstat(self._claims).st_mtime_ns  # by the clock of the file system, as the files' times

    def __enter__(self) -> "Cohort":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._claims)

    def share(self, names: Iterable[str]) -> Iterator[str]:
        """Yield every case, claimed for this process until the next one is asked for.

        Cases that others work on come last: done by then, or left over by one that died.
        """
        left = list(names)
        while left:
            for name in list(left):
                with self._claim(name) as mine:
                    if mine:
                        yield name
                        left.remove(name)
            if left:
                time.sleep(WAIT_SECONDS)

    def is_new(self, path: Path) -> bool:
        """Whether a file was written since this process started."""
        try:
            return path.stat().st_mtime_ns >= self._started
        except FileNotFoundError:
            return False

    def failure(self, name: str) -> str:
        """Why a case failed, in this process or another, since this one started; empty if it did not."""
        path = self._out / f"{name}{ERROR_SUFFIX}"
        return read_failure(path) if self.is_new(path) else ""

    def note_failure(self, name: str, reason: str) -> None:
        """Say in a file beside the cases' folders why this one failed; an empty reason takes that back."""
        path = self._out / f"{name}{ERROR_SUFFIX}"
        if not reason:
            path.unlink(missing_ok=True)
            return
        with atomic_write(path) as temporary:
            temporary.write_text(reason + "\n", encoding="utf-8", errors="backslashreplace")

    @contextmanager
    def _claim(self, name: str) -> Iterator[bool]:
        if fcntl is None:
            yield True
            return
        byte = int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:7], "big")
        claimed = self._lock(byte)
        try:
            yield claimed
        finally:
            if claimed:
                with suppress(OSError):  # a file system without locks
                    fcntl.lockf(self._claims, fcntl.LOCK_UN, 1, byte)

    def _lock(self, byte: int) -> bool:
        try:
            fcntl.lockf(self._claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if self._shared:
                raise FocusNetError(
                    f"{self._out}: its file system has no locks, which several processes need ({error.strerror})"
                ) from error
        return True


def read_failure(path: Path) -> str:
    """Why a case failed, from the file that says so."""
    return path.read_text(encoding="utf-8", errors="replace").strip()


def make_record(
    folder: Path, made_with: dict[str, Any], source: Path, image: Volume, identifiers: Iterable[str], **more: Any
) -> dict[str, Any]:
    """What tells later whether the prediction in `folder`, which is complete but for this, is one of the same kind.

    Args:
        folder: Of the case.
        made_with: All that the result depends on beside the CT: checkpoint, settings, kinds of output.
        source: The CT.
        image: As it was read.
        identifiers: What else of the CT is in the outputs, as the UIDs of its slices.
        more: For people.
    """
    files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    content = {"path": str(source), "stamp": _stamp(source), "sha256": content_digest(image, identifiers)}
    return {"made_with": made_with, "input": content, "files": files, **more}


def is_complete(
    folder: Path, made_with: dict[str, Any], source: Path, read: Callable[[], tuple[Volume, Iterable[str]]]
) -> bool:
    """Whether `folder` holds the whole prediction that would be made anew.

    Args:
        folder: Of the case.
        made_with: As for `make_record`.
        source: The CT; `read` is called only if its files' names, sizes or times are others than they were.
        read: Returns image and identifiers of the CT, as for `make_record`.
    """
    try:
        record = read_json(folder / RECORD)
        whole = all((folder / name).stat().st_size == size for name, size in record["files"].items())
        stamp, digest = record["input"]["stamp"], record["input"]["sha256"]
    except (FocusNetError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return False
    if not whole or record.get("made_with") != made_with:
        return False
    return (bool(stamp) and stamp == _stamp(source)) or digest == content_digest(*read())


def content_digest(image: Volume, identifiers: Iterable[str]) -> str:
    """SHA-256 of a CT's HU and grid, whatever file format they were in."""
    digest = hashlib.sha256(repr((image.grid, image.array.dtype.str, list(identifiers))).encode())
    for plane in image.array:  # which may be a view that has its voxels in another order
        digest.update(plane.tobytes())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _stamp(source: Path) -> str:
    """Names, sizes and times of a CT's files; empty where its voxels lie in a file that only its header names."""
    if source.is_file() and is_detached(source):
        return ""
    folder = source if source.is_dir() else source.parent
    files = [source] if source.is_file() else sorted(path for path in folder.iterdir() if path.is_file())
    found = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(found).encode()).hexdigest()
