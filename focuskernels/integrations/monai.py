"""Drop-in losses for MONAI 1.6.1: same constructors, same values, same gradients, one pass over the logits.

What is not served raises ValueError in the constructor: `other_act`, `squared_pred`, `reduction="none"`, label
smoothing, and a prediction that is already a probability (neither `sigmoid` nor `softmax`). Soft labels raise when
they are met. Quirks of MONAI are kept: the focal half is a sigmoid focal loss whatever `softmax` says, its
`reduction="sum"` averages over space first, and the weight of a generalized dice class that is absent is the largest
of the others.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from .._arguments import values_are_readable
from ..focal_dice import ClassSums, class_sums
from ..reference.focal_dice import SIGMOID, SOFTMAX, SOFTMAX_DICE_SIGMOID_FOCAL
from .cross_entropy import weighted_sums

Weight: TypeAlias = Sequence[float] | float | int | Tensor | None


class _Loss(nn.Module):
    """The options that all three share."""

    class_weight: Tensor | None

    def __init__(
        self,
        *,
        include_background: bool,
        to_onehot_y: bool,
        sigmoid: bool,
        softmax: bool,
        other_act: Callable[[Tensor], Tensor] | None,
        reduction: str,
        smooth_nr: float,
        smooth_dr: float,
        batch: bool,
        gamma: float,
        weight: Weight,
        weights: dict[str, float],
    ) -> None:
        super().__init__()
        if other_act is not None:
            raise ValueError("other_act is not served; use sigmoid=True or softmax=True")
        if sigmoid == softmax:
            raise ValueError(f"exactly one of sigmoid and softmax must be True, got {sigmoid} and {softmax}")
        reduction = str(getattr(reduction, "value", reduction))
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        for name, value in weights.items():
            if value < 0:
                raise ValueError(f"{name} should be no less than 0.0.")
        self.include_background = include_background
        self.to_onehot_y = to_onehot_y
        self.softmax = softmax
        self.reduction = reduction
        self.smooth_nr = float(smooth_nr)
        self.smooth_dr = float(smooth_dr)
        self.batch = batch
        self.gamma = gamma
        self.register_buffer("class_weight", None if weight is None else torch.as_tensor(weight))

    def _first(self, classes: int) -> int:
        """The first channel that counts."""
        return 0 if self.include_background or classes == 1 else 1

    def _reduced(self, terms: Tensor) -> Tensor:
        return terms.mean() if self.reduction == "mean" else terms.sum()

    def _per_sample(self, sums: ClassSums) -> tuple[Tensor, Tensor, Tensor]:
        """Intersection, prediction and target; (N, C), or (1, C) summed over the batch."""
        first = self._first(sums.target.shape[1])
        rows = (row[:, first:] for row in sums[:3])
        intersection, prediction, target = (row.sum(0, keepdim=True) if self.batch else row for row in rows)
        return intersection, prediction, target

    def _dice(self, sums: ClassSums, jaccard: bool, weight: Tensor | None) -> Tensor:
        intersection, prediction, target = self._per_sample(sums)
        union = prediction + target
        if jaccard:
            union = 2 * (union - intersection)
        return self._reduced(_weighted(1 - (2 * intersection + self.smooth_nr) / (union + self.smooth_dr), weight))

    def _sigmoid_focal(self, sums: ClassSums, voxels: int, alpha: float | Tensor | None) -> Tensor:
        """The focal half; its mean over space comes first in either reduction."""
        first = self._first(sums.target.shape[1])
        inside, outside = sums.focal[:, first:], sums.focal_outside[:, first:]
        if isinstance(alpha, Tensor):
            inside = inside * alpha.to(inside)
        elif alpha is not None:
            inside, outside = alpha * inside, (1 - alpha) * outside
        return self._reduced(_weighted((inside + outside) / voxels, self.class_weight))

    def _mode(self, classes: int) -> int:
        # MONAI ignores softmax for a single channel, and would take the logit for a probability.
        if self.softmax and classes == 1:
            raise ValueError("softmax=True needs more than one channel; use sigmoid=True")
        return SOFTMAX_DICE_SIGMOID_FOCAL if self.softmax else SIGMOID

    def _sums(self, input: Tensor, target: Tensor, mode: int, gamma: float) -> ClassSums:
        if mode == SIGMOID and not (self.to_onehot_y and input.shape[1] > 1):
            return class_sums(input, _multi_hot(target, input), mode=mode, gamma=gamma)
        return class_sums(input, self._indices(target, input), mode=mode, gamma=gamma)

    def _indices(self, target: Tensor, input: Tensor) -> Tensor:
        """(N, *spatial) class indices from (N, 1, *spatial) or a one-hot target."""
        if target.shape[1] == 1:
            if not self.to_onehot_y:
                raise ValueError("a target of class indices (N, 1, ...) needs to_onehot_y=True")
            indices = target[:, 0]
            return indices if not (indices.is_floating_point() or indices.dtype == torch.bool) else indices.long()
        if self.to_onehot_y:
            raise ValueError(f"labels should have a channel with length equal to one, got {tuple(target.shape)}")
        multi_hot = _multi_hot(target, input)
        if values_are_readable(multi_hot) and not bool((multi_hot.sum(dim=1) == 1).all()):
            raise ValueError("with softmax=True a target of the input's shape must be one-hot")
        return multi_hot.to(torch.uint8).argmax(dim=1)


def _weighted(terms: Tensor, weight: Tensor | None) -> Tensor:
    """(N, C) terms times the weights of the classes."""
    if weight is None:
        return terms
    if weight.dim() and weight.numel() != terms.shape[-1]:
        raise ValueError(f"weight has {weight.numel()} values for {terms.shape[-1]} classes")
    return terms * weight.to(terms)


def _multi_hot(target: Tensor, input: Tensor) -> Tensor:
    if target.shape != input.shape:
        raise ValueError(f"ground truth has different shape ({target.shape}) from input ({input.shape})")
    hot = target == 1
    if values_are_readable(target) and not bool((hot | (target == 0)).all()):
        raise ValueError("soft labels are not served: the target must hold 0 and 1 only")
    return hot


def _check(input: Tensor, target: Tensor) -> None:
    """Refuse shapes that do not fit; dtypes and devices `class_sums` refuses."""
    if input.dim() < 3:
        raise ValueError(f"input must be (N, C, *spatial), got shape {tuple(input.shape)}")
    if input.dim() != target.dim():
        raise ValueError(
            "the number of dimensions for input and target should be the same, "
            f"got shape {tuple(input.shape)} and {tuple(target.shape)}"
        )
    if target.shape[1] not in (1, input.shape[1]):
        raise ValueError(
            "number of channels for target is neither 1 (without one-hot encoding) nor the same as input, "
            f"got shape {tuple(input.shape)} and {tuple(target.shape)}"
        )
    if target.shape[:1] + target.shape[2:] != input.shape[:1] + input.shape[2:]:
        raise ValueError(
            "input and target must have the same batch and spatial sizes, "
            f"got shape {tuple(input.shape)} and {tuple(target.shape)}"
        )


class DiceFocalLoss(_Loss):
    """`monai.losses.DiceFocalLoss`: dice of softmax or sigmoid, plus sigmoid focal loss."""

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        gamma: float = 2.0,
        weight: Weight = None,
        lambda_dice: float = 1.0,
        lambda_focal: float = 1.0,
        alpha: float | Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            reduction=reduction,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            gamma=gamma,
            weight=weight,
            weights={"lambda_dice": lambda_dice, "lambda_focal": lambda_focal},
        )
        if squared_pred:
            raise ValueError("squared_pred=True is not served")
        self.jaccard = jaccard
        self.lambda_dice = lambda_dice
        self.lambda_focal = lambda_focal
        self.alpha: float | Tensor | None
        if alpha is None or isinstance(alpha, float | int):
            self.alpha = alpha
        else:
            self.register_buffer("alpha", torch.as_tensor(alpha), persistent=False)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Logits (N, C, *spatial); target (N, 1, *spatial) with to_onehot_y, else (N, C, *spatial) of 0 and 1."""
        _check(input, target)
        sums = self._sums(input, target, self._mode(input.shape[1]), self.gamma)
        focal = self._sigmoid_focal(sums, input.shape[2:].numel(), self.alpha)
        return self.lambda_dice * self._dice(sums, self.jaccard, self.class_weight) + self.lambda_focal * focal


