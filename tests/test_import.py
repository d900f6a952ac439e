"""Importing focuskernels needs torch alone; focusnet uses its public names alone."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import focuskernels

PACKAGE = Path(focuskernels.__file__).parent
FOCUSNET = sorted((PACKAGE.parent / "focusnet").rglob("*.py"))

# As if they were not installed: torch itself asks for Triton.
BLOCKED = """
import sys
for name in ("triton", "focusnet", "scipy", "SimpleITK", "matplotlib", "rich", "jsonargparse"):
    sys.modules[name] = None
"""


def run_without_csrc(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    shutil.copytree(PACKAGE, folder / "focuskernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return subprocess.run(
        [sys.executable, "-c", BLOCKED + code],
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_needs_no_cuda_triton_or_library(tmp_path: Path) -> None:
    code = """
import torch, focuskernels, focuskernels.nn, focuskernels.info
assert not torch.cuda.is_initialized()
for _ in range(2):
    print(int(focuskernels.heatmap_argmax_3d(torch.eye(2).view(1, 1, 1, 2, 2)).value))
print(focuskernels.__file__)
"""
    done = run_without_csrc(tmp_path, code, FOCUSKERNELS_STRICT="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "1", str(tmp_path / "focuskernels" / "__init__.py")]
    assert done.stderr.count("not built") == 1  # said once


def test_strict_makes_a_missing_kernel_an_error(tmp_path: Path) -> None:
    code = "import torch, focuskernels; focuskernels.heatmap_argmax_3d(torch.ones(1, 1, 1, 1, 1))"
    done = run_without_csrc(tmp_path, code, FOCUSKERNELS_STRICT="1")
    assert done.returncode == 1
    assert "RuntimeError: focuskernels.heatmap_argmax_3d falls back: C++ (csrc): not built" in done.stderr


def test_public_names() -> None:
    assert focuskernels.__all__ == sorted(focuskernels.__all__)
    assert all(hasattr(focuskernels, name) for name in focuskernels.__all__)


@pytest.mark.parametrize("path", FOCUSNET, ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_focusnet_imports_public_names_only(path: Path) -> None:
    public = dict.fromkeys(("focuskernels.nn", "focuskernels.reference.nn", "focuskernels.flops"))
    public["focuskernels"] = set(focuskernels.__all__) | {"nn"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "focuskernels":
            assert node.module in public, node.module
            names = {alias.name for alias in node.names}
            allowed = public[node.module]
            assert names <= allowed if allowed is not None else not any(name.startswith("_") for name in names)
