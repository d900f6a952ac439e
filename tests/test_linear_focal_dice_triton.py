"""The Triton kernel of `linear_argmax`: interpreted without a GPU, and on the GPU at hand."""

import importlib.util
import os
from typing import Any

import pytest
import torch

from focuskernels import linear_argmax
from focuskernels.reference import linear_focal_dice as reference

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernels() -> Any:
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and TRITON_INTERPRET is not 1")
    from focuskernels.kernels import linear_focal_dice

    return linear_focal_dice


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("channels", "classes", "voxels"), [(32, 19, 300), (5, 1, 7), (70, 33, 131), (3, 256, 17)])
def test_argmax_is_the_reference(
    kernels: Any, channels: int, classes: int, voxels: int, channels_last: bool, dtype: torch.dtype
) -> None:
    # whole numbers: sums are exact in any order, and many logits are equal
    features = torch.randint(-3, 4, (2, channels, voxels)).to(dtype)
    weight, bias = torch.randint(-2, 3, (classes, channels)).to(dtype), torch.randint(-2, 3, (classes,)).to(dtype)
    if channels_last:
        features = features.transpose(1, 2).contiguous().transpose(1, 2)
    for b in (bias, None):
        labels, top = kernels.argmax(*(None if t is None else t.to(DEVICE) for t in (features, weight, b)), True)
        double_bias = None if b is None else b.double()
        expected, expected_top = reference.argmax(
            reference.top_class, features.double(), weight.double(), double_bias, True
        )
        assert torch.equal(labels.cpu(), expected)
        torch.testing.assert_close(top.cpu().double(), expected_top, rtol=1e-5, atol=0)
    assert kernels.argmax(features.to(DEVICE), weight.to(DEVICE), None, False)[1].numel() == 0
    apart = torch.stack([bias, -9 * bias], dim=1)[:, 0]
    dense, strided = (kernels.argmax(*(t.to(DEVICE) for t in (features, weight, b)), False)[0] for b in (bias, apart))
    assert torch.equal(dense, strided)


def test_nan_is_the_largest(kernels: Any) -> None:
    nan, low = float("nan"), -float("inf")
    columns = torch.tensor([[1, 1, 0], [0, nan, 5], [nan, 9, nan], [2, 7, 7], [low, low, low], [1, 2, nan]])
    weight = torch.eye(3)
    for row, column in enumerate(columns):
        # a product with 0 would spread it: the logits come from the bias
        labels, _ = kernels.argmax(torch.zeros(1, 3, 1, device=DEVICE), weight.to(DEVICE), column.to(DEVICE), False)
        assert int(labels) == int(column.max(dim=0).indices), row


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_argmax_on_a_gpu(dtype: torch.dtype) -> None:
    features = torch.randn(1, 32, 40, 96, 96, device="cuda", dtype=dtype)
    weight, bias = torch.randn(19, 32, device="cuda", dtype=dtype), torch.randn(19, device="cuda", dtype=dtype)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    labels = linear_argmax(features, weight, bias).labels
    assert torch.cuda.max_memory_allocated() - before <= 2 * labels.numel()
    logits = torch.einsum("ck,nkdhw->ncdhw", weight.double(), features.double()) + bias.double().view(-1, 1, 1, 1)
    chosen = logits.gather(1, labels[:, None].long())[:, 0]
    rounding = 2 * torch.finfo(dtype).eps * logits.abs().amax(dim=1)
    assert bool((chosen >= logits.amax(dim=1) - rounding).all())
