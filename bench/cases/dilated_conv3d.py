"""Dilated 3x3x3 convolution: bound by arithmetic. FLOPs are counted densely, products with padding included;
`valid_macs` is the share that is not."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from focuskernels import dilated_conv3d
from focuskernels.dilated_conv3d import why_not

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
    in_layout,
    ours,
    random,
    size_of,
)

Triple = tuple[int, int, int]


class Size(NamedTuple):
    """One case."""

    volume: Triple
    channels: tuple[int, int]
    dilation: Triple
    batch: int = 1


def _cube(d: int) -> Triple:
    return d, d, d


A = (60, 128, 128)
SIZES = {
    ("cpu", "quick"): [Size((4, 7, 8), (8, 8), (1, 2, 2))],
    ("cpu", "full"): [
        Size((24, 64, 64), (32, 32), _cube(6)),
        Size((24, 64, 64), (32, 32), _cube(1)),
        Size((24, 64, 64), (32, 32), (1, 18, 18)),
    ],
    ("cuda", "quick"): [Size((4, 7, 8), (16, 16), (1, 2, 2))],
    ("cuda", "full"): [
        Size(A, (64, 64), _cube(6)),
        Size(A, (64, 64), _cube(18)),
        Size(A, (64, 64), _cube(1)),
        Size(A, (64, 32), (1, 12, 12)),
        Size(A, (64, 64), _cube(24)),
        Size(A, (64, 64), _cube(12)),
        Size(A, (64, 64), _cube(3)),
        Size((96, 160, 160), (64, 64), _cube(6)),
        Size(A, (128, 64), _cube(6)),
        Size(A, (256, 64), _cube(6)),
        Size(A, (32, 32), _cube(6)),
        Size((59, 125, 131), (64, 64), _cube(12)),
        Size((24, 48, 48), (64, 64), _cube(6)),
        Size(A, (64, 64), _cube(6), batch=2),
    ],
}


#: DenseASPP's growth: channels of a map are convolved into others of the same map, and how many it has.
SLICES = {
    ("cpu", "quick"): (Size((4, 7, 8), (8, 8), (1, 2, 2)), 16),
    ("cpu", "full"): (Size((24, 64, 64), (64, 32), (1, 6, 6)), 192),
    ("cuda", "quick"): (Size((4, 7, 8), (32, 32), (1, 2, 2)), 64),
    ("cuda", "full"): (Size(A, (64, 32), (1, 6, 6)), 192),
}


def cases(device: str, size: str) -> Sequence[Case]:
    """Case list of `OP`."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    found = [_case(s, dtype, device) for s in SIZES[device, size]]
    return [*found[:2], _slice_case(*SLICES[device, size], dtype), *found[2:]]


def _case(s: Size, dtype: torch.dtype, device: str) -> Case:
    (inner, outer), layout = s.channels, "channels_last_3d"
    x_shape, w_shape = (s.batch, inner, *s.volume), (outer, inner, 3, 3, 3)

    def make(generator: torch.Generator) -> Inputs:
        weight = random(generator, *w_shape, dtype=dtype, layout=layout)
        return {
            "x": random(generator, *x_shape, dtype=dtype, layout=layout).requires_grad_(),
            "weight": (weight / math.sqrt(27 * inner)).requires_grad_(),
        }

    voxels = s.batch * math.prod(s.volume)
    x, w, y = (size_of(n, dtype=dtype) for n in (voxels * inner, math.prod(w_shape), voxels * outer))
    flops = 2 * 27 * inner * outer * voxels
    return Case(
        name=f"{s.batch}x{'x'.join(map(str, s.volume))} {inner}->{outer} dilation {'x'.join(map(str, s.dilation))} "
        f"{dtype_name(dtype)}",
        make=make,
        cost=cost_by_mode(Cost(x + w + y, flops), Cost(2 * (x + w) + y, 2 * flops)),
        oracle=convolution(s.dilation),
        providers=providers(s.dilation, device),
        shape={
            "volume": s.volume,
            "batch": s.batch,
            "in": inner,
            "out": outer,
            "dilation": s.dilation,
            "valid_macs": valid_share(s.volume, s.dilation),
        },
        dtype=dtype,
        layout=layout,
        oracle_dtype=torch.float64 if flops < 1e10 and device == "cpu" else torch.float32,
    )


def providers(dilation: Triple, device: str) -> list[Provider]:
    """Ours and the peers of a 3x3x3 convolution."""
    vendor = "cuDNN" if device == "cuda" else "oneDNN"
    conv, tuning = convolution(dilation), {"mode": "max-autotune-no-cudagraphs"} if device == "cuda" else {}

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return dilated_conv3d(x, weight, None, dilation)

    return [
        ours(run),
        eager(conv, f"F.conv3d ({vendor}), channels_last_3d"),
        Provider(f"F.conv3d ({vendor}), NCDHW", "peer", lambda: conv, adapt=in_layout("contiguous")),
        eager(space_to_batch(dilation), "space-to-batch + F.conv3d", "peer"),
        compiled(conv, **tuning),
    ]


