"""Focal plus dice loss of a segmentation (FocusNet, equations 1 to 3) without a one-hot target."""

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from ._arguments import integer, require_number, values_are_readable
from ._lib import (
    csrc_kernel,
    define,
    forbid_double_backward,
    too_many_samples,
    triton_kernel,
    unsupported,
    unsupported_by_triton,
)
from .reference import focal_dice as reference
from .reference.focal_dice import SIGMOID, SOFTMAX

Mode: TypeAlias = Literal["softmax", "sigmoid"]


class FocalDiceSums(NamedTuple):
    """Sums over the voxels of each sample; float32, or float64 for float64 logits.

    All but `target` and `voxels` are differentiable.
    """

    intersection: Tensor  #: (N, C) probability of each class on its own voxels
    prediction: Tensor  #: (N, C) probability of each class
    target: Tensor  #: (N, C) number of voxels of each class
    focal: Tensor  #: (N,) focal terms
    voxels: Tensor  #: (N,) number of focal terms: voxels that count, times channels for "sigmoid"


def focal_dice_loss(
    logits: Tensor,
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
    inplace_grad: bool = False,
) -> Tensor:
    """Focal loss plus dice loss of voxel-wise class scores.

    `focal_weight` times the mean over all counted voxels of `-alpha_t (1 - p_t)^gamma log p_t` (Lin et al. 2017;
    FocusNet, eq. 1), plus `dice_weight` times the sum over classes of `1 - (2 I + smooth) / (Y + P + smooth)`
    (FocusNet, eq. 2, there without `smooth`), averaged over samples.

    Args:
        logits: (N, C, *spatial), floating point; half precision is computed in float32.
        target: "softmax": class indices (N, *spatial) of any integer dtype. "sigmoid": (N, C, *spatial), bool or
            uint8, of 0 and 1: independent channels that may overlap.
        activation: "softmax" (C >= 2) or "sigmoid".
        gamma: focusing exponent >= 0; 0 gives cross-entropy.
        alpha: (C,) focal weights >= 0 of the true class, about 1 / organ size. For "sigmoid" it weighs the voxels
            inside a channel's organ; those outside weigh 1.
        focal_weight, dice_weight: finite weights of the two parts; they get no gradient.
        ignore_index: voxels (for "sigmoid": voxels of a channel) with this target value count nowhere.
        class_mask: (N, C) bool. A False class was not annotated in that sample: it leaves the softmax (probability 0,
            zero gradient), its dice term and the voxels labelled with it are dropped. For "sigmoid" its channel is.
        include_background: whether class 0 has a dice term. It always takes part in the softmax and the focal part.
        batch_dice: sum intersection and sizes over the batch before the ratio.
        smooth: >= 0. With 0, the term of a class that is neither predicted nor there is 0.
        class_reduction: "sum" over classes, as in the paper, or "mean" over the classes kept.
        inplace_grad: backward writes the gradient over the logits, which saves its memory. Only where nothing else
            needs the logits afterwards; PyTorch raises if another backward does. Under `torch.compile` it does nothing.

    Returns:
        A scalar; float32, or float64 for float64 logits. Without a counted voxel it is 0.

    Raises:
        TypeError: wrong types, dtypes or devices.
        ValueError: shapes or parameters that do not fit, one class only for "softmax"; and, on the CPU outside
            `torch.compile`, a target value or an `alpha` out of range, or a sample without any class. Where values are
            not looked at, a voxel whose target is out of range is ignored. On a GPU, looking at targets means waiting
            for it, and is done only with FOCUSKERNELS_CHECK_LABELS=1 in the environment.
    """
    check_options(activation, gamma, ignore_index, smooth, class_reduction, focal_weight, dice_weight)
    sums = focal_dice_sums(
        logits,
        target,
        activation=activation,
        gamma=gamma,
        alpha=alpha,
        ignore_index=ignore_index,
        class_mask=class_mask,
        inplace_grad=inplace_grad,
    )
    return reference.loss(
        sums, class_mask, focal_weight, dice_weight, include_background, batch_dice, smooth, class_reduction
    )


