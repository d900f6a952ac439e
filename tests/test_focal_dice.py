import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import assert_layouts_agree, assert_traceable, gradients
from torch import Tensor

from focuskernels import FocalDiceSums, focal_dice_loss, focal_dice_sums
from focuskernels._lib import csrc_missing
from focuskernels.focal_dice import class_sums
from focuskernels.nn import FocalDiceLoss
from focuskernels.reference import focal_dice as reference
from focuskernels.reference.focal_dice import SIGMOID, SOFTMAX, SOFTMAX_DICE_SIGMOID_FOCAL

MODES = (SOFTMAX, SIGMOID, SOFTMAX_DICE_SIGMOID_FOCAL)
GAMMAS = (0.0, 0.5, 1.0, 2.0, 3.0, 3.7)
# Rounding of the logits' dtype; of float32 sums and exponentials where that is finer.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def one_hot(target: Tensor, classes: int) -> Tensor:
    """(N,C,*spatial); a target out of range is nowhere."""
    return torch.stack([target == c for c in range(classes)], dim=1)


def formula(
    logits: Tensor,
    target: Tensor,
    *,
    activation: str = "softmax",
    gamma: float = 2.0,
    alpha: list[float] | None = None,
    focal_weight: float = 1.0,
    dice_weight: float = 1.0,
    ignore_index: int | None = None,
    class_mask: Tensor | None = None,
    include_background: bool = True,
    batch_dice: bool = False,
    smooth: float = 1e-5,
    class_reduction: str = "sum",
) -> Tensor:
    """Equations 1 to 3 in float64 from one-hot targets and probabilities, sample by sample and class by class."""
    x = logits.double()
    samples, classes = x.shape[:2]
    kept = torch.ones(samples, classes, dtype=torch.bool) if class_mask is None else class_mask
    weights = [1.0] * classes if alpha is None else alpha
    ignored = -99 if ignore_index is None else ignore_index
    focal, count, terms = x.sum() * 0, 0, {}
    for n in range(samples):
        channels = [c for c in range(classes) if kept[n, c]]
        softmax = x[n, channels].softmax(dim=0)
        for position, c in enumerate(channels):
            p = softmax[position] if activation == "softmax" else x[n, c].sigmoid()
            if activation == "softmax":
                inside = target[n] == c
                valid = sum((target[n] == k).int() for k in channels).bool() & (target[n] != ignored)
                inside = inside & valid
                log_p = x[n, channels].log_softmax(dim=0)[position]
                focal = focal - weights[c] * ((1 - p[inside]) ** gamma * log_p[inside]).sum()
                count += int(inside.sum())
            else:
                valid = target[n, c] != ignored
                inside = (target[n, c] == 1) & valid
                outside = (target[n, c] == 0) & valid
                log_p, log_q = (torch.nn.functional.logsigmoid(z) for z in (x[n, c], -x[n, c]))
                focal = focal - weights[c] * ((1 - p[inside]) ** gamma * log_p[inside]).sum()
                focal = focal - (p[outside] ** gamma * log_q[outside]).sum()
                count += int(valid.sum())
            terms[n, c] = (p[inside].sum(), p[valid].sum(), inside.sum())
    first = 0 if include_background else 1
    groups = [range(samples)] if batch_dice else [[n] for n in range(samples)]
    dice = x.sum() * 0
    for group in groups:
        values = []
        for c in range(first, classes):
            found = [terms[n, c] for n in group if (n, c) in terms]
            if not found:
                continue
            intersection, prediction, size = (sum(f[i] for f in found) for i in range(3))
            values.append(1 - (2 * intersection + smooth) / (prediction + size + smooth))
        total = sum(values, start=x.sum() * 0)
        dice = dice + (total / max(1, len(values)) if class_reduction == "mean" else total) / len(groups)
    return focal_weight * focal / max(1, count) + dice_weight * dice


