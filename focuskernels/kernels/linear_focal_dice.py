"""Triton kernel of `linear_argmax` (docs/focal_dice.md).

Bytes: the features once, a label and, on request, a probability per voxel. FLOPs: 2 K C per voxel. A program holds the
logits of all classes of a few voxels in registers; the weight comes from a cache.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

#: A product of matrices takes at least 16 of each axis.
BLOCK_K = 32
MIN_CLASSES = 16


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


def tile(classes: int) -> tuple[int, int, int]:
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
    block_c, block_v, warps = tile(len(weight))
    on = torch.cuda.device(features.device) if features.is_cuda else contextlib.nullcontext()
    with on:
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
