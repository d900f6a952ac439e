"""Focal plus dice loss of a segmentation (FocusNet, equations 1 to 3) without a one-hot target."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from ._arguments import values_are_readable
from .reference import focal_dice as reference

Mode: TypeAlias = Literal["softmax", "sigmoid"]


class FocalDiceSums(NamedTuple):
    """Sums over the voxels of each sample; float32, or float64 for float64 logits. All but `target` and `voxels` are differentiable."""

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
        focal_weight, dice_weight: weights of the two parts.
        ignore_index: voxels (for "sigmoid": voxels of a channel) with this target value count nowhere.
        class_mask: (N, C) bool. A False class was not annotated in that sample: it leaves the softmax (probability 0,
            zero gradient), its dice term and the voxels labelled with it are dropped. For "sigmoid" its channel is.
        include_background: whether class 0 has a dice term. It always takes part in the softmax and the focal part.
        batch_dice: sum intersection and sizes over the batch before the ratio.
        smooth: >= 0. With 0, the term of a class that is neither predicted nor there is 0.
        class_reduction: "sum" over classes, as in the paper, or "mean" over the classes kept.

    Returns:
        A scalar; float32, or float64 for float64 logits. Without a counted voxel it is 0.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: shapes or parameters that do not fit, one class only for "softmax"; and, on the CPU outside
            `torch.compile`, a target value or an `alpha` out of range, or a sample without any class. Where values are
            not looked at, a voxel whose target is out of range is ignored.
    """
    check_options(activation, gamma, smooth, class_reduction)
    sums = focal_dice_sums(
        logits,
        target,
        activation=activation,
        gamma=gamma,
        alpha=alpha,
        ignore_index=ignore_index,
        class_mask=class_mask,
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
) -> FocalDiceSums:
    """The sums that `focal_dice_loss`, and any other dice-like loss, is made of; same arguments and errors.

    They add up over samples, patches and processes, so that a ratio can be taken after reducing them.
    """
    check_options(activation, gamma)
    _check(logits, target, activation, class_mask)
    if alpha is not None:
        alpha = _alpha_tensor(alpha, logits)
    if class_mask is not None:
        class_mask = _needed(class_mask)
    if activation == "sigmoid":
        _check_multi_hot(target, ignore_index)
        return FocalDiceSums(*reference.sigmoid_sums(logits, target, gamma, alpha, ignore_index, class_mask))
    in_range = _check_labels(target, logits.shape[1], ignore_index)
    return FocalDiceSums(*reference.softmax_sums(logits, target, gamma, alpha, ignore_index, class_mask, in_range))


def check_options(activation: str, gamma: float, smooth: float = 0.0, class_reduction: str = "sum") -> None:
    """Refuse unknown names and numbers out of range."""
    if activation not in get_args(Mode):
        raise ValueError(f"activation must be one of {get_args(Mode)}, got {activation!r}")
    if class_reduction not in ("sum", "mean"):
        raise ValueError(f"class_reduction must be 'sum' or 'mean', got {class_reduction!r}")
    for name, value in {"gamma": gamma, "smooth": smooth}.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be finite and at least 0, got {value}")


def _check(logits: Tensor, target: Tensor, activation: str, class_mask: Tensor | None) -> None:
    for name, tensor in {"logits": logits, "target": target}.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if logits.dim() < 3:
        raise ValueError(f"logits must be (N, C, *spatial), got {tuple(logits.shape)}")
    if activation == "softmax":
        _check_softmax(logits, target)
    else:
        if target.shape != logits.shape:
            raise ValueError(f"target must have the shape of logits, {tuple(logits.shape)}, got {tuple(target.shape)}")
        if target.dtype not in (torch.bool, torch.uint8):
            raise TypeError(f"target must be bool or uint8 for 'sigmoid', got {target.dtype}")
    if target.device != logits.device:
        raise TypeError(f"logits lie on {logits.device}, target on {target.device}")
    if class_mask is not None:
        _check_class_mask(class_mask, logits)


def _check_softmax(logits: Tensor, target: Tensor) -> None:
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


def _alpha_tensor(alpha: Tensor | Sequence[float], logits: Tensor) -> Tensor:
    values = torch.as_tensor(alpha, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    if values.shape != logits.shape[1:2]:
        raise ValueError(f"alpha must have {logits.shape[1]} values, one per class, got shape {tuple(values.shape)}")
    if values_are_readable(values) and not bool(((values >= 0) & torch.isfinite(values)).all()):
        raise ValueError(f"alpha must be finite and at least 0, got {values.tolist()}")
    return values


def _check_labels(target: Tensor, classes: int, ignore_index: int | None) -> bool:
    """Whether all class indices are known to be in range; refuses those that are not."""
    if not values_are_readable(target):
        return False
    counted = target if ignore_index is None else target[target != ignore_index]
    if counted.numel() == 0:
        return True
    low, high = (int(value) for value in counted.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(f"target holds class indices from {low} to {high}, expected 0 to {classes - 1}")
    return True


def _check_multi_hot(target: Tensor, ignore_index: int | None) -> None:
    if target.dtype == torch.bool or not values_are_readable(target):
        return
    counted = target if ignore_index is None else target[target != ignore_index]
    if counted.numel() and int(counted.max()) > 1:
        raise ValueError(f"target must be 0 or 1 for 'sigmoid', got {int(counted.max())}")