def focal_dice_sums(
    logits: Tensor,
    target: Tensor,
    *,
    activation: Mode = "softmax",
    gamma: float = 2.0,
    alpha: Tensor | Sequence[float] | None = None,
    ignore_index: int | None = None,
    class_mask: Tensor | None = None,
    inplace_grad: bool = False,
) -> FocalDiceSums:
    """The sums that `focal_dice_loss`, and any other dice-like loss, is made of.

    They add up over samples, patches and processes, so that a ratio can be taken after reducing them.

    Args:
        logits, target, activation, gamma, alpha, ignore_index, class_mask, inplace_grad: as there; `alpha` weighs the
            row `focal`.

    Returns:
        FocalDiceSums(intersection, prediction, target, focal, voxels).

    Raises:
        TypeError, ValueError: as there.
    """
    return loss_sums(
        logits,
        target,
        lambda **options: _checked_class_sums(logits, target, inplace_grad=inplace_grad, **options),
        activation=activation,
        gamma=gamma,
        alpha=alpha,
        ignore_index=ignore_index,
        class_mask=class_mask,
    )


def loss_sums(
    logits: Tensor,
    target: Tensor,
    sums_of: Callable[..., "ClassSums"],
    *,
    activation: Mode,
    gamma: float,
    alpha: Tensor | Sequence[float] | None,
    ignore_index: int | None,
    class_mask: Tensor | None,
) -> FocalDiceSums:
    """Check the arguments, take the sums from `sums_of(mode, gamma, ignore_index, class_mask)` and weigh them by alpha.

    Of `logits` only shape, dtype and device are looked at.
    """
    check_options(activation, gamma, ignore_index)
    _check(logits, target, class_mask, multi_hot=activation == "sigmoid")
    if alpha is not None:
        alpha = _alpha_of(logits, alpha)
    mode = SOFTMAX if activation == "softmax" else SIGMOID
    sums = sums_of(mode=mode, gamma=gamma, ignore_index=ignore_index, class_mask=class_mask)
    focal = sums.focal if alpha is None else alpha * sums.focal
    return FocalDiceSums(
        sums.intersection,
        sums.prediction,
        sums.target,
        focal.sum(dim=1) + sums.focal_outside.sum(dim=1),
        sums.voxels.sum(dim=1),
    )


class ClassSums(NamedTuple):
    """What one pass over the logits sums up per sample and class, (N, C) each; the primitive under every loss here."""

    intersection: Tensor  #: probability of each class on its own voxels
    prediction: Tensor  #: probability of each class
    target: Tensor  #: number of voxels of each class
    focal: Tensor  #: focal terms of each class's own voxels, not weighed by alpha
    focal_outside: Tensor  #: of the other voxels; 0 for SOFTMAX
    voxels: Tensor  #: number of focal terms


def class_sums(
    logits: Tensor,
    target: Tensor,
    *,
    mode: int,
    gamma: float,
    ignore_index: int | None = None,
    class_mask: Tensor | None = None,
    inplace_grad: bool = False,
) -> ClassSums:
    """The sums, differentiable in the logits.

    Args:
        logits: (N, C, *spatial).
        target: (N, *spatial) integers; (N, C, *spatial) bool or uint8 of 0 and 1 for SIGMOID only.
        mode: SOFTMAX, SIGMOID, or SOFTMAX_DICE_SIGMOID_FOCAL, in which intersection and prediction are those of a
            softmax and the focal terms those of independent channels.
        gamma, ignore_index, class_mask, inplace_grad: as in `focal_dice_loss`.

    Raises:
        TypeError, ValueError: tensors as `focal_dice_loss`, on behalf of the kernels: they would read beyond them.
    """
    _check(logits, target, class_mask, multi_hot=mode == SIGMOID and target.dim() == logits.dim())
    return _checked_class_sums(logits, target, mode, gamma, ignore_index, class_mask, inplace_grad)


def _checked_class_sums(
    logits: Tensor,
    target: Tensor,
    mode: int,
    gamma: float,
    ignore_index: int | None,
    class_mask: Tensor | None,
    inplace_grad: bool,
) -> ClassSums:
    if class_mask is not None:
        class_mask = _needed(class_mask)
    x, labels = flat(logits), flat_target(target, logits)
    inplace_grad = inplace_grad and not torch.compiler.is_compiling()
    table, wrong = _ClassSums.apply(x, labels, mode, gamma, ignore_index, class_mask, inplace_grad)
    check_labels(wrong, target, logits, ignore_index)
    return ClassSums(*table.unbind(dim=1))


