"""Triton kernels of roi_align_3d (docs/roi.md).

Bytes: forward reads every voxel in a box and writes the result; backward reads the gradient of the result and writes
that of the input once. FLOPs: 2 per channel and pair of a bin and a voxel. A first, small launch works out per ROI and
axis which voxels a bin reads with what weight, so that samples cost nothing per channel; backward, for which only the
boxes are kept, repeats it.

The weight of bin o on voxel v of an axis is written at v + 2 o: neighbouring bins share at most two voxels, so that no
two places collide, and an axis takes size + 2 bins places, whatever the boxes are.
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._lib import is_channels_last
from ..reference.roi_align3d import empty_gradient, empty_output

#: Values of a program: of a few channels where they lie apart, of many where they lie side by side.
TILE = 1024
CHANNELS, CHANNELS_LAST = 8, 32
WARPS = 4
#: ROIs that are tested against a tile at a time.
BLOCK_K = 128
#: Bins, and voxels of each, that a table is written for at a time.
BLOCK_O, BLOCK_J, TABLE_WARPS = 8, 16, 4


@triton.jit
def _of(axis, z, y, x):
    return tl.where(axis == 0, z, tl.where(axis == 1, y, x))


@triton.jit
def _base(k, axis, sizes, bins, PER_VOXEL: tl.constexpr, PER_BIN: tl.constexpr):
    """Where the part of ROI k and an axis begins in a table with so many places per voxel and per bin."""
    z = PER_VOXEL * sizes[0] + PER_BIN * bins[0]
    y = PER_VOXEL * sizes[1] + PER_BIN * bins[1]
    x = PER_VOXEL * sizes[2] + PER_BIN * bins[2]
    return k * (z + y + x) + _of(axis, 0, z, z + y)


@triton.jit
def _over(a, b):
    """Division rounded as a CPU does it."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def _position(o, i, axis):
    """Sample i of bin o, as reference.samples, operation by operation."""
    start, bin_size, _step, count, _size = axis
    return start + o * bin_size + _over((i + 0.5) * bin_size, count)


@triton.jit
def _inside(x, i, axis):
    return (x >= -1) & (x <= axis[4]) & (i >= 0) & (i < axis[3])


@triton.jit
def _number(o, x, axis):
    """About which sample of bin o lies at x."""
    start, bin_size, step, _count, _size = axis
    return tl.where(step > 0, _over(x - (start + o * bin_size), tl.where(step > 0, step, 1)), 0)


@triton.jit
def _clamp(i, most):
    return tl.where(i > 0, tl.where(i < most, i, most), 0)


@triton.jit
def _lower_voxel(x, size):
    return tl.floor(_clamp(x, size - 1)).to(tl.int32)


@triton.jit
def _upper_voxel(x, size):
    """The lower one where that is read alone."""
    return tl.ceil(_clamp(x, size - 1)).to(tl.int32)


@triton.jit
def _first_sample(o, axis):
    """Of bin o the first sample inside, or -1; looks around the place where it lies without rounding."""
    guess = _clamp(tl.ceil(_number(o, -1, axis) - 0.5) - 1, axis[3] - 1)
    found = 0 * guess - 1
    for t in tl.static_range(3):
        i = guess + 2 - t
        found = tl.where(_inside(_position(o, i, axis), i, axis), i, found)
    return found


@triton.jit
def _last_sample(o, axis):
    guess = _clamp(tl.floor(_number(o, axis[4], axis) - 0.5) + 1, axis[3] - 1)
    found = 0 * guess - 1
    for t in tl.static_range(3):
        i = guess - 2 + t
        found = tl.where(_inside(_position(o, i, axis), i, axis), i, found)
    return found


@triton.jit
def _before(o, axis):
    """Whether bin o, of which nothing lies inside, lies before all voxels; else it lies behind them."""
    return (o < 0) | (_position(o, axis[3] - 1, axis) < -1)


