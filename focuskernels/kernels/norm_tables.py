"""Triton kernels of what stands between the passes of a norm: a few numbers per sample and channel.

A program has some channels, or a group of them, of all samples. In float64: the numbers are few, and a dozen small
launches would cost more than the passes over a small map.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BATCH = tl.constexpr(0)
GROUP = tl.constexpr(2)

#: Channels of a program, but for a group's.
BLOCK_C = 32
#: Largest group that one program takes.
MOST = 4096
WARPS = 1


@triton.jit
def _number(place, inside):
    return tl.load(place, mask=inside, other=0.0).to(tl.float64)


@triton.jit
def table_kernel(
    moments,
    weight,
    bias,
    table,
    rstd,
    variance,
    samples,
    channels,
    width,
    voxels: tl.int64,
    eps: tl.float32,
    NORM: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)
    c = tl.program_id(0) * width + lane
    inside = (lane < width) & (c < channels)
    count = voxels.to(tl.float64)
    mean = tl.zeros((BLOCK,), tl.float64)
    squares = tl.zeros((BLOCK,), tl.float64)
    if NORM == BATCH:
        for n in range(samples):
            mean += _number(moments + n * 2 * channels + c, inside)
        mean = mean / samples
        for n in range(samples):
            distance = _number(moments + n * 2 * channels + c, inside) - mean
            squares += _number(moments + (n * 2 + 1) * channels + c, inside) + count * distance * distance
        squares = squares / (count * samples)
    for n in range(samples):
        if NORM != BATCH:
            mean = _number(moments + n * 2 * channels + c, inside)
            squares = _number(moments + (n * 2 + 1) * channels + c, inside)
            if NORM == GROUP:
                common = tl.sum(mean, axis=0) / width
                distance = tl.where(inside, mean - common, 0.0)
                squares = tl.sum(squares + count * distance * distance, axis=0) / width + tl.zeros((BLOCK,), tl.float64)
                mean = common + tl.zeros((BLOCK,), tl.float64)
            squares = squares / count
        inverse = 1.0 / tl.sqrt(squares + eps)
        scale = inverse
        if WEIGHT:
            scale = inverse * _number(weight + c, inside)
        shift = tl.zeros((BLOCK,), tl.float32)
        if BIAS:
            shift = tl.load(bias + c, mask=inside, other=0.0)
        tl.store(table + n * 3 * channels + c, mean.to(tl.float32), mask=inside)
        tl.store(table + (n * 3 + 1) * channels + c, scale.to(tl.float32), mask=inside)
        tl.store(table + (n * 3 + 2) * channels + c, shift, mask=inside)
        tl.store(rstd + n * channels + c, inverse.to(tl.float32), mask=inside)
        tl.store(variance + n * channels + c, squares.to(tl.float32), mask=inside)


@triton.jit
def gradient_kernel(
    sums,
    table,
    rstd,
    rows,
    weight,
    bias,
    samples,
    channels,
    width,
    voxels: tl.int64,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)
    c = tl.program_id(0) * width + lane
    inside = (lane < width) & (c < channels)
    count = voxels.to(tl.float64)
    of_weight = tl.zeros((BLOCK,), tl.float64)
    of_bias = tl.zeros((BLOCK,), tl.float64)
    mean = tl.zeros((BLOCK,), tl.float64)
    along = tl.zeros((BLOCK,), tl.float64)
    if NORM == BATCH:
        for n in range(samples):
            scale = _number(table + (n * 3 + 1) * channels + c, inside)
            mean -= scale * _number(sums + n * 2 * channels + c, inside)
            along -= scale * _number(sums + (n * 2 + 1) * channels + c, inside)
        mean = mean / (count * samples)
        along = along / (count * samples)
    for n in range(samples):
        scale = _number(table + (n * 3 + 1) * channels + c, inside)
        inverse = _number(rstd + n * channels + c, inside)
        total = _number(sums + n * 2 * channels + c, inside)
        moment = _number(sums + (n * 2 + 1) * channels + c, inside)
        if NORM != BATCH:
            mean = -scale * total / count
            along = -scale * moment / count
            if NORM == GROUP:
                mean = tl.sum(mean, axis=0) / width + tl.zeros((BLOCK,), tl.float64)
                along = tl.sum(along, axis=0) / width + tl.zeros((BLOCK,), tl.float64)
        tl.store(rows + n * 3 * channels + c, scale.to(tl.float32), mask=inside)
        tl.store(rows + (n * 3 + 1) * channels + c, (along * inverse * inverse).to(tl.float32), mask=inside)
        tl.store(rows + (n * 3 + 2) * channels + c, mean.to(tl.float32), mask=inside)
        of_weight += moment * inverse
        of_bias += total
    tl.store(weight + c, of_weight.to(tl.float32), mask=inside)
    tl.store(bias + c, of_bias.to(tl.float32), mask=inside)


def table(
    moments: Tensor, weight: Tensor | None, bias: Tensor | None, norm: int, groups: int, voxels: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.norm_act.norm_table`."""
    samples, _, channels = moments.shape
    out = moments.new_empty((samples, 3, channels))
    rstd, variance = (moments.new_empty((samples, channels)) for _ in range(2))
    if not channels:
        return out, rstd, variance
    grid, width, block = _programs(norm, groups, channels)
    with torch.cuda.device_of(moments):
        table_kernel[grid](
            moments,
            moments if weight is None else weight,
            moments if bias is None else bias,
            out,
            rstd,
            variance,
            samples,
            channels,
            width,
            voxels,
            eps,
            NORM=norm,
            WEIGHT=weight is not None,
            BIAS=bias is not None,
            BLOCK=block,
            num_warps=WARPS,
        )
    return out, rstd, variance


def gradient(
    sums: Tensor, table: Tensor, rstd: Tensor, norm: int, groups: int, voxels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.norm_act.norm_gradient`."""
    samples, _, channels = sums.shape
    rows = torch.empty_like(table)
    weight, bias = (sums.new_empty(channels) for _ in range(2))
    if not channels:
        return rows, weight, bias
    grid, width, block = _programs(norm, groups, channels)
    with torch.cuda.device_of(sums):
        gradient_kernel[grid](
            sums,
            table,
            rstd,
            rows,
            weight,
            bias,
            samples,
            channels,
            width,
            voxels,
            NORM=norm,
            BLOCK=block,
            num_warps=WARPS,
        )
    return rows, weight, bias


def _programs(norm: int, groups: int, channels: int) -> tuple[tuple[int], int, int]:
    """Grid, channels of a program, and those rounded up."""
    if norm == GROUP.value:
        return (groups,), channels // groups, triton.next_power_of_2(channels // groups)
    return (triton.cdiv(channels, BLOCK_C),), BLOCK_C, BLOCK_C
