"""The loss of the last 1x1x1 convolution's logits, which never exist as a whole: the claim is memory.

Forward reads features and labels; backward reads both again and writes the features' gradient. Products: one forward,
and two backward. That backward computes the logits again instead of keeping them is not in the floor.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from focuskernels import linear_focal_dice_loss

from ..case import (
    Case,
    Cost,
    Function,
    Inputs,
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
from .focal_dice_loss import GAMMA, SMOOTH, fused, monai_like_for_like, one_hot
from .focal_dice_loss import plain as plain_loss

Triple = tuple[int, int, int]
#: (features, classes, volume)
SIZES: dict[tuple[str, str], list[tuple[int, int, Triple]]] = {
    ("cpu", "quick"): [(8, 4, (5, 6, 7))],
    ("cpu", "full"): [(32, 19, (64, 128, 128))],
    ("cuda", "quick"): [(8, 4, (5, 6, 7))],
    ("cuda", "full"): [(32, 19, (96, 256, 256)), (32, 104, (96, 160, 160))],
}
FORMATS: dict[str, list[tuple[torch.dtype, str]]] = {
    "cpu": [(torch.float32, "contiguous"), (torch.float32, "channels_last_3d")],
    "cuda": [(torch.bfloat16, "channels_last_3d"), (torch.float32, "contiguous")],
}


def cases(device: str, size: str) -> Sequence[Case]:
    """Case list of `OP`."""
    return [_case(*s, dtype, layout) for s in SIZES[device, size] for dtype, layout in FORMATS[device]]


def _case(channels: int, classes: int, volume: Triple, dtype: torch.dtype, layout: str) -> Case:
    voxels = math.prod(volume)

    def maker(volume: Triple) -> Function:
        def make(generator: torch.Generator) -> Inputs:
            device = generator.device
            return {
                "features": random(generator, 1, channels, *volume, dtype=dtype, layout=layout).requires_grad_(),
                "weight": (random(generator, classes, channels, dtype=dtype) / math.sqrt(channels)).requires_grad_(),
                "bias": random(generator, classes, dtype=dtype).requires_grad_(),
                "target": torch.randint(classes, (1, *volume), generator=generator, device=device),
                "alpha": torch.linspace(0.5, 1.5, classes, device=device),
            }

        return make

    features, target = size_of(voxels * channels, dtype=dtype), 8 * voxels
    product, elements = 2 * voxels * channels * classes, voxels * classes
    plain = after_convolution(plain_loss)
    monai = Provider("conv3d + MONAI DiceLoss + FocalLoss", "peer", lambda: after_convolution(monai_like_for_like()))
    return Case(
        name=f"{channels}->{classes}, {'x'.join(map(str, volume))} {dtype_name(dtype)} {layout}",
        make=maker(volume),
        cost=cost_by_mode(
            Cost(features + target, product + 7 * elements), Cost(2 * features + target, 2 * product + 9 * elements)
        ),
        oracle=plain,
        providers=[
            ours(_ours),
            eager(after_convolution(fused), "conv3d + focal_dice_loss", "peer"),
            eager(plain, "eager, conv3d + gather"),
            compiled(plain, "torch.compile, conv3d + gather"),
            eager(after_convolution(one_hot), "eager, conv3d + one-hot", "peer"),
            monai,
        ],
        shape={"volume": volume, "voxels": voxels, "features": channels, "classes": classes},
        dtype=dtype,
        layout=layout,
        oracle_dtype=torch.float64 if elements < 2**26 else torch.float32,
        # the weights' gradients are sums over all voxels whose terms cancel
        tolerance=1e-3 if dtype == torch.float32 else 1e-1,
        make_small=maker((16, 64, 64)) if elements > 2**27 else None,
    )


def after_convolution(loss: Function) -> Function:
    """The same loss of logits that a convolution has written."""

    def run(features: Tensor, weight: Tensor, bias: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
        return loss(F.conv3d(features, weight[:, :, None, None, None], bias), target, alpha)

    return run


def _ours(features: Tensor, weight: Tensor, bias: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
    return linear_focal_dice_loss(features, weight, bias, target, gamma=GAMMA, alpha=alpha, smooth=SMOOTH)


OP = Op("linear_focal_dice_loss", ("linear_focal_dice_loss",), ("linear_focal_dice", "focal_dice"), cases)
