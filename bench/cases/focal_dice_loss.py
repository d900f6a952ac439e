"""Focal plus dice loss. Forward reads logits and target; backward reads both again and writes the gradient."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from focuskernels import focal_dice_loss

from ..case import (
    Case,
    Cost,
    Function,
    Inputs,
    Missing,
    Op,
    Provider,
    compiled,
    cost_by_mode,
    dtype_name,
    eager,
    ours,
    random,
    size_of,
)

GAMMA, SMOOTH = 2.0, 1e-5
SHAPES = {
    ("cpu", "quick"): [((1, 4, 5, 6, 7), "contiguous")],
    ("cpu", "full"): [((1, 19, 64, 128, 128), "contiguous"), ((2, 10, 32, 96, 96), "channels_last_3d")],
    ("cuda", "quick"): [((1, 4, 5, 6, 7), "contiguous")],
    ("cuda", "full"): [
        ((1, 19, 96, 256, 256), "contiguous"),
        ((1, 19, 96, 256, 256), "channels_last_3d"),
        ((1, 19, 160, 512, 512), "contiguous"),
        ((2, 10, 40, 192, 192), "contiguous"),
    ],
}
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.bfloat16)}
#: Elements of logits up to which the formula in high precision fits beside the inputs.
LARGE = 2**28


def cases(device: str, size: str) -> Sequence[Case]:
    """Case list of `OP`."""
    return [_case(shape, layout, dtype) for shape, layout in SHAPES[device, size] for dtype in DTYPES[device]]


def _case(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Case:
    voxels, elements = shape[0] * math.prod(shape[2:]), math.prod(shape)
    logits, target = size_of(*shape, dtype=dtype), 8 * voxels

    def maker(shape: tuple[int, ...]) -> Callable[[torch.Generator], Inputs]:
        def make(generator: torch.Generator) -> Inputs:
            device = generator.device
            labels = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator, device=device)
            return {
                "logits": random(generator, *shape, dtype=dtype, layout=layout).requires_grad_(),
                "target": labels,
                "alpha": torch.linspace(0.5, 1.5, shape[1], device=device),
            }

        return make

    return Case(
        name=f"{'x'.join(map(str, shape))} {dtype_name(dtype)} {layout}",
        make=maker(shape),
        # per element: maximum, difference, exponential, sum, quotient, two sums; backward some more products
        cost=cost_by_mode(Cost(logits + target, 7 * elements), Cost(2 * logits + target, 9 * elements)),
        oracle=plain,
        providers=_providers(),
        shape={"shape": shape, "voxels": voxels, "classes": shape[1]},
        dtype=dtype,
        layout=layout,
        oracle_dtype=torch.float64 if elements <= LARGE // 4 else torch.float32,
        make_small=maker((1, shape[1], 16, 64, 64)) if elements > LARGE else None,
    )


def _providers() -> list[Provider]:
    return [
        ours(fused),
        Provider("focuskernels, inplace_grad", "ours", lambda: _inplace, adapt=_own_logits),
        eager(plain, "eager, gather"),
        compiled(plain, "torch.compile, gather"),
        eager(one_hot, "eager, one-hot", "peer"),
        Provider("MONAI DiceLoss + FocalLoss(softmax)", "peer", monai_like_for_like),
        Provider("MONAI DiceFocalLoss", "other", _monai_dice_focal, checked=False),
        Provider("MONAI DiceCELoss", "other", _monai_dice_ce, oracle=_dice_ce),
        Provider("nnU-Net DC_and_CE (MemoryEfficient)", "other", _nnunet_dice_ce, checked=False),
        Provider("F.cross_entropy", "other", lambda: _cross_entropy, oracle=_cross_entropy),
    ]


def fused(logits: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
    """`focal_dice_loss`."""
    return focal_dice_loss(logits, target, gamma=GAMMA, alpha=alpha, smooth=SMOOTH)


def _inplace(logits: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
    return focal_dice_loss(logits, target, gamma=GAMMA, alpha=alpha, smooth=SMOOTH, inplace_grad=True)


def _own_logits(inputs: Inputs) -> Inputs:
    """Logits of its own for everyone who writes over them; copied before the clock starts."""
    logits = inputs["logits"].detach().clone(memory_format=torch.preserve_format)
    return {**inputs, "logits": logits.requires_grad_(inputs["logits"].requires_grad)}


def plain(logits: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
    """The paper's loss in the form of plain PyTorch that is fastest: by gather and scatter, without a one-hot."""
    n, classes = logits.shape[:2]
    log_p = F.log_softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32)).flatten(2)
    index = target.flatten(1)
    log_pt = log_p.gather(1, index[:, None])[:, 0]
    p_t = log_pt.exp()
    focal = (alpha[index] * (1 - p_t) ** GAMMA * -log_pt).mean()
    zeros = log_p.new_zeros(n, classes)
    intersection = zeros.scatter_add(1, index, p_t)
    present = zeros.scatter_add(1, index, torch.ones_like(p_t))
    return focal + _dice(intersection, log_p.exp().sum(dim=2), present)


