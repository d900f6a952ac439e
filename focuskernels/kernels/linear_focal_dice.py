"""Triton kernels of `linear_focal_dice_loss` and `linear_argmax` (docs/focal_dice.md).

Bytes: the loss reads features and labels, forward and backward, and writes the features' gradient; an argmax reads
features, and writes labels and, on request, a probability. FLOPs: 2 K C per voxel forward, three times that backward. A
program holds the logits of all classes of a few voxels in registers, where they become their gradient. Programs' sums
over voxels are added in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .focal_dice import (
    ROWS,
    SOFTMAX,
    _add_tile,
    _classes_kept,
    _flags,
    _gradient,
    _load_target,
    _pointers,
    _store_sums,
    tiles_per_program,
)

#: A product of matrices takes at least 16 of each axis.
BLOCK_K = 32
MIN_CLASSES = MIN_CHANNELS = 16
#: Of products of float32: in TF32, with the rest that its rounding leaves; in one, where there is no TF32.
PRECISION = "ieee" if torch.version.hip else "tf32x3"
#: As of the loss alone, but no fewer than 16: a program stores the sums of a whole weight.
TILES = (16, 64)


@triton.jit
def _load_weight(weight, channels, classes, c, k):
    """(BLOCK_C, BLOCK_K), 0 outside."""
    inside = (c < classes)[:, None] & (k < channels)[None, :]
    return tl.load(weight + c[:, None] * channels + k[None, :], mask=inside, other=0.0)


@triton.jit
def _load_bias(bias, classes, c, BIAS: tl.constexpr):
    """(BLOCK_C, 1) in float32."""
    if BIAS:
        return tl.load(bias + c, mask=c < classes, other=0.0).to(tl.float32)[:, None]
    else:
        return tl.zeros(c.shape, tl.float32)[:, None]


@triton.jit
def _place(n, voxels, channels, stride_n, stride_k, stride_v, v, k):
    """Offsets of the tile's features (BLOCK_V, BLOCK_K), and which of them exist."""
    offset = n * stride_n + v[:, None] * stride_v + k.to(tl.int64)[None, :] * stride_k
    return offset, (v < voxels)[:, None] & (k < channels)[None, :]


@triton.jit
def _logits(x, w, bias, inside, PRECISION: tl.constexpr):
    """(BLOCK_C, BLOCK_V) in float32, as a convolution rounds them; -inf outside."""
    logits = tl.trans(tl.dot(x, tl.trans(w), input_precision=PRECISION)) + bias
    return tl.where(inside, logits.to(x.dtype).to(tl.float32), float("-inf"))


