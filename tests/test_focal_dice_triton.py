"""The Triton kernels: interpreted or compiled without a GPU, and on the GPU at hand."""

import importlib.util
import inspect
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_runs import skip_unless_kernels_run

from focuskernels import focal_dice_loss
from focuskernels.reference import focal_dice as reference
from focuskernels.reference.focal_dice import SIGMOID, SOFTMAX, SOFTMAX_DICE_SIGMOID_FOCAL

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]

MODES = (SOFTMAX, SIGMOID, SOFTMAX_DICE_SIGMOID_FOCAL)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    skip_unless_kernels_run()
    from focuskernels.kernels import focal_dice

    if not torch.cuda.is_available():
        # Small, so that small inputs have several programs of several tiles.
        monkeypatch.setattr(focal_dice, "TILES", (2, 2))
    return focal_dice


def inputs(mode: int, multi_hot: bool, dtype: torch.dtype, channels_last: bool, masked: bool) -> Iterator[Any]:
    for shape in [(2, 3, 70), (1, 19, 270)] if DEVICE == "cpu" else [(2, 3, 70), (1, 19, 300001), (3, 130, 999)]:
        logits = 4 * torch.randn(shape, device=DEVICE).to(dtype)
        if channels_last:
            logits = logits.transpose(1, 2).contiguous().transpose(1, 2)
        size = shape if multi_hot else (shape[0], shape[2])
        target = torch.randint(0, 3 if multi_hot else shape[1] + 1, size, dtype=torch.uint8, device=DEVICE)
        mask = torch.rand(shape[:2], device=DEVICE) < 0.7 if masked else None
        if mask is not None:
            mask[:, 0] = True
        yield logits, target, mask


# Each pair of two options somewhere; the interpreter cannot multiply bfloat16.
@pytest.mark.parametrize(
    ("mode", "multi_hot", "masked", "channels_last", "gamma", "dtype"),
    [
        (SOFTMAX, False, False, False, 2.0, torch.float32),
        (SOFTMAX, False, True, True, 0.5, torch.float32),
        (SOFTMAX, False, True, False, 1.0, torch.float16),
        (SOFTMAX, False, False, True, 0.0, torch.float16),
        (SIGMOID, False, True, False, 2.0, torch.float32),
        (SIGMOID, True, True, False, 0.5, torch.float32),
        (SIGMOID, True, False, True, 0.0, torch.float16),
        (SOFTMAX_DICE_SIGMOID_FOCAL, False, True, True, 2.0, torch.float32),
        (SOFTMAX_DICE_SIGMOID_FOCAL, False, False, False, 0.5, torch.float16),
        *(
            pytest.param(*options, torch.bfloat16, marks=pytest.mark.gpu)
            for options in (
                (SOFTMAX, False, True, True, 2.0),
                (SIGMOID, False, False, True, 1.0),
                (SIGMOID, True, True, False, 2.0),
                (SOFTMAX_DICE_SIGMOID_FOCAL, False, True, False, 0.0),
            )
        ),
    ],
)
def test_kernels_are_the_reference(
    kernels: Any, mode: int, multi_hot: bool, masked: bool, channels_last: bool, gamma: float, dtype: torch.dtype
) -> None:
    for logits, target, mask in inputs(mode, multi_hot, dtype, channels_last, masked):
        options = (mode, gamma, 1)
        table, wrong = kernels.forward(logits, target, *options, mask)
        expected_table, expected_wrong = reference.forward(logits.double(), target, *options, mask)
        torch.testing.assert_close(table.double(), expected_table, rtol=5e-6, atol=2e-5)
        assert torch.equal(wrong, expected_wrong)
        grad = torch.linspace(-1, 2, table.numel(), device=DEVICE).view(table.shape).flip(2).contiguous()
        actual = kernels.backward(logits, target, grad, *options, mask)
        expected = reference.backward(logits.double(), target, grad.double(), *options, mask)
        assert actual.stride() == logits.stride()
        slack = 1e-7 * expected.numel() ** 0.5
        assert float((actual - expected).norm()) <= TOLERANCE[dtype] * float(expected.norm()) + slack
        again, _ = kernels.forward(logits, target, *options, mask)
        assert torch.equal(again, table)
        over = logits.clone(memory_format=torch.preserve_format)
        kernels.backward_(over, target, grad, *options, mask)
        assert torch.equal(over, actual)


