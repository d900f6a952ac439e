"""Labels from features, without logits in memory: features are read, one byte per voxel is written."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from focuskernels import linear_argmax

from ..case import Case, Cost, Inputs, Op, compiled, dtype_name, eager, memory_format, ours, random, size_of
from .linear_focal_dice_loss import FORMATS, SIZES

Triple = tuple[int, int, int]


def cases(device: str, size: str) -> Sequence[Case]:
    """Case list of `OP`."""
    return [_case(*s, dtype, layout) for s in SIZES[device, size] for dtype, layout in FORMATS[device]]


def _case(channels: int, classes: int, volume: Triple, dtype: torch.dtype, layout: str) -> Case:
    voxels = math.prod(volume)

    def make(generator: torch.Generator) -> Inputs:
        weight = F.normalize(random(generator, classes, channels, dtype=torch.float32)).to(dtype)
        labels = torch.randint(classes, (1, *volume), generator=generator, device=generator.device)
        # one class clearly ahead: rounding leaves ties, which some resolve otherwise
        features = weight[labels].movedim(-1, 1).contiguous(memory_format=memory_format(layout))
        return {"features": features, "weight": weight, "bias": torch.zeros_like(weight[:, 0])}

    features = size_of(voxels * channels, dtype=dtype)
    return Case(
        name=f"{channels}->{classes}, {'x'.join(map(str, volume))} {dtype_name(dtype)} {layout}",
        make=make,
        cost={"fwd": Cost(features + voxels, 2 * voxels * channels * classes)},
        oracle=plain,
        providers=[ours(_ours), eager(plain), compiled(plain), eager(_by_max, "conv3d + torch.max", "peer")],
        shape={"volume": volume, "voxels": voxels, "features": channels, "classes": classes},
        dtype=dtype,
        layout=layout,
        oracle_dtype=torch.float32,
    )


def _ours(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear_argmax(features, weight, bias).labels


def plain(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Logits, then argmax."""
    return F.conv3d(features, weight[:, :, None, None, None], bias).argmax(dim=1).to(torch.uint8)


def _by_max(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv3d(features, weight[:, :, None, None, None], bias).max(dim=1).indices.to(torch.uint8)


OP = Op("linear_argmax", ("linear_argmax",), ("linear_focal_dice", "focal_dice"), cases)