@triton.jit
def forward_kernel(
    features,
    target,
    class_mask,
    weight,
    bias,
    sums,
    wrongs,
    channels,
    classes,
    voxels,
    stride_n,
    stride_k,
    stride_v,
    tiles,
    ignore: tl.int64,
    gamma: tl.float32,
    MODE: tl.constexpr,
    KIND: tl.constexpr,
    MULTI_HOT: tl.constexpr,
    MASKED: tl.constexpr,
    IGNORES: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    kept = _classes_kept(class_mask, n, classes, c, MASKED)
    w = _load_weight(weight, channels, classes, c, k)
    b = _load_bias(bias, classes, c, BIAS)
    zero = tl.zeros((BLOCK_C, BLOCK_V), tl.float32)
    found = (zero, zero, zero, zero, zero, zero)
    wrong_sum = tl.zeros((1,), tl.int32)
    for tile in range(tiles):
        v = (program * tiles + tile) * BLOCK_V + tl.arange(0, BLOCK_V)
        offset, there = _place(n, voxels, channels, stride_n, stride_k, stride_v, v, k)
        x = tl.load(features + offset, mask=there, other=0.0)
        inside = kept[:, None] & (v < voxels)[None, :]
        logits = _logits(x, w, b, inside, PRECISION)
        own, counted, _label, wrong = _load_target(
            target, class_mask, n, classes, voxels, ignore, c, v, inside, MULTI_HOT, MASKED, IGNORES
        )
        wrong_sum += wrong
        found = _add_tile(found, logits, own, counted, gamma, MODE, KIND, MULTI_HOT)
    row = n * tl.num_programs(0) + program
    _store_sums(sums + row * 6 * classes, classes, c, found, MODE)
    tl.store(wrongs + row + tl.arange(0, 1), wrong_sum)


@triton.jit
def backward_kernel(
    features,
    target,
    class_mask,
    weight,
    bias,
    grad_sums,
    grad,
    grad_weight,
    grad_bias,
    channels,
    classes,
    voxels,
    stride_n,
    stride_k,
    stride_v,
    tiles,
    ignore: tl.int64,
    gamma: tl.float32,
    MODE: tl.constexpr,
    KIND: tl.constexpr,
    MULTI_HOT: tl.constexpr,
    MASKED: tl.constexpr,
    IGNORES: tl.constexpr,
    BIAS: tl.constexpr,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    kept = _classes_kept(class_mask, n, classes, c, MASKED)
    w = _load_weight(weight, channels, classes, c, k)
    b = _load_bias(bias, classes, c, BIAS)
    table = grad_sums + n * 6 * classes
    weight_sum = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    bias_sum = tl.zeros((BLOCK_C, BLOCK_V), tl.float32)
    for tile in range(tiles):
        v = (program * tiles + tile) * BLOCK_V + tl.arange(0, BLOCK_V)
        offset, there = _place(n, voxels, channels, stride_n, stride_k, stride_v, v, k)
        x = tl.load(features + offset, mask=there, other=0.0)
        inside = kept[:, None] & (v < voxels)[None, :]
        logits = _logits(x, w, b, inside, PRECISION)
        own, counted, label, _wrong = _load_target(
            target, class_mask, n, classes, voxels, ignore, c, v, inside, MULTI_HOT, MASKED, IGNORES
        )
        d = _gradient(logits, own, counted, label, table, classes, c, gamma, MODE, KIND, MULTI_HOT)
        bias_sum += d
        d = d.to(x.dtype)
        weight_sum = tl.dot(d, x, weight_sum, input_precision=PRECISION)
        if FEATURES:
            y = tl.dot(tl.trans(d), w, input_precision=PRECISION)
            tl.store(grad + offset, y.to(grad.dtype.element_ty), mask=there)
    row = (n * tl.num_programs(0) + program) * classes
    inside_weight = (c < classes)[:, None] & (k < channels)[None, :]
    tl.store(grad_weight + (row + c)[:, None] * channels + k[None, :], weight_sum, mask=inside_weight)
    tl.store(grad_bias + row + c, tl.sum(bias_sum, axis=1), mask=c < classes)


@triton.jit
def argmax_kernel(
    features,
    weight,
    bias,
    labels,
    probabilities,
    channels,
    classes,
    voxels,
    stride_n,
    stride_k,
    stride_v,
    BIAS: tl.constexpr,
    PROBABILITY: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(1).to(tl.int64)
    v = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    c = tl.arange(0, BLOCK_C)
    logits = tl.zeros((BLOCK_V, BLOCK_C), tl.float32)
    for first in range(0, channels, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = (v < voxels)[:, None] & (k < channels)[None, :]
        x = tl.load(features + n * stride_n + v[:, None] * stride_v + k.to(tl.int64)[None, :] * stride_k, inside, 0.0)
        known = (k < channels)[:, None] & (c < classes)[None, :]
        w = tl.load(weight + c[None, :] * channels + k[:, None], known, 0.0)
        logits = tl.dot(x, w, logits, input_precision="ieee")
    if BIAS:
        logits += tl.load(bias + c, c < classes, 0.0).to(tl.float32)[None, :]
    # as a convolution's: the first of equals is taken of what its dtype can tell apart
    logits = logits.to(features.dtype.element_ty).to(tl.float32)
    logits = tl.where((c < classes)[None, :], logits, float("-inf"))
    top = tl.max(logits, axis=1)
    nan = tl.min(tl.where(logits != logits, c[None, :], BLOCK_C), axis=1)
    first_top = tl.min(tl.where(logits == top[:, None], c[None, :], BLOCK_C), axis=1)
    label = tl.where(nan < BLOCK_C, nan, tl.where(first_top < BLOCK_C, first_top, 0))
    tl.store(labels + n * voxels + v, label.to(tl.uint8), v < voxels)
    if PROBABILITY:
        total = tl.sum(tl.exp(logits - top[:, None]), axis=1)
        tl.store(probabilities + n * voxels + v, 1 / total, v < voxels)


def tile(classes: int, mode: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """BLOCK_C, BLOCK_V and warps: 4 to 16 logits a lane, beside the weight and the sums in registers."""
    block_c = max(MIN_CLASSES, triton.next_power_of_2(classes))
    if block_c > 32:
        return block_c, 2048 // block_c, 8
    elements = 512 if dtype.itemsize > 2 else 2048 if mode == SOFTMAX.value else 1024
    return block_c, elements // block_c, 4


def block_k(channels: int) -> int:
    """All channels, of which a program holds a voxel's at a time."""
    return max(MIN_CHANNELS, triton.next_power_of_2(channels))


def forward(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mode: int,
    gamma: float,
    ignore_index: int | None,
    class_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `reference.linear_focal_dice.forward`."""
    batch, channels, voxels = features.shape
    classes = len(weight)
    block_c, block_v, warps = tile(classes, mode, features.dtype)
    tiles = tiles_per_program(voxels, block_v, TILES)
    programs = triton.cdiv(voxels, block_v * tiles)
    sums = features.new_empty((batch, programs, ROWS, classes), dtype=torch.float32)
    wrong = features.new_empty((batch, programs), dtype=torch.int32)
    if programs and batch:
        with torch.cuda.device_of(features):
            forward_kernel[(programs, batch)](
                *_pointers(features, target, class_mask),
                weight.contiguous(),
                weight if bias is None else bias.contiguous(),
                sums,
                wrong,
                channels,
                classes,
                voxels,
                *features.stride(),
                tiles,
                0 if ignore_index is None else ignore_index,
                gamma,
                **_flags(target, mode, gamma, ignore_index, class_mask),
                BIAS=bias is not None,
                PRECISION=PRECISION,
                BLOCK_C=block_c,
                BLOCK_K=block_k(channels),
                BLOCK_V=block_v,
                num_warps=warps,
            )
    return sums.sum(dim=1, dtype=torch.float64).to(torch.float32), wrong.sum(dim=1)


def backward(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    grad_sums: Tensor,
    mode: int,
    gamma: float,
    ignore_index: int | None,
    class_mask: Tensor | None,
    features_need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.linear_focal_dice.backward`."""
    batch, channels, voxels = features.shape
    classes = len(weight)
    block_c, block_v, warps = tile(classes, mode, features.dtype)
    tiles = tiles_per_program(voxels, block_v, TILES)
    programs = triton.cdiv(voxels, block_v * tiles)
    grad = torch.empty_like(features) if features_need_grad else features.new_empty(0)
    grad_weight = features.new_empty((batch * programs, classes, channels), dtype=torch.float32)
    grad_bias = features.new_empty((batch * programs, classes), dtype=torch.float32)
    if programs and batch:
        with torch.cuda.device_of(features):
            backward_kernel[(programs, batch)](
                *_pointers(features, target, class_mask),
                weight.contiguous(),
                weight if bias is None else bias.contiguous(),
                grad_sums,
                grad,
                grad_weight,
                grad_bias,
                channels,
                classes,
                voxels,
                *features.stride(),
                tiles,
                0 if ignore_index is None else ignore_index,
                gamma,
                **_flags(target, mode, gamma, ignore_index, class_mask),
                BIAS=bias is not None,
                PRECISION=PRECISION,
                FEATURES=features_need_grad,
                BLOCK_C=block_c,
                BLOCK_K=block_k(channels),
                BLOCK_V=block_v,
                num_warps=warps,
            )
    return grad, grad_weight.sum(dim=0), grad_bias.sum(dim=0)


def argmax_tile(classes: int) -> tuple[int, int, int]:
    """BLOCK_C, BLOCK_V and warps: 32 logits a lane."""
    block_c = max(MIN_CLASSES, triton.next_power_of_2(classes))
    block_v = max(16, min(128, 4096 // block_c))
    return block_c, block_v, max(1, block_c * block_v // (32 * 32))


def argmax(features: Tensor, weight: Tensor, bias: Tensor | None, probability: bool) -> tuple[Tensor, Tensor]:
    """As `reference.linear_focal_dice.argmax`."""
    batch, channels, voxels = features.shape
    labels = features.new_empty((batch, voxels), dtype=torch.uint8)
    top = features.new_empty((batch, voxels) if probability else (0,), dtype=torch.float32)
    if labels.numel() == 0:
        return labels, top
    block_c, block_v, warps = argmax_tile(len(weight))
    with torch.cuda.device_of(features):
        argmax_kernel[(triton.cdiv(voxels, block_v), batch)](
            features,
            weight.contiguous(),
            weight if bias is None else bias.contiguous(),
            labels,
            top,
            channels,
            len(weight),
            voxels,
            *features.stride(),
            BIAS=bias is not None,
            PROBABILITY=probability,
            BLOCK_C=block_c,
            BLOCK_K=BLOCK_K,
            BLOCK_V=block_v,
            num_warps=warps,
        )
    return labels, top