def case(mode: int = SOFTMAX, shape: tuple[int, ...] = (2, 5, 3, 4, 7), dtype: torch.dtype = torch.float64) -> Any:
    logits = (3 * torch.randn(shape, dtype=torch.float64)).to(dtype)
    if mode == SIGMOID:
        return logits, torch.rand(shape) > 0.6
    return logits, torch.randint(0, shape[1], (shape[0], *shape[2:]))


def assert_matches_formula(logits: Tensor, target: Tensor, rtol: float = 1e-10, **options: Any) -> None:
    ours, truth = (logits.detach().clone().requires_grad_() for _ in range(2))
    actual, expected = focal_dice_loss(ours, target, **options), formula(truth, target, **options)
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=rtol)
    (grad,), (grad_truth,) = torch.autograd.grad(actual, ours), torch.autograd.grad(expected, truth)
    assert float(grad_truth.norm()) > 0
    assert float((grad.double() - grad_truth).norm() / grad_truth.norm()) < rtol


@pytest.mark.parametrize(
    "options",
    [
        {},
        *({"gamma": gamma} for gamma in GAMMAS),
        {"alpha": [0.1, 1.0, 2.0, 3.0, 0.0]},
        {"focal_weight": 0.3, "dice_weight": 2.0},
        {"dice_weight": 0.0, "gamma": 0.0},
        {"ignore_index": 2},
        {"ignore_index": 255},
        {"include_background": False},
        {"batch_dice": True, "smooth": 1.0},
        {"class_reduction": "mean"},
        {"class_reduction": "mean", "batch_dice": True, "include_background": False},
    ],
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_matches_the_formula(activation: str, masked: bool, options: dict[str, Any]) -> None:
    logits, target = case(SOFTMAX if activation == "softmax" else SIGMOID)
    if options.get("ignore_index") == 255:
        target = target.to(torch.uint8)
        target[torch.rand(target.shape) < 0.3] = 255
    elif "ignore_index" in options and activation == "sigmoid":
        options = {**options, "ignore_index": 1}
    mask = torch.tensor([[True, True, False, True, True], [True, False, False, True, True]]) if masked else None
    assert_matches_formula(logits, target, activation=activation, class_mask=mask, **options)


@pytest.mark.parametrize(
    "shape", [(1, 2, 1), (3, 2, 17), (1, 7, 5, 31), (2, 3, 1, 1, 1), (1, 130, 3, 5, 7), (1, 4, 9000)]
)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_any_rank_and_size(activation: str, shape: tuple[int, ...]) -> None:
    assert_matches_formula(*case(SOFTMAX if activation == "softmax" else SIGMOID, shape), activation=activation)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_dtypes_of_logits(activation: str, dtype: torch.dtype) -> None:
    logits, target = case(SOFTMAX if activation == "softmax" else SIGMOID, (2, 5, 6, 8, 9), dtype)
    # half precision loses what lies under its smallest number; a scaled loss keeps it, as in mixed-precision training
    options = {"focal_weight": 100.0, "dice_weight": 100.0, "activation": activation}
    assert (
        focal_dice_loss(logits, target).dtype == torch.promote_types(dtype, torch.float32)
        if activation == "softmax"
        else True
    )
    assert_matches_formula(logits, target, TOLERANCE[dtype], **options)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32]
)
def test_dtypes_of_target(dtype: torch.dtype) -> None:
    logits, target = case()
    torch.testing.assert_close(focal_dice_loss(logits, target.to(dtype)), focal_dice_loss(logits, target))


