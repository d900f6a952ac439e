"""Squeeze-excite, product and sum, alone and behind a norm (the tail of MONAI's SE blocks).

Forward reads x for its mean, reads x and the residual and writes: 4 maps. Backward reads x and the incoming gradient
for the gate's gradient, reads the gradient again and writes that of x: 4 maps, as the residual's is the incoming one.
With a norm in front, its statistics give the mean, so that forward is 4 maps too; backward takes two passes over x and
the gradient and writes two maps: 6. Where the activation let through is one bit per element more, not counted here.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from focuskernels import norm_act, norm_se_residual, se_residual
from focuskernels.reference import nn as plain

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


class Size(NamedTuple):
    """One case; `norm` None is se_residual alone."""

    norm: str | None
    channels: int
    volume: tuple[int, int, int]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"


REDUCTION = 8
CL, BF16 = "channels_last_3d", torch.bfloat16
SIZES = {
    ("cpu", "quick"): [Size(None, 8, (3, 5, 6)), Size("batch", 8, (3, 5, 6))],
    ("cpu", "full"): [
        Size("batch", 32, (64, 96, 96)),
        Size(None, 32, (64, 96, 96)),
        Size("group", 32, (64, 96, 96), layout=CL),
        Size(None, 32, (64, 96, 96), layout=CL),
    ],
    ("cuda", "quick"): [Size(None, 8, (3, 5, 6)), Size("batch", 8, (3, 5, 6))],
    ("cuda", "full"): [
        Size("batch", 32, (64, 192, 192), BF16, CL),
        Size(None, 32, (64, 192, 192), BF16, CL),
        Size("batch", 32, (64, 192, 192)),
        Size(None, 32, (64, 192, 192)),
    ],
}


def cases(device: str, size: str) -> Sequence[Case]:
    """Case list of `OP`."""
    return [_case(s) for s in SIZES[device, size]]


def _case(s: Size) -> Case:
    shape, hidden = (1, s.channels, *s.volume), s.channels // REDUCTION

    def make(generator: torch.Generator) -> Inputs:
        x, residual = (random(generator, *shape, dtype=s.dtype, layout=s.layout).requires_grad_() for _ in range(2))
        inputs = {"x": x, "residual": residual}
        sizes = {
            "fc1_weight": (hidden, s.channels),
            "fc1_bias": (hidden,),
            "fc2_weight": (s.channels, hidden),
            "fc2_bias": (s.channels,),
        }
        for name, size in sizes.items():
            inputs[name] = random(generator, *size, dtype=s.dtype).requires_grad_()
        if s.norm is not None:
            for name in ("weight", "bias"):
                inputs[name] = random(generator, s.channels, dtype=torch.float32).requires_grad_()
        return inputs

    formula = plain.se_residual if s.norm is None else _after_norm(s.norm, plain.norm_act, plain.se_residual)
    if s.norm is None:
        functions = [ours(se_residual)]
    else:
        functions = [ours(_fused(s.norm)), ours(_after_norm(s.norm, norm_act, se_residual), "focuskernels, two ops")]
    size, elements = size_of(*shape, dtype=s.dtype), math.prod(shape)
    fwd, bwd = (Cost(4 * size, 4 * elements), Cost(4 * size, 5 * elements))
    if s.norm is not None:
        fwd, bwd = Cost(4 * size, 10 * elements), Cost(6 * size, 18 * elements)
    what = "se + add" if s.norm is None else f"{s.norm} norm + se + add + relu"
    return Case(
        name=f"{what}, {'x'.join(map(str, shape))} {dtype_name(s.dtype)} {s.layout}",
        make=make,
        cost=cost_by_mode(fwd, bwd),
        oracle=formula,
        providers=[
            *functions,
            eager(formula),
            compiled(formula),
            Provider("MONAI ChannelSELayer", "peer", _monai(s)),
        ],
        shape={"shape": shape, "voxels": elements // s.channels, "norm": s.norm},
        dtype=s.dtype,
        layout=s.layout,
        # the gate's few numbers are means of cancelling terms
        tolerance=1e-3 if s.dtype == torch.float32 else 5e-2,
    )


def _after_norm(norm: str, normalise: Function, add: Function) -> Function:
    def run(
        x: Tensor,
        residual: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
        weight: Tensor,
        bias: Tensor,
    ) -> Tensor:
        h = normalise(x, weight, bias, norm=norm, activation=None)
        return add(h, residual, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation="relu")

    return run


def _fused(norm: str) -> Function:
    def run(
        x: Tensor,
        residual: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
        weight: Tensor,
        bias: Tensor,
    ) -> Tensor:
        layers = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        return norm_se_residual(x, residual, weight, bias, *layers, norm=norm)  # type: ignore[arg-type]

    return run


def _monai(s: Size) -> Callable[[], Function]:
    def build() -> Function:
        try:
            from monai.networks.blocks import ChannelSELayer
        except ImportError as error:
            raise Missing(f"monai is not installed ({error}); pip install -e '.[bench]'") from error
        layer = ChannelSELayer(spatial_dims=3, in_channels=s.channels, r=REDUCTION)

        def add(
            x: Tensor,
            residual: Tensor,
            fc1_weight: Tensor,
            fc1_bias: Tensor,
            fc2_weight: Tensor,
            fc2_bias: Tensor,
            activation: str | None = None,
        ) -> Tensor:
            parameters = {
                "fc.0.weight": fc1_weight,
                "fc.0.bias": fc1_bias,
                "fc.2.weight": fc2_weight,
                "fc.2.bias": fc2_bias,
            }
            y = torch.func.functional_call(layer, parameters, (x,))
            y += residual
            return F.relu(y, inplace=True) if activation == "relu" else y

        return add if s.norm is None else _after_norm(s.norm, plain.norm_act, add)

    return build


STEMS = ("se_residual", "norm_se_residual", "norm_act", "norm_tables", "channelwise")
FILES = ("focuskernels/reference/nn.py",)
OP = Op("se_residual", ("se_residual", "norm_se_residual"), STEMS, cases, files=FILES)