def check_options(
    activation: str,
    gamma: float,
    ignore_index: int | None = None,
    smooth: float = 0.0,
    class_reduction: str = "sum",
    focal_weight: float = 1.0,
    dice_weight: float = 1.0,
) -> None:
    """Refuse unknown names, what is no number, and numbers out of range."""
    if activation not in get_args(Mode):
        raise ValueError(f"activation must be one of {get_args(Mode)}, got {activation!r}")
    if class_reduction not in ("sum", "mean"):
        raise ValueError(f"class_reduction must be 'sum' or 'mean', got {class_reduction!r}")
    if ignore_index is not None:
        integer(ignore_index, "ignore_index")
    require_number(gamma, "gamma", least=0)
    require_number(smooth, "smooth", least=0)
    require_number(focal_weight, "focal_weight")
    require_number(dice_weight, "dice_weight")


def _check(logits: Tensor, target: Tensor, class_mask: Tensor | None, multi_hot: bool) -> None:
    for name, tensor in {"logits": logits, "target": target}.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if logits.dim() < 3:
        raise ValueError(f"logits must be (N, C, *spatial), got {tuple(logits.shape)}")
    if multi_hot:
        _check_multi_hot(logits, target)
    else:
        _check_indices(logits, target)
    if target.device != logits.device:
        raise TypeError(f"logits lie on {logits.device}, target on {target.device}")
    if class_mask is not None:
        _check_class_mask(class_mask, logits)


def _check_multi_hot(logits: Tensor, target: Tensor) -> None:
    if target.shape != logits.shape:
        raise ValueError(f"target must have the shape of logits, {tuple(logits.shape)}, got {tuple(target.shape)}")
    if target.dtype not in (torch.bool, torch.uint8):
        raise TypeError(f"target must be bool or uint8 for 'sigmoid', got {target.dtype}")


def _check_indices(logits: Tensor, target: Tensor) -> None:
    if logits.shape[1] < 2:
        raise ValueError(
            f"softmax needs at least two classes, got logits {tuple(logits.shape)}; one organ is 'sigmoid'"
        )
    if target.shape != logits.shape[:1] + logits.shape[2:]:
        expected = (logits.shape[0], *logits.shape[2:])
        raise ValueError(f"target must be {expected} for logits {tuple(logits.shape)}, got {tuple(target.shape)}")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"target must hold integer class indices for 'softmax', got {target.dtype}")


def _check_class_mask(class_mask: Tensor, logits: Tensor) -> None:
    if not isinstance(class_mask, Tensor) or class_mask.dtype != torch.bool:
        raise TypeError(
            f"class_mask must be a bool tensor, got {getattr(class_mask, 'dtype', type(class_mask).__name__)}"
        )
    if class_mask.shape != logits.shape[:2]:
        raise ValueError(f"class_mask must be {tuple(logits.shape[:2])}, got {tuple(class_mask.shape)}")
    if class_mask.device != logits.device:
        raise TypeError(f"logits lie on {logits.device}, class_mask on {class_mask.device}")
    if values_are_readable(class_mask) and not bool(class_mask.any(dim=1).all()):
        raise ValueError(f"class_mask leaves a sample without any class: {class_mask.tolist()}")


def _needed(class_mask: Tensor) -> Tensor | None:
    """The mask, or None where it is known to mask nothing: that saves a copy of the logits."""
    return None if values_are_readable(class_mask) and bool(class_mask.all()) else class_mask


def _alpha_of(logits: Tensor, alpha: Tensor | Sequence[float]) -> Tensor:
    values = alpha_tensor(alpha, torch.promote_types(logits.dtype, torch.float32), logits.device)
    if values.shape != logits.shape[1:2]:
        raise ValueError(f"alpha must have {logits.shape[1]} values, one per class, got shape {tuple(values.shape)}")
    return values


