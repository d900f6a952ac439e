"""The network's last 1x1x1 convolution together with the loss or the labels: its logits never exist as a whole."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import focal_dice
from ._arguments import cast_for_autocast, require_float
from ._lib import (
    Kernel,
    csrc_missing,
    define,
    forbid_double_backward,
    too_many_samples,
    triton_kernel,
    triton_kernel_or,
)
from .focal_dice import ClassSums, Mode
from .reference import focal_dice as loss_reference
from .reference import linear_focal_dice as reference


class LinearArgmax(NamedTuple):
    """The most probable class of every voxel."""

    labels: Tensor  #: (N, *spatial) uint8
    probability: Tensor | None  #: (N, *spatial) its softmax probability, float32 or float64; None unless asked for


def linear_focal_dice_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    activation: Mode = "softmax",
    gamma: float = 2.0,
    alpha: Tensor | Sequence[float] | None = None,
    focal_weight: float = 1.0,
    dice_weight: float = 1.0,
    ignore_index: int | None = None,
    class_mask: Tensor | None = None,
    include_background: bool = True,
    batch_dice: bool = False,
    smooth: float = 1e-5,
    class_reduction: Literal["sum", "mean"] = "sum",
) -> Tensor:
    """`focal_dice_loss` of the logits `weight @ features + bias`, of which only a chunk exists at a time.

    On CUDA each pass is one Triton kernel, and no logits exist, up to 128 classes of 32 features or 64 of 64; in
    float32 up to 32 of 32.

    Args:
        features: (N, K, *spatial), floating point; the logits are rounded to its dtype, as a convolution's are.
        weight: (C, K), or that of a convolution (C, K, 1, 1, 1).
        bias: (C,) or None.
        target and the others: as in `focal_dice_loss`.

    Returns:
        A scalar, differentiable once in features, weight and bias.

    Raises:
        TypeError, ValueError: as `focal_dice_loss`, and for weights that do not fit.
    """
    focal_dice.check_options(activation, gamma, ignore_index, smooth, class_reduction, focal_weight, dice_weight)
    features, matrix, bias = _linear(features, weight, bias)
    shape = (features.shape[0], matrix.shape[0], *features.shape[2:])
    # Has the logits' shape, dtype and device but no memory of its size.
    like_logits = features.new_empty(1).expand(shape)
    sums = focal_dice.loss_sums(
        like_logits,
        target,
        lambda **options: _sums(features, matrix, bias, target, like_logits, **options),
        activation=activation,
        gamma=gamma,
        alpha=alpha,
        ignore_index=ignore_index,
        class_mask=class_mask,
    )
    return loss_reference.loss(
        sums, class_mask, focal_weight, dice_weight, include_background, batch_dice, smooth, class_reduction
    )


def linear_argmax(
    features: Tensor, weight: Tensor, bias: Tensor | None = None, *, probability: bool = False
) -> LinearArgmax:
    """The class with the largest of the logits `weight @ features + bias`, of which only a chunk exists at a time.

    Args:
        features, weight, bias: as in `linear_focal_dice_loss`; at most 256 classes.
        probability: whether its softmax probability is wanted too.

    Returns:
        LinearArgmax(labels, probability); not differentiable. Of equal logits the first class is taken.

    Raises:
        TypeError, ValueError: inputs that do not fit together, or too many classes.
    """
    features, matrix, bias = _linear(features, weight, bias)
    if not 1 <= matrix.shape[0] <= 256:
        raise ValueError(f"weight must have 1 to 256 classes, got {tuple(weight.shape)}")
    shape = (features.shape[0], *features.shape[2:])
    with torch.no_grad():
        labels, top = _argmax(focal_dice.flat(features), matrix, bias, probability)
    return LinearArgmax(labels.view(shape), top.view(shape) if probability else None)


def _linear(features: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The checked arguments in the dtype of an active autocast, the weight as a matrix."""
    if not isinstance(features, Tensor) or features.dim() < 3:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise (ValueError if isinstance(features, Tensor) else TypeError)(
            f"features must be a tensor (N, K, *spatial), got {shape}"
        )
    require_float(features, "features", features.dim())
    require_float(weight, "weight", weight.dim() if isinstance(weight, Tensor) else 2)
    if weight.dim() < 2 or weight.shape[1] != features.shape[1] or weight.shape[2:].numel() != 1:
        raise ValueError(
            f"weight must be (C, {features.shape[1]}) or (C, {features.shape[1]}, 1, 1, 1), got {tuple(weight.shape)}"
        )
    if bias is not None:
        require_float(bias, "bias", 1)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    cast = cast_for_autocast(features, weight.flatten(1), bias)
    present = [t for t in cast if t is not None]
    if len({t.dtype for t in present}) > 1 or len({t.device for t in present}) > 1:
        raise TypeError(f"features, weight and bias differ: {[(t.dtype, str(t.device)) for t in present]}")
    return cast  # type: ignore[return-value]


def _sums(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    like_logits: Tensor,
    *,
    mode: int,
    gamma: float,
    ignore_index: int | None,
    class_mask: Tensor | None,
) -> ClassSums:
    labels = focal_dice.flat_target(target, like_logits)
    x = focal_dice.flat(features)
    table, wrong = _LinearSums.apply(x, weight, bias, labels, mode, gamma, ignore_index, class_mask)
    focal_dice.check_labels(wrong, target, like_logits, ignore_index)
    return ClassSums(*table.unbind(dim=1))