@triton.jit
def _first_voxel(o, i, bins, axis):
    """That bin o with first sample i reads."""
    some = (i >= 0) & (o < bins) & (o >= 0)
    nothing = tl.where(_before(o, axis), 0, axis[4]).to(tl.int32)
    return tl.where(some, _lower_voxel(_position(o, i, axis), axis[4]), nothing)


@triton.jit
def _last_voxel(o, i, bins, axis):
    some = (i >= 0) & (o < bins) & (o >= 0)
    nothing = tl.where(_before(o, axis), -1, axis[4] - 1).to(tl.int32)
    return tl.where(some, _upper_voxel(_position(o, i, axis), axis[4]), nothing)


@triton.jit
def table_kernel(
    rois,
    weights,
    places,
    heads,
    samples,
    depth,
    height,
    width,
    bins_z,
    bins_y,
    bins_x,
    ratio,
    scale_z: tl.int64,
    scale_y: tl.int64,
    scale_x: tl.int64,
    ALIGNED: tl.constexpr,
    FORWARD: tl.constexpr,
    SPARSE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Heads (K, 3, 4): first voxel that ROI k reads, one past the last, bound of the readers' loop, sample.

    Places, forward: of every bin its first voxel and how many it reads, then which ones. Backward: of every voxel the
    first and last bin that read it.
    """
    k, a = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sizes, all_bins = (depth, height, width), (bins_z, bins_y, bins_x)
    voxels, bins = _of(a, depth, height, width).to(tl.int32), _of(a, bins_z, bins_y, bins_x).to(tl.int32)
    dtype = rois.dtype.element_ty
    scale = _of(a, scale_z, scale_y, scale_x).to(tl.float64, bitcast=True).to(dtype)
    row = rois + 7 * k
    sample = tl.load(row)
    offset = 0.5 if ALIGNED else 0.0
    start = tl.load(row + 1 + a) * scale - offset
    extent = tl.load(row + 4 + a) * scale - offset - start
    if not ALIGNED:
        extent = tl.where(extent > 1, extent, 1)
    bin_size = _over(extent, bins.to(dtype))
    # Written so that NaN is none.
    finite = (tl.abs(start) < float("inf")) & (tl.abs(bin_size) < float("inf"))
    usable = finite & (extent >= 0) & (sample >= 0) & (sample < samples)
    start, bin_size = tl.where(usable, start, 0), tl.where(usable, bin_size, 0)
    count = tl.where(usable, tl.full((), ratio, dtype) if SPARSE else tl.ceil(bin_size), 0)
    some = count > 0
    step = _over(bin_size, tl.where(some, count, 1))
    axis = (start, bin_size, step, tl.where(some, count, 1), voxels.to(dtype))

    weight_row = weights + _base(k, a, sizes, all_bins, 1, 2)
    place_row = places + (_base(k, a, sizes, all_bins, 1, 4) if FORWARD else _base(k, a, sizes, all_bins, 2, 0))
    candidates = tl.where(step > 0, tl.ceil(_over(2 + 0 * step, tl.where(step > 0, step, 1))) + 3, count)
    candidates = tl.where(some, tl.minimum(candidates, count), 0).to(tl.int32)
    share = _over(1 + 0 * count, axis[3])
    low, high, bound = voxels, 0 * voxels, 0 * voxels
    for block in range(0, tl.where(some, bins, 0), BLOCK_O):
        o = block + tl.arange(0, BLOCK_O)
        number = o.to(dtype)
        sample_first, sample_last = _first_sample(number, axis), _last_sample(number, axis)
        inside = tl.where((sample_first >= 0) & (sample_last >= sample_first), sample_last - sample_first + 1, 0)
        first = _first_voxel(number, sample_first, bins, axis)
        last = _last_voxel(number, sample_last, bins, axis)
        next_first = _first_voxel(number + 1, _first_sample(number + 1, axis), bins, axis)
        before = _last_voxel(number - 1, _last_sample(number - 1, axis), bins, axis)
        # Rounding could make bins of a box that is far too large overlap more than two places leave room for.
        last, before = tl.minimum(last, next_first + 1), tl.minimum(before, first + 1)
        used = (inside > 0) & (o < bins)
        low = tl.minimum(low, tl.min(tl.where(used, first, voxels)))
        high = tl.maximum(high, tl.max(tl.where(used, last + 1, 0)))
        length = tl.where(used, last - first + 1, 0)
        if FORWARD:
            # Of samples far apart only the voxels around each are read.
            far = (2 * inside < length) & SPARSE
            slots = tl.where(far, 2 * inside, length).to(tl.int32)
            bound = tl.maximum(bound, tl.max(slots))
            tl.store(place_row + o, first, o < bins)
            tl.store(place_row + bins + o, slots, o < bins)
            longest = tl.max(length)
        else:
            # Beyond the last voxel that is read nobody looks.
            until = tl.where(next_first == voxels, last, next_first - 1)
            longest = tl.max(tl.where(o < bins, tl.maximum(tl.maximum(length, last - before), until - first + 1), 0))
        for j_first in range(0, longest, BLOCK_J):
            j = j_first + tl.arange(0, BLOCK_J)[None, :]
            v = first[:, None] + j
            wanted = used[:, None] & (j < length[:, None])
            nearest = _number(number[:, None], v.to(dtype) - 1, axis)
            from_sample = _clamp(tl.ceil(nearest - 0.5) - 1, count - 1)
            weight = 0 * nearest
            for t in range(candidates):
                i = from_sample + t
                x = _position(number[:, None], i, axis)
                known = _inside(x, i, axis)
                x = tl.where(known, _clamp(x, axis[4] - 1), 0)
                lower = tl.floor(x)
                fraction = x - lower
                part = tl.where(lower == v, 1 - fraction, tl.where(lower + 1 == v, fraction, 0))
                weight += tl.where(known, part, 0)
            tl.store(weight_row + v + 2 * o[:, None], (weight * share).to(tl.float32), wanted)
            if SPARSE and FORWARD:
                i = sample_first[:, None] + j // 2
                x = _position(number[:, None], i, axis)
                lower, upper = _lower_voxel(x, axis[4]), _upper_voxel(x, axis[4])
                after = _lower_voxel(_position(number[:, None], i + 1, axis), axis[4])
                # A voxel that the next sample reads too, beside a border, is left to that one.
                alone = (lower < upper) & ((upper < after) | (j // 2 + 1 == inside[:, None]))
                upper = tl.where(alone, upper, voxels)
                read = tl.where(far[:, None], tl.where(j % 2 == 0, lower, upper), v)
                tl.store(place_row + 2 * bins + v + 2 * o[:, None], read, wanted)
            if not FORWARD:
                v = before[:, None] + 1 + j
                tl.store(place_row + v, o[:, None] + 0 * j, (o < bins)[:, None] & (v <= last[:, None]))
                v = first[:, None] + j
                tl.store(place_row + voxels + v, o[:, None] + 0 * j, (o < bins)[:, None] & (v <= until[:, None]))
    if not FORWARD:
        # Bins that may have a sample in [v - 1, v + 1]; the rest is for rounding.
        most = tl.where(bin_size > 0, 2 + _over(2.001 - step, tl.where(bin_size > 0, bin_size, 1)), bins)
        bound = tl.where(most < bins, tl.maximum(most, 1), bins).to(tl.int32)
    head = heads + 12 * k + 4 * a
    tl.store(head, tl.where(high > 0, low, 0))
    tl.store(head + 1, high)
    tl.store(head + 2, tl.where(high > 0, bound, 0))
    tl.store(head + 3, tl.where(usable, sample, -1).to(tl.int32))


@triton.jit
def _bin(weights, places, k, axis: tl.constexpr, sizes, bins, o, inside):
    """Of bins o along an axis: weights by voxel, voxels by slot, first voxel, number of slots."""
    base = places + _base(k, axis, sizes, bins, 1, 4)
    first = tl.load(base + o, mask=inside, other=0)
    number = tl.load(base + bins[axis] + o, mask=inside, other=0)
    return (
        weights + _base(k, axis, sizes, bins, 1, 2) + 2 * o,
        base + 2 * bins[axis] + first + 2 * o,
        first,
        number,
    )


@triton.jit
def _slot(along, j, size, SPARSE: tl.constexpr):
    """Voxel number j that bins read, and its weight."""
    weights, voxels, first, number = along
    voxel = tl.load(voxels + j, mask=j < number, other=0) if SPARSE else first + j
    # A slot that says `size` is of a voxel that another one reads, or none.
    weight = tl.load(weights + voxel, mask=(j < number) & (voxel < size), other=0.0)
    return voxel.to(tl.int64), weight


@triton.jit
def forward_kernel(
    source,
    weights,
    places,
    heads,
    result,
    channels,
    depth,
    height,
    width,
    bins_z,
    bins_y,
    bins_x,
    source_n,
    source_c,
    source_z,
    source_y,
    source_x,
    result_k,
    result_c,
    result_v,
    SPARSE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    k = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    # Divisions in 32 bits: in 64 they are calls. The launcher refuses larger volumes.
    o = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    known = o < bins_z * bins_y * bins_x
    inside = (c < channels)[:, None] & known[None, :]
    sizes, bins = (depth, height, width), (bins_z, bins_y, bins_x)
    along_z = _bin(weights, places, k, 0, sizes, bins, o // (bins_y * bins_x), known)
    along_y = _bin(weights, places, k, 1, sizes, bins, o // bins_x % bins_y, known)
    along_x = _bin(weights, places, k, 2, sizes, bins, o % bins_x, known)
    head = heads + 12 * k
    n = tl.maximum(tl.load(head + 3), 0).to(tl.int64)
    first = source + n * source_n + c[:, None] * source_c
    total = tl.zeros((BLOCK_C, BLOCK_V), tl.float32)
    bound_z, bound_y, bound_x = tl.load(head + 2), tl.load(head + 6), tl.load(head + 10)
    for i in range(bound_z):
        z, weight_z = _slot(along_z, i, depth, SPARSE)
        for j in range(bound_y):
            y, weight_y = _slot(along_y, j, height, SPARSE)
            line, weight_y = first + (z * source_z + y * source_y)[None, :], weight_z * weight_y
            for m in range(bound_x):
                x, weight_x = _slot(along_x, m, width, SPARSE)
                weight = weight_y * weight_x
                # What has no part in a bin is not read.
                read = inside & (weight != 0)[None, :]
                value = tl.load(line + (x * source_x)[None, :], mask=read, other=0.0).to(tl.float32)
                total += value * weight[None, :]
    result += k * result_k + c[:, None] * result_c + o.to(tl.int64)[None, :] * result_v
    tl.store(result, total.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _meets(heads, k, axis: tl.constexpr, low, high, known):
    head = heads + 12 * k.to(tl.int64) + 4 * axis
    from_voxel, to_voxel = tl.load(head, mask=known, other=0), tl.load(head + 1, mask=known, other=0)
    return known & (from_voxel <= high) & (to_voxel > low)


@triton.jit
def _readers(weights, places, heads, k, axis: tl.constexpr, sizes, bins, v):
    """Of voxels v along an axis: their weights by twice the bin, the first bin, how many, and the most of any voxel."""
    head = heads + 12 * k + 4 * axis
    inside = (v >= tl.load(head)) & (v < tl.load(head + 1))
    place = places + _base(k, axis, sizes, bins, 2, 0) + v
    first = tl.load(place, mask=inside, other=0)
    last = tl.load(place + sizes[axis], mask=inside, other=-1)
    return weights + _base(k, axis, sizes, bins, 1, 2) + v, first, last - first + 1, tl.load(head + 2)


@triton.jit
def _reader(along, j):
    """Bin number j that reads the voxels, and its weight."""
    weights, first, number, _most = along
    o = first + j
    return o.to(tl.int64), tl.load(weights + 2 * o, mask=j < number, other=0.0)


@triton.jit
def backward_kernel(
    grad,
    weights,
    places,
    heads,
    result,
    rois,
    channels,
    depth,
    height,
    width,
    bins_z,
    bins_y,
    bins_x,
    grad_k,
    grad_c,
    grad_z,
    grad_y,
    grad_x,
    result_n,
    result_c,
    result_v,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(2)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = tl.program_id(0) * BLOCK_V
    v = start + tl.arange(0, BLOCK_V)
    inside = (c < channels)[:, None] & (v < depth * height * width)[None, :]
    sizes, bins = (depth, height, width), (bins_z, bins_y, bins_x)
    end = tl.minimum(start, depth * height * width - BLOCK_V) + BLOCK_V - 1
    row, end_row = start // width, end // width
    z, end_z = row // height, end_row // height
    # The box around the tile: a row, rows of a plane, or planes.
    low_y, high_y = tl.where(z == end_z, row % height, 0), tl.where(z == end_z, end_row % height, height - 1)
    low_x, high_x = tl.where(row == end_row, start % width, 0), tl.where(row == end_row, end % width, width - 1)
    sums = tl.zeros((BLOCK_C, BLOCK_V), tl.float32)
    for block in range(0, rois, BLOCK_K):
        k = block + tl.arange(0, BLOCK_K)
        known = (k < rois) & (tl.load(heads + 12 * k.to(tl.int64) + 3, mask=k < rois, other=-1) == n)
        known = _meets(heads, k, 0, z, end_z, known)
        known = _meets(heads, k, 1, low_y, high_y, known)
        known = _meets(heads, k, 2, low_x, high_x, known)
        chosen = tl.min(tl.where(known, k, rois))
        if chosen < rois:
            # ROIs in their order.
            while chosen < rois:
                number = chosen.to(tl.int64)
                along_z = _readers(weights, places, heads, number, 0, sizes, bins, v // (height * width))
                along_y = _readers(weights, places, heads, number, 1, sizes, bins, v // width % height)
                along_x = _readers(weights, places, heads, number, 2, sizes, bins, v % width)
                owed = grad + number * grad_k + c[:, None] * grad_c
                for i in range(along_z[3]):
                    o_z, weight_z = _reader(along_z, i)
                    for j in range(along_y[3]):
                        o_y, weight_y = _reader(along_y, j)
                        line, weight_y = owed + (o_z * grad_z + o_y * grad_y)[None, :], weight_z * weight_y
                        for m in range(along_x[3]):
                            o_x, weight_x = _reader(along_x, m)
                            weight = weight_y * weight_x
                            read = inside & (weight != 0)[None, :]
                            value = tl.load(line + (o_x * grad_x)[None, :], mask=read, other=0.0).to(tl.float32)
                            sums += value * weight[None, :]
                known = known & (k > chosen)
                chosen = tl.min(tl.where(known, k, rois))
    result += n.to(tl.int64) * result_n + c[:, None] * result_c + v.to(tl.int64)[None, :] * result_v
    tl.store(result, sums.to(result.dtype.element_ty), mask=inside)


class _Tables(NamedTuple):
    weights: Tensor  #: (K, places) float32
    places: Tensor  #: (K, places) int32
    heads: Tensor  #: (K, 3, 4) int32


def _tables(
    rois: Tensor,
    bins: Sequence[int],
    scale: Sequence[float],
    ratio: int,
    aligned: bool,
    shape: Sequence[int],
    is_forward: bool,
) -> _Tables:
    count, voxels, all_bins = len(rois), sum(shape[2:]), sum(bins)
    weights = rois.new_empty((count, voxels + 2 * all_bins), dtype=torch.float32)
    places = rois.new_empty((count, voxels + 4 * all_bins if is_forward else 2 * voxels), dtype=torch.int32)
    heads = rois.new_empty((count, 3, 4), dtype=torch.int32)
    # A launch passes Python's floats as float32; these are the bits of float64.
    bits = struct.unpack("3q", struct.pack("3d", *scale))
    table_kernel[count, 3](
        rois.contiguous(),
        weights,
        places,
        heads,
        shape[0],
        *shape[2:],
        *bins,
        ratio,
        *bits,
        ALIGNED=aligned,
        FORWARD=is_forward,
        SPARSE=ratio > 0,
        BLOCK_O=BLOCK_O,
        BLOCK_J=BLOCK_J,
        num_warps=TABLE_WARPS,
        # One rounding per operation, as on a CPU, or samples at a border and counts would differ.
        enable_fp_fusion=False,
    )
    return _Tables(weights, places, heads)


def forward(
    input: Tensor, rois: Tensor, output_size: Sequence[int], scale: Sequence[float], sampling_ratio: int, aligned: bool
) -> Tensor:
    """As `reference.roi_align3d.forward`."""
    out = empty_output(input, rois, output_size)
    if not input.shape[0]:
        return out.zero_()
    if out.numel() == 0:
        return out
    channels_last = is_channels_last(input)
    block_c, block_v = tile(input.shape[1], channels_last)
    with torch.cuda.device_of(input):
        tables = _tables(rois, output_size, scale, sampling_ratio, aligned, input.shape, True)
        forward_kernel[triton.cdiv(out[0, 0].numel(), block_v), triton.cdiv(out.shape[1], block_c), len(rois)](
            input,
            *tables,
            out,
            *input.shape[1:],
            *output_size,
            *input.stride(),
            *_strides(out.shape, channels_last),
            SPARSE=sampling_ratio > 0,
            BLOCK_C=block_c,
            BLOCK_V=block_v,
            num_warps=WARPS,
        )
    return out


def backward(
    grad: Tensor,
    rois: Tensor,
    scale: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    shape: Sequence[int],
    dtype: int,
    channels_last: bool,
) -> Tensor:
    """As `reference.roi_align3d.backward`."""
    result = empty_gradient(grad, shape, dtype, channels_last)
    if not len(rois):
        return result.zero_()
    if result.numel() == 0:
        return result
    block_c, block_v = tile(shape[1], channels_last)
    with torch.cuda.device_of(result):
        tables = _tables(rois, grad.shape[2:], scale, sampling_ratio, aligned, shape, False)
        backward_kernel[triton.cdiv(result[0, 0].numel(), block_v), triton.cdiv(shape[1], block_c), shape[0]](
            grad,
            *tables,
            result,
            len(rois),
            *shape[1:],
            *grad.shape[2:],
            *grad.stride(),
            *_strides(shape, channels_last),
            BLOCK_K=min(BLOCK_K, triton.next_power_of_2(len(rois))),
            BLOCK_C=block_c,
            BLOCK_V=block_v,
            num_warps=WARPS,
        )
    return result


def tile(channels: int, channels_last: bool) -> tuple[int, int]:
    """BLOCK_C and BLOCK_V."""
    block_c = min(triton.next_power_of_2(channels), CHANNELS_LAST if channels_last else CHANNELS)
    return block_c, TILE // block_c


def _strides(shape: Sequence[int], channels_last: bool) -> tuple[int, int, int]:
    """Of a dense (N, C, D, H, W): by sample, channel and voxel."""
    _, channels, *sizes = shape
    voxels = sizes[0] * sizes[1] * sizes[2]
    return (channels * voxels, 1, channels) if channels_last else (channels * voxels, voxels, 1)