def _slice_case(s: Size, width: int, dtype: torch.dtype) -> Case:
    """The first channels of a wider map are read, the ones behind them written, both in place."""
    (inner, outer), layout, voxels = s.channels, "channels_last_3d", math.prod(s.volume)
    conv = convolution(s.dilation)

    def make(generator: torch.Generator) -> Inputs:
        weight = random(generator, outer, inner, 3, 3, 3, dtype=dtype, layout=layout) / math.sqrt(27 * inner)
        return {"buffer": random(generator, 1, width, *s.volume, dtype=dtype, layout=layout), "weight": weight}

    def oracle(buffer: Tensor, weight: Tensor) -> Tensor:
        return conv(buffer[:, :inner], weight)

    def copied(buffer: Tensor, weight: Tensor) -> Tensor:
        return buffer[:, inner : inner + outer].copy_(conv(buffer[:, :inner], weight))

    def run(buffer: Tensor, weight: Tensor) -> Tensor:
        return _into(buffer[:, :inner], weight, s.dilation, buffer[:, inner : inner + outer])

    x, w, y = (size_of(n, dtype=dtype) for n in (voxels * inner, 27 * inner * outer, voxels * outer))
    flops = 2 * 27 * inner * outer * voxels
    return Case(
        name=f"{'x'.join(map(str, s.volume))} {inner}->{outer} dilation {'x'.join(map(str, s.dilation))}, from and to "
        f"channels of {width}, {dtype_name(dtype)}",
        make=make,
        cost={"fwd": Cost(x + w + y, flops)},
        oracle=oracle,
        providers=[ours(run), eager(copied, "F.conv3d + copy"), compiled(copied, "torch.compile, F.conv3d + copy")],
        shape={"volume": s.volume, "in": inner, "out": outer, "dilation": s.dilation, "width": width},
        dtype=dtype,
        layout=layout,
        oracle_dtype=torch.float32,
    )


def _into(x: Tensor, weight: Tensor, dilation: Triple, out: Tensor) -> Tensor:
    """As DenseASPP does it: written in place by our kernel, copied from another's result."""
    if x.is_cuda and why_not(x, weight, out) is None:
        from focuskernels.kernels.dilated_conv3d import convolve, tile_for

        tile = tile_for(x, weight, dilation, None)
        if tile is not None:
            convolve(x, weight, None, out, dilation, tile)
            return out
    return out.copy_(dilated_conv3d(x, weight, None, dilation))


def convolution(dilation: Triple) -> Function:
    """`F.conv3d` that keeps the size."""

    def conv3d(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv3d(x, weight, padding=dilation, dilation=dilation)

    return conv3d


def space_to_batch(dilation: Triple) -> Function:
    """Every dilation-th voxel along each axis is a volume of its own, in which the convolution is dense."""

    def run(x: Tensor, weight: Tensor) -> Tensor:
        n, channels, *volume = x.shape
        steps = [-(-size // d) for size, d in zip(volume, dilation)]
        pads = [p for size, d, k in reversed(list(zip(volume, dilation, steps))) for p in (0, d * k - size)]
        (kz, ky, kx), (dz, dy, dx) = steps, dilation
        phases = F.pad(x, pads).view(n, channels, kz, dz, ky, dy, kx, dx).permute(0, 3, 5, 7, 1, 2, 4, 6)
        dense = phases.reshape(n * dz * dy * dx, channels, kz, ky, kx)
        if x.is_contiguous(memory_format=torch.channels_last_3d):
            dense = dense.contiguous(memory_format=torch.channels_last_3d)
        y = F.conv3d(dense, weight, padding=1)
        y = y.view(n, dz, dy, dx, -1, kz, ky, kx).permute(0, 4, 5, 1, 6, 2, 7, 3)
        y = y.reshape(n, y.shape[1], kz * dz, ky * dy, kx * dx)
        return y[:, :, : volume[0], : volume[1], : volume[2]]

    return run


def valid_share(volume: Triple, dilation: Triple) -> float:
    """The share of multiplications whose voxel lies inside the volume."""
    return math.prod((size + 2 * max(0, size - d)) / (3 * size) for size, d in zip(volume, dilation))


OP = Op("dilated_conv3d", ("dilated_conv3d",), ("dilated_conv3d", "dilated_conv3d_tiles", "onednn"), cases)
