import torch
import torch.nn.functional as F
from torch import Tensor

Sums = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def softmax_sums(
    logits: Tensor,
    target: Tensor,
    gamma: float,
    alpha: Tensor | None,
    ignore_index: int | None,
    class_mask: Tensor | None,
    target_in_range: bool,
) -> Sums:
    """Intersection, prediction, target (N,C), focal and voxels (N,) of logits (N,C,*spatial) and class indices (N,*spatial)."""
    classes = logits.shape[1]
    target = target.to(torch.int64)
    valid = _valid_voxels(target, classes, ignore_index, class_mask, target_in_range)
    if valid is not None:
        target = torch.where(valid, target, 0)
    log_p = F.log_softmax(_without_masked(logits, class_mask), dim=1, dtype=_sum_dtype(logits))
    log_pt = log_p.gather(1, target.unsqueeze(1)).squeeze(1)
    p, ones = log_p.exp(), torch.ones_like(log_pt)
    if valid is not None:
        # First of all, since a masked class has log p = -inf, whose gradient is NaN even when weighed by 0.
        log_pt = torch.where(valid, log_pt, 0)
        p, ones = torch.where(valid.unsqueeze(1), p, 0), valid.to(log_pt.dtype)
    focal = focal_terms(log_pt, -torch.expm1(log_pt), gamma)
    if alpha is not None:
        focal = focal * alpha[target]
    spatial = tuple(range(2, logits.dim()))
    return (
        _sum_by_class(log_pt.exp() * ones, target, classes),
        p.sum(dim=spatial),
        _sum_by_class(ones, target, classes),
        focal.flatten(1).sum(dim=1),
        ones.flatten(1).sum(dim=1),
    )


def sigmoid_sums(
    logits: Tensor,
    target: Tensor,
    gamma: float,
    alpha: Tensor | None,
    ignore_index: int | None,
    class_mask: Tensor | None,
) -> Sums:
    """The same for independent channels; target (N,C,*spatial), 0 or 1. `voxels` counts those of every channel."""
    x = logits.to(_sum_dtype(logits))
    positive = target == 1
    valid = None if ignore_index is None else target != ignore_index
    if class_mask is not None:
        kept = _over_voxels(class_mask, logits).expand(logits.shape)
        valid = kept if valid is None else valid & kept
    z = torch.where(positive, x, -x)
    focal = focal_terms(F.logsigmoid(z), (-z).sigmoid(), gamma)
    if alpha is not None:
        focal = torch.where(positive, focal * _over_voxels(alpha.unsqueeze(0), logits), focal)
    p, ones = x.sigmoid(), torch.ones_like(x)
    if valid is not None:
        focal, p, ones = (torch.where(valid, term, 0) for term in (focal, p, ones))
    spatial = tuple(range(2, logits.dim()))
    return (
        torch.where(positive, p, 0).sum(dim=spatial),
        p.sum(dim=spatial),
        torch.where(positive, ones, 0).sum(dim=spatial),
        focal.flatten(1).sum(dim=1),
        ones.flatten(1).sum(dim=1),
    )


def focal_terms(log_pt: Tensor, rest: Tensor, gamma: float) -> Tensor:
    """(1 - p_t)^gamma * -log p_t, given log p_t and rest = 1 - p_t."""
    if gamma == 0:
        return -log_pt
    if gamma < 1:
        # The power's slope is infinite at 0 and would meet a factor 0.
        rest = rest.clamp_min(torch.finfo(rest.dtype).tiny)
    return rest**gamma * -log_pt


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


def _without_masked(logits: Tensor, class_mask: Tensor | None) -> Tensor:
    return logits if class_mask is None else logits.masked_fill(~_over_voxels(class_mask, logits), -torch.inf)


def _valid_voxels(
    target: Tensor, classes: int, ignore_index: int | None, class_mask: Tensor | None, target_in_range: bool
) -> Tensor | None:
    """Which voxels count; None if all do."""
    if target_in_range and ignore_index is None and class_mask is None:
        return None
    valid = (target >= 0) & (target < classes)
    if ignore_index is not None:
        valid = valid & (target != ignore_index)
    if class_mask is not None:
        index = target.flatten(1).clamp(0, classes - 1)
        valid = valid & class_mask.gather(1, index).view(target.shape)
    return valid


def _over_voxels(per_class: Tensor, logits: Tensor) -> Tensor:
    """(N, C) as (N, C, 1, ...) beside logits."""
    return per_class.view(*per_class.shape, *(1,) * (logits.dim() - 2))


def _sum_by_class(values: Tensor, target: Tensor, classes: int) -> Tensor:
    """Sum values (N,*spatial) into (N,C) by their class; in float64, as a scatter adds one by one."""
    sums = values.new_zeros(values.shape[0], classes, dtype=torch.float64)
    return sums.scatter_add(1, target.flatten(1), values.flatten(1).to(torch.float64)).to(values.dtype)


def _sum_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)
