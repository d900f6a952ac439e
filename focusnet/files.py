"""Writing files so that no truncated one is ever visible under its final name."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import FocusNetError


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` with its suffixes; on success it replaces `path`, on error it is removed.

    Raises:
        FocusNetError: the folder or file cannot be written (read-only, disk full), naming `path`.
    """
    path = Path(path)
    # the unique part goes first, so that writers that look at the suffix (.nii.gz) still see it
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        raise FocusNetError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # a folder that is a file fails here too, and would hide the first error
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`; on success it replaces `path` and all in there, on error it is removed.

    No file system replaces a folder in one step: the older one is moved aside and deleted last, so that even a kill in
    between leaves a whole one, though maybe under a name that starts with a dot.

    Raises:
        FocusNetError: the folder cannot be written (read-only, disk full), naming `path`.
    """
    path = Path(path)
    if path.is_symlink():
        path = path.resolve()
    mark = uuid.uuid4().hex[:8]
    temporary, older = (path.with_name(f".{kind}-{mark}-{path.name}") for kind in ("tmp", "old"))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            path.rename(older)
        temporary.rename(path)
    except FocusNetError as error:
        raise FocusNetError(str(error).replace(str(temporary), str(path))) from error
    except OSError as error:
        raise FocusNetError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if older.exists() and not path.exists():
            older.rename(path)
        shutil.rmtree(older, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Create a folder for results and write into it, so that no work is lost to one that cannot be written.

    Raises:
        FocusNetError: it cannot be written (read-only, disk full, a file), naming it.
    """
    if folder.exists() and not folder.is_dir():
        raise FocusNetError(f"cannot write into {folder}: it is a file, expected a folder")
    probe = folder / ".probe"
    try:
        with atomic_write(probe) as temporary:
            temporary.write_bytes(b"probe")
    except FocusNetError as error:
        raise FocusNetError(str(error).replace(f"cannot write {probe}", f"cannot write into {folder}")) from error
    probe.unlink(missing_ok=True)