def test_a_small_volume_has_a_program_a_tile_and_a_large_one_few_sums(kernels: Any) -> None:
    for voxels, tiles in ((1, 1), (32**3, 1), (64 * 1024 * 2, 2), (40 * 192 * 192, 23), (160 * 512 * 512, 64)):
        assert kernels.tiles_per_program(voxels, 64, (1, 64)) == tiles


@pytest.mark.gpu
def test_no_memory_beside_logits_and_gradient() -> None:
    logits = torch.randn(1, 19, 64, 128, 128, device="cuda", requires_grad=True)
    target = torch.randint(0, 19, (1, 64, 128, 128), device="cuda", dtype=torch.uint8)
    focal_dice_loss(logits, target).backward()
    logits.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    focal_dice_loss(logits, target).backward()
    size = logits.numel() * 4
    assert torch.cuda.max_memory_allocated() - before < 1.01 * size


@pytest.mark.gpu
@pytest.mark.large
def test_more_than_2_31_elements() -> None:
    shape = (1, 16, 520, 512, 512)
    logits = torch.zeros(shape, device="cuda", dtype=torch.bfloat16)
    logits[:, 3, -1, -1, -5:] = 4
    target = torch.zeros((1, *shape[2:]), device="cuda", dtype=torch.uint8)
    target[:, -1, -1, -5:] = 3
    x = logits.requires_grad_()
    loss = focal_dice_loss(x, target, inplace_grad=True, focal_weight=1e8)
    loss.backward()
    assert x.grad is not None
    tail = x.grad[0, :, -1, -1, -5:]
    assert tail.isfinite().all()
    assert torch.equal(tail[:, :1].expand_as(tail), tail)
    assert bool((tail[3] < 0).all())


# One of each kind, at FocusNet's number of classes.
SPILL_CHECK = """
import os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from focuskernels.kernels import focal_dice as kernels

capability, dtype, mode = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
block_c, block_v, warps = kernels.tile(19, mode)
pointers = {"logits": dtype, "grad": dtype, "sums": "fp32", "grad_sums": "fp32"}
pointers |= {"target": "u8", "class_mask": "u8", "wrongs": "i32"}
scalars = dict.fromkeys(("classes", "voxels", "tiles"), "i32") | {"gamma": "fp32"}
scalars |= dict.fromkeys(("stride_n", "stride_c", "ignore"), "i64")
types = {**{name: "*" + kind for name, kind in pointers.items()}, **scalars}
constants = dict(MODE=mode, KIND=2, MULTI_HOT=False, MASKED=True, IGNORES=True, stride_v=1)
constants |= dict(BLOCK_C=block_c, BLOCK_V=block_v)
sixteen = ("voxels", "stride_n", "stride_c")
tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
for kernel in (kernels.forward_kernel, kernels.backward_kernel):
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    names = [name for name in kernel.arg_names if signature[name].startswith("*") or name in sixteen]
    aligned = [kernel.arg_names.index(name) for name in names]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        print(subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_without_spills(capability: int, dtype: str, mode: int) -> None:
    pytest.importorskip("triton.backends.nvidia")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = str(Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        # Triton reads the source of a kernel from its file.
        script = Path(folder, "check.py")
        script.write_text(SPILL_CHECK)
        arguments = [sys.executable, str(script), str(capability), dtype, str(mode)]
        result = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    usage = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", result.stdout)
    assert len(usage) == 2, result.stdout
    for registers, stack, shared, local in usage:
        # since the fused loss shares its helpers, ptxas keeps two numbers of MONAI's mixed mode on the stack here
        allowed = 8 if (capability, dtype, mode) == (80, "bf16", SOFTMAX_DICE_SIGMOID_FOCAL) else 0
        assert int(stack) <= allowed and int(local) == 0, result.stdout
        assert int(registers) <= 255 and int(shared) <= 48 * 1024


def test_the_compiler_learns_that_a_stride_is_one() -> None:
    # Triton fixes an integer argument of 1, without which loads are not vectorised, only where it has no annotation.
    from focuskernels.kernels import focal_dice

    for kernel in (focal_dice.forward_kernel, focal_dice.backward_kernel):
        parameters = inspect.signature(kernel.fn).parameters
        assert [parameters[f"stride_{axis}"].annotation for axis in "ncv"] == [inspect.Parameter.empty] * 3
