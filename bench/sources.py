"""Which version of the code a number belongs to."""

import hashlib
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from .case import Op

ROOT = Path(__file__).resolve().parent.parent
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def source_files(op: Op, device: str, root: Path = ROOT) -> list[Path]:
    """What runs on a device: public function, reference, and Triton kernels or csrc with the headers it includes."""
    found: set[Path] = set()
    for stem in op.stems:
        for folder in ("", "reference/"):
            found.update(root.glob(f"focuskernels/{folder}{stem}.py"))
        if device == "cuda":
            found.update(root.glob(f"focuskernels/kernels/{stem}.py"))
        else:
            found.update(_with_headers(path for path in root.glob(f"csrc/{stem}*") if path.is_file()))
    found.update(root / name for name in op.files)
    return sorted(found)


def source_hash(op: Op, device: str, root: Path = ROOT) -> str:
    """A short hash over names and contents of `source_files`."""
    digest = hashlib.sha256()
    for path in source_files(op, device, root):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def commit() -> tuple[str | None, bool | None]:
    """(commit, whether the code differs from it); None outside a git checkout."""
    head = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", "focuskernels", "focusnet", "csrc", "bench")
    return head, None if changes is None else bool(changes)


def _with_headers(paths: Iterable[Path]) -> set[Path]:
    seen: set[Path] = set()
    waiting = list(paths)
    while waiting:
        path = waiting.pop()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        included = _INCLUDE.findall(path.read_text(encoding="utf-8", errors="replace"))
        waiting += [path.parent / name for name in included]
    return seen


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None
