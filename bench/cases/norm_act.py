"""Normalisation and activation: x is read for the statistics, read again and written; backward reads x and the incoming
gradient twice and writes one."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from focuskernels import norm_act
from focuskernels.reference import nn as plain

from ..case import Case, Cost, Inputs, Op, compiled, cost_by_mode, dtype_name, eager, ours, random, size_of


class Size(NamedTuple):
    """One case."""

    norm: str
    channels: int
    volume: tuple[int, int, int]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"


CL, BF16 = "channels_last_3d", torch.bfloat16
SIZES = {
    ("cpu", "quick"): [Size("batch", 4, (3, 5, 6)), Size("instance", 4, (3, 5, 6), layout=CL)],
    ("cpu", "full"): [
        Size("batch", 32, (64, 96, 96)),
        Size("instance", 32, (64, 96, 96)),
        Size("instance", 32, (64, 96, 96), layout=CL),
        Size("instance", 32, (64, 96, 96), BF16, CL),
    ],
    ("cuda", "quick"): [Size("batch", 4, (3, 5, 6)), Size("instance", 4, (3, 5, 6), layout=CL)],
    ("cuda", "full"): [
        Size("batch", 32, (64, 192, 192), BF16, CL),
        Size("instance", 32, (128, 128, 128), BF16, CL),
        Size("instance", 32, (128, 128, 128), BF16),
        Size("batch", 32, (64, 192, 192)),
    ],
}
ACTIVATION = {"batch": "relu", "instance": "leaky_relu"}


def cases(device: str, size: str) -> Sequence[Case]:
    """Case list of `OP`."""
    return [_case(s) for s in SIZES[device, size]]


def _case(s: Size) -> Case:
    shape = (1, s.channels, *s.volume)

    def make(generator: torch.Generator) -> Inputs:
        return {
            "x": random(generator, *shape, dtype=s.dtype, layout=s.layout).requires_grad_(),
            "weight": random(generator, s.channels, dtype=torch.float32).requires_grad_(),
            "bias": random(generator, s.channels, dtype=torch.float32).requires_grad_(),
        }

    formula = partial(plain.norm_act, norm=s.norm, activation=ACTIVATION[s.norm])
    function = partial(norm_act, norm=s.norm, activation=ACTIVATION[s.norm])  # type: ignore[arg-type]
    size, elements = size_of(*shape, dtype=s.dtype), s.channels * s.volume[0] * s.volume[1] * s.volume[2]
    return Case(
        name=f"{s.norm}, {'x'.join(map(str, shape))} {dtype_name(s.dtype)} {s.layout}",
        make=make,
        cost=cost_by_mode(Cost(3 * size, 7 * elements), Cost(5 * size, 12 * elements)),
        oracle=formula,
        providers=[ours(function), eager(formula), compiled(formula)],
        shape={"shape": shape, "voxels": elements // s.channels, "norm": s.norm},
        dtype=s.dtype,
        layout=s.layout,
        # PyTorch's own instance norm of so many voxels is off by 5e-5
        tolerance=1e-4 if s.dtype == torch.float32 else None,
    )


STEMS = ("norm_act", "norm_tables", "channelwise")
OP = Op("norm_act", ("norm_act",), STEMS, cases, files=("focuskernels/reference/nn.py",))
