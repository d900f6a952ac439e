"""The cross-entropy that MONAI's and nnU-Net's losses share, from the sums of one pass."""

from torch import Tensor

from ..focal_dice import ClassSums


def weighted_sums(sums: ClassSums, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropy of all voxels, and their number, both weighed by class; `sums` of gamma 0."""
    losses, counts = sums.focal.sum(dim=0), sums.target.sum(dim=0)
    if weight is not None:
        weight = weight.to(losses)
        losses, counts = losses * weight, counts * weight
    return losses.sum(), counts.sum()
