"""Drop-in for nnU-Net 2.8.1's `DC_and_CE_loss` with its soft dice; nnU-Net need not be installed.

As there, the dice part is minus the dice coefficient. Both of nnU-Net's dice classes give these numbers, apart from
rounding; `dice_class` is accepted for the signature's sake and ignored.
"""

from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from ..focal_dice import ClassSums, class_sums
from ..reference.focal_dice import SOFTMAX
from .cross_entropy import weighted_sums


class DC_and_CE_loss(nn.Module):
    """Minus soft dice plus cross-entropy.

    Args:
        soft_dice_kwargs: batch_dice (False), do_bg (True), smooth (1.0), ddp (True). With `batch_dice` and `ddp`, the
            sums of each class are added up over all processes before the ratio.
        ce_kwargs: weight, ignore_index (-100), reduction "mean"; anything else raises ValueError.
        weight_ce, weight_dice: weights of the parts.
        ignore_label: voxels with this label count nowhere.
        dice_class: ignored.
    """

    ce_weight: Tensor | None

    def __init__(
        self,
        soft_dice_kwargs: dict[str, Any],
        ce_kwargs: dict[str, Any],
        weight_ce: float = 1,
        weight_dice: float = 1,
        ignore_label: int | None = None,
        dice_class: Any = None,
    ) -> None:
        super().__init__()
        dice = {"batch_dice": False, "do_bg": True, "smooth": 1.0, "ddp": True, **soft_dice_kwargs}
        unknown = set(dice) - {"batch_dice", "do_bg", "smooth", "ddp"}
        unknown |= set(ce_kwargs) - {"weight", "ignore_index", "reduction", "label_smoothing"}
        if unknown:
            raise ValueError(f"options that are not served: {sorted(unknown)}")
        if ce_kwargs.get("label_smoothing", 0.0) or ce_kwargs.get("reduction", "mean") != "mean":
            raise ValueError("label_smoothing and reductions other than 'mean' are not served")
        if ignore_label is None and ce_kwargs.get("ignore_index", -100) >= 0:
            raise ValueError("ignore_index for the cross-entropy alone is not served; use ignore_label")
        self.batch_dice, self.do_bg = bool(dice["batch_dice"]), bool(dice["do_bg"])
        self.smooth, self.ddp = float(dice["smooth"]), bool(dice["ddp"])
        self.weight_ce = weight_ce
        self.weight_dice = weight_dice
        self.ignore_label = ignore_label
        weight = ce_kwargs.get("weight")
        self.register_buffer("ce_weight", None if weight is None else torch.as_tensor(weight))

    def forward(self, net_output: Tensor, target: Tensor) -> Tensor:
        """Logits (b, c, *spatial) and label map (b, 1, *spatial) of any dtype -> scalar."""
        if target.shape != (net_output.shape[0], 1, *net_output.shape[2:]):
            raise ValueError(
                f"target must be a label map (b, 1, ...), got {tuple(target.shape)} for {tuple(net_output.shape)}"
            )
        labels = target[:, 0]
        if labels.is_floating_point() or labels.dtype == torch.bool:
            labels = labels.long()
        sums = class_sums(net_output, labels, mode=SOFTMAX, gamma=0.0, ignore_index=self.ignore_label)
        return self.weight_ce * self._cross_entropy(sums) + self.weight_dice * -self._dice(sums)

    def _cross_entropy(self, sums: ClassSums) -> Tensor:
        loss, count = weighted_sums(sums, self.ce_weight)
        # nnU-Net leaves the cross-entropy out where no voxel counts.
        return torch.where(count > 0, loss / torch.where(count > 0, count, 1), 0)

    def _dice(self, sums: ClassSums) -> Tensor:
        first = 0 if self.do_bg else 1
        table = torch.stack([row[:, first:] for row in sums[:3]])
        if self.batch_dice:
            table = table.sum(dim=1)
            if self.ddp and torch.distributed.is_available() and torch.distributed.is_initialized():
                table = all_reduce(table)
        intersection, prediction, target = table
        denominator = (target + prediction + self.smooth).clamp_min(1e-8)
        return ((2 * intersection + self.smooth) / denominator).mean()
