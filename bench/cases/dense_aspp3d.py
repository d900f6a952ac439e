"""DenseASPP: four branches that read everything before them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from focuskernels.nn import DenseASPP3d
from focuskernels.reference.nn import to_reference

from ..case import Case, Cost, Function, Inputs, Op, compiled, cost_by_mode, dtype_name, eager, memory_format, ours
from ..networks import Parameters, functional, parameters_of

Triple = tuple[int, int, int]
GROWTH, BOTTLENECK, DILATIONS = 32, 64, ((1, 3, 3), (1, 6, 6), (1, 12, 12), (1, 18, 18))
#: (channels, volume): S-Net's features after one in-plane downsampling.
SIZES: dict[tuple[str, str], list[tuple[int, Triple]]] = {
    ("cpu", "quick"): [(4, (3, 7, 8))],
    ("cpu", "full"): [(64, (16, 48, 48))],
    ("cuda", "quick"): [(4, (3, 7, 8))],
    ("cuda", "full"): [(64, (40, 96, 96)), (64, (60, 128, 128)), (64, (96, 160, 160))],
}


def cases(device: str, size: str) -> Sequence[Case]:
    """Case list of `OP`."""
    growth, bottleneck = (4, 8) if size == "quick" else (GROWTH, BOTTLENECK)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return [_case(c, volume, growth, bottleneck, dtype) for c, volume in SIZES[device, size]]


def _case(channels: int, volume: Triple, growth: int, bottleneck: int, dtype: torch.dtype) -> Case:
    layout = "channels_last_3d"

    def build() -> DenseASPP3d:
        return DenseASPP3d(channels, growth, bottleneck, DILATIONS)

    def make(generator: torch.Generator) -> Inputs:
        x = torch.empty((1, channels, *volume), device=generator.device).normal_(generator=generator)
        x = x.to(dtype, memory_format=memory_format(layout))
        return {"x": x.requires_grad_(), "parameters": parameters_of(build, generator)}

    amp = None if dtype == torch.float32 else dtype
    plain = _function(to_reference(build()), amp)
    return Case(
        name=f"{channels} channels, {'x'.join(map(str, volume))} {dtype_name(dtype)}",
        make=make,
        cost=cost_by_mode(*_costs(channels, math.prod(volume), growth, bottleneck, dtype.itemsize)),
        oracle=_function(to_reference(build()), None),
        providers=[ours(_function(build(), amp)), eager(plain), compiled(plain)],
        shape={"channels": channels, "volume": volume, "voxels": math.prod(volume)},
        dtype=dtype,
        layout=layout,
        oracle_dtype=torch.float32 if amp else torch.float64,
        # rectifiers switch and small gradients cancel through eight layers
        tolerance=1e-2 if amp is None else 5e-2,
        rounded=None if amp is None else plain,
    )


def _function(network: DenseASPP3d, amp: torch.dtype | None) -> Function:
    run = functional(network, amp)

    def dense_aspp(x: Tensor, parameters: Parameters) -> Tensor:
        return run(parameters, x)

    return dense_aspp


def _costs(channels: int, voxels: int, growth: int, bottleneck: int, itemsize: int) -> tuple[Cost, Cost]:
    """Forward and backward, given that statistics of a norm come with the pass that writes its input.

    A branch reads its c channels, writes and reads the bottleneck, writes its growth. Backward reads the gradient of
    the growth, reads the bottleneck twice, writes its gradient, reads c channels and adds to the gradients of c.
    """
    fwd = bwd = flops = 0
    for branch in range(len(DILATIONS)):
        c = channels + branch * growth
        flops += 2 * voxels * (c * bottleneck + 27 * bottleneck * growth)
        fwd += voxels * (c + 2 * bottleneck + growth) * itemsize
        bwd += voxels * (growth + 3 * bottleneck + 3 * c) * itemsize
    return Cost(fwd, flops), Cost(bwd, 2 * flops)


STEMS = ("nn", "dense_aspp3d", "dilated_conv3d", "dilated_conv3d_tiles", "onednn", "norm_act", "channelwise")
OP = Op("dense_aspp3d", ("nn.DenseASPP3d", "dilated_conv3d", "norm_act"), STEMS, cases)
