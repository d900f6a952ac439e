"""The Triton kernels of roi_gather_3d: interpreted or compiled without a GPU, and on the GPU at hand."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_runs import skip_unless_kernels_run

from focuskernels import paste_rois_3d, roi_gather_each_3d
from focuskernels._lib import DTYPES
from focuskernels.reference import roi_gather3d as reference

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    skip_unless_kernels_run()
    from focuskernels.kernels import roi_gather3d

    if not torch.cuda.is_available():
        # Small, so that small inputs have several tiles.
        monkeypatch.setattr(roi_gather3d, "BLOCK_C", 2)
        monkeypatch.setattr(roi_gather3d, "BLOCK_V", 128)
    return roi_gather3d


@pytest.mark.parametrize(
    ("dtype", "kind", "border", "channels_last", "ragged"),
    [
        (torch.float32, torch.int64, False, False, 0),
        (torch.float32, torch.float32, True, True, 0),
        (torch.float32, torch.float64, False, True, 5),
        (torch.float16, torch.float32, False, False, 0),
        (torch.float16, torch.float32, True, False, 1),
        pytest.param(torch.bfloat16, torch.float32, True, False, 0, marks=pytest.mark.gpu),
        pytest.param(torch.bfloat16, torch.int64, False, True, 5, marks=pytest.mark.gpu),
    ],
)
def test_kernels_are_the_reference(
    kernels: Any, dtype: torch.dtype, kind: torch.dtype, border: bool, channels_last: bool, ragged: int
) -> None:
    """`ragged` ROIs have a size of their own, and read one channel of the first source."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    first = torch.randn(2, 3, 4, 5, 8).to(dtype).contiguous(memory_format=layout)
    second = torch.randn(2, 2, 2, 3, 3).transpose(3, 4)
    rows = [(0, 2.3, 1.2, 4.4), (1, 3, 2, 3), (1, -1, 40, 2), (7, 3, 3, 3), (1, 2, 2, 3)]
    centers = torch.tensor(rows[: ragged or None], dtype=torch.float64).to(kind)
    sizes = [4, 5, 3, 1, 1, 1, 2, 2, 2, 2, 3, 2, 3, 2, 4][: 3 * ragged] or [3, 4, 2]
    outputs = sizes if ragged or kind == torch.int64 else [2, 2, 3]
    channels = [2, 0, 1, 1, 0][:ragged] + [-1] * ragged
    boxes = (sizes, outputs, [1.0, 1.0, 1.0, 0.5, 0.5, 0.75], channels)
    expected = reference.forward([first, second], centers, *boxes, border)
    actual = kernels.forward([first.to(device), second.to(device)], centers.to(device), *boxes, border)
    tolerance = TOLERANCE[dtype]
    for a, e in zip(actual, expected, strict=True):
        assert (a.stride(), a.dtype) == (e.stride(), e.dtype)
        torch.testing.assert_close(a.cpu(), e, rtol=tolerance, atol=tolerance)
    grads = [torch.randn(out.shape).to(out.dtype).contiguous(memory_format=layout) for out in expected]
    dtypes = [DTYPES.index(t.dtype) for t in (first, second)]
    about = ([*first.shape, *second.shape], [0, 1 if ragged else 3], dtypes)
    for bases in ([], [torch.randn_like(first), torch.randn(second.shape)]):
        expected = reference.backward(grads, bases, centers, *boxes, *about, [int(channels_last), 0], border)
        on_device = ([g.to(device) for g in grads], [b.to(device) for b in bases], centers.to(device))
        actual = kernels.backward(*on_device, *boxes, *about, [int(channels_last), 0], border)
        for a, e in zip(actual, expected, strict=True):
            assert (a.stride(), a.dtype) == (e.stride(), e.dtype)
            torch.testing.assert_close(a.cpu(), e, rtol=tolerance, atol=tolerance)
        if device == "cuda":
            again = kernels.backward(*on_device, *boxes, *about, [int(channels_last), 0], border)
            assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


@pytest.mark.gpu
def test_cuda_graphs_of_torch_compile_leave_out_what_copies_from_the_host() -> None:
    """A graph that held the copy would read the addresses of the call that it was made from."""

    def cut_and_paste(volume: torch.Tensor, centers: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rois = roi_gather_each_3d([volume * 2 + 1], centers, [(4, 6, 8), (3, 5, 7)])
        return paste_rois_3d(labels, [roi[0, 0].sin() for roi in rois], centers, [1, 2])

    compiled = torch.compile(cut_and_paste, mode="reduce-overhead")
    for shift in range(5):
        volume = torch.randn(1, 1, 12, 14, 16, device="cuda")
        centers = torch.tensor([[0, 4, 5, 6], [0, 6, 7 + shift % 2, 8]], device="cuda")
        labels = torch.zeros(1, 12, 14, 16, dtype=torch.uint8, device="cuda")
        assert torch.equal(compiled(volume, centers, labels), cut_and_paste(volume, centers, labels))


SCRIPT = """
import os, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from focuskernels.kernels import roi_gather3d as kernels

capability, dtype, channels_last, border = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "True", sys.argv[4] == "True"
tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
fixed = {"TABLE": border, "BORDER": border, "BLOCK_C": kernels.BLOCK_C, "BLOCK_V": kernels.BLOCK_V, "ADD": True}
ones = ("source_c", "result_c", "grad_c") if channels_last else ("source_x", "result_v", "grad_v")
fixed |= dict.fromkeys(ones, 1)
types = {name: "*" + dtype for name in ("source", "result", "grad", "total")} | {"centers": "*fp32"}
types |= {"geometry": "*fp64", "table": "*i64"}
for kernel in (kernels.forward_kernel, kernels.backward_kernel):
    constants = {name: value for name, value in fixed.items() if name in kernel.arg_names}
    strides = [n for n in kernel.arg_names if n.startswith(("source_", "result_", "grad_"))]
    types |= dict.fromkeys(strides, "i64")
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    pointers = [n for n in signature if signature[n].startswith("*")]
    attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in pointers}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": kernels.WARPS})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        print(subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dtype", "channels_last", "border"),
    [(80, "fp32", False, False), (90, "fp32", False, True), (90, "bf16", True, False), (100, "bf16", True, True)],
)
def test_kernels_compile_without_spills(
    capability: int, dtype: str, channels_last: bool, border: bool, tmp_path: Path
) -> None:
    pytest.importorskip("triton.backends.nvidia")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = str(Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    # Triton reads the source of a kernel from its file.
    script = tmp_path / "check.py"
    script.write_text(SCRIPT)
    arguments = [sys.executable, str(script), str(capability), dtype, str(channels_last), str(border)]
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    usage = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", result.stdout)
    assert len(usage) == 2, result.stdout
    for registers, stack, shared, local in usage:
        assert int(stack) == int(local) == 0, result.stdout
        # up to 231 with Triton 3.6, at most 192 with 3.9: one program a multiprocessor either way
        assert int(registers) <= 240 and int(shared) <= 48 * 1024, result.stdout
