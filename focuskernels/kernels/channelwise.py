"""Triton kernels of the passes that norm_act, se_residual and norm_se_residual consist of (docs/se_residual.md).

Bytes, in maps: moments 1 read; affine 1 read (2 with a residual), 1 written; sums 2 read (3 with the output), 1 written
if the gradient is kept; backward 2 read, 1 written. A program holds a tile of channels by voxels, whose fast axis is
that of the memory; reductions keep one accumulator per element of the tile and reduce it once. The programs' sums are
added in a fixed order, so that results do not depend on scheduling.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

NONE = tl.constexpr(0)
RELU = tl.constexpr(1)

TILES_PER_PROGRAM = 16
ELEMENTS = 4096
WARPS = 8
#: Programs that share a channel's sums.
MOST_PROGRAMS = 2048
#: Channels that a program merges, and programs' findings that it reads at a time.
MERGED_CHANNELS = 8
MERGED_PROGRAMS = 256


@triton.jit
def _offsets(n, c, v, channels, voxels, CHANNELS_LAST: tl.constexpr):
    """Of a tile, 64 bits, and which of its elements exist."""
    # Not by strides: their types are given, and then Triton does not know one that is 1, and loads element by element.
    if CHANNELS_LAST:
        place = c[:, None] + v[None, :] * channels
    else:
        place = c.to(tl.int64)[:, None] * voxels + v[None, :]
    offset = n * channels * voxels + place
    return offset, (c < channels)[:, None] & (v < voxels)[None, :]


@triton.jit
def _row(table, n, row, c, channels):
    return tl.load(table + (n * 3 + row) * channels + c, mask=c < channels, other=0.0)[:, None]


@triton.jit
def _before_activation(grad, y, slope, ACTIVATION: tl.constexpr):
    if ACTIVATION == NONE:
        return grad
    elif ACTIVATION == RELU:
        return tl.where(y <= 0, 0.0, grad)
    else:
        return tl.where(y <= 0, grad * slope, grad)


@triton.jit
def moments_kernel(
    x,
    found,
    channels,
    voxels: tl.int64,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TILES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.program_id(2).to(tl.int64)
    begin = program * TILES * BLOCK_V
    # Differences from the mean of the first tile, so that large means cancel little.
    v = begin + tl.arange(0, BLOCK_V)
    offset, inside = _offsets(n, c, v, channels, voxels, CHANNELS_LAST)
    first = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    shift = tl.sum(first, axis=1) / tl.minimum(voxels - begin, BLOCK_V).to(tl.float32)
    difference = tl.where(inside, first - shift[:, None], 0.0)
    total = difference
    squares = difference * difference
    for tile in range(1, TILES):
        v = begin + tile * BLOCK_V + tl.arange(0, BLOCK_V)
        offset, inside = _offsets(n, c, v, channels, voxels, CHANNELS_LAST)
        difference = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) - shift[:, None]
        difference = tl.where(inside, difference, 0.0)
        total += difference
        squares += difference * difference
    count = tl.minimum(voxels - begin, TILES * BLOCK_V).to(tl.float32)
    mean = tl.sum(total, axis=1) / count
    spread = tl.sum(squares, axis=1) - mean * mean * count
    place = found + ((n * tl.num_programs(0) + program) * 2) * channels + c
    tl.store(place, shift + mean, mask=c < channels)
    tl.store(place + channels, tl.where(spread < 0, 0.0, spread), mask=c < channels)


@triton.jit
def merge_kernel(
    found,
    out,
    programs,
    channels,
    chunk,
    voxels: tl.int64,
    length: tl.int64,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Moments of `chunk` neighbours from theirs, each of `length` voxels, the last of fewer (Chan et al. 1983)."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * chunk
    last = tl.minimum(first + chunk, programs)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    for begin in range(first, last, BLOCK_P):
        place, count, inside = _findings(found, n, begin, last, c, programs, channels, voxels, length, BLOCK_P)
        total += tl.load(place, mask=inside, other=0.0).to(tl.float64) * count
    mean = tl.sum(total, axis=0) / tl.minimum(voxels - first * length, chunk * length).to(tl.float64)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    for begin in range(first, last, BLOCK_P):
        place, count, inside = _findings(found, n, begin, last, c, programs, channels, voxels, length, BLOCK_P)
        distance = tl.load(place, mask=inside, other=0.0).to(tl.float64) - mean[None, :]
        squares += tl.load(place + channels, mask=inside, other=0.0).to(tl.float64)
        squares += tl.where(inside, distance * distance * count, 0.0)
    to = out + (n * tl.num_programs(0) + tl.program_id(0)) * 2 * channels + c
    tl.store(to, mean.to(tl.float32), mask=c < channels)
    tl.store(to + channels, tl.sum(squares, axis=0).to(tl.float32), mask=c < channels)


@triton.jit
def _findings(found, n, begin, last, c, programs, channels, voxels, length, BLOCK_P: tl.constexpr):
    """Where the means of some programs stand, of how many voxels each is, and which there are."""
    p = begin + tl.arange(0, BLOCK_P)
    place = found + ((n * programs + p) * 2)[:, None] * channels + c[None, :]
    count = tl.minimum(voxels - p * length, length).to(tl.float64)
    return place, count[:, None], (p < last)[:, None] & (c < channels)[None, :]


@triton.jit
def affine_kernel(
    x,
    table,
    residual,
    out,
    channels,
    voxels: tl.int64,
    slope: tl.float32,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.program_id(2).to(tl.int64)
    v = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    offset, inside = _offsets(n, c, v, channels, voxels, CHANNELS_LAST)
    y = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) - _row(table, n, 0, c, channels)
    y = y * _row(table, n, 1, c, channels) + _row(table, n, 2, c, channels)
    if RESIDUAL:
        y += tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION != NONE:
        y = tl.where(y < 0, 0.0 if ACTIVATION == RELU else y * slope, y)
    tl.store(out + offset, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def sums_kernel(
    grad,
    x,
    table,
    output,
    kept,
    found,
    channels,
    voxels: tl.int64,
    slope: tl.float32,
    ACTIVATION: tl.constexpr,
    OUTPUT: tl.constexpr,
    KEEP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TILES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.program_id(2).to(tl.int64)
    center = _row(table, n, 0, c, channels)
    scale = _row(table, n, 1, c, channels)
    shift = _row(table, n, 2, c, channels)
    total = tl.zeros((BLOCK_C, BLOCK_V), tl.float32)
    moment = tl.zeros((BLOCK_C, BLOCK_V), tl.float32)
    for tile in range(TILES):
        v = (program * TILES + tile) * BLOCK_V + tl.arange(0, BLOCK_V)
        offset, inside = _offsets(n, c, v, channels, voxels, CHANNELS_LAST)
        difference = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) - center
        d = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
        if ACTIVATION != NONE:
            if OUTPUT:
                y = tl.load(output + offset, mask=inside, other=0.0).to(tl.float32)
            else:
                y = difference * scale + shift
            d = _before_activation(d, y, slope, ACTIVATION)
        if KEEP:
            tl.store(kept + offset, d.to(kept.dtype.element_ty), mask=inside)
        total += d
        moment += tl.where(inside, d * difference, 0.0)
    place = found + ((n * tl.num_programs(0) + program) * 2) * channels + c
    tl.store(place, tl.sum(total, axis=1), mask=c < channels)
    tl.store(place + channels, tl.sum(moment, axis=1), mask=c < channels)


@triton.jit
def backward_kernel(
    grad,
    x,
    table,
    weights,
    out,
    channels,
    voxels: tl.int64,
    slope: tl.float32,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.program_id(2).to(tl.int64)
    v = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    offset, inside = _offsets(n, c, v, channels, voxels, CHANNELS_LAST)
    difference = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) - _row(table, n, 0, c, channels)
    d = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION != NONE:
        y = difference * _row(table, n, 1, c, channels) + _row(table, n, 2, c, channels)
        d = _before_activation(d, y, slope, ACTIVATION)
    d = d * _row(weights, n, 0, c, channels)
    d += difference * _row(weights, n, 1, c, channels) + _row(weights, n, 2, c, channels)
    tl.store(out + offset, d.to(out.dtype.element_ty), mask=inside)


def tile(channels: int, channels_last: bool) -> tuple[int, int]:
    """BLOCK_C and BLOCK_V: channels first, a piece of one channel; last, whole rows where they are not long."""
    block_c = min(128, triton.next_power_of_2(channels)) if channels_last else 1
    return block_c, ELEMENTS // block_c


def moments(x: Tensor) -> Tensor:
    """As `reference.channelwise.moments`."""
    batch, channels, voxels = x.shape[0], x.shape[1], x.shape[2:].numel()
    block_c, block_v = tile(channels, _channels_last(x))
    tiles = _tiles(voxels, block_v)
    programs = triton.cdiv(voxels, block_v * tiles)
    found = x.new_empty((batch, programs, 2, channels), dtype=torch.float32)
    if x.numel():
        with torch.cuda.device_of(x):
            moments_kernel[(programs, triton.cdiv(channels, block_c), batch)](
                x,
                found,
                *_sizes(x),
                CHANNELS_LAST=_channels_last(x),
                BLOCK_C=block_c,
                BLOCK_V=block_v,
                TILES=tiles,
                num_warps=WARPS,
            )
    return merged(found, voxels, block_v * tiles)


def affine(x: Tensor, table: Tensor, residual: Tensor | None, activation: int, slope: float) -> Tensor:
    """As `reference.channelwise.affine`."""
    out = torch.empty_like(x)
    block_c, block_v = tile(x.shape[1], _channels_last(x))
    if x.numel():
        with torch.cuda.device_of(x):
            affine_kernel[_grid(x, block_c, block_v)](
                x,
                table,
                x if residual is None else residual,
                out,
                *_sizes(x),
                slope,
                ACTIVATION=activation,
                RESIDUAL=residual is not None,
                CHANNELS_LAST=_channels_last(x),
                BLOCK_C=block_c,
                BLOCK_V=block_v,
                num_warps=WARPS,
            )
    return out


def affine_sums(
    grad: Tensor, x: Tensor, table: Tensor, out: Tensor | None, activation: int, slope: float, keep: bool
) -> tuple[Tensor, Tensor]:
    """As `reference.channelwise.affine_sums`."""
    batch, channels, voxels = x.shape[0], x.shape[1], x.shape[2:].numel()
    block_c, block_v = tile(channels, _channels_last(x))
    tiles = _tiles(voxels, block_v)
    programs = triton.cdiv(voxels, block_v * tiles)
    found = x.new_empty((batch, programs, 2, channels), dtype=torch.float32)
    kept = torch.empty_like(x) if keep else grad.new_empty(0)
    if x.numel():
        with torch.cuda.device_of(x):
            sums_kernel[(programs, triton.cdiv(channels, block_c), batch)](
                grad,
                x,
                table,
                x if out is None else out,
                kept if keep else x,
                found,
                *_sizes(x),
                slope,
                ACTIVATION=activation,
                OUTPUT=out is not None,
                KEEP=keep,
                CHANNELS_LAST=_channels_last(x),
                BLOCK_C=block_c,
                BLOCK_V=block_v,
                TILES=tiles,
                num_warps=WARPS,
            )
    return found.sum(dim=1, dtype=torch.float64).to(torch.float32), kept


def affine_backward(grad: Tensor, x: Tensor, table: Tensor, weights: Tensor, activation: int, slope: float) -> Tensor:
    """As `reference.channelwise.affine_backward`."""
    out = torch.empty_like(x)
    block_c, block_v = tile(x.shape[1], _channels_last(x))
    if x.numel():
        with torch.cuda.device_of(x):
            backward_kernel[_grid(x, block_c, block_v)](
                grad,
                x,
                table,
                weights,
                out,
                *_sizes(x),
                slope,
                ACTIVATION=activation,
                CHANNELS_LAST=_channels_last(x),
                BLOCK_C=block_c,
                BLOCK_V=block_v,
                num_warps=WARPS,
            )
    return out


def merged(found: Tensor, voxels: int, length: int) -> Tensor:
    """Moments (N, 2, C) of what programs of `length` voxels, the last of fewer, found (N, programs, 2, C)."""
    batch, programs, _, channels = found.shape
    chunks = 1 if programs <= MOST_PROGRAMS else triton.cdiv(programs, MERGED_PROGRAMS)
    chunk = programs if chunks == 1 else MERGED_PROGRAMS
    out = found.new_empty((batch, chunks, 2, channels))
    if out.numel():
        with torch.cuda.device_of(found):
            merge_kernel[(chunks, triton.cdiv(channels, MERGED_CHANNELS), batch)](
                found,
                out,
                programs,
                channels,
                chunk,
                voxels,
                length,
                BLOCK_C=MERGED_CHANNELS,
                BLOCK_P=MERGED_PROGRAMS,
                num_warps=WARPS,
            )
    return out.squeeze(1) if chunks == 1 else merged(out, voxels, chunk * length)


def _tiles(voxels: int, block_v: int) -> int:
    """Tiles of a program: more in large maps, so that what programs find stays little."""
    tiles = TILES_PER_PROGRAM
    while triton.cdiv(voxels, block_v * tiles) > MOST_PROGRAMS:
        tiles *= 4
    return tiles


def _channels_last(x: Tensor) -> bool:
    return not x.is_contiguous()


def _sizes(x: Tensor) -> tuple[int, int]:
    return x.shape[1], x.shape[2:].numel()


def _grid(x: Tensor, block_c: int, block_v: int) -> tuple[int, int, int]:
    return triton.cdiv(x.shape[2:].numel(), block_v), triton.cdiv(x.shape[1], block_c), x.shape[0]
