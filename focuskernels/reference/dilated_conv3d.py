"""Dilated convolution and its gradients by the vendor's library (oneDNN, cuDNN): definition, oracle and fallback."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._lib import layout, layout_of


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: Sequence[int]) -> Tensor:
    """Stride-1 cross-correlation with zeros around the volume; the spatial size stays."""
    y = F.conv3d(x, weight, bias, padding=padding(weight, dilation), dilation=tuple(dilation))
    return y.contiguous(memory_format=output_layout(x, weight))


def grad_input(grad: Tensor, weight: Tensor, dilation: Sequence[int]) -> Tensor:
    """Gradient of the input: the same convolution with reversed taps and inputs for outputs.

    oneDNN runs it up to three times faster than its own backward product, and it needs no input to take a shape from.
    """
    return forward(grad, flipped(weight), None, dilation)


def grad_weight(grad: Tensor, x: Tensor, weight: Tensor, dilation: Sequence[int], bias: bool) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias (empty without one); of `weight` only shape and layout are looked at."""
    return padded_grad_weight(grad, x, weight, dilation, padding(weight, dilation), bias)


def padded_grad_weight(
    grad: Tensor, x: Tensor, weight: Tensor, dilation: Sequence[int], around: Sequence[int], bias: bool
) -> tuple[Tensor, Tensor]:
    """As `grad_weight`, with a number of zeros around each axis of `x`."""
    _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        [weight.shape[0]] if bias else None,
        [1, 1, 1],
        around,
        dilation,
        False,
        [0, 0, 0],
        1,
        [False, True, bias],
    )
    layout = layout_of(weight)
    return grad_weight.contiguous(memory_format=layout), grad_bias if bias else grad.new_empty(0)


def padding(weight: Tensor, dilation: Sequence[int]) -> list[int]:
    """Zeros in front of, and behind, each axis."""
    return [step * (size - 1) // 2 for step, size in zip(dilation, weight.shape[2:], strict=True)]


def flipped(weight: Tensor) -> Tensor:
    """(I, O, kd, kh, kw), reversed along its last three axes: the weight of the gradient of the input."""
    return weight.transpose(0, 1).flip(2, 3, 4)


def output_layout(x: Tensor, weight: Tensor) -> torch.memory_format:
    """channels_last_3d if `x`, which may be some channels of a wider map, or `weight` has channels innermost."""
    return layout(_channels_innermost(x) or _channels_innermost(weight))


def _channels_innermost(x: Tensor) -> bool:
    # One channel is in both layouts; the stride tells which is meant.
    one = x.shape[1] == 1 and x.shape[2:].numel() > 1
    return x.stride(1) == 1 and (one or not x.is_contiguous())