@pytest.mark.parametrize(("dtype", "ignore_index"), [(torch.uint8, 256), (torch.uint8, -254), (torch.int8, 258)])
def test_an_ignored_value_that_the_target_cannot_hold_is_never_met(dtype: torch.dtype, ignore_index: int) -> None:
    logits, target = case()
    target = target.to(dtype)
    expected = focal_dice_loss(logits, target)
    assert torch.equal(focal_dice_loss(logits, target, ignore_index=ignore_index), expected)
    x, labels = logits.flatten(2), target.flatten(1)
    for got, want in zip(
        reference.forward(x, labels, SOFTMAX, 2.0, ignore_index, None),
        reference.forward(x, labels, SOFTMAX, 2.0, None, None),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_numbers_by_hand() -> None:
    # two voxels, p = (3/4, 1/4) and (1/2, 1/2), both of class 0
    logits = torch.tensor([[[3.0, 1.0], [1.0, 1.0]]]).log().double()
    sums = focal_dice_sums(logits, torch.zeros(1, 2, dtype=torch.uint8), gamma=1.0, alpha=[2.0, 5.0])
    assert isinstance(sums, FocalDiceSums)
    torch.testing.assert_close(sums.intersection, torch.tensor([[1.25, 0.0]]).double())
    torch.testing.assert_close(sums.prediction, torch.tensor([[1.25, 0.75]]).double())
    assert sums.target.tolist() == [[2.0, 0.0]]
    assert sums.voxels.tolist() == [2.0]
    expected = 2 * (0.25 * torch.tensor(4 / 3).log() + 0.5 * torch.tensor(2.0).log())
    torch.testing.assert_close(sums.focal, expected.double().view(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_gradcheck(mode: int, gamma: float) -> None:
    logits, target = case(mode, (2, 3, 2, 2, 3))
    mask = torch.tensor([[True, True, True], [True, False, True]])

    def sums(x: Tensor) -> tuple[Tensor, ...]:
        found = class_sums(x, target, mode=mode, gamma=gamma, class_mask=mask)
        return found.intersection, found.prediction, found.focal, found.focal_outside

    assert torch.autograd.gradcheck(sums, (logits.requires_grad_(),))


@pytest.mark.parametrize("index_target", [False, True])
def test_mixed_mode_is_softmax_dice_beside_sigmoid_focal(index_target: bool) -> None:
    logits, target = case()
    mixed = class_sums(logits, target, mode=SOFTMAX_DICE_SIGMOID_FOCAL, gamma=1.5)
    softmax = class_sums(logits, target, mode=SOFTMAX, gamma=1.5)
    other = target if index_target else one_hot(target, 5)
    sigmoid = class_sums(logits, other, mode=SIGMOID, gamma=1.5)
    for actual, expected in zip(mixed, (*softmax[:3], *sigmoid[3:])):
        torch.testing.assert_close(actual, expected)


# The C++ kernel against the reference, op by op. -----------------------------------------------------------------


def table_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.linspace(-1, 2, shape[0] * 6 * shape[1], dtype=dtype).view(shape[0], 6, shape[1]).flip(2).contiguous()


@pytest.mark.skipif(csrc_missing() is not None, reason=f"csrc: {csrc_missing()}")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", ["channels first", "channels last"])
@pytest.mark.parametrize(("mode", "target_kind"), [*((mode, "index") for mode in MODES), (SIGMOID, "multi-hot")])
def test_csrc_is_the_reference(mode: int, layout: str, masked: bool, target_kind: str) -> None:
    native = torch.ops.focuskernels_C
    sizes = [(2, 3, 1), (1, 2, 33), (3, 5, 300), (1, 19, 4097), (0, 3, 5), (2, 3, 0), (1, 70, 100)]
    for shape, dtype, gamma in itertools.product(sizes, TOLERANCE, (2.0, 0.0, 0.5)):
        logits = (4 * torch.randn(shape, dtype=torch.float64)).to(dtype)
        if layout == "channels last":
            logits = logits.transpose(1, 2).contiguous().transpose(1, 2)
        high, width = (3, shape) if target_kind == "multi-hot" else (shape[1] + 1, (shape[0], shape[2]))
        target = torch.randint(0, high, width, dtype=torch.uint8)
        target[..., : shape[2] // 2] = torch.randint(0, 2, ())  # runs of one class beside mixed blocks
        mask = torch.rand(shape[:2]) < 0.7 if masked else None
        if mask is not None:
            mask[:, 0] = True
        options = (mode, gamma, 1, mask)
        grad = table_gradient(shape, torch.promote_types(dtype, torch.float32))
        table, wrong = native.focal_dice_forward(logits, target, *options)
        expected_table, expected_wrong = reference.forward(logits, target, *options)
        tolerance = {"rtol": 1e-11, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 3e-6, "atol": 1e-5}
        torch.testing.assert_close(table, expected_table, **tolerance)
        assert torch.equal(wrong, expected_wrong)
        actual = native.focal_dice_backward(logits, target, grad, *options)
        expected = reference.backward(logits.double(), target, grad.double(), *options)
        assert actual.stride() == logits.stride()
        # Where a voxel is certain, its gradient is a small difference of numbers of order one.
        slack = 0 if dtype == torch.float64 else 1e-7 * actual.numel() ** 0.5
        assert float((actual - expected).norm()) <= TOLERANCE[dtype] * float(expected.norm()) + slack
        over = logits.clone(memory_format=torch.preserve_format)
        native.focal_dice_backward_(over, target, grad, *options)
        assert torch.equal(over, actual)


@pytest.mark.skipif(csrc_missing() is not None, reason=f"csrc: {csrc_missing()}")
def test_csrc_is_closer_to_float64_than_eager_float32() -> None:
    logits, target = case(SOFTMAX, (1, 19, 8, 16, 17))
    truth, ours, eager = (x.requires_grad_() for x in (logits, logits.detach().float(), logits.detach().float()))
    (exact,) = torch.autograd.grad(formula(truth, target), truth)
    (actual,) = torch.autograd.grad(focal_dice_loss(ours, target), ours)
    log_p = eager.log_softmax(1)
    p, y = log_p.exp(), one_hot(target, 19).float()
    focal = -((1 - p) ** 2 * log_p * y).sum() / target.numel()
    dice = 1 - (2 * (p * y).sum((2, 3, 4)) + 1e-5) / (p.sum((2, 3, 4)) + y.sum((2, 3, 4)) + 1e-5)
    (plain,) = torch.autograd.grad(focal + dice.sum(), eager)
    assert (actual - exact).norm() <= (plain - exact).norm()
    assert (actual - exact).norm() <= 3e-7 * exact.norm()


# Edges. ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_extreme_logits(activation: str, dtype: torch.dtype, gamma: float) -> None:
    logits, target = case(SOFTMAX if activation == "softmax" else SIGMOID, (1, 4, 3, 3, 20), dtype)
    logits = torch.where(logits > 0, 1e4, -1e4).to(dtype).requires_grad_()
    loss = focal_dice_loss(logits, target, activation=activation, gamma=gamma)
    torch.testing.assert_close(
        loss.double(), formula(logits.detach(), target, activation=activation, gamma=gamma), rtol=1e-5, atol=0
    )
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.isfinite().all()
    assert grad.abs().max() > 0 or gamma > 0


@pytest.mark.parametrize("gamma", [0.0, 0.3, 2.0])
def test_certain_and_right_has_no_gradient(gamma: float) -> None:
    target = torch.randint(0, 3, (1, 4, 4, 4))
    logits = (2e4 * one_hot(target, 3) - 1e4).requires_grad_()
    loss = focal_dice_loss(logits, target, gamma=gamma)
    assert float(loss) == pytest.approx(0, abs=1e-6)
    assert float(torch.autograd.grad(loss, logits)[0].abs().max()) == 0


def test_infinitely_unlikely_classes_take_no_part() -> None:
    logits, target = case(SOFTMAX, (1, 5, 3, 4, 7), torch.float32)
    target = target % 3
    few = logits[:, :3].clone().requires_grad_()
    logits[:, 3:] = -torch.inf
    sums, expected = focal_dice_sums(logits.requires_grad_(), target), focal_dice_sums(few, target)
    torch.testing.assert_close(sums.prediction[:, :3], expected.prediction)
    assert sums.prediction[:, 3:].abs().max() == 0
    torch.testing.assert_close(gradients(sums.focal, [logits])[0][:, :3], gradients(expected.focal, [few])[0])


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_nan_shows_unless_its_voxel_is_ignored(activation: str) -> None:
    logits, target = case(SOFTMAX if activation == "softmax" else SIGMOID, dtype=torch.float32)
    logits[0, 1, 1, 2, 3] = torch.nan
    target = target.to(torch.uint8)
    assert focal_dice_loss(logits, target, activation=activation).isnan()
    target[0, ..., 1, 2, 3] = 9
    logits.requires_grad_()
    loss = focal_dice_loss(logits, target, activation=activation, ignore_index=9)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite() and grad.isfinite().all()


def test_absent_classes() -> None:
    logits = torch.randn(2, 6, 3, 4, 5, requires_grad=True)
    target = torch.zeros(2, 3, 4, 5, dtype=torch.int64)
    for smooth in (0.0, 1e-5):
        (grad,) = torch.autograd.grad(focal_dice_loss(logits, target, smooth=smooth), logits)
        assert grad.isfinite().all()
    certain = torch.zeros(1, 3, 2, 2, 2)
    certain[:, 0] = 1e4
    assert float(focal_dice_loss(certain, target[:1, :2, :2, :2], smooth=0.0)) == 0


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_all_voxels_ignored(activation: str) -> None:
    logits, target = case(SOFTMAX if activation == "softmax" else SIGMOID, dtype=torch.float32)
    target = torch.full_like(target, 7, dtype=torch.uint8)
    logits.requires_grad_()
    loss = focal_dice_loss(logits, target, activation=activation, ignore_index=7)
    assert float(loss.detach()) == 0
    assert float(torch.autograd.grad(loss, logits)[0].abs().max()) == 0


@pytest.mark.parametrize("shape", [(0, 3, 2, 2, 2), (2, 3, 0, 2, 2)])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_nothing_to_count(activation: str, shape: tuple[int, ...]) -> None:
    logits = torch.zeros(shape, requires_grad=True)
    target = torch.zeros(shape if activation == "sigmoid" else (shape[0], *shape[2:]), dtype=torch.uint8)
    loss = focal_dice_loss(logits, target, activation=activation)
    assert float(loss.detach()) == 0
    assert torch.autograd.grad(loss, logits)[0].shape == shape


def test_masked_classes_have_no_say() -> None:
    logits, target = case(dtype=torch.float32)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3] = False
    other = logits.clone()
    other[0, 3] = 1e6
    losses = [focal_dice_loss(x.requires_grad_(), target, class_mask=mask) for x in (logits, other)]
    assert torch.equal(*losses)
    for loss, x in zip(losses, (logits, other)):
        (grad,) = torch.autograd.grad(loss, x)
        assert grad[0, 3].abs().max() == 0
        assert grad[0].abs().amax(dim=0)[target[0] == 3].max() == 0


# What callers do. ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_layouts(activation: str) -> None:
    logits, target = case(SOFTMAX if activation == "softmax" else SIGMOID, (2, 3, 4, 5, 6))
    assert_layouts_agree(lambda x: focal_dice_loss(x, target, activation=activation), logits)


def test_layout_of_gradient_and_target() -> None:
    logits, target = case(dtype=torch.float32)
    logits = logits.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    wide = target.new_zeros(*target.shape[:-1], 2 * target.shape[-1])
    wide[..., ::2] = target
    (grad,) = torch.autograd.grad(focal_dice_loss(logits, wide[..., ::2]), logits)
    assert grad.is_contiguous(memory_format=torch.channels_last_3d)
    (expected,) = torch.autograd.grad(focal_dice_loss(logits, target), logits)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_compile_and_fake_tensors(activation: str) -> None:
    logits, target = case(SOFTMAX if activation == "softmax" else SIGMOID, dtype=torch.float32)
    mask = torch.tensor([[True, True, False, True, True]] * 2)
    function = lambda x, t, m: focal_dice_loss(x, t, activation=activation, class_mask=m, ignore_index=4)  # noqa: E731
    assert_traceable(function, logits.requires_grad_(), target, mask)


@pytest.mark.parametrize("mode", MODES)
def test_opcheck(mode: int) -> None:
    logits, target = case(mode, (2, 3, 40), torch.float32)
    target = target.to(torch.uint8)
    grad = table_gradient(logits.shape, torch.float32)
    mask = torch.tensor([[True, True, True], [True, False, True]])
    for x in (logits, logits.transpose(1, 2).contiguous().transpose(1, 2)):
        torch.library.opcheck(torch.ops.focuskernels.focal_dice_fwd, (x, target, mode, 2.0, None, mask))
        torch.library.opcheck(torch.ops.focuskernels.focal_dice_bwd, (x, target, grad, mode, 2.0, 1, None))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_in_place(dtype: torch.dtype, layout: torch.memory_format) -> None:
    features, target = case(dtype=dtype)
    features = features.contiguous(memory_format=layout).requires_grad_()
    (expected,) = torch.autograd.grad(focal_dice_loss(features * 2, target), features)
    logits = features * 2
    loss = focal_dice_loss(logits, target, inplace_grad=True)
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert grad.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(2 * grad, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)
    torch.testing.assert_close(
        torch.autograd.grad(focal_dice_loss(features * 2, target, inplace_grad=True), features)[0], expected
    )


@pytest.mark.parametrize(
    ("dtype", "voxels"),
    [(torch.float32, 240_000), (torch.float32, 240_008), (torch.float32, 240_001), (torch.bfloat16, 470_016)],
)
def test_gradients_that_bypass_the_cache(dtype: torch.dtype, voxels: int) -> None:
    """Over 16 MiB, with planes that begin at cache lines or do not; the gradient in place is never written so."""
    logits = torch.randn(1, 19, voxels, dtype=dtype, requires_grad=True)
    target = torch.randint(0, 19, (1, voxels), dtype=torch.uint8)
    (expected,) = torch.autograd.grad(focal_dice_loss(logits, target), logits)
    copy = logits.detach().clone().requires_grad_()
    focal_dice_loss(copy * 1, target, inplace_grad=True).backward()
    assert torch.equal(copy.grad, expected)


def test_gradient_in_place_is_noticed_by_others() -> None:
    features, target = case(dtype=torch.float32)
    logits = features.requires_grad_() * 2
    loss = logits.square().sum() + focal_dice_loss(logits, target, inplace_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_deterministic_whatever_the_threads() -> None:
    logits, target = case(SOFTMAX, (2, 7, 20, 24, 25), torch.float32)
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            x = logits.clone().requires_grad_()
            loss = focal_dice_loss(x, target)
            results.append((loss.detach(), *torch.autograd.grad(loss, x)))
    finally:
        torch.set_num_threads(1)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


def test_no_second_derivative() -> None:
    logits, target = case(dtype=torch.float32)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(focal_dice_loss(logits.requires_grad_(), target), logits, create_graph=True)


def test_under_autocast() -> None:
    logits, target = case(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = focal_dice_loss(logits, target)
    assert torch.equal(actual, focal_dice_loss(logits, target))


def test_module_is_the_function() -> None:
    logits, target = case()
    module = FocalDiceLoss(gamma=1.0, alpha=[1, 2, 3, 4, 5], batch_dice=True)
    torch.testing.assert_close(
        module(logits, target), focal_dice_loss(logits, target, gamma=1.0, alpha=[1, 2, 3, 4, 5], batch_dice=True)
    )
    assert not module.state_dict()


# Bad input. ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, "at least two classes", lambda x, t: (x[:, :1], t, {})),
        (ValueError, r"\(2, 3, 4, 7\)", lambda x, t: (x, t[:1], {})),
        (ValueError, r"\(N, C, \*spatial\)", lambda x, t: (x[:, :, 0, 0, 0], t, {})),
        (ValueError, "from 0 to 5, expected 0 to 4", lambda x, t: (x, _set(t, 5), {})),
        (ValueError, "from -1 to 4", lambda x, t: (x, _set(t, -1), {})),
        (ValueError, "from -1 to", lambda x, t: (x, _set(t, -1), {"ignore_index": 3})),
        (TypeError, "alpha must hold one number per class, got 'abc'", lambda x, t: (x, t, {"alpha": "abc"})),
        (
            ValueError,
            r"alpha must be \(C,\), one number per class, got shape \(\)",
            lambda x, t: (x, t, {"alpha": 0.25}),
        ),
        (ValueError, "alpha must have 5", lambda x, t: (x, t, {"alpha": [1.0]})),
        (ValueError, "alpha must be finite", lambda x, t: (x, t, {"alpha": [1.0, -1, 1, 1, 1]})),
        (ValueError, "gamma", lambda x, t: (x, t, {"gamma": -1.0})),
        (ValueError, "gamma", lambda x, t: (x, t, {"gamma": float("nan")})),
        (TypeError, "gamma must be a number, got '2'", lambda x, t: (x, t, {"gamma": "2"})),
        (TypeError, "focal_weight must be a number, got '1'", lambda x, t: (x, t, {"focal_weight": "1"})),
        *(
            (TypeError, f"{name} must be a number, got tensor", lambda x, t, o={name: value}: (x, t, o))
            for name in ("gamma", "smooth", "focal_weight", "dice_weight")
            for value in (torch.ones(3), torch.ones(1), torch.tensor(1.0, requires_grad=True), torch.tensor(1j))
        ),
        (ValueError, "focal_weight must be finite, got nan", lambda x, t: (x, t, {"focal_weight": float("nan")})),
        (ValueError, "dice_weight must be finite, got -inf", lambda x, t: (x, t, {"dice_weight": float("-inf")})),
        (ValueError, "gamma must be finite and at least 0", lambda x, t: (x, t, {"gamma": torch.tensor(-1.0)})),
        (TypeError, "ignore_index must be an integer, got 1.5", lambda x, t: (x, t, {"ignore_index": 1.5})),
        (ValueError, "smooth", lambda x, t: (x, t, {"smooth": -1.0})),
        (ValueError, "tanh", lambda x, t: (x, t, {"activation": "tanh"})),
        (ValueError, "none", lambda x, t: (x, t, {"class_reduction": "none"})),
        (ValueError, "shape of logits", lambda x, t: (x, t, {"activation": "sigmoid"})),
        (ValueError, "without any class", lambda x, t: (x, t, {"class_mask": torch.zeros(2, 5, dtype=torch.bool)})),
        (ValueError, r"\(2, 5\)", lambda x, t: (x, t, {"class_mask": torch.ones(5, dtype=torch.bool)})),
        (TypeError, "bool tensor", lambda x, t: (x, t, {"class_mask": torch.ones(2, 5)})),
        (TypeError, "floating point", lambda x, t: (x.long(), t, {})),
        (TypeError, "integer class indices", lambda x, t: (x, t.float(), {})),
        (TypeError, "integer class indices", lambda x, t: (x, t > 1, {})),
        (TypeError, "must be a tensor", lambda x, t: (x, t.tolist(), {})),
        (TypeError, "bool or uint8", lambda x, t: (x, x.long(), {"activation": "sigmoid"})),
        (ValueError, "0 or 1", lambda x, t: (x, torch.full(x.shape, 2, dtype=torch.uint8), {"activation": "sigmoid"})),
    ],
)
def test_bad_input(error: type[Exception], match: str, change: Callable[..., Any]) -> None:
    logits, target, options = change(*case(dtype=torch.float32))
    with pytest.raises(error, match=match):
        focal_dice_loss(logits, target, **options)


def test_numbers_may_be_tensors_without_dimensions() -> None:
    logits, target = case(dtype=torch.float32)
    options = {"gamma": 1.5, "smooth": 0.1, "focal_weight": 0.5, "dice_weight": 2.0}
    tensors = {name: torch.tensor(value) for name, value in options.items()}
    torch.testing.assert_close(focal_dice_loss(logits, target, **tensors), focal_dice_loss(logits, target, **options))


def test_compiled_code_takes_weights_as_tensors() -> None:
    logits, target = case(dtype=torch.float32)
    compiled = torch.compile(
        lambda weight: focal_dice_loss(logits, target, focal_weight=weight), fullgraph=True, backend="eager"
    )
    for value in (0.5, 2.0):
        expected = focal_dice_loss(logits, target, focal_weight=value)
        torch.testing.assert_close(compiled(torch.tensor(value)), expected)


@pytest.mark.parametrize(
    ("error", "match", "mode", "change"),
    [
        (ValueError, r"target must be \(2, 3, 4, 7\) for logits", SOFTMAX, lambda x, t: (x, t[:1])),
        (ValueError, r"target must be \(2, 3, 4, 7\) for logits", SIGMOID, lambda x, t: (x, t[..., :2])),
        (ValueError, "target must have the shape of logits", SIGMOID, lambda x, t: (x, (x > 0)[:1])),
        (ValueError, "target must be", SOFTMAX_DICE_SIGMOID_FOCAL, lambda x, t: (x, x > 0)),
        (TypeError, "logits must be floating point, got torch.int64", SOFTMAX, lambda x, t: (x.long(), t)),
        (TypeError, "logits lie on cpu, target on meta", SIGMOID, lambda x, t: (x, t.to("meta"))),
    ],
)
def test_the_primitive_refuses_what_kernels_would_read_beyond(
    error: type[Exception], match: str, mode: int, change: Callable[..., Any]
) -> None:
    with pytest.raises(error, match=match):
        class_sums(*change(*case()), mode=mode, gamma=2.0)


def _set(target: Tensor, value: int) -> Tensor:
    target = target.clone()
    target[0, 0, 0, :5] = torch.arange(5)
    target[1, 0, 0, 0] = value
    return target


# Known implementations. ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_cross_entropy(gamma: float) -> None:
    logits, target = case(dtype=torch.float32)
    actual = focal_dice_loss(logits, target, gamma=0.0, dice_weight=0.0, ignore_index=3)
    torch.testing.assert_close(actual, torch.nn.functional.cross_entropy(logits, target, ignore_index=3))


@pytest.mark.parametrize("gamma", [0.5, 2.0])
@pytest.mark.parametrize("batch", [False, True])
def test_monai_dice_plus_softmax_focal(gamma: float, batch: bool) -> None:
    monai = pytest.importorskip("monai.losses")
    logits, target = case(SOFTMAX, (2, 5, 6, 7, 8), torch.float32)
    alpha = [0.5, 1.0, 2.0, 3.0, 4.0]
    one = target.unsqueeze(1)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    dice = monai.DiceLoss(softmax=True, to_onehot_y=True, reduction="sum", smooth_nr=1e-5, smooth_dr=1e-5, batch=batch)
    focal = monai.FocalLoss(use_softmax=True, to_onehot_y=True, gamma=gamma, alpha=alpha)
    # MONAI's sum runs over samples as well, its focal mean over classes too.
    expected = dice(theirs, one) / (1 if batch else 2) + 5 * focal(theirs, one)
    actual = focal_dice_loss(ours, target, gamma=gamma, alpha=alpha, batch_dice=batch)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(f, x)[0] for f, x in ((actual, ours), (expected, theirs))))
