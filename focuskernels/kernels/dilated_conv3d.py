"""Triton kernels of the dilated convolution and its gradients (docs/dilated_conv3d.md).

Maps are (N, C, D, H, W) with channels innermost, possibly some channels of a wider map; sizes of a voxel V, taps T:
forward and the gradient of the input are one kernel (the latter with reversed taps), 2 T I O V FLOPs, which reads I V
and writes O V elements at least; the gradient of the weight reads (I + O) V. Taps that fall on padding for a whole tile
are skipped. Every element has one writer and every sum a fixed order: results do not depend on scheduling.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError
from triton.tools.tensor_descriptor import TensorDescriptor

from .._lib import layout_of, log
from ..reference import dilated_conv3d as reference
from . import dilated_conv3d_tiles as tiles
from .dilated_conv3d_tiles import AnyTile, Tile, WeightTile

#: A candidate this far from the vendor's result, relative to its norm, is wrong.
TOLERANCE = 2e-2


@triton.jit
def _first_tap(position, EXTENT: tl.constexpr, step, TAPS: tl.constexpr):
    """The first tap that meets the volume anywhere in a tile of EXTENT voxels from `position` on."""
    if TAPS == 1:
        return position * 0
    return (position + EXTENT <= step).to(tl.int32)


@triton.jit
def _end_tap(position, size, step, TAPS: tl.constexpr):
    """One past the last such tap."""
    if TAPS == 1:
        return position * 0 + 1
    return tl.minimum((size - 1 - position + step) // step + 1, TAPS)


@triton.jit
def _plane(g, depth, step, PAIR: tl.constexpr):
    """The g-th plane to compute: planes `step` apart follow each other, so that their common inputs stay in L2."""
    if PAIR:
        return g // step * (2 * step) + g % step
    planes = depth // step
    longer = (depth - planes * step) * (planes + 1)
    rest = g - longer
    shorter = tl.maximum(planes, 1)
    first = g % (planes + 1) * step + g // (planes + 1)
    return tl.where(g < longer, first, rest % shorter * step + depth - planes * step + rest // shorter)


@triton.jit
def conv_kernel(
    x,
    weight,
    y,
    bias,
    sums,
    D,
    H,
    W,
    sxn,
    sxd,
    sxh,
    sxw,
    syn,
    syd,
    syh,
    syw,
    step_d,
    step_h,
    step_w,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    KD: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
    PAIR: tl.constexpr,
    SWAP: tl.constexpr,
    BIAS: tl.constexpr,
    SUMS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One program: BH x BW voxels of a plane (PAIR: of two planes a step apart) times BN outputs.

    x and weight are descriptors (TMA) or pointers; weight is (rows, taps * CIN). With PAIR its rows are those of the
    first plane, then those of the second, over one more tap along the depth, zero where a plane has no such tap. SWAP
    puts the outputs, which are few, on the rows of the product: the voxels then need no way through registers.
    """
    BM: tl.constexpr = BH * BW
    KC: tl.constexpr = CIN // BK
    PLANES: tl.constexpr = KD + PAIR
    TAPS: tl.constexpr = PLANES * 9
    MIDDLE: tl.constexpr = KD // 2
    tile = tl.program_id(0)
    block = tl.program_id(1)
    n = tl.program_id(2)
    tiles_w = tl.cdiv(W, BW)
    tiles_h = tl.cdiv(H, BH)
    w0 = tile % tiles_w * BW
    h0 = tile // tiles_w % tiles_h * BH
    d = _plane(tile // (tiles_w * tiles_h), D, step_d, PAIR)

    d_first = _first_tap(d, 1, step_d, PLANES)
    d_end = _end_tap(d, D, step_d, PLANES)
    h_first = _first_tap(h0, BH, step_h, 3)
    h_end = _end_tap(h0, H, step_h, 3)
    w_first = _first_tap(w0, BW, step_w, 3)
    w_end = _end_tap(w0, W, step_w, 3)

    m = tl.arange(0, BM)
    rows = tl.arange(0, BN)
    hh = h0 + m // BW
    ww = w0 + m % BW
    inside = (hh < H) & (ww < W)
    if not TMA:
        depth = tl.arange(0, BK)
        # Not tl.where(inside, ..., 0): that would hide that rows are aligned, and split their loads.
        x_offsets = (hh * sxh + ww * sxw)[:, None] + depth[None, :]
        w_offsets = (block * BN + rows)[:, None] * (TAPS * CIN) + depth[None, :]
        x_base = x + n.to(tl.int64) * sxn
        valid = tl.zeros((BM,), tl.int32)
        for i in tl.static_range(9):
            zh = hh + (i // 3 - 1) * step_h
            zw = ww + (i % 3 - 1) * step_w
            valid = valid | ((inside & (zh >= 0) & (zh < H) & (zw >= 0) & (zw < W)).to(tl.int32) << i)

    if SWAP:
        total = tl.zeros((BN, BM), tl.float32)
    else:
        total = tl.zeros((BM, BN), tl.float32)
    zd = d + (d_first - MIDDLE) * step_d
    kh = h_first
    kw = w_first
    c = 0
    k = (d_first * 9 + h_first * 3 + w_first) * CIN
    for _ in range((d_end - d_first) * (h_end - h_first) * (w_end - w_first) * KC):
        dh = (kh - 1) * step_h
        dw = (kw - 1) * step_w
        if TMA:
            voxels = x.load([n, zd, h0 + dh, w0 + dw, c]).reshape(BM, BK)
            taps = weight.load([block * BN, k])
        else:
            start = x_base + (zd.to(tl.int64) * sxd + (dh.to(tl.int64) * sxh + (dw * sxw + c)))
            ok = ((valid >> (kh * 3 + kw)) & 1) != 0
            voxels = tl.load(start + x_offsets, mask=ok[:, None], other=0.0)
            taps = tl.load(weight + k + w_offsets)
        if SWAP:
            total = tl.dot(taps, voxels.T, total)
        else:
            total = tl.dot(voxels, taps.T, total)
        k += BK
        c += BK
        end = c == CIN
        c = tl.where(end, 0, c)
        kw = tl.where(end, kw + 1, kw)
        end = kw == w_end
        kw = tl.where(end, w_first, kw)
        k = tl.where(end, k + (3 - (w_end - w_first)) * CIN, k)
        kh = tl.where(end, kh + 1, kh)
        end = kh == h_end
        kh = tl.where(end, h_first, kh)
        k = tl.where(end, k + (3 - (h_end - h_first)) * 3 * CIN, k)
        zd = tl.where(end, zd + step_d, zd)

    value = total.T if SWAP else total
    if PAIR:
        channel = rows % COUT
        plane = d + rows // COUT * step_d
    else:
        channel = block * BN + rows
        plane = d + rows * 0
    if BIAS:
        value += tl.load(bias + channel).to(tl.float32)[None, :]
    keep = inside[:, None] & (plane < D)[None, :]
    place = y + n.to(tl.int64) * syn + plane.to(tl.int64)[None, :] * syd
    place += (hh * syh + ww * syw)[:, None] + channel[None, :]
    if ACCUMULATE:
        value += tl.load(place, mask=keep, other=0.0).to(tl.float32)
    if SUMS:
        kept = tl.where(keep, value, 0.0)
        row = (n * tl.num_programs(0) + tile).to(tl.int64) * (2 * tl.num_programs(1) * BN) + block * BN + rows
        tl.store(sums + row, tl.sum(kept, axis=0))
        tl.store(sums + row + tl.num_programs(1) * BN, tl.sum(kept * kept, axis=0))
    tl.store(place, value.to(y.dtype.element_ty), mask=keep)


@triton.jit
def weight_kernel(
    x,
    grad,
    partial,
    N,
    D,
    H,
    W,
    sxn,
    sxd,
    sxh,
    sxw,
    sgn,
    sgd,
    sgh,
    sgw,
    step_d,
    step_h,
    step_w,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    KD: tl.constexpr,
    BW: tl.constexpr,
    BC: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
):
    """One program: the three taps along w of one (kd, kh), BC inputs times BN outputs, over a share of all rows.

    A row of x, read once, meets three shifted rows of grad. Only rows whose partner lies in the volume are visited.
    """
    kd = tl.program_id(0) // 3
    kh = tl.program_id(0) % 3
    blocks: tl.constexpr = COUT // BN
    ci = tl.program_id(1) // blocks * BC
    co = tl.program_id(1) % blocks * BN
    share = tl.program_id(2)
    shift_d = (kd - KD // 2) * step_d
    shift_h = (kh - 1) * step_h
    # x at (d, h) meets grad at (d - shift_d, h - shift_h)
    d_low = tl.maximum(shift_d, 0)
    h_low = tl.maximum(shift_h, 0)
    d_end = tl.minimum(D + shift_d, D)
    h_end = tl.minimum(H + shift_h, H)
    planes = tl.maximum(d_end - d_low, 0)
    lines = tl.maximum(h_end - h_low, 0)
    tiles_w = tl.cdiv(W, BW)
    w_end = tiles_w * BW
    count = N * planes * lines * tiles_w
    each = tl.cdiv(count, tl.num_programs(2))
    first = share * each
    last = tl.minimum(first + each, count)
    w0 = first % tiles_w * BW
    line = first // tiles_w
    h = h_low + line % tl.maximum(lines, 1)
    line = line // tl.maximum(lines, 1)
    d = d_low + line % tl.maximum(planes, 1)
    n = line // tl.maximum(planes, 1)
    row = tl.arange(0, BW)
    inputs = tl.arange(0, BC)
    outputs = tl.arange(0, BN)
    left = tl.zeros((BC, BN), tl.float32)
    middle = tl.zeros((BC, BN), tl.float32)
    right = tl.zeros((BC, BN), tl.float32)
    for _ in range(first, last):
        if TMA:
            voxels = x.load([n, d, h, w0, ci]).reshape(BW, BC)
            later = grad.load([n, d - shift_d, h - shift_h, w0 + step_w, co]).reshape(BW, BN)
            same = grad.load([n, d - shift_d, h - shift_h, w0, co]).reshape(BW, BN)
            earlier = grad.load([n, d - shift_d, h - shift_h, w0 - step_w, co]).reshape(BW, BN)
        else:
            ww = w0 + row
            x_line = x + (n.to(tl.int64) * sxn + d.to(tl.int64) * sxd + h.to(tl.int64) * sxh) + ci
            g_line = grad + (n.to(tl.int64) * sgn + (d - shift_d).to(tl.int64) * sgd) + co
            g_line += (h - shift_h).to(tl.int64) * sgh
            g_offsets = (ww * sgw)[:, None] + outputs[None, :]
            voxels = tl.load(x_line + (ww * sxw)[:, None] + inputs[None, :], mask=(ww < W)[:, None], other=0.0)
            later = tl.load(g_line + step_w * sgw + g_offsets, mask=(ww + step_w < W)[:, None], other=0.0)
            same = tl.load(g_line + g_offsets, mask=(ww < W)[:, None], other=0.0)
            ok = (ww >= step_w) & (ww < W + step_w)
            earlier = tl.load(g_line - step_w * sgw + g_offsets, mask=ok[:, None], other=0.0)
        left = tl.dot(voxels.T, later, left)
        middle = tl.dot(voxels.T, same, middle)
        right = tl.dot(voxels.T, earlier, right)
        w0 += BW
        end = w0 == w_end
        w0 = tl.where(end, 0, w0)
        h = tl.where(end, h + 1, h)
        end = h == h_end
        h = tl.where(end, h_low, h)
        d = tl.where(end, d + 1, d)
        end = d == d_end
        d = tl.where(end, d_low, d)
        n = tl.where(end, n + 1, n)
    place = partial + (share.to(tl.int64) * (KD * 9) + tl.program_id(0) * 3) * (CIN * COUT)
    place += (ci + inputs)[:, None] * COUT + (co + outputs)[None, :]
    tl.store(place, left)
    tl.store(place + CIN * COUT, middle)
    tl.store(place + 2 * CIN * COUT, right)


@triton.jit
def reduce_kernel(partial, weight, size, shares, COUT: tl.constexpr, BLOCK: tl.constexpr):
    """Sum the shares in order: (shares, taps * CIN, COUT) -> (COUT, taps * CIN)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    place = partial + i
    for _ in range(shares):
        total += tl.load(place, mask=i < size, other=0.0)
        place += size
    tl.store(weight + i % COUT * (size // COUT) + i // COUT, total.to(weight.dtype.element_ty), mask=i < size)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: Sequence[int]) -> Tensor:
    """As `reference.dilated_conv3d.forward`, for what `dilated_conv3d.why_not` lets through."""

    def run(tile: Tile | None) -> Tensor:
        if tile is None:
            return reference.forward(x, weight, bias, dilation)
        y = empty_map(x, weight.shape[0])
        convolve(x, weight, bias, y, dilation, tile)
        return y

    return run(tile_for(x, weight, dilation, run))


def grad_input(grad: Tensor, weight: Tensor, dilation: Sequence[int]) -> Tensor:
    """As `reference.dilated_conv3d.grad_input`."""
    return forward(grad, reference.flipped(weight), None, dilation)


def grad_weight(grad: Tensor, x: Tensor, weight: Tensor, dilation: Sequence[int], bias: bool) -> tuple[Tensor, Tensor]:
    """As `reference.dilated_conv3d.grad_weight`."""

    def run(tile: WeightTile | None) -> Tensor:
        if tile is None:
            return reference.grad_weight(grad, x, weight, dilation, False)[0]
        return weight_gradient(grad, x, weight.shape[2:], dilation, tile)

    outputs, inputs, *kernel = weight.shape
    candidates = tiles.weight_tiles(_capability(x), inputs, outputs, kernel, x.shape[0], x.shape[2:])
    tile = tiles.choose(_problem("weight", x, weight, dilation), candidates, _race(run, x, grad))
    grad_bias = grad.sum(dim=(0, 2, 3, 4)) if bias else grad.new_empty(0)
    return run(tile).contiguous(memory_format=layout_of(weight)), grad_bias


def tile_for(
    x: Tensor, weight: Tensor, dilation: Sequence[int], run: Callable[[Tile | None], Tensor] | None
) -> Tile | None:
    """The tile of a forward product, None for the vendor's; without `run` nothing is measured."""
    outputs, inputs, *kernel = weight.shape
    candidates = tiles.tiles(_capability(x), inputs, outputs, kernel, x.shape[0], x.shape[2:], dilation)
    return tiles.choose(_problem("forward", x, weight, dilation), candidates, _race(run, x) if run else None)


def _race(run: Callable[[Any], Tensor], *maps: Tensor) -> Callable[[Sequence[AnyTile | None]], AnyTile | None] | None:
    """How to find the fastest candidate that agrees with the vendor's library, where measuring is allowed."""
    if torch.are_deterministic_algorithms_enabled() or torch.cuda.is_current_stream_capturing():
        return None
    # The vendor's library needs a hundred GiB beyond this, and nothing else could judge the candidates.
    if max(x.numel() for x in maps) >= 2**31:
        return None

    def measured(candidates: Sequence[AnyTile | None]) -> AnyTile | None:
        try:
            expected = run(None).float()
        except torch.OutOfMemoryError:
            return candidates[0]
        size = expected.norm()
        if not 0 < float(size) < math.inf:
            raise tiles.Undecided  # nothing is right or wrong beside zeros or NaN

        def milliseconds(tile: AnyTile | None) -> float | None:
            try:
                error = (run(tile).float() - expected).norm() / size
            except (torch.OutOfMemoryError, TritonError) as failure:
                log.debug("focuskernels.dilated_conv3d: %s: %s", tile, failure)
                return None
            if not bool(error <= TOLERANCE):
                log.warning("focuskernels.dilated_conv3d: %s is off by %.2g and left out", tile, float(error))
                return None
            return _milliseconds(lambda: run(tile))

        with torch.cuda.device_of(maps[0]):  # its stream is the one to be timed
            return tiles.race(candidates, milliseconds)

    return measured


def _milliseconds(run: Callable[[], Tensor]) -> float:
    """Median of five."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(6)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in itertools.pairwise(marks))[2]


def _problem(product: str, x: Tensor, weight: Tensor, dilation: Sequence[int]) -> str:
    outputs, inputs, *kernel = weight.shape
    dense = x.is_contiguous(memory_format=torch.channels_last_3d)
    device, dtype = torch.cuda.get_device_name(x.device), str(x.dtype).removeprefix("torch.")
    return tiles.problem(
        device, triton.__version__, dtype, product, (inputs, outputs), kernel, dilation, x.shape[2:], dense
    )


def _capability(x: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(x.device)


def empty_map(like: Tensor, channels: int) -> Tensor:
    """(N, channels, D, H, W) in channels_last_3d, of the size and dtype of `like`."""
    shape = (like.shape[0], channels, *like.shape[2:])
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last_3d)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    dilation: Sequence[int],
    tile: Tile,
    *,
    accumulate: bool = False,
    sums: bool = False,
) -> Tensor | None:
    """Write the convolution of `x` with `weight` to `y`, or add it to what is there.

    x, y: channels innermost, of any strides the tile's way of loading allows. Returns with `sums` per channel the sum
    and the sum of squares of the result before rounding, (N, 2, O) float64.
    """
    outputs, inputs, kd, *_ = weight.shape
    tile = tile.roomy() if accumulate or sums else tile
    depth, height, width = x.shape[2:]
    planes = triton.cdiv(depth, 2 * dilation[0]) * dilation[0] if tile.pair else depth
    rows = outputs * (2 if tile.pair else 1)
    tiles = planes * triton.cdiv(height, tile.bh) * triton.cdiv(width, tile.bw)
    grid = (tiles, rows // tile.bn, x.shape[0])
    table = x.new_empty((x.shape[0], tiles, 2, rows // outputs, outputs), dtype=torch.float32) if sums else None
    packed = _aligned(_pair(weight) if tile.pair else _pack(weight))
    source: Tensor | TensorDescriptor = x
    taps: Tensor | TensorDescriptor = packed
    if tile.tma:
        source = _descriptor(x, [1, 1, tile.bh, tile.bw, tile.bk])
        taps = TensorDescriptor(packed, list(packed.shape), list(packed.stride()), [tile.bn, tile.bk])
    with torch.cuda.device_of(x):
        conv_kernel[grid](
            source,
            taps,
            y,
            bias.contiguous() if bias is not None else y,
            table if table is not None else y,
            depth,
            height,
            width,
            *_strides(x),
            *_strides(y),
            *dilation,
            **conv_constants(inputs, outputs, kd, tile, bias is not None, sums, accumulate),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return None if table is None else table.sum(dim=(1, 3), dtype=torch.float64)


def conv_constants(
    inputs: int, outputs: int, planes: int, tile: Tile, bias: bool, sums: bool, accumulate: bool
) -> dict[str, Any]:
    """What `conv_kernel` is compiled for; `planes` of the weight."""
    return {
        "CIN": inputs,
        "COUT": outputs,
        "KD": planes,
        "BH": tile.bh,
        "BW": tile.bw,
        "BN": tile.bn,
        "BK": tile.bk,
        "TMA": tile.tma,
        "PAIR": int(tile.pair),
        "SWAP": tile.bn >= 64,
        "BIAS": bias,
        "SUMS": sums,
        "ACCUMULATE": accumulate,
    }


def weight_constants(inputs: int, outputs: int, planes: int, tile: WeightTile) -> dict[str, Any]:
    """What `weight_kernel` is compiled for."""
    sizes = {"CIN": inputs, "COUT": outputs, "KD": planes}
    return sizes | {"BW": tile.bw, "BC": tile.bc, "BN": tile.bn, "TMA": tile.tma}


def weight_gradient(
    grad: Tensor, x: Tensor, kernel: Sequence[int], dilation: Sequence[int], tile: WeightTile
) -> Tensor:
    """(O, I, kd, kh, kw) in channels_last_3d, the dtype of `x`."""
    outputs, inputs = grad.shape[1], x.shape[1]
    taps = math.prod(kernel)
    partial = x.new_empty((tile.shares, taps, inputs, outputs), dtype=torch.float32)
    weight = x.new_empty((outputs, *kernel, inputs))
    grid = (taps // 3, inputs // tile.bc * (outputs // tile.bn), tile.shares)
    sources: tuple[Tensor | TensorDescriptor, ...] = (x, grad)
    if tile.tma:
        sources = _descriptor(x, [1, 1, 1, tile.bw, tile.bc]), _descriptor(grad, [1, 1, 1, tile.bw, tile.bn])
    with torch.cuda.device_of(x):
        weight_kernel[grid](
            *sources,
            partial,
            x.shape[0],
            *x.shape[2:],
            *_strides(x),
            *_strides(grad),
            *dilation,
            **weight_constants(inputs, outputs, kernel[0], tile),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        size = weight.numel()
        reduce_kernel[(triton.cdiv(size, 512),)](partial, weight, size, tile.shares, COUT=outputs, BLOCK=512)
    return weight.permute(0, 4, 1, 2, 3)


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of n, d, h, w."""
    return x.stride()[:1] + x.stride()[2:]


def _pack(weight: Tensor) -> Tensor:
    """(O, taps * I): the memory of a weight in channels_last_3d."""
    return weight.permute(0, 2, 3, 4, 1).reshape(weight.shape[0], -1).contiguous()


def _aligned(x: Tensor) -> Tensor:
    """Where a descriptor may point to: a weight may be a view into the middle of others."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _pair(weight: Tensor) -> Tensor:
    """(2 O, 4 * 9 * I): the outputs of two planes, the second of which starts one tap later."""
    outputs, inputs = weight.shape[:2]
    packed = weight.new_zeros((2, outputs, 4, 9, inputs))
    taps = weight.permute(0, 2, 3, 4, 1).reshape(outputs, 3, 9, inputs)
    packed[0, :, :3] = taps
    packed[1, :, 1:] = taps
    return packed.view(2 * outputs, -1)


def _descriptor(x: Tensor, block: Sequence[int]) -> TensorDescriptor:
    """Of a map with channels last; axes of one voxel get a stride that the hardware accepts."""
    last = x.permute(0, 2, 3, 4, 1)
    strides = [s if size > 1 else 16 for size, s in zip(last.shape[:4], last.stride())]
    return TensorDescriptor(last, list(last.shape), [*strides, 1], list(block))
