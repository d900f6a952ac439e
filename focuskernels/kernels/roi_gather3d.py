"""Triton kernels of roi_gather_3d (docs/roi.md).

Bytes: forward reads every voxel in a box and writes the result; backward reads the gradient of the result and
writes the gradients of the sources once. A launch serves one source and all ROIs. Backward gathers: every voxel of a
source sums what the ROIs owe it, in their order, without atomics.

ROIs of one size are one tensor. Others are tensors of their own, and a table on the device says where they lie and what
they read.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._lib import is_channels_last, layout
from ..reference.roi_gather3d import Boxes, empty_gradients, empty_outputs

BLOCK_C = 8
BLOCK_V = 128
WARPS = 8


@triton.jit
def _axis(geometry, k, axis: tl.constexpr):
    """Of ROI k along an axis what `_geometry` has worked out."""
    row = geometry + 24 * k + 8 * axis
    out, count = tl.load(row).to(tl.int32), tl.load(row + 1).to(tl.int32)
    return (
        out,
        count,
        tl.load(row + 2),
        tl.load(row + 3),
        tl.load(row + 4),
        tl.load(row + 5),
        tl.load(row + 6),
        tl.load(row + 7),
    )


@triton.jit
def _start(center, axis):
    """The first voxel of the ROI around a centre, which may be far outside."""
    _out, _count, half, margin, limit, _bins, _per_voxel, _scale = axis
    center = center.to(tl.float64)
    center = tl.where(center < -margin, -margin, center)
    return tl.where(center > limit, limit, center) - half


@triton.jit
def _position(start, o, axis, size, BORDER: tl.constexpr):
    """As reference.coordinates, operation by operation."""
    step = (o.to(tl.float64) + 0.5) * axis[5] - 0.5
    x = (start + step + 0.5) * axis[7] - 0.5
    if BORDER:
        x = tl.where(x < 0, 0.0, x)
        x = tl.where(x > size - 1, size - 1.0, x)
    return x


@triton.jit
def _pair(x, size):
    """Lower voxel of the two around x, and their weights, 0 outside; not a number where x is none."""
    lower = tl.floor(x)
    fraction = x - lower
    index = tl.where(x == x, lower, 0.0).to(tl.int64)
    low = tl.where((index >= 0) & (index < size), 1 - fraction, 0.0)
    high = tl.where((index >= -1) & (index < size - 1), fraction, 0.0)
    return index, low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _entry(table, k, pointer):
    """Where ROI k's samples lie, and the first channel that it reads."""
    return tl.load(table + 2 * k).to(pointer.dtype), tl.load(table + 2 * k + 1)