def one_hot(logits: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
    """The paper's loss as its formulas stand."""
    y = F.one_hot(target, logits.shape[1]).movedim(-1, 1)
    log_p = F.log_softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
    p, axes = log_p.exp(), tuple(range(2, logits.dim()))
    weight = alpha.view(1, -1, *(1,) * len(axes))
    focal = (weight * y * (1 - p) ** GAMMA * -log_p).sum(dim=1).mean()
    return focal + _dice((y * p).sum(dim=axes), p.sum(dim=axes), y.sum(dim=axes))


def _dice(intersection: Tensor, predicted: Tensor, present: Tensor) -> Tensor:
    return (1 - (2 * intersection + SMOOTH) / (present + predicted + SMOOTH)).sum(dim=1).mean()


def _cross_entropy(logits: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


def _dice_ce(logits: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
    p = logits.softmax(dim=1).flatten(2)
    y = F.one_hot(target.flatten(1), logits.shape[1]).transpose(1, 2)
    ratio = (2 * (p * y).sum(dim=2) + SMOOTH) / (p.sum(dim=2) + y.sum(dim=2) + SMOOTH)
    return F.cross_entropy(logits, target) + (1 - ratio).mean()


def _monai() -> Any:
    try:
        import monai.losses
    except ImportError as error:
        raise Missing(f"monai is not installed ({error}); pip install -e '.[bench]'") from error
    return monai.losses


def monai_like_for_like() -> Function:
    """Built of MONAI's losses so that it computes the same."""
    losses = _monai()

    def run(logits: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
        # "mean" divides by all N * C * voxels though one class per voxel counts; "sum" adds up the samples' dice too
        n, classes = logits.shape[:2]
        focal = losses.FocalLoss(to_onehot_y=True, gamma=GAMMA, alpha=alpha, reduction="mean", use_softmax=True)
        dice = losses.DiceLoss(to_onehot_y=True, softmax=True, reduction="sum", smooth_nr=SMOOTH, smooth_dr=SMOOTH)
        labels = target[:, None]
        return classes * focal(logits, labels) + dice(logits, labels) / n

    return run


def _monai_dice_focal() -> Function:
    losses = _monai()

    def run(logits: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
        # its focal half takes a sigmoid, whatever `softmax` says
        return losses.DiceFocalLoss(to_onehot_y=True, softmax=True, gamma=GAMMA, alpha=alpha)(logits, target[:, None])

    return run


def _monai_dice_ce() -> Function:
    loss = _monai().DiceCELoss(to_onehot_y=True, softmax=True, smooth_nr=SMOOTH, smooth_dr=SMOOTH)
    return lambda logits, target, alpha: loss(logits, target[:, None])


def _nnunet_dice_ce() -> Function:
    try:
        from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
        from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
    except ImportError as error:
        raise Missing(f"nnunetv2 is not installed ({error}); pip install nnunetv2") from error
    dice = {"batch_dice": False, "do_bg": True, "smooth": SMOOTH, "ddp": False}
    loss = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)
    return lambda logits, target, alpha: loss(logits, target[:, None])


OP = Op("focal_dice_loss", ("focal_dice_loss",), ("focal_dice",), cases)
