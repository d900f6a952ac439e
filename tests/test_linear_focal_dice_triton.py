"""The Triton kernels of the last convolution: interpreted without a GPU, and on the GPU at hand."""

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_runs import skip_unless_kernels_run

from focuskernels import focal_dice, linear_argmax, linear_focal_dice, linear_focal_dice_loss
from focuskernels.reference import focal_dice as loss_reference
from focuskernels.reference import linear_focal_dice as reference
from focuskernels.reference.focal_dice import SIGMOID, SOFTMAX, SOFTMAX_DICE_SIGMOID_FOCAL

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernels() -> Any:
    skip_unless_kernels_run()
    from focuskernels.kernels import linear_focal_dice

    return linear_focal_dice


def whole(low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Whole numbers, whose sums of products are exact in any order."""
    return torch.randint(low, high, shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("channels", "classes", "voxels"), [(32, 19, 300), (5, 1, 7), (70, 33, 131), (3, 256, 17)])
def test_argmax_is_the_reference(
    kernels: Any, channels: int, classes: int, voxels: int, channels_last: bool, dtype: torch.dtype
) -> None:
    # many logits are equal
    features = whole(-3, 4, (2, channels, voxels), dtype)
    weight, bias = whole(-2, 3, (classes, channels), dtype), whole(-2, 3, (classes,), dtype)
    if channels_last:
        features = features.transpose(1, 2).contiguous().transpose(1, 2)
    for b in (bias, None):
        labels, top = kernels.argmax(features, weight, b, True)
        double_bias = None if b is None else b.double()
        expected, expected_top = reference.argmax(
            reference.top_class, features.double(), weight.double(), double_bias, True
        )
        assert torch.equal(labels, expected)
        torch.testing.assert_close(top.double(), expected_top, rtol=1e-5, atol=0)
    assert kernels.argmax(features, weight, None, False)[1].numel() == 0
    apart = torch.stack([bias, -9 * bias], dim=1)[:, 0]
    dense, strided = (kernels.argmax(features, weight, b, False)[0] for b in (bias, apart))
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


#: Of the gradients; d is rounded to the dtype before it is multiplied, and so is the result.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
SHAPES = [(1, 32, 19, 300), (2, 5, 3, 131), (2, 40, 17, 67), (1, 1, 2, 1)]
LARGER = [(1, 32, 19, 300001), (1, 64, 16, 4097)]
MOST = [(2, 32, 104, 9999), (1, 64, 64, 4097)]


def shapes(dtype: torch.dtype) -> list[tuple[int, ...]]:
    if DEVICE == "cpu":
        return SHAPES
    return [SHAPES[1], *LARGER, *(MOST if dtype == torch.bfloat16 else [])]


# Each pair of two options somewhere; the interpreter cannot multiply bfloat16.
@pytest.mark.parametrize(
    ("mode", "multi_hot", "masked", "channels_last", "gamma", "dtype"),
    [
        (SOFTMAX, False, False, False, 2.0, torch.float32),
        (SOFTMAX, False, True, True, 0.5, torch.float32),
        (SOFTMAX, False, True, False, 1.0, torch.float16),
        (SOFTMAX, False, False, True, 0.0, torch.float16),
        (SOFTMAX, False, True, True, 2.0, torch.float16),
        (SIGMOID, False, True, False, 2.0, torch.float32),
        (SIGMOID, True, True, True, 0.5, torch.float32),
        (SIGMOID, True, False, False, 0.0, torch.float16),
        (SOFTMAX_DICE_SIGMOID_FOCAL, False, True, True, 2.0, torch.float32),
        (SOFTMAX_DICE_SIGMOID_FOCAL, False, False, False, 0.5, torch.float16),
        *(
            pytest.param(*options, torch.bfloat16, marks=pytest.mark.gpu)
            for options in (
                (SOFTMAX, False, True, True, 2.0),
                (SIGMOID, True, True, False, 2.0),
                (SIGMOID, False, False, True, 1.0),
                (SOFTMAX_DICE_SIGMOID_FOCAL, False, True, False, 0.0),
            )
        ),
    ],
)
def test_loss_is_the_reference(
    kernels: Any,
    monkeypatch: pytest.MonkeyPatch,
    mode: int,
    multi_hot: bool,
    masked: bool,
    channels_last: bool,
    gamma: float,
    dtype: torch.dtype,
) -> None:
    if DEVICE == "cpu":
        # small, so that there are several programs of several tiles
        monkeypatch.setattr(kernels, "TILES", (2, 2))
    for shape in shapes(dtype):
        assert_loss_is_the_reference(kernels, shape, mode, multi_hot, masked, channels_last, gamma, dtype)


def assert_loss_is_the_reference(
    kernels: Any,
    shape: tuple[int, ...],
    mode: int,
    multi_hot: bool,
    masked: bool,
    channels_last: bool,
    gamma: float,
    dtype: torch.dtype,
) -> None:
    batch, channels, classes, voxels = shape
    # multiples of 1/64, whose sums are exact: logits are rounded alike
    features = whole(-8, 9, (batch, channels, voxels), dtype) / 4
    weight = whole(-8, 9, (classes, channels), dtype) / 16
    # every other number of a longer one
    bias = None if gamma == 1 else whole(-8, 9, (2 * classes,), dtype).div(8)[::2]
    if channels_last:
        features = features.transpose(1, 2).contiguous().transpose(1, 2)
    target = whole(
        0, 3 if multi_hot else classes + 1, (batch, classes, voxels) if multi_hot else (batch, voxels), torch.uint8
    )
    mask = torch.rand(batch, classes, device=DEVICE) < 0.7 if masked else None
    if mask is not None:
        mask[:, 0] = True
    logits = torch.einsum("ck,nkv->ncv", weight.double(), features.double())
    logits = (logits if bias is None else logits + bias.double().view(-1, 1)).to(dtype).double()
    linear, options = (features, weight, bias, target), (mode, gamma, 1, mask)

    table, wrong = kernels.forward(*linear, *options)
    expected_table, expected_wrong = loss_reference.forward(logits, target, *options)
    torch.testing.assert_close(table.double(), expected_table, rtol=5e-6, atol=2e-5)
    assert torch.equal(wrong, expected_wrong)

    grad = torch.linspace(-1, 2, table.numel(), device=DEVICE).view(table.shape).flip(2).contiguous()
    found = kernels.backward(*linear, grad, *options, True)
    d = loss_reference.backward(logits, target, grad.double(), *options)
    expected = (
        torch.einsum("ck,ncv->nkv", weight.double(), d),
        torch.einsum("ncv,nkv->ck", d, features.double()),
        d.sum(dim=(0, 2)),
    )
    assert found[0].stride() == features.stride()
    assert [t.dtype for t in found] == [dtype, torch.float32, torch.float32]
    for actual, right in zip(found, expected):
        slack = 1e-7 * right.numel() ** 0.5
        assert float((actual - right).norm()) <= TOLERANCE[dtype] * float(right.norm()) + slack
    alone = kernels.backward(*linear, grad, *options, False)
    assert alone[0].numel() == 0
    for each, again in ((found[1], alone[1]), (found[2], alone[2]), (table, kernels.forward(*linear, *options)[0])):
        assert torch.equal(each, again)


def test_nothing_to_sum(kernels: Any) -> None:
    options = (SOFTMAX, 2.0, None, None)
    for shape in ((0, 4, 9), (2, 4, 0)):
        features, target = torch.ones(shape, device=DEVICE), torch.zeros(shape[0], shape[2], device=DEVICE).byte()
        weight = torch.ones(3, 4, device=DEVICE)
        table, wrong = kernels.forward(features, weight, None, target, *options)
        assert torch.equal(table.cpu(), torch.zeros(shape[0], 6, 3)) and torch.equal(wrong.cpu(), torch.zeros(shape[0]))
        grads = kernels.backward(features, weight, None, target, table, *options, True)
        assert [tuple(g.shape) for g in grads] == [shape, (3, 4), (3,)]
        assert not grads[1].any() and not grads[2].any()


def test_more_samples_than_a_launch_has_are_refused() -> None:
    many = torch.ones(1, dtype=torch.float16).expand(65536, 16, 1)
    reasons = (
        focal_dice._not_in_triton(many),
        linear_focal_dice._unsupported_by_triton(many),
        linear_focal_dice.why_not(many, many[:2, :, 0]),
    )
    assert reasons == ("65536 samples, at most 65535 are supported",) * 3
    assert focal_dice._not_in_triton(many[1:]) is None


def test_chunks_where_one_kernel_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    # by design, so that it is no fallback
    monkeypatch.setenv("FOCUSKERNELS_STRICT", "1")
    features, target = torch.randn(1, 8, 40), torch.randint(0, 129, (1, 40))
    for classes, dtype, words in ((129, torch.float32, "129 classes"), (5, torch.float64, "float64")):
        arguments = (features.to(dtype), torch.randn(classes, 8, dtype=dtype), None, target % classes)
        assert words in str(linear_focal_dice.why_not(*arguments[:2]))
        kernel = linear_focal_dice._one_kernel_or_chunks("forward", linear_focal_dice._chunked_forward)
        table, _ = kernel.run(*arguments, SOFTMAX, 2.0, None, None)
        expected, _ = reference.forward(loss_reference.forward, *arguments, SOFTMAX, 2.0, None, None)
        torch.testing.assert_close(table, expected)
    for classes, channels, dtype, fits in (
        (128, 32, torch.bfloat16, True),
        (64, 64, torch.float16, True),
        (65, 64, torch.bfloat16, False),
        (128, 33, torch.float16, False),
        (2, 65, torch.bfloat16, False),
        (32, 32, torch.float32, True),
        (33, 32, torch.float32, False),
        (129, 16, torch.bfloat16, False),  # a program of 16 voxels or more holds no more classes
        (256, 3, torch.float16, False),
    ):
        shapes = (1, channels, 1), (classes, channels)
        assert (linear_focal_dice.why_not(*(torch.ones(shape, dtype=dtype) for shape in shapes)) is None) == fits


def on_gpu(dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, ...]:
    """Features, weight, bias and target of a head as FocusNet's."""
    features = torch.randn(1, 32, 40, 96, 96, device="cuda", dtype=dtype)
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last_3d)
    weight = torch.randn(19, 32, device="cuda", dtype=dtype) / 4
    target = torch.randint(0, 19, (1, 40, 96, 96), device="cuda", dtype=torch.uint8)
    return features, weight, torch.randn(19, device="cuda", dtype=dtype), target


