"""Convolutions by oneDNN on the CPU, also where PyTorch takes its own slower loop: one sample of a small float32 map.

PyTorch (`ConvParams::use_mkldnn`) does so where N = 1 and N C D H is at most 20480, as of an organ's ROI. Its loop
unfolds the map, once per tap, and takes several times as long. Values are those of `reference/dilated_conv3d.py`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import dilated_conv3d as reference

_SMALL = 20480


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: Sequence[int]) -> Tensor:
    """As `reference.forward`."""
    if not _passed_over(x):
        return reference.forward(x, weight, bias, dilation)
    y = torch.mkldnn_convolution(x, weight, bias, reference.padding(weight, dilation), [1, 1, 1], list(dilation), 1)
    return y.contiguous(memory_format=reference.output_layout(x, weight))


def grad_input(grad: Tensor, weight: Tensor, dilation: Sequence[int]) -> Tensor:
    """As `reference.grad_input`."""
    return forward(grad, reference.flipped(weight), None, dilation)


def grad_weight(grad: Tensor, x: Tensor, weight: Tensor, dilation: Sequence[int], bias: bool) -> tuple[Tensor, Tensor]:
    """As `reference.grad_weight`; a small map becomes two halves, since two samples are not passed over."""
    around = reference.padding(weight, dilation)
    if x.dtype == torch.bfloat16 and dilation[0] == 1 and x.shape[2] <= 2 * around[0]:
        # Where every slice meets zeros, oneDNN's kernel for AVX-512 (torch 2.11 to 2.14) returns what memory held
        # before. Slices of zeros behind both add nothing.
        thicker = 2 * around[0] + 1 - x.shape[2]
        grad, x = _padded(grad, 0, 0, thicker), _padded(x, 0, 0, thicker)
    if not _passed_over(x):
        return reference.grad_weight(grad, x, weight, dilation, bias)
    axis = min(range(3), key=lambda a: around[a] / x.shape[2 + a])  # that has the least to read twice
    length, margin = -(-x.shape[2 + axis] // 2), around[axis]
    odd = 2 * length - x.shape[2 + axis]
    grads, maps = _padded(grad, axis, 0, odd), _padded(x, axis, margin, margin + odd)
    grads, maps = (
        torch.cat([t.narrow(2 + axis, 0, size), t.narrow(2 + axis, length, size)])
        for t, size in ((grads, length), (maps, length + 2 * margin))
    )
    around[axis] = 0
    return reference.padded_grad_weight(grads, maps, weight, dilation, around, bias)


def _passed_over(x: Tensor) -> bool:
    if x.dtype != torch.float32 or x.shape[0] != 1 or x.shape[:4].numel() > _SMALL:
        return False
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def _padded(x: Tensor, axis: int, before: int, behind: int) -> Tensor:
    return F.pad(x, [0, 0] * (2 - axis) + [before, behind])
