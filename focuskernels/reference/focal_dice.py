"""Sums of a segmentation loss over voxels and their gradient, by the formulas of docs/focal_dice.md.

Shapes: logits (N,C,V); target (N,V) class indices, or (N,C,V) of 0 and 1; class_mask (N,C). The table of sums is
(N,6,C), its rows in the order of `ROWS`; an index target in mode SOFTMAX leaves the row `outside` 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SOFTMAX, SIGMOID, SOFTMAX_DICE_SIGMOID_FOCAL = 0, 1, 2
ROWS = ("intersection", "prediction", "target", "focal", "focal_outside", "voxels")

Sums = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def forward(
    logits: Tensor, target: Tensor, mode: int, gamma: float, ignore_index: int | None, class_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The table (N,6,C), float32 or float64, and per sample the number (N,) of target values that mean nothing."""
    classes = logits.shape[1]
    valid, wrong = _counted(target, classes, ignore_index, class_mask)
    if mode == SOFTMAX:
        rows = _softmax_rows(logits, _safe_index(target, valid), valid, gamma, class_mask)
    else:
        positive, counted = _per_channel(target, valid, classes, class_mask)
        rows = _sigmoid_rows(logits, positive, counted, gamma)
        if mode == SOFTMAX_DICE_SIGMOID_FOCAL:
            rows[:3] = _softmax_rows(logits, _safe_index(target, valid), valid, 0.0, class_mask)[:3]
    return torch.stack(rows, dim=1), wrong.flatten(1).sum(dim=1)


def backward(
    logits: Tensor,
    target: Tensor,
    grad_sums: Tensor,
    mode: int,
    gamma: float,
    ignore_index: int | None,
    class_mask: Tensor | None,
) -> Tensor:
    """The gradient of the logits, in their dtype and layout, given that of the table."""
    classes = logits.shape[1]
    valid, _ = _counted(target, classes, ignore_index, class_mask)
    inside, prediction, _, focal, focal_outside, _ = grad_sums.unbind(dim=1)
    if mode == SOFTMAX:
        index = _safe_index(target, valid)
        grad = _softmax_grad(logits, index, valid, gamma, class_mask, inside, prediction, focal)
    else:
        positive, counted = _per_channel(target, valid, classes, class_mask)
        none = torch.zeros_like(inside)
        dice = (inside, prediction) if mode == SIGMOID else (none, none)
        grad = _sigmoid_grad(logits, positive, counted, gamma, *dice, focal, focal_outside)
        if mode == SOFTMAX_DICE_SIGMOID_FOCAL:
            index = _safe_index(target, valid)
            grad = grad + _softmax_grad(logits, index, valid, 0.0, class_mask, inside, prediction, none)
    return torch.empty_like(logits).copy_(grad)


def backward_(logits: Tensor, target: Tensor, grad_sums: Tensor, *options: int | float | Tensor | None) -> None:
    """`backward`, written over the logits."""
    logits.copy_(backward(logits, target, grad_sums, *options))  # type: ignore[arg-type]


def _softmax_rows(
    logits: Tensor, index: Tensor, valid: Tensor, gamma: float, class_mask: Tensor | None
) -> list[Tensor]:
    classes = logits.shape[1]
    p, log_pt = _softmax(logits, index, valid, class_mask)
    ones = valid.to(log_pt.dtype)
    rest = -torch.expm1(log_pt)
    return [
        _sum_by_class(log_pt.exp() * ones, index, classes),
        torch.where(valid.unsqueeze(1), p, 0).sum(dim=2),
        count := _sum_by_class(ones, index, classes),
        _sum_by_class(_power(rest, gamma) * -log_pt, index, classes),
        torch.zeros_like(count),
        count,
    ]


def _softmax_grad(
    logits: Tensor,
    index: Tensor,
    valid: Tensor,
    gamma: float,
    class_mask: Tensor | None,
    grad_inside: Tensor,
    grad_prediction: Tensor,
    grad_focal: Tensor,
) -> Tensor:
    p, log_pt = _softmax(logits, index, valid, class_mask)
    pt = log_pt.exp()
    rest = -torch.expm1(log_pt)
    # d focal / d log p_t
    slope = _power(rest, gamma) * (gamma * pt * log_pt / _positive(rest) - 1)
    true = pt * grad_inside.gather(1, index) + slope * grad_focal.gather(1, index)
    mean = (p * grad_prediction.unsqueeze(2)).sum(dim=1) + true
    grad = p * (grad_prediction.unsqueeze(2) - mean.unsqueeze(1))
    grad = grad.scatter_add(1, index.unsqueeze(1), true.unsqueeze(1))
    return torch.where(valid.unsqueeze(1), grad, 0)


