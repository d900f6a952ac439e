import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import focuskernels
from focuskernels import _lib, info


def test_every_op_names_its_backend_on_every_device() -> None:
    lines = info.report().split("\n\n")[0].splitlines()
    functions = {name for name in focuskernels.__all__ if inspect.isfunction(getattr(focuskernels, name))}
    assert {line.split()[0] for line in lines} == functions | {"nn.DenseASPP3d"}
    for line in lines:
        assert re.search(r"  cpu: [^;]+", line), line
        assert re.search(r"; cuda: .+", line), line


def test_environment() -> None:
    facts = info.environment()
    assert facts["torch"] == torch.__version__
    assert facts["threads"].startswith(f"{torch.get_num_threads()} of ")
    assert {"focuskernels", "python", "triton", "cuda"} <= set(facts)
    assert any(name.startswith("gpu") for name in facts)


def test_reason_is_that_of_each_kernel_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(name: str, reason: str | None) -> _lib.Kernel:
        return _lib.Kernel(name, len, lambda: reason)

    ops = {
        "forward": {"cpu": (kernel("a", "too old"), kernel("b", None)), "cuda": (kernel("c", "no nvcc"),)},
        "backward": {"cpu": (), "cuda": (kernel("c", "no nvcc"),)},
    }
    monkeypatch.setitem(_lib._KERNELS, "made_up", ops)
    assert info.describe("made_up") == (
        "cpu: b (a: too old), backward: reference (no kernel yet); cuda: reference (c: no nvcc)"
    )


def test_the_gradient_of_the_centres_has_no_kernel() -> None:
    assert "roi_gather_3d_centers_bwd: reference (no kernel yet)" in info.describe("roi_gather_3d")


def test_command_without_the_library(tmp_path: Path) -> None:
    source = Path(focuskernels.__file__).parent
    shutil.copytree(source, tmp_path / "focuskernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    done = subprocess.run(
        [sys.executable, "-m", "focuskernels.info"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "cpu: reference (C++ (csrc): not built" in done.stdout
