from typing import Any

import pytest
import torch
from compare import assert_layouts_agree, assert_traceable
from torch import Tensor

from focuskernels import focal_dice_loss, linear_argmax, linear_focal_dice_loss
from focuskernels._lib import csrc_missing
from focuskernels.reference import linear_focal_dice as reference


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reference.CHUNK, "cpu", 50)


def case(dtype: torch.dtype = torch.float64, multi_hot: bool = False) -> tuple[Tensor, ...]:
    features = torch.randn(2, 6, 4, 5, 7, dtype=dtype)
    weight, bias = torch.randn(5, 6, dtype=dtype), torch.randn(5, dtype=dtype)
    target = torch.rand(2, 5, 4, 5, 7) > 0.5 if multi_hot else torch.randint(0, 5, (2, 4, 5, 7))
    return features, weight, bias, target


def separate(features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, **options: Any) -> Tensor:
    logits = torch.nn.functional.conv3d(features, weight.view(*weight.shape[:2], 1, 1, 1), bias)
    return focal_dice_loss(logits, target, **options)


@pytest.mark.parametrize("bias_given", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gamma": 0.5, "alpha": [1.0, 2, 3, 4, 5], "batch_dice": True},
        {"ignore_index": 2, "class_reduction": "mean", "include_background": False},
        {"class_mask": torch.tensor([[True, True, False, True, True], [True, False, True, True, True]])},
        {"activation": "sigmoid", "focal_weight": 0.3, "dice_weight": 2.0, "smooth": 1.0},
    ],
)
def test_is_the_convolution_and_the_loss(options: dict[str, Any], bias_given: bool) -> None:
    features, weight, bias, target = case(multi_hot=options.get("activation") == "sigmoid")
    results = []
    for function in (linear_focal_dice_loss, separate):
        leaves = [t.clone().requires_grad_() for t in (features, weight, *([bias] if bias_given else []))]
        loss = function(*leaves, *([] if bias_given else [None]), target, **options)
        results.append((loss, torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_gradients_only_where_asked(frozen: int) -> None:
    leaves = list(case()[:3])
    target = case()[3]
    needed = [t.requires_grad_() for i, t in enumerate(leaves) if i != frozen]
    loss = linear_focal_dice_loss(*leaves, target)
    expected = torch.autograd.grad(separate(*leaves, target), needed)
    torch.testing.assert_close(torch.autograd.grad(loss, needed), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_and_dtypes(dtype: torch.dtype) -> None:
    features, weight, bias, target = case(dtype)
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 2e-3}
    assert_layouts_agree(lambda x: linear_focal_dice_loss(x, weight, bias, target), features, **tolerance)
    actual = linear_focal_dice_loss(features, weight.view(5, 6, 1, 1, 1), bias, target)
    torch.testing.assert_close(actual, separate(features, weight, bias, target), **tolerance)


def test_gradcheck() -> None:
    features, weight, bias, target = case()
    inputs = tuple(t.requires_grad_() for t in (features[:, :, :1, :2, :3].contiguous(), weight, bias))
    assert torch.autograd.gradcheck(lambda f, w, b: linear_focal_dice_loss(f, w, b, target[:, :1, :2, :3]), inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_argmax(layout: torch.memory_format, dtype: torch.dtype) -> None:
    features, weight, bias, _ = case(dtype)
    logits = torch.nn.functional.conv3d(features, weight.view(5, 6, 1, 1, 1), bias)
    found = linear_argmax(features.contiguous(memory_format=layout), weight, bias, probability=True)
    assert found.labels.dtype == torch.uint8
    assert torch.equal(found.labels.long(), logits.argmax(dim=1))
    assert found.probability is not None
    torch.testing.assert_close(found.probability, logits.softmax(dim=1).amax(dim=1))
    assert linear_argmax(features, weight).probability is None


@pytest.mark.skipif(csrc_missing() is not None, reason=f"csrc: {csrc_missing()}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_class_argmax_takes_the_first_of_equals_and_nan_for_the_largest(dtype: torch.dtype) -> None:
    nan, low = float("nan"), -float("inf")
    columns = [[1, 1, 0], [0, nan, 5], [nan, 9, nan], [0.0, -0.0, 0.0], [low, low, low], [2, 7, 7], [1, 2, nan]]
    logits = torch.tensor(columns, dtype=dtype).t().repeat(1, 700).contiguous()  # more voxels than a block
    labels, largest = torch.ops.focuskernels_C.class_argmax(logits)
    expected = logits.max(dim=0)
    assert torch.equal(labels.long(), expected.indices)
    torch.testing.assert_close(largest, expected.values, rtol=0, atol=0, equal_nan=True)


def test_nothing_to_count() -> None:
    features, weight, bias, target = case()
    assert float(linear_focal_dice_loss(features[:0], weight, bias, target[:0])) == 0
    assert linear_argmax(features[:0], weight).labels.shape == (0, 4, 5, 7)
    assert float(linear_focal_dice_loss(features, weight, bias, target * 0 + 9, ignore_index=9)) == 0


def test_compile_and_fake_tensors() -> None:
    features, weight, bias, target = case(torch.float32)
    leaves = [t.requires_grad_() for t in (features, weight, bias)]
    assert_traceable(linear_focal_dice_loss, *leaves, target)


def test_under_autocast() -> None:
    features, weight, bias, target = case(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = linear_focal_dice_loss(features.requires_grad_(), weight, bias, target)
    expected = linear_focal_dice_loss(*(t.bfloat16() for t in (features, weight, bias)), target)
    assert torch.equal(actual, expected)
    assert torch.autograd.grad(actual, features)[0].dtype == torch.float32


def test_bad_input() -> None:
    features, weight, bias, target = case(torch.float32)
    for arguments, error, match in (
        ((features, weight[:, :5], bias, target), ValueError, r"\(C, 6\)"),
        ((features, weight, bias[:4], target), ValueError, r"bias must be \(5,\)"),
        ((features, weight.double(), bias, target), TypeError, "differ"),
        ((features.long(), weight, bias, target), TypeError, "floating point"),
        ((features[:, :, 0, 0, 0], weight, bias, target), ValueError, r"\(N, K, \*spatial\)"),
        ((features, weight, bias, target[:1]), ValueError, "target must be"),
        ((features, weight, bias, target + 1), ValueError, "expected 0 to 4"),
        ((features, weight[:1], bias[:1], target), ValueError, "at least two classes"),
    ):
        with pytest.raises(error, match=match):
            linear_focal_dice_loss(*arguments)
    with pytest.raises(ValueError, match="1 to 256"):
        linear_argmax(features, torch.ones(300, 6))
    loss = linear_focal_dice_loss(features.requires_grad_(), weight, bias, target)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, features, create_graph=True)