class DiceCELoss(_Loss):
    """`monai.losses.DiceCELoss`: dice plus cross-entropy, which is binary for a single channel."""

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: Tensor | None = None,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            reduction=reduction,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            gamma=0.0,
            weight=weight if weight is None or include_background else weight[1:],
            weights={"lambda_dice": lambda_dice, "lambda_ce": lambda_ce},
        )
        if squared_pred:
            raise ValueError("squared_pred=True is not served")
        if label_smoothing:
            raise ValueError("label_smoothing is not served")
        self.register_buffer("ce_weight", weight)
        self.jaccard = jaccard
        self.lambda_dice = lambda_dice
        self.lambda_ce = lambda_ce

    ce_weight: Tensor | None

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Logits (N, C, *spatial); target (N, 1, *spatial) with to_onehot_y, else (N, C, *spatial) of 0 and 1."""
        _check(input, target)
        if input.shape[1] == 1:
            return self._single(input, target)
        if not self.softmax:
            raise ValueError(
                "with several channels DiceCELoss serves softmax=True only: its cross-entropy is a softmax"
            )
        sums = self._sums(input, target, SOFTMAX, 0.0)
        dice = self._dice(sums, self.jaccard, self.class_weight)
        return self.lambda_dice * dice + self.lambda_ce * self._cross_entropy(sums)

    def _cross_entropy(self, sums: ClassSums) -> Tensor:
        loss, count = weighted_sums(sums, self.ce_weight)
        return loss / count if self.reduction == "mean" else loss

    def _single(self, input: Tensor, target: Tensor) -> Tensor:
        sums = class_sums(input, _multi_hot(target, input), mode=self._mode(1), gamma=0.0)
        inside = sums.focal if self.ce_weight is None else sums.focal * self.ce_weight.to(sums.focal)
        losses = (inside + sums.focal_outside).sum()
        binary = losses / input.numel() if self.reduction == "mean" else losses
        # MONAI drops class weights from the dice of a single channel.
        return self.lambda_dice * self._dice(sums, self.jaccard, None) + self.lambda_ce * binary


class GeneralizedDiceFocalLoss(_Loss):
    """`monai.losses.GeneralizedDiceFocalLoss`: Sudre's generalized dice plus sigmoid focal loss."""

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[[Tensor], Tensor] | None = None,
        w_type: str = "square",
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        gamma: float = 2.0,
        weight: Weight = None,
        lambda_gdl: float = 1.0,
        lambda_focal: float = 1.0,
    ) -> None:
        super().__init__(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            reduction=reduction,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            gamma=gamma,
            weight=weight,
            weights={"lambda_gdl": lambda_gdl, "lambda_focal": lambda_focal},
        )
        self.w_type = str(getattr(w_type, "value", w_type))
        if self.w_type not in ("square", "simple", "uniform"):
            raise ValueError(f"w_type must be 'square', 'simple' or 'uniform', got {self.w_type!r}")
        self.lambda_gdl = lambda_gdl
        self.lambda_focal = lambda_focal

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Logits (N, C, *spatial); target (N, 1, *spatial) with to_onehot_y, else (N, C, *spatial) of 0 and 1."""
        _check(input, target)
        sums = self._sums(input, target, self._mode(input.shape[1]), self.gamma)
        focal = self._sigmoid_focal(sums, input.shape[2:].numel(), None)
        return self.lambda_gdl * self._generalized_dice(sums) + self.lambda_focal * focal

    def _generalized_dice(self, sums: ClassSums) -> Tensor:
        intersection, prediction, target = self._per_sample(sums)
        weight = torch.ones_like(target)
        if self.w_type != "uniform":
            weight = 1 / (target if self.w_type == "simple" else target * target)
            absent = torch.isinf(weight)
            weight = torch.where(absent, 0, weight)
            weight = weight + absent * weight.amax(dim=1, keepdim=True)
        numerator = 2 * (intersection * weight).sum(dim=1) + self.smooth_nr
        denominator = ((prediction + target) * weight).sum(dim=1) + self.smooth_dr
        return self._reduced(1 - numerator / denominator)
