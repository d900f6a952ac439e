"""Triton kernels of heatmap_argmax_3d (docs/roi.md).

Bytes: every value once, and 12 per chunk of a map written and read; no FLOPs but comparisons. A program finds the first
maximum of a chunk of some maps, a second one that of a map's chunks. Nothing depends on the order in which they run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Values of a pass, passes of a program, and maps of one whose maps lie side by side.
TILE, PASSES, MAPS = 2048, 16, 16
WARPS = 4
#: Chunks that a pass of the second kernel reads.
BLOCK = 512


@triton.jit
def _better(x, best):
    """NaN is the largest; of equals the earlier one stays."""
    return (x > best) | ((x != x) & (best == best))


@triton.jit
def _first_maximum(best, place):
    """Along the first axis. Lanes know the place of their own first maximum; where best is NaN it has no equal."""
    most = tl.full(place.shape, 2**63 - 1, tl.int64)
    nan = tl.min(tl.where(best != best, place, most), axis=0)
    number = tl.where(best == best, best, float("-inf"))
    top = tl.max(number, axis=0)
    first = tl.min(tl.where((best == best) & (number == top[None, :]), place, most), axis=0)
    is_nan = nan != 2**63 - 1
    return tl.where(is_nan, float("nan"), top), tl.where(is_nan, nan, first)


@triton.jit
def chunks_kernel(
    heatmaps,
    values,
    places,
    maps,
    voxels: tl.int64,
    stride_n: tl.int64,
    stride_k,
    stride_v,
    PASSES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n, k = tl.program_id(2).to(tl.int64), tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    start = tl.program_id(0).to(tl.int64) * (BLOCK_V * PASSES)
    v = tl.arange(0, BLOCK_V)
    source = heatmaps + n * stride_n + start * stride_v
    source += v.to(tl.int64)[:, None] * stride_v + k.to(tl.int64)[None, :] * stride_k
    known = (k < maps)[None, :]
    best = tl.load(source, mask=known & (start + v < voxels)[:, None], other=float("-inf")).to(tl.float32)
    found = tl.zeros((BLOCK_V, BLOCK_K), tl.int32)
    for i in range(1, PASSES):
        source += BLOCK_V * stride_v
        inside = known & (start + i * BLOCK_V + v < voxels)[:, None]
        x = tl.load(source, mask=inside, other=float("-inf")).to(tl.float32)
        better = _better(x, best)
        best, found = tl.where(better, x, best), tl.where(better, i, found)
    # What lies outside lies behind all others, and never comes first.
    value, place = _first_maximum(best, start + found * BLOCK_V + v[:, None])
    into = (n * maps + k) * tl.num_programs(0) + tl.program_id(0)
    tl.store(values + into, value, k < maps)
    tl.store(places + into, place, k < maps)


@triton.jit
def maps_kernel(
    heatmaps,
    values,
    places,
    position,
    value,
    maps,
    chunks,
    stride_n: tl.int64,
    stride_k: tl.int64,
    stride_v: tl.int64,
    BLOCK: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    place = tl.full((BLOCK,), 2**63 - 1, tl.int64)
    for first in range(0, chunks, BLOCK):
        inside = first + lane < chunks
        x = tl.load(values + number * chunks + first + lane, mask=inside, other=float("-inf"))
        at = tl.load(places + number * chunks + first + lane, mask=inside, other=2**63 - 1)
        # A chunk of -inf alone counts as well.
        better = _better(x, best) | ((x == best) & (at < place))
        best, place = tl.where(better, x, best), tl.where(better, at, place)
    _, place_of_top = _first_maximum(best[:, None], place[:, None])
    at = tl.min(place_of_top)
    tl.store(position + number, at)
    top = heatmaps + number // maps * stride_n + number % maps * stride_k + at * stride_v
    tl.store(value + number, tl.load(top))


def argmax(heatmaps: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.heatmap_argmax3d.argmax`."""
    batch, maps = heatmaps.shape[:2]
    position = heatmaps.new_empty((batch, maps), dtype=torch.int64)
    value = heatmaps.new_empty((batch, maps))
    if not batch * maps:
        return position, value
    if _voxel_stride(heatmaps) is None:
        heatmaps = heatmaps.contiguous()
    voxels, stride = heatmaps.shape[2:].numel(), _voxel_stride(heatmaps) or 1
    block_k, block_v = tile(maps, stride)
    chunks = triton.cdiv(voxels, block_v * PASSES)
    values = heatmaps.new_empty((batch, maps, chunks), dtype=torch.float32)
    places = heatmaps.new_empty((batch, maps, chunks), dtype=torch.int64)
    strides = (heatmaps.stride(0), heatmaps.stride(1), stride)
    with torch.cuda.device_of(heatmaps):
        chunks_kernel[chunks, triton.cdiv(maps, block_k), batch](
            heatmaps,
            values,
            places,
            maps,
            voxels,
            *strides,
            PASSES=PASSES,
            BLOCK_K=block_k,
            BLOCK_V=block_v,
            num_warps=WARPS,
        )
        maps_kernel[(batch * maps,)](
            heatmaps, values, places, position, value, maps, chunks, *strides, BLOCK=BLOCK, num_warps=WARPS
        )
    return position, value


def tile(maps: int, voxel_stride: int) -> tuple[int, int]:
    """BLOCK_K and BLOCK_V: one map where its voxels lie side by side."""
    block_k = 1 if voxel_stride == 1 else min(triton.next_power_of_2(maps), MAPS)
    return block_k, TILE // block_k


def _voxel_stride(x: Tensor) -> int | None:
    """How far apart the voxels of a map lie in (z, y, x) order; None where the distance is not the same everywhere."""
    stride, voxels = None, 1
    for size, distance in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size == 1:
            continue
        stride = distance if stride is None else stride
        if distance != stride * voxels:
            return None
        voxels *= size
    return 1 if stride is None else stride