class _LinearSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        mode: int,
        gamma: float,
        ignore_index: int | None,
        class_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        table, wrong = _forward(features, weight, bias, target, mode, gamma, ignore_index, class_mask)
        ctx.save_for_backward(features, weight, bias, target, class_mask)
        ctx.options = (mode, gamma, ignore_index)
        ctx.mark_non_differentiable(wrong)
        return table, wrong

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        forbid_double_backward("linear_focal_dice_loss")
        features, weight, bias, target, class_mask = ctx.saved_tensors
        needed = ctx.needs_input_grad
        grad, grad_weight, grad_bias = _backward(
            features, weight, bias, target, grads[0].contiguous(), *ctx.options, class_mask, needed[0]
        )
        return (
            grad if needed[0] else None,
            grad_weight.to(weight.dtype) if needed[1] else None,
            grad_bias.to(weight.dtype) if needed[2] else None,
            None,
            None,
            None,
            None,
            None,
        )


def _chunked_forward(*args: Any) -> tuple[Tensor, Tensor]:
    return reference.forward(focal_dice.forward_op, *args)


def _chunked_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return reference.backward(focal_dice.backward_op_, *args)


def _reference_argmax(*args: Any) -> tuple[Tensor, Tensor]:
    return reference.argmax(reference.top_class, *args)


def _chunked_argmax(features: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return reference.argmax(_top_class, features, *args)


def _top_class(logits: Tensor) -> tuple[Tensor, Tensor]:
    # float32 holds every number of half precision
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.ops.focuskernels_C.class_argmax(wide)


#: What fits into the registers of one program: features, and classes times features, both rounded up to powers of 2.
#: More classes would leave it fewer than the 16 voxels that a product of matrices takes.
MOST_FEATURES = 64
MOST_CLASSES = 128
MOST_WEIGHTS = {torch.bfloat16: 4096, torch.float16: 4096, torch.float32: 1024}


def why_not(features: Tensor, weight: Tensor) -> str | None:
    """Why the loss is taken chunk after chunk on CUDA; None if one kernel does all."""
    most = MOST_WEIGHTS.get(features.dtype)
    if most is None:
        return f"no kernel for {features.dtype}"
    classes, channels = weight.shape
    size = max(16, _rounded(classes)) * max(16, _rounded(channels))
    if channels > MOST_FEATURES or classes > MOST_CLASSES or size > most:
        return f"{classes} classes of {channels} features in {features.dtype}"
    return too_many_samples(features)


def _rounded(size: int) -> int:
    return 1 << (size - 1).bit_length() if size else 0


def _one_kernel_or_chunks(name: str, chunks: Callable[..., Any]) -> Kernel:
    label = "Triton, in chunks where docs/focal_dice.md says so"
    return triton_kernel_or("linear_focal_dice", name, chunks, lambda *args: why_not(*args[:2]), label)


def _unsupported_by_triton(features: Tensor, *_: Any) -> str | None:
    if features.dtype == torch.float64:
        return "float64 is served by plain PyTorch"
    return too_many_samples(features)


def _fake_forward(features: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(features.dtype, torch.float32)
    table = features.new_empty((features.shape[0], 6, weight.shape[0]), dtype=dtype)
    return table, features.new_empty((features.shape[0],), dtype=torch.int64)


def _fake_backward(features: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(features.dtype, torch.float32)
    grad = torch.empty_like(features) if rest[-1] else features.new_empty(0)
    return grad, weight.new_empty(weight.shape, dtype=dtype), weight.new_empty(weight.shape[:1], dtype=dtype)


def _fake_argmax(features: Tensor, weight: Tensor, bias: Tensor | None, probability: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(features.dtype, torch.float32)
    shape = (features.shape[0], features.shape[2])
    return features.new_empty(shape, dtype=torch.uint8), features.new_empty(shape if probability else (0,), dtype=dtype)


_LINEAR = "Tensor features, Tensor weight, Tensor? bias"
_OPTIONS = "int mode, float gamma, int? ignore_index, Tensor? class_mask"

_forward = define(
    f"linear_focal_dice_fwd({_LINEAR}, Tensor target, {_OPTIONS}) -> (Tensor sums, Tensor wrong)",
    op="linear_focal_dice_loss",
    reference=_chunked_forward,
    fake=_fake_forward,
    cpu=[Kernel("C++ (csrc), in chunks", _chunked_forward, csrc_missing)],
    cuda=[_one_kernel_or_chunks("forward", _chunked_forward)],
)
_backward = define(
    f"linear_focal_dice_bwd({_LINEAR}, Tensor target, Tensor grad_sums, {_OPTIONS}, bool features_need_grad)"
    " -> (Tensor grad, Tensor grad_weight, Tensor grad_bias)",
    op="linear_focal_dice_loss",
    reference=_chunked_backward,
    fake=_fake_backward,
    cpu=[Kernel("C++ (csrc), in chunks", _chunked_backward, csrc_missing)],
    cuda=[_one_kernel_or_chunks("backward", _chunked_backward)],
)
_argmax = define(
    f"linear_argmax({_LINEAR}, bool probability) -> (Tensor labels, Tensor probability)",
    op="linear_argmax",
    reference=_reference_argmax,
    fake=_fake_argmax,
    cpu=[Kernel("C++ (csrc), in chunks", _chunked_argmax, csrc_missing)],
    cuda=[triton_kernel("linear_focal_dice", "argmax", _unsupported_by_triton)],
)
