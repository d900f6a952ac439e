"""A 1x1x1 convolution and the focal and dice sums, chunk after chunk: the logits never exist as a whole.

Shapes: features (N,K,V), channels first or last; weight (C,K); bias (C,) or None; target and tables as in
`reference.focal_dice`. The sums of a chunk and their gradient come from the kernels of `focal_dice` passed in.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Voxels of a chunk: the logits stay in the last-level cache. Fixed, so that sums depend on the shapes only.
CHUNK = {"cpu": 1 << 15, "cuda": 1 << 18}


def forward(
    sums: Callable[..., tuple[Tensor, Tensor]],
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mode: int,
    gamma: float,
    ignore_index: int | None,
    class_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The table (N,6,C) and the number (N,) of target values that mean nothing."""
    batch, classes = features.shape[0], weight.shape[0]
    table = features.new_zeros((batch, 6, classes), dtype=torch.float64)
    wrong = features.new_zeros((batch,), dtype=torch.int64)
    for n, piece in chunks(features):
        logits = chunk_logits(features[n, :, piece], weight, bias)
        part, wrong_part = sums(logits, _part(target, n, piece), mode, gamma, ignore_index, _row(class_mask, n))
        table[n] += part[0]
        wrong[n] += wrong_part[0]
    return table.to(torch.promote_types(features.dtype, torch.float32)), wrong


def backward(
    sums_backward_: Callable[..., None],
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
    """Gradients of features (empty where not needed), weight and bias; the latter two in float32 or float64."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    grad = torch.empty_like(features) if features_need_grad else features.new_empty(0)
    grad_weight = weight.new_zeros(weight.shape, dtype=dtype)
    grad_bias = weight.new_zeros(weight.shape[:1], dtype=dtype)
    for n, piece in chunks(features):
        f = features[n, :, piece]
        logits = chunk_logits(f, weight, bias)
        options = (mode, gamma, ignore_index, _row(class_mask, n))
        sums_backward_(logits, _part(target, n, piece), grad_sums[n : n + 1], *options)
        grad_logits = logits[0]
        if features_need_grad:
            _product_into(grad[n, :, piece], weight.t(), grad_logits)
        grad_weight += grad_logits @ f.t()
        grad_bias += grad_logits.sum(dim=1, dtype=dtype)
    return grad, grad_weight, grad_bias


def argmax(
    top_class: Callable[[Tensor], tuple[Tensor, Tensor]],
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    probability: bool,
) -> tuple[Tensor, Tensor]:
    """The class with the largest logit (N,V) uint8 and its softmax probability (N,V), empty unless asked for.

    `top_class` is called with logits (C,v) of a chunk and returns the class (v,) and its logit.
    """
    batch, _, voxels = features.shape
    dtype = torch.promote_types(features.dtype, torch.float32)
    labels = features.new_empty((batch, voxels), dtype=torch.uint8)
    top = features.new_empty((batch, voxels) if probability else (0,), dtype=dtype)
    for n, piece in chunks(features):
        f = features[n, :, piece]
        logits = weight @ f if bias is None else torch.addmm(bias.unsqueeze(1), weight, f)
        labels[n, piece], largest = top_class(logits)
        if probability:
            top[n, piece] = 1 / (logits.to(dtype) - largest.to(dtype)).exp().sum(dim=0)
    return labels, top


def top_class(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The class (v,) with the largest of the logits (C,v), the first of equals, and that logit."""
    largest, index = logits.max(dim=0)
    return index, largest


def chunks(features: Tensor) -> Iterator[tuple[int, slice]]:
    """Sample and voxels of every chunk."""
    batch, _, voxels = features.shape
    size = CHUNK.get(features.device.type, CHUNK["cpu"])
    for n in range(batch):
        for start in range(0, voxels, size):
            yield n, slice(start, min(start + size, voxels))


def chunk_logits(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(1,C,v) logits of features (K,v), channels first or last as the features are."""
    if features.stride(1) == 1:
        logits = weight @ features if bias is None else torch.addmm(bias.unsqueeze(1), weight, features)
        return logits.unsqueeze(0)
    rows = features.t() @ weight.t() if bias is None else torch.addmm(bias, features.t(), weight.t())
    return rows.t().unsqueeze(0)


def _product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """a @ b, in the layout of `out` from the beginning."""
    if out.stride(1) == 1:
        torch.mm(a, b, out=out)
    else:
        torch.mm(b.t(), a.t(), out=out.t())


def _part(target: Tensor, n: int, piece: slice) -> Tensor:
    return target[n : n + 1, ..., piece].contiguous()


def _row(class_mask: Tensor | None, n: int) -> Tensor | None:
    return None if class_mask is None else class_mask[n : n + 1]
