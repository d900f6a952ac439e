"""Writing files so that no truncated one is ever visible under its final name; reading JSON.

What is being written has a name of its own, `.tmp-<8 hex digits>-<final name>`, and is locked, so that what a killed
process left of it is known by the missing lock and cleared by the next one that writes into the folder.
"""

import errno
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from .errors import FocusNetError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, nor cleared
    fcntl = None  # type: ignore[assignment]

_NEW_SECONDS = 60.0  # far more than it takes to lock what was created
_UNFINISHED = re.compile(r"\.(tmp|old)-[0-9a-f]{8}-(.+)")


def load_json(path: Path) -> object:
    """The content of a JSON file.

    Raises:
        FocusNetError: it cannot be read or is no JSON, which NaN is not.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_json)
    except OSError as error:
        raise FocusNetError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise FocusNetError(f"cannot read {path}: it is no JSON ({error})") from error


def _no_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number in JSON")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` with its suffixes; on success it replaces `path`, on error it is removed.

    Raises:
        FocusNetError: the folder or file cannot be written (read-only, disk full, a folder), naming `path`.
    """
    path = Path(path)
    check_no_folder(path)
    # the unique part goes first, so that writers that look at the suffix (.nii.gz) still see it
    temporary = _beside(path, "tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_unfinished(path.parent)
        temporary.touch(exist_ok=False)
        with _locked(temporary):
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
    between leaves a whole one, though maybe under a name that starts with a dot; `clear_unfinished` moves it back.

    Raises:
        FocusNetError: the folder cannot be written (read-only, disk full), naming `path`.
    """
    path = Path(path)
    if path.is_symlink():
        path = path.resolve()
    temporary, older = _beside(path, "tmp"), _beside(path, "old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_unfinished(path.parent)
        temporary.mkdir()
        with _locked(temporary):
            yield temporary
            with _locked(path):
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


def clear_unfinished(folder: Path) -> None:
    """Remove what killed processes left half written in `folder`; a folder that had not been replaced yet comes back.

    What a living process is writing is locked and stays, and so does what is younger than a minute, and everything
    where the file system has no locks.
    """
    for entry in list(folder.iterdir()):
        unfinished = _UNFINISHED.fullmatch(entry.name)
        if not unfinished:
            continue
        with suppress(OSError), _locked(entry) as free:
            whole, moved_aside = folder / unfinished[2], unfinished[1] == "old"
            if not free or (not moved_aside and time.time() - entry.stat().st_mtime < _NEW_SECONDS):
                continue
            if moved_aside and not whole.exists():
                entry.rename(whole)
            elif entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink()


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for this from working in `folder` too.

    The lock is of the process, not of its children: those of a killed one may live some seconds longer.

    Raises:
        FocusNetError: another process works there.
    """
    if fcntl is None:
        yield
        return
    with (folder / ".lock").open("ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # and not that there are no locks
                raise FocusNetError(f"another process works in {folder}: wait until it ends") from error
        yield


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


def check_no_folder(file: Path) -> None:
    """Refuse a folder where a file is to be written.

    Raises:
        FocusNetError: it is a folder, naming it.
    """
    if os.path.isdir(file):  # unlike Path.is_dir, it is silent about a folder that may not be read
        raise FocusNetError(f"cannot write {file}: it is a folder, expected a file")


def check_replaceable(folder: Path, kind: str, written: Collection[str], marks: Collection[str]) -> None:
    """Refuse to replace a folder that is none of a `kind`: what was `written` into such a one is all it may hold, one
    of `marks` at least, beside hidden files.

    Raises:
        FocusNetError: it holds something else, or is a file, naming it.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FocusNetError(f"cannot write {folder}: it is a file, expected a folder")
    found = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if found and (found.difference(written) or not found.intersection(marks)):
        odd = min(found.difference(written), default=f"no {min(marks)}")
        raise FocusNetError(f"cannot replace {folder}: it is no {kind} ({odd}); choose another folder")


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{kind}-{uuid.uuid4().hex[:8]}-{path.name}")


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock of a file or folder, if it can be had at once; yields whether it is held."""
    if fcntl is None or not path.exists():
        yield False
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield _lock(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