def softmax_loss(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The loss by the formulas of the reference, and its gradient; of float64 there is no kernel on a GPU."""
    options = (SOFTMAX, 2.0, None, None)
    table = loss_reference.forward(logits, target, *options)[0].requires_grad_()
    intersection, prediction, voxels_of, focal, _outside, voxels = table.unbind(dim=1)
    sums = (intersection, prediction, voxels_of, focal, voxels)
    loss = loss_reference.loss(sums, None, 1.0, 1.0, True, False, 1e-5, "sum")
    (grad,) = torch.autograd.grad(loss, table)
    return loss.detach(), loss_reference.backward(logits, target, grad, *options)


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_loss_on_a_gpu_is_that_of_the_logits(channels_last: bool, dtype: torch.dtype, tolerance: float) -> None:
    *linear, target = on_gpu(dtype, channels_last)
    leaves = [t.requires_grad_() for t in linear]
    loss = linear_focal_dice_loss(*leaves, target)
    found = torch.autograd.grad(loss, leaves)
    exact = [t.detach().double().requires_grad_() for t in linear]
    logits = torch.nn.functional.conv3d(exact[0], exact[1][:, :, None, None, None], exact[2]).flatten(2)
    expected_loss, d = softmax_loss(logits.detach(), target.flatten(1))
    torch.testing.assert_close(loss.double(), expected_loss, rtol=tolerance, atol=0)
    for actual, expected in zip(found, torch.autograd.grad(logits, exact, d)):
        assert float((actual - expected).norm()) <= tolerance * float(expected.norm())
    again = torch.autograd.grad(linear_focal_dice_loss(*leaves, target), leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, again))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_memory_beside_the_gradient_of_the_features(dtype: torch.dtype) -> None:
    *linear, target = on_gpu(dtype, channels_last=True)
    leaves = [t.requires_grad_() for t in linear]
    torch.autograd.grad(linear_focal_dice_loss(*leaves, target), leaves)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(linear_focal_dice_loss(*leaves, target), leaves)
    gradient = leaves[0].numel() * leaves[0].element_size()
    # The logits alone would be 0.6 of it. In float32, 0.052 are the sums that a thousand programs keep, 33 a class; and
    # PyTorch's allocator cuts a block only where more than 1 MiB would be left over: 0.042 for the two large tensors.
    assert torch.cuda.max_memory_allocated() - before < 1.1 * gradient


@pytest.mark.gpu
@pytest.mark.large
def test_loss_of_more_than_2_31_features() -> None:
    shape = (1, 32, 280, 512, 512)
    features = torch.zeros(shape, device="cuda", dtype=torch.bfloat16)
    features[:, :, -1, -1, -5:] = 1
    target = torch.zeros((1, *shape[2:]), device="cuda", dtype=torch.uint8)
    target[:, -1, -1, -5:] = 3
    weight = torch.zeros(16, 32, device="cuda", dtype=torch.bfloat16)
    weight[3] = 0.125
    x = features.requires_grad_()
    linear_focal_dice_loss(x, weight, None, target, focal_weight=1e8).backward()
    assert x.grad is not None
    tail = x.grad[0, :, -1, -1, -5:]
    assert tail.isfinite().all()
    assert bool((tail == tail[0, 0]).all()) and bool((tail < 0).all())
