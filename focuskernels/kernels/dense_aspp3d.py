"""Triton passes of DenseASPP (docs/dilated_conv3d.md): norm, ReLU and 1x1x1 convolution of a channel prefix in one.

Of a buffer of V voxels, c channels wide where a branch reads, b of its bottleneck: forward reads c V and writes b V;
backward reads (b + c) V twice, reads and writes c V of the gradient. No normalised map and no gradient of one reaches
memory. Products: 2 c b V in forward, 3 times that in backward. Sums have a fixed order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import channelwise, dense_aspp3d
from .._lib import MOST_PROGRAMS
from ..dense_aspp3d import RowsOf
from ..dilated_conv3d import why_not
from ..reference.channelwise import RELU
from .channelwise import merged
from .dilated_conv3d import convolve, empty_map, tile_for

WARPS = 4
VOXELS = 64
TILES_PER_PROGRAM = 64
#: Channels at a time of the sums, which hold two products in registers.
SUMS_WIDEST = 32


@triton.jit
def reduce_kernel(
    x,
    table,
    weight,
    h,
    found,
    voxels: tl.int64,
    stride: tl.int64,
    CHANNELS: tl.constexpr,
    BOTTLENECK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """h of BLOCK_V voxels, their mean and sum of squared differences from it."""
    n = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK_V
    v = start + tl.arange(0, BLOCK_V)
    inside = v < voxels
    c = tl.arange(0, BLOCK_C)
    b = tl.arange(0, BOTTLENECK)
    place = x + (n * voxels + v)[:, None] * stride + c[None, :]
    rows = table + n * (3 * CHANNELS) + c
    taps = weight + b[:, None] * CHANNELS + c[None, :]
    total = tl.zeros((BLOCK_V, BOTTLENECK), tl.float32)
    for _ in range(0, CHANNELS, BLOCK_C):
        difference = tl.load(place, mask=inside[:, None], other=0.0).to(tl.float32) - tl.load(rows)[None, :]
        y = difference * tl.load(rows + CHANNELS)[None, :] + tl.load(rows + 2 * CHANNELS)[None, :]
        y = tl.where(y < 0, 0.0, y).to(weight.dtype.element_ty)
        total = tl.dot(y, tl.load(taps).T, total)
        place += BLOCK_C
        rows += BLOCK_C
        taps += BLOCK_C
    tl.store(
        h + (n * voxels + v)[:, None] * BOTTLENECK + b[None, :],
        total.to(h.dtype.element_ty),
        mask=inside[:, None],
    )
    count = tl.minimum(voxels - start, BLOCK_V).to(tl.float32)
    mean = tl.sum(tl.where(inside[:, None], total, 0.0), axis=0) / count
    difference = tl.where(inside[:, None], total - mean[None, :], 0.0)
    row = found + (n * tl.num_programs(0) + tl.program_id(0)) * (2 * BOTTLENECK) + b
    tl.store(row, mean)
    tl.store(row + BOTTLENECK, tl.sum(difference * difference, axis=0))


@triton.jit
def sums_kernel(
    grad,
    x,
    table,
    weight,
    found,
    partial,
    voxels: tl.int64,
    stride: tl.int64,
    CHANNELS: tl.constexpr,
    BOTTLENECK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILES: tl.constexpr,
):
    """Sums of d and d (x - mean), where d is the gradient before the activation, and the gradient of the weight."""
    n = tl.program_id(2).to(tl.int64)
    program = n * tl.num_programs(1) + tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.arange(0, BOTTLENECK)
    rows = table + n * (3 * CHANNELS) + c
    center = tl.load(rows)[None, :]
    scale = tl.load(rows + CHANNELS)[None, :]
    shift = tl.load(rows + 2 * CHANNELS)[None, :]
    taps = tl.load(weight + b[:, None] * CHANNELS + c[None, :])
    total = tl.zeros((BLOCK_C,), tl.float32)
    moment = tl.zeros((BLOCK_C,), tl.float32)
    grad_weight = tl.zeros((BOTTLENECK, BLOCK_C), tl.float32)
    v = tl.program_id(1).to(tl.int64) * (TILES * BLOCK_V) + tl.arange(0, BLOCK_V)
    for _ in range(TILES):
        inside = (v < voxels)[:, None]
        above = tl.load(grad + (n * voxels + v)[:, None] * BOTTLENECK + b[None, :], mask=inside, other=0.0)
        difference = tl.load(x + (n * voxels + v)[:, None] * stride + c[None, :], mask=inside, other=0.0)
        difference = difference.to(tl.float32) - center
        y = difference * scale + shift
        # Outside the volume `above` is 0, and so is all that follows from it.
        d = tl.where(y <= 0, 0.0, tl.dot(above, taps))
        total += tl.sum(d, axis=0)
        moment += tl.sum(d * difference, axis=0)
        grad_weight = tl.dot(above.T, tl.where(y < 0, 0.0, y).to(above.dtype), grad_weight)
        v += BLOCK_V
    place = found + program * (2 * CHANNELS) + c
    tl.store(place, total)
    tl.store(place + CHANNELS, moment)
    tl.store(partial + (program * BOTTLENECK + b)[:, None] * CHANNELS + c[None, :], grad_weight)


@triton.jit
def backward_kernel(
    grad,
    x,
    table,
    weights,
    weight,
    into,
    voxels: tl.int64,
    stride: tl.int64,
    CHANNELS: tl.constexpr,
    BOTTLENECK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Add the gradient of x to `into`, which is laid out as x."""
    n = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.arange(0, BOTTLENECK)
    v = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (v < voxels)[:, None]
    rows = table + n * (3 * CHANNELS) + c
    factors = weights + n * (3 * CHANNELS) + c
    taps = tl.load(weight + b[:, None] * CHANNELS + c[None, :])
    above = tl.load(grad + (n * voxels + v)[:, None] * BOTTLENECK + b[None, :], mask=inside, other=0.0)
    offset = (n * voxels + v)[:, None] * stride + c[None, :]
    difference = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) - tl.load(rows)[None, :]
    y = difference * tl.load(rows + CHANNELS)[None, :] + tl.load(rows + 2 * CHANNELS)[None, :]
    d = tl.where(y <= 0, 0.0, tl.dot(above, taps)) * tl.load(factors)[None, :]
    d += difference * tl.load(factors + CHANNELS)[None, :] + tl.load(factors + 2 * CHANNELS)[None, :]
    d += tl.load(into + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(into + offset, d.to(into.dtype.element_ty), mask=inside)


class Passes(dense_aspp3d.Passes):
    """Each by a kernel where it applies, else as without Triton."""

    def reduce(self, buffer: Tensor, channels: int, table: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """See the base."""
        if not _fits(buffer, channels, weight):
            return super().reduce(buffer, channels, table, weight)
        size, bottleneck = buffer.shape[2:].numel(), len(weight)
        h = empty_map(buffer, bottleneck)
        tiles = triton.cdiv(size, VOXELS)
        found = table.new_empty((len(buffer), tiles, 2, bottleneck))
        with torch.cuda.device_of(buffer):
            reduce_kernel[(tiles, len(buffer))](
                buffer,
                table,
                _matrix(weight),
                h,
                found,
                size,
                buffer.shape[1],
                **constants(channels, bottleneck, VOXELS),
                num_warps=WARPS,
            )
        return h, merged(found, size, VOXELS)

    def reduce_backward(
        self, grad: Tensor, buffer: Tensor, channels: int, table: Tensor, weight: Tensor, rows_of: RowsOf, into: Tensor
    ) -> Tensor:
        """See the base."""
        if not _fits(buffer, channels, weight):
            return super().reduce_backward(grad, buffer, channels, table, weight, rows_of, into)
        size, bottleneck = buffer.shape[2:].numel(), len(weight)
        matrix, programs = _matrix(weight), triton.cdiv(size, VOXELS * TILES_PER_PROGRAM)
        fixed = constants(channels, bottleneck, VOXELS)
        narrow = constants(channels, bottleneck, VOXELS, SUMS_WIDEST)
        found = table.new_empty((len(buffer), programs, 2, channels))
        partial = table.new_empty((len(buffer) * programs, bottleneck, channels))
        with torch.cuda.device_of(buffer):
            sums_kernel[(channels // narrow["BLOCK_C"], programs, len(buffer))](
                grad,
                buffer,
                table,
                matrix,
                found,
                partial,
                size,
                buffer.shape[1],
                **narrow,
                TILES=TILES_PER_PROGRAM,
                num_warps=WARPS,
            )
            rows = rows_of(found.sum(dim=1, dtype=torch.float64).to(torch.float32))
            backward_kernel[(triton.cdiv(size, VOXELS), channels // fixed["BLOCK_C"], len(buffer))](
                grad, buffer, table, rows, matrix, into, size, buffer.shape[1], **fixed, num_warps=WARPS
            )
        return partial.sum(dim=0).to(weight.dtype).view(weight.shape)

    def grow(
        self, h: Tensor, table: Tensor, weight: Tensor, dilation: Sequence[int], buffer: Tensor, channels: int
    ) -> Tensor:
        """See the base."""
        y = channelwise.affine(h, table, None, RELU, 0.0)
        out = buffer[:, channels : channels + len(weight)]
        ours = y.dtype == buffer.dtype and why_not(y, weight, out) is None
        tile = tile_for(y, weight, dilation, None) if ours else None
        if tile is None:
            return self._grow_by_vendor(y, weight, dilation, out)
        sums = convolve(y, weight, None, out, dilation, tile, sums=True)
        assert sums is not None
        mean = sums[:, 0] / y.shape[2:].numel()
        return torch.stack([mean, (sums[:, 1] - mean * sums[:, 0]).clamp_(min=0)], dim=1).to(torch.float32)

    def _growth_gradient(self, grad: Tensor, h: Tensor, weight: Tensor) -> Tensor:
        """The kernels read some channels of a map in place."""
        ours = grad.dtype == h.dtype and why_not(grad, weight.transpose(0, 1)) is None
        return grad if ours else super()._growth_gradient(grad, h, weight)


def constants(channels: int, bottleneck: int, voxels: int, widest: int = 64) -> dict[str, int]:
    """What the kernels are compiled for; `widest` channels at a time."""
    block = min(widest, channels & -channels)
    return {"CHANNELS": channels, "BOTTLENECK": bottleneck, "BLOCK_V": voxels, "BLOCK_C": block}


def _fits(buffer: Tensor, channels: int, weight: Tensor) -> bool:
    bottleneck = len(weight)
    return (
        buffer.dtype in (torch.bfloat16, torch.float16)
        and weight.dtype == buffer.dtype
        and channels % 16 == 0
        and bottleneck in (16, 32, 64, 128)
        and not buffer.is_contiguous()
        and buffer.is_contiguous(memory_format=torch.channels_last_3d)
        and 0 < len(buffer) <= MOST_PROGRAMS
    )


def _matrix(weight: Tensor) -> Tensor:
    """(b, c), contiguous, of a 1x1x1 weight."""
    return weight.reshape(weight.shape[:2]).contiguous()