def alpha_tensor(
    alpha: Tensor | Sequence[float], dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Tensor:
    """The focal weights (C,); refuses what is none."""
    try:
        values = torch.as_tensor(alpha, dtype=dtype, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"alpha must hold one number per class, got {alpha!r}") from error
    if values.dim() != 1:
        raise ValueError(f"alpha must be (C,), one number per class, got shape {tuple(values.shape)}")
    if values_are_readable(values) and not bool(((values >= 0) & torch.isfinite(values)).all()):
        raise ValueError(f"alpha must be finite and at least 0, got {values.tolist()}")
    return values


def check_labels(wrong: Tensor, target: Tensor, logits: Tensor, ignore_index: int | None) -> None:
    """Refuse target values that mean nothing, where looking at their number is free or was asked for."""
    if torch.compiler.is_compiling() or wrong.numel() == 0:
        return
    if not values_are_readable(wrong) and os.environ.get("FOCUSKERNELS_CHECK_LABELS") != "1":
        return
    if bool(wrong.any()):
        raise ValueError(_wrong_labels(target, logits, ignore_index))


def _wrong_labels(target: Tensor, logits: Tensor, ignore_index: int | None) -> str:
    counted = target.to(torch.int64)
    if ignore_index is not None:
        counted = counted[counted != ignore_index]
    low, high = (int(value) for value in counted.aminmax())
    if target.dim() == logits.dim():
        return f"target must be 0 or 1 for 'sigmoid', got values from {low} to {high}"
    return f"target holds class indices from {low} to {high}, expected 0 to {logits.shape[1] - 1}"


def flat(logits: Tensor) -> Tensor:
    """(N, C, V) with the memory layout of dense logits, channels first or last; else channels first."""
    if not logits.is_contiguous() and logits.movedim(1, -1).is_contiguous():
        return logits.movedim(1, -1).flatten(1, -2).transpose(1, 2)
    return logits.contiguous().flatten(2)


def flat_target(target: Tensor, logits: Tensor) -> Tensor:
    """(N, V) or (N, C, V), contiguous, of a dtype that kernels read."""
    if target.dtype == torch.bool:
        target = target.view(torch.uint8)
    elif target.dtype not in _TARGETS:
        target = target.to(torch.int64)
    return target.flatten(1).contiguous() if target.dim() < logits.dim() else target.flatten(2).contiguous()


class _ClassSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        mode: int,
        gamma: float,
        ignore_index: int | None,
        class_mask: Tensor | None,
        inplace_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        table, wrong = forward_op(logits, target, mode, gamma, ignore_index, class_mask)
        ctx.save_for_backward(logits, target, class_mask)
        ctx.options = (mode, gamma, ignore_index)
        ctx.inplace_grad = inplace_grad
        ctx.mark_non_differentiable(wrong)
        return table, wrong

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        forbid_double_backward("focal_dice_loss")
        logits, target, class_mask = ctx.saved_tensors
        arguments = (logits, target, grads[0].contiguous(), *ctx.options, class_mask)
        if ctx.inplace_grad:
            backward_op_(*arguments)
            # So that PyTorch notices when something else needs the logits.
            torch.autograd.graph.increment_version(logits)
            grad = logits.detach()
        else:
            grad = _backward(*arguments)
        return grad, None, None, None, None, None, None


_TARGETS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _not_in_triton(logits: Tensor, *_: Any) -> str | None:
    # A program holds all classes of its voxels in registers.
    if logits.shape[1] > 1024:
        return f"{logits.shape[1]} classes, at most 1024 are supported"
    return unsupported_by_triton(logits) or too_many_samples(logits)


def _fake_forward(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, classes, _voxels = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    table = logits.new_empty((batch, len(reference.ROWS), classes), dtype=dtype)
    return table, logits.new_empty((batch,), dtype=torch.int64)


def _fake_backward(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


_OPTIONS = "int mode, float gamma, int? ignore_index, Tensor? class_mask"

forward_op = define(
    f"focal_dice_fwd(Tensor logits, Tensor target, {_OPTIONS}) -> (Tensor sums, Tensor wrong)",
    op=("focal_dice_loss", "focal_dice_sums"),
    reference=reference.forward,
    fake=_fake_forward,
    cpu=[csrc_kernel("focal_dice_forward", unsupported)],
    cuda=[triton_kernel("focal_dice", "forward", _not_in_triton)],
)
_backward = define(
    f"focal_dice_bwd(Tensor logits, Tensor target, Tensor grad_sums, {_OPTIONS}) -> Tensor",
    op=("focal_dice_loss", "focal_dice_sums"),
    reference=reference.backward,
    fake=_fake_backward,
    cpu=[csrc_kernel("focal_dice_backward", unsupported)],
    cuda=[triton_kernel("focal_dice", "backward", _not_in_triton)],
)
backward_op_ = define(
    f"focal_dice_bwd_(Tensor(a!) logits, Tensor target, Tensor grad_sums, {_OPTIONS}) -> ()",
    op=("focal_dice_loss", "focal_dice_sums"),
    reference=reference.backward_,
    fake=lambda *_: None,
    cpu=[csrc_kernel("focal_dice_backward_", unsupported)],
    cuda=[triton_kernel("focal_dice", "backward_", _not_in_triton)],
)