def _softmax(logits: Tensor, index: Tensor, valid: Tensor, class_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """p (N,C,V) and log p_t (N,V), the latter 0 where the voxel does not count."""
    if class_mask is not None:
        logits = logits.masked_fill(~class_mask.unsqueeze(2), -torch.inf)
    log_p = F.log_softmax(logits, dim=1, dtype=_sum_dtype(logits))
    return log_p.exp(), torch.where(valid, log_p.gather(1, index.unsqueeze(1)).squeeze(1), 0)


def _sigmoid_rows(logits: Tensor, positive: Tensor, counted: Tensor, gamma: float) -> list[Tensor]:
    x = logits.to(_sum_dtype(logits))
    z = torch.where(positive, x, -x)
    p = torch.where(counted, x.sigmoid(), 0)
    focal = torch.where(counted, _power((-z).sigmoid(), gamma) * -F.logsigmoid(z), 0)
    inside = positive & counted
    return [
        torch.where(inside, p, 0).sum(dim=2),
        p.sum(dim=2),
        inside.sum(dim=2).to(x.dtype),
        torch.where(inside, focal, 0).sum(dim=2),
        torch.where(inside, 0, focal).sum(dim=2),
        counted.sum(dim=2).to(x.dtype),
    ]


def _sigmoid_grad(
    logits: Tensor,
    positive: Tensor,
    counted: Tensor,
    gamma: float,
    grad_inside: Tensor,
    grad_prediction: Tensor,
    grad_focal: Tensor,
    grad_focal_outside: Tensor,
) -> Tensor:
    x = logits.to(_sum_dtype(logits))
    z = torch.where(positive, x, -x)
    p, rest = z.sigmoid(), (-z).sigmoid()
    # d focal / d z
    slope = -_power(rest, gamma) * (gamma * p * -F.logsigmoid(z) + rest)
    inside, prediction, focal, outside = (
        g.unsqueeze(2) for g in (grad_inside, grad_prediction, grad_focal, grad_focal_outside)
    )
    grad = p * rest * (prediction + torch.where(positive, inside, 0))
    grad = grad + torch.where(positive, slope * focal, -slope * outside)
    return torch.where(counted, grad, 0)


def _counted(
    target: Tensor, classes: int, ignore_index: int | None, class_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Which target values count, and which mean nothing; both of the target's shape."""
    multi_hot = target.dim() == 3
    in_range = (target >= 0) & (target < (2 if multi_hot else classes))
    # a comparison in 8 bits would wrap the number
    kept = torch.ones_like(in_range) if ignore_index is None else target.to(torch.int64) != ignore_index
    valid = in_range & kept
    if class_mask is not None and not multi_hot:
        valid = valid & class_mask.gather(1, target.to(torch.int64).clamp(0, classes - 1))
    wrong = ~in_range & kept
    if class_mask is not None and multi_hot:
        wrong = wrong & class_mask.unsqueeze(2)
    return valid, wrong


def _safe_index(target: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, target.to(torch.int64), 0)


def _per_channel(target: Tensor, valid: Tensor, classes: int, class_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Whether a voxel belongs to a channel and whether it counts there, (N,C,V) each."""
    if target.dim() == 3:
        positive, counted = target == 1, valid
    else:
        channels = torch.arange(classes, device=target.device).view(1, -1, 1)
        positive = target.to(torch.int64).unsqueeze(1) == channels
        counted = valid.unsqueeze(1).expand(positive.shape)
    if class_mask is not None:
        counted = counted & class_mask.unsqueeze(2)
    return positive, counted


def _power(rest: Tensor, gamma: float) -> Tensor:
    return torch.ones_like(rest) if gamma == 0 else rest**gamma


def _positive(rest: Tensor) -> Tensor:
    # log p_t / (1 - p_t) tends to -1, but is 0 / 0 at 1; what it multiplies is 0 there unless gamma is 0.
    return rest.clamp_min(torch.finfo(rest.dtype).tiny)


def _sum_by_class(values: Tensor, index: Tensor, classes: int) -> Tensor:
    """Sum values (N,V) into (N,C) by their class; in float64, as a scatter adds one by one."""
    sums = values.new_zeros(values.shape[0], classes, dtype=torch.float64)
    return sums.scatter_add(1, index, values.to(torch.float64)).to(values.dtype)


def _sum_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def loss(
    sums: Sums,
    class_mask: Tensor | None,
    focal_weight: float,
    dice_weight: float,
    include_background: bool,
    batch_dice: bool,
    smooth: float,
    class_reduction: str,
) -> Tensor:
    """focal_weight * mean focal term + dice_weight * dice loss (the paper's equations 1 to 3)."""
    intersection, prediction, target, focal, voxels = sums
    mean_focal = focal.sum() / voxels.sum().clamp_min(1)
    kept = torch.ones_like(target) if class_mask is None else class_mask.to(target.dtype)
    if batch_dice:
        intersection, prediction, target = (t.sum(dim=0, keepdim=True) for t in (intersection, prediction, target))
        kept = kept.amax(dim=0, keepdim=True) if len(kept) else kept.new_zeros(1, kept.shape[1])
    first = 0 if include_background else 1
    dice = dice_terms(intersection, prediction, target, smooth)[:, first:]
    kept = kept[:, first:]
    per_sample = (dice * kept).sum(dim=1)
    if class_reduction == "mean":
        per_sample = per_sample / kept.sum(dim=1).clamp_min(1)
    mean_dice = per_sample.sum() / max(1, len(per_sample))
    return focal_weight * mean_focal + dice_weight * mean_dice


def dice_terms(intersection: Tensor, prediction: Tensor, target: Tensor, smooth: float) -> Tensor:
    """1 - (2 I + smooth) / (Y + P + smooth); 0 where nothing is predicted and nothing is there."""
    denominator = target + prediction + smooth
    present = denominator > 0
    ratio = (2 * intersection + smooth) / torch.where(present, denominator, 1)
    return torch.where(present, 1 - ratio, 0)