@triton.jit
def forward_kernel(
    source,
    centers,
    geometry,
    table,
    result,
    samples,
    channels,
    depth,
    height,
    width,
    source_n,
    source_c,
    source_z,
    source_y,
    source_x,
    result_k,
    result_c,
    result_v,
    TABLE: tl.constexpr,
    BORDER: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    k = tl.program_id(2).to(tl.int64)
    group = k if TABLE else k * 0
    along_z, along_y, along_x = _axis(geometry, group, 0), _axis(geometry, group, 1), _axis(geometry, group, 2)
    out_z, out_y, out_x = along_z[0], along_y[0], along_x[0]
    if TABLE:
        into, channel = _entry(table, k, result)
        source += channel * source_c
        # 0: channels first, each as long as the ROI
        stride_c = result_c if result_c else (out_z * out_y * out_x).to(result_c.dtype)
    else:
        into, stride_c = result + k * result_k, result_c
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    # Divisions in 32 bits: in 64 they are calls. The launcher refuses larger volumes.
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (c < channels)[:, None] & (v < out_z * out_y * out_x)[None, :]
    center = centers + 4 * k
    sample = tl.load(center).to(tl.float64)
    known = (sample >= 0) & (sample < samples)
    n = tl.where(known, sample, 0.0).to(tl.int64)
    z = _position(_start(tl.load(center + 1), along_z), v // (out_y * out_x), along_z, depth, BORDER)
    y = _position(_start(tl.load(center + 2), along_y), v // out_x % out_y, along_y, height, BORDER)
    x = _position(_start(tl.load(center + 3), along_x), v % out_x, along_x, width, BORDER)
    z_index, z_low, z_high = _pair(z, depth)
    z_low, z_high = tl.where(known, z_low, 0.0), tl.where(known, z_high, 0.0)
    y_index, y_low, y_high = _pair(y, height)
    x_index, x_low, x_high = _pair(x, width)
    first = source + n * source_n + c[:, None] * source_c
    total = tl.zeros((BLOCK_C, BLOCK_V), tl.float32)
    for corner in tl.static_range(8):
        weight = z_high if corner // 4 else z_low
        weight *= y_high if corner // 2 % 2 else y_low
        weight *= x_high if corner % 2 else x_low
        place = (z_index + corner // 4) * source_z
        place += (y_index + corner // 2 % 2) * source_y + (x_index + corner % 2) * source_x
        # What has no part in a sample is not read.
        read = inside & (weight != 0)[None, :]
        value = tl.load(first + place[None, :], mask=read, other=0.0).to(tl.float32)
        total += tl.where(read, value * weight[None, :], 0.0)
    into += c[:, None] * stride_c + v.to(tl.int64)[None, :] * result_v
    tl.store(into, total.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _reach(start, axis, size, BORDER: tl.constexpr):
    """Where to look for the first sample, the distance of two, and how many may read one voxel."""
    out, count, _half, _margin, _limit, bins, _per_voxel, scale = axis
    first = _position(start, tl.full((), 0, tl.int64), axis, size, False)
    step = bins * scale
    if not BORDER:
        whole = (step == 1) & (tl.floor(first) == first)
        count = tl.where(whole, 1, count)
        # The sample before the only one of those that lie on voxels has weight 0.
        first = tl.where(whole, first - 1, first)
    return first, step * (out - 1), count


@triton.jit
def _reader(v, i, first, per_voxel, BORDER: tl.constexpr):
    """Candidate i of the samples that read voxel v."""
    if BORDER:
        return v.to(tl.int64) * 0 + i
    else:
        o = tl.ceil((v.to(tl.float64) - 1 - first) * per_voxel)
        return tl.where((o > 0) & (o < 1e9), o, 0.0).to(tl.int64) + i


@triton.jit
def _weight(v, o, start, axis, size, BORDER: tl.constexpr):
    index, low, high = _pair(_position(start, o, axis, size, BORDER), size)
    weight = tl.where(index == v, low, tl.where(index + 1 == v, high, 0.0))
    return tl.where((o >= 0) & (o < axis[0]), weight, 0.0)


@triton.jit
def backward_kernel(
    grad,
    centers,
    geometry,
    table,
    total,
    result,
    rois,
    reads,
    channels,
    depth,
    height,
    width,
    grad_k,
    grad_c,
    grad_v,
    result_n,
    result_c,
    result_v,
    TABLE: tl.constexpr,
    ADD: tl.constexpr,
    BORDER: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = tl.program_id(0) * BLOCK_V
    v = start + tl.arange(0, BLOCK_V)
    inside = (c < channels)[:, None] & (v < depth * height * width)[None, :]
    z, y, x = v // (height * width), v // width % height, v % width
    place = n * result_n + c[:, None] * result_c + v.to(tl.int64)[None, :] * result_v
    if ADD:
        sums = tl.load(total + place, mask=inside, other=0.0).to(tl.float32)
    else:
        sums = tl.zeros((BLOCK_C, BLOCK_V), tl.float32)
    low_z, high_z = start // (height * width), (start + BLOCK_V - 1) // (height * width)
    for k in range(rois):
        number = k + tl.full((), 0, tl.int64)
        center = centers + 4 * number
        sample = tl.load(center).to(tl.float64)
        group = number if TABLE else number * 0
        along_z, along_y, along_x = _axis(geometry, group, 0), _axis(geometry, group, 1), _axis(geometry, group, 2)
        start_z = _start(tl.load(center + 1), along_z)
        start_y = _start(tl.load(center + 2), along_y)
        start_x = _start(tl.load(center + 3), along_x)
        first_z, length_z, count_z = _reach(start_z, along_z, depth, BORDER)
        first_y, _length_y, count_y = _reach(start_y, along_y, height, BORDER)
        first_x, _length_x, count_x = _reach(start_x, along_x, width, BORDER)
        near = (high_z.to(tl.float64) > first_z - 1) & (low_z.to(tl.float64) < first_z + length_z + 2)
        if BORDER:
            near = near | (low_z == 0) | (high_z >= depth - 1)
        if (tl.floor(sample) == n.to(tl.float64)) & near:
            if TABLE:
                owed, channel = _entry(table, number, grad)
                stride_c = grad_c if grad_c else (along_z[0] * along_y[0] * along_x[0]).to(grad_c.dtype)
                owed += (c - channel)[:, None] * stride_c
                readers = inside & ((c >= channel) & (c < channel + reads))[:, None]
            else:
                owed, readers = grad + number * grad_k + c[:, None] * grad_c, inside
            for i in range(count_z):
                oz = _reader(z, i, first_z, along_z[6], BORDER)
                wz = _weight(z, oz, start_z, along_z, depth, BORDER)
                for j in range(count_y):
                    oy = _reader(y, j, first_y, along_y[6], BORDER)
                    wy = wz * _weight(y, oy, start_y, along_y, height, BORDER)
                    for m in range(count_x):
                        ox = _reader(x, m, first_x, along_x[6], BORDER)
                        weight = wy * _weight(x, ox, start_x, along_x, width, BORDER)
                        o = (oz * along_y[0] + oy) * along_x[0] + ox
                        read = readers & (weight != 0)[None, :]
                        value = tl.load(owed + o[None, :] * grad_v, mask=read, other=0.0).to(tl.float32)
                        sums += tl.where(read, value * weight[None, :], 0.0)
    tl.store(result + place, sums.to(result.dtype.element_ty), mask=inside)


def forward(
    sources: Sequence[Tensor],
    centers: Tensor,
    roi_size: Sequence[int],
    output_size: Sequence[int],
    scales: Sequence[float],
    channels: Sequence[int],
    border: bool,
) -> list[Tensor]:
    """As `reference.roi_gather3d.forward`."""
    boxes = Boxes(centers.contiguous(), roi_size, output_size, scales, channels, border)
    outputs = empty_outputs(sources, boxes)
    if not outputs or not len(centers):
        return outputs
    voxel = outputs[0].shape[1] if is_channels_last(sources[0]) else 1
    first = 0
    for i, source in enumerate(sources):
        reads = boxes.width(i, source.shape[1])
        parts = [out[:, first : first + reads] for out in outputs]
        first += reads
        voxels = max(part.shape[2:].numel() for part in parts)
        if not source.shape[0] or not reads or not voxels:
            for part in parts:
                part.zero_()
            continue
        with torch.cuda.device_of(source):
            table, strides = _rois(boxes, i, parts, voxel)
            forward_kernel[triton.cdiv(voxels, BLOCK_V), triton.cdiv(reads, BLOCK_C), len(centers)](
                source,
                boxes.centers,
                _geometry(boxes, i, source),
                table,
                parts[0],
                source.shape[0],
                reads,
                *source.shape[2:],
                *source.stride(),
                *strides,
                TABLE=table is not None,
                BORDER=border,
                BLOCK_C=BLOCK_C,
                BLOCK_V=BLOCK_V,
                num_warps=WARPS,
            )
    return outputs


def backward(
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    centers: Tensor,
    roi_size: Sequence[int],
    output_size: Sequence[int],
    scales: Sequence[float],
    channels: Sequence[int],
    shapes: Sequence[int],
    first_channels: Sequence[int],
    dtypes: Sequence[int],
    channels_last: Sequence[int],
    border: bool,
) -> list[Tensor]:
    """As `reference.roi_gather3d.backward`."""
    boxes = Boxes(centers.contiguous(), roi_size, output_size, scales, channels, border)
    results = empty_gradients(centers, shapes, dtypes, channels_last)
    last = any(is_channels_last(grad) for grad in grads)
    grads = [grad.contiguous(memory_format=layout(last)) for grad in grads]
    voxel = grads[0].shape[1] if last else 1
    for i, result in enumerate(results):
        if result.numel() == 0:
            continue
        first, reads = first_channels[i], boxes.width(i, result.shape[1])
        parts = [grad[:, first : first + reads] for grad in grads]
        grid = (triton.cdiv(result[0, 0].numel(), BLOCK_V), triton.cdiv(result.shape[1], BLOCK_C), result.shape[0])
        with torch.cuda.device_of(result):
            table, strides = _rois(boxes, i, parts, voxel)
            backward_kernel[grid](
                parts[0],
                boxes.centers,
                _geometry(boxes, i, result),
                table,
                bases[i] if bases else result,
                result,
                len(centers),
                reads,
                *result.shape[1:],
                *strides,
                *_dense_strides(result),
                TABLE=table is not None,
                ADD=bool(bases),
                BORDER=border,
                BLOCK_C=BLOCK_C,
                BLOCK_V=BLOCK_V,
                num_warps=WARPS,
            )
    return results


def _geometry(boxes: Boxes, i: int, source: Tensor) -> Tensor:
    """On the device, for every output and axis: what kernels need of sizes and scales, so that they divide by none."""
    scales = tuple(boxes.scales[3 * i : 3 * i + 3])
    return _geometry_of(
        tuple(boxes.roi_size), tuple(boxes.output_size), scales, source.shape[2:], boxes.border, source.device
    )


@functools.lru_cache(maxsize=64)
def _geometry_of(
    roi_size: tuple[int, ...],
    output_size: tuple[int, ...],
    scales: tuple[float, ...],
    shape: torch.Size,
    border: bool,
    device: torch.device,
) -> Tensor:
    rows = []
    for roi, out, scale, size in zip(roi_size, output_size, itertools.cycle(scales), itertools.cycle(shape)):
        margin, bins = roi + 2 + 2 / scale, roi / out
        # The voxels at the border are read from everywhere outside.
        count = out if border else min(math.ceil(2 / (bins * scale)) + 1, out)
        rows.append((out, count, roi // 2, margin, size / scale + margin, bins, 1 / (bins * scale), scale))
    return torch.tensor(rows, dtype=torch.float64).to(device)


def _rois(boxes: Boxes, i: int, parts: Sequence[Tensor], voxel: int) -> tuple[Tensor | None, Sequence[int]]:
    """The table of ROIs that are tensors of their own, else None; strides by ROI, channel and voxel.

    Args:
        boxes: all ROIs.
        i: number of the source that they read.
        parts: its channels of every output, or of their gradients; all in one layout.
        voxel: how far apart their voxels are, in elements; 1 where channels come first.
    """
    if len(parts) == 1 and not boxes.channels:
        return None, _dense_strides(parts[0])
    rows = [(part.data_ptr(), max(boxes.channel(i, k), 0)) for k, part in enumerate(parts)]
    strides = (0, 0, 1) if voxel == 1 else (0, 1, voxel)
    return torch.tensor(rows, dtype=torch.int64).to(parts[0].device, non_blocking=True), strides


def _dense_strides(x: Tensor) -> tuple[int, int, int]:
    """Of (N, C, D, H, W) whose voxels lie one after the other: by sample, channel and voxel."""
    # The stride of an axis of length 1 says nothing.
    voxel = next((x.stride(d) for d in (4, 3, 2) if x.shape[d] > 1), 1)
    return x.stride(0), x.stride(1), voxel
