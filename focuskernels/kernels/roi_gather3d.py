"""Triton kernels of roi_gather_3d (docs/roi.md).

Bytes: forward reads every voxel in a box and writes the result; backward reads the gradient of the result and
writes the gradients of the sources once. A launch serves one source, and one size of ROI: it writes its channels of the
result. Backward gathers: every voxel of a source sums what the ROIs owe it, in their order, without atomics.
"""

import contextlib
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.roi_gather3d import Boxes, empty_gradients, empty_outputs

BLOCK_C = 8
BLOCK_V = 128
WARPS = 8


@triton.jit
def _position(center, o, roi, out, scale: tl.float64, size, BORDER: tl.constexpr):
    """As reference.coordinates, operation by operation."""
    margin = roi + 2 + 2 / scale
    limit = size / scale + margin
    center = tl.where(center < -margin, -margin, center)
    center = tl.where(center > limit, limit, center)
    step = (o.to(tl.float64) + 0.5) * (roi.to(tl.float64) / out) - 0.5
    x = (center - roi // 2 + step + 0.5) * scale - 0.5
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
def forward_kernel(
    source,
    centers,
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
    roi_z,
    roi_y,
    roi_x,
    out_z,
    out_y,
    out_x,
    scale_z: tl.float64,
    scale_y: tl.float64,
    scale_x: tl.float64,
    BORDER: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    k = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    # Divisions in 32 bits: in 64 they are calls. The launcher refuses larger volumes.
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (c < channels)[:, None] & (v < out_z * out_y * out_x)[None, :]
    center = centers + 4 * k
    sample = tl.load(center).to(tl.float64)
    known = (sample >= 0) & (sample < samples)
    n = tl.where(known, sample, 0.0).to(tl.int64)
    z = _position(tl.load(center + 1).to(tl.float64), v // (out_y * out_x), roi_z, out_z, scale_z, depth, BORDER)
    y = _position(tl.load(center + 2).to(tl.float64), v // out_x % out_y, roi_y, out_y, scale_y, height, BORDER)
    x = _position(tl.load(center + 3).to(tl.float64), v % out_x, roi_x, out_x, scale_x, width, BORDER)
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
    into = result + k * result_k + c[:, None] * result_c + v.to(tl.int64)[None, :] * result_v
    tl.store(into, total.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _reach(center, roi, out, scale: tl.float64, size, BORDER: tl.constexpr):
    """Where to look for the first sample, the distance of two, its inverse, and how many may read one voxel."""
    first = _position(center, tl.full((), 0, tl.int64), roi, out, scale, size, False)
    step = roi.to(tl.float64) / out * scale
    whole = (step == 1) & (tl.floor(first) == first)
    count = tl.minimum(tl.ceil(2 / step).to(tl.int64) + 1, out)
    if BORDER:
        # The voxels at the border are read from everywhere outside.
        count = out + 0 * count
    else:
        count = tl.where(whole, 1, count)
        # The sample before the only one of those that lie on voxels has weight 0.
        first = tl.where(whole, first - 1, first)
    return first, step, 1 / step, count


@triton.jit
def _reader(v, i, first, per_voxel, BORDER: tl.constexpr):
    """Candidate i of the samples that read voxel v."""
    if BORDER:
        return v.to(tl.int64) * 0 + i
    else:
        o = tl.ceil((v.to(tl.float64) - 1 - first) * per_voxel)
        return tl.where((o > 0) & (o < 1e9), o, 0.0).to(tl.int64) + i


@triton.jit
def _weight(v, o, center, roi, out, scale: tl.float64, size, BORDER: tl.constexpr):
    index, low, high = _pair(_position(center, o, roi, out, scale, size, BORDER), size)
    weight = tl.where(index == v, low, tl.where(index + 1 == v, high, 0.0))
    return tl.where((o >= 0) & (o < out), weight, 0.0)


@triton.jit
def backward_kernel(
    grad,
    centers,
    total,
    result,
    rois,
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
    roi_z,
    roi_y,
    roi_x,
    out_z,
    out_y,
    out_x,
    scale_z: tl.float64,
    scale_y: tl.float64,
    scale_x: tl.float64,
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
        center_z = tl.load(center + 1).to(tl.float64)
        center_y = tl.load(center + 2).to(tl.float64)
        center_x = tl.load(center + 3).to(tl.float64)
        first_z, step_z, per_z, count_z = _reach(center_z, roi_z, out_z, scale_z, depth, BORDER)
        first_y, _step_y, per_y, count_y = _reach(center_y, roi_y, out_y, scale_y, height, BORDER)
        first_x, _step_x, per_x, count_x = _reach(center_x, roi_x, out_x, scale_x, width, BORDER)
        near = (high_z.to(tl.float64) > first_z - 1) & (low_z.to(tl.float64) < first_z + step_z * (out_z - 1) + 2)
        if BORDER:
            near = near | (low_z == 0) | (high_z >= depth - 1)
        if (tl.floor(sample) == n.to(tl.float64)) & near:
            owed = grad + number * grad_k + c[:, None] * grad_c
            for i in range(count_z):
                oz = _reader(z, i, first_z, per_z, BORDER)
                wz = _weight(z, oz, center_z, roi_z, out_z, scale_z, depth, BORDER)
                for j in range(count_y):
                    oy = _reader(y, j, first_y, per_y, BORDER)
                    wy = wz * _weight(y, oy, center_y, roi_y, out_y, scale_y, height, BORDER)
                    for m in range(count_x):
                        ox = _reader(x, m, first_x, per_x, BORDER)
                        weight = wy * _weight(x, ox, center_x, roi_x, out_x, scale_x, width, BORDER)
                        o = (oz * out_y + oy) * out_x + ox
                        read = inside & (weight != 0)[None, :]
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
    for group, (rois, out) in enumerate(zip(boxes.groups(), outputs, strict=True)):
        first = 0
        for i, source in enumerate(sources):
            part = _part(boxes, i, source, rois.start)
            into = out[:, first : first + part.shape[1]]
            first += part.shape[1]
            if into.numel() == 0 or part.shape[0] == 0:
                into.zero_()
                continue
            grid = (triton.cdiv(out[0, 0].numel(), BLOCK_V), triton.cdiv(part.shape[1], BLOCK_C), out.shape[0])
            roi, size = boxes.sizes(group)
            with _on(source):
                forward_kernel[grid](
                    part,
                    boxes.centers[rois],
                    into,
                    *part.shape,
                    *part.stride(),
                    *_dense_strides(into),
                    *roi,
                    *size,
                    *scales[3 * i : 3 * i + 3],
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
    """As `reference.roi_gather3d.backward`, for one size of ROI."""
    boxes = Boxes(centers.contiguous(), roi_size, output_size, scales, channels, border)
    results = empty_gradients(grads, centers, shapes, dtypes, channels_last)
    (grad,) = (_dense(grad) for grad in grads)
    for i, result in enumerate(results):
        if result.numel() == 0:
            continue
        owed = grad[:, first_channels[i] : first_channels[i] + result.shape[1]]
        grid = (triton.cdiv(result[0, 0].numel(), BLOCK_V), triton.cdiv(result.shape[1], BLOCK_C), result.shape[0])
        with _on(result):
            backward_kernel[grid](
                owed,
                boxes.centers,
                bases[i] if bases else result,
                result,
                owed.shape[0],
                *result.shape[1:],
                *_dense_strides(owed),
                *_dense_strides(result),
                *boxes.roi_size,
                *boxes.output_size,
                *scales[3 * i : 3 * i + 3],
                ADD=bool(bases),
                BORDER=border,
                BLOCK_C=BLOCK_C,
                BLOCK_V=BLOCK_V,
                num_warps=WARPS,
            )
    return results


def _part(boxes: Boxes, i: int, source: Tensor, roi: int) -> Tensor:
    """The channels that a group of ROIs reads."""
    return source.narrow(1, max(boxes.channel(i, roi), 0), boxes.width(i, source.shape[1]))


def _dense(x: Tensor) -> Tensor:
    layout = torch.channels_last_3d
    return x if x.is_contiguous() or x.is_contiguous(memory_format=layout) else x.contiguous()


def _dense_strides(x: Tensor) -> tuple[int, int, int]:
    """Of (N, C, D, H, W) whose voxels lie one after the other: by sample, channel and voxel."""
    # The stride of an axis of length 1 says nothing.
    voxel = next((x.stride(d) for d in (4, 3, 2) if x.shape[d] > 1), 1)
    return x.stride(0), x.stride(1), voxel


def _on(x: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()
