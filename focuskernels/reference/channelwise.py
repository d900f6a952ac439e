"""Passes over a map (N, C, D, H, W) with a few numbers per sample and channel.

Those stand in a table (N, 3, C) of the rows center, scale, shift of `act((x - center) scale + shift + residual)`, in
float32 or, for float64 maps, float64. Means are subtracted before anything is multiplied, so that large ones cost no
accuracy.
"""

import torch
from torch import Tensor

NONE, RELU, LEAKY_RELU = range(3)
ACTIVATIONS = {None: NONE, "relu": RELU, "leaky_relu": LEAKY_RELU}

SPACE = (2, 3, 4)


def table_dtype(x: Tensor) -> torch.dtype:
    """In which sums and coefficients of `x` are kept."""
    return torch.promote_types(x.dtype, torch.float32)


def moments(x: Tensor) -> Tensor:
    """Mean and sum of squared differences from it: (N, 2, C)."""
    wide = x.to(table_dtype(x))
    mean = wide.mean(dim=SPACE, keepdim=True)
    return torch.stack([mean.flatten(1), (wide - mean).square().sum(dim=SPACE)], dim=1)


def affine(x: Tensor, table: Tensor, residual: Tensor | None, activation: int, slope: float) -> Tensor:
    """act((x - center) scale + shift + residual), shaped and laid out as `x`."""
    y = _affine(x, table)
    if residual is not None:
        y = y + residual
    if activation != NONE:
        y = torch.where(y < 0, y * slope if activation == LEAKY_RELU else 0, y)
    return _as(y, x)


def affine_sums(
    grad: Tensor, x: Tensor, table: Tensor, out: Tensor | None, activation: int, slope: float, keep: bool
) -> tuple[Tensor, Tensor]:
    """Sums of d and of d (x - center), (N, 2, C), where d is the gradient before the activation; and d where kept.

    The side of the activation is that of `out`, or of the recomputed `affine(x, table)` without it.
    """
    d = _before_activation(grad, _affine(x, table) if out is None else out, activation, slope)
    sums = torch.stack([d.sum(dim=SPACE), (d * (x - _row(table, 0))).sum(dim=SPACE)], dim=1)
    return sums, _as(d, x) if keep else grad.new_empty(0)


def affine_backward(grad: Tensor, x: Tensor, table: Tensor, weights: Tensor, activation: int, slope: float) -> Tensor:
    """w0 d + w1 (x - center) + w2 with the rows w (N, 3, C); d as in `affine_sums`."""
    d = _before_activation(grad, _affine(x, table), activation, slope)
    return _as(_row(weights, 0) * d + _row(weights, 1) * (x - _row(table, 0)) + _row(weights, 2), x)


def _row(table: Tensor, index: int) -> Tensor:
    return table[:, index, :, None, None, None]


def _affine(x: Tensor, table: Tensor) -> Tensor:
    return (x - _row(table, 0)) * _row(table, 1) + _row(table, 2)


def _before_activation(grad: Tensor, y: Tensor, activation: int, slope: float) -> Tensor:
    grad = grad.to(table_dtype(grad))
    if activation == NONE:
        return grad
    return torch.where(y <= 0, grad * slope if activation == LEAKY_RELU else 0, grad)


def _as(y: Tensor, x: Tensor) -> Tensor:
    """`y` in the dtype and layout of `x`."""
    y = y.to(x.dtype)
    return y if y.stride() == x.stride() else torch.empty_like(x).copy_(y)
