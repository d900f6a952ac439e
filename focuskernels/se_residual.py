"""Squeeze-and-excitation of one branch, added to another."""

from typing import Any, Literal

import torch
from torch import Tensor

from . import channelwise
from ._arguments import require_float
from ._lib import forbid_double_backward
from .reference import se_residual as reference
from .reference.se_residual import Layers


def se_residual(
    x: Tensor,
    residual: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    activation: Literal["relu"] | None = None,
    channel_sums: Tensor | None = None,
) -> Tensor:
    """`residual + x * sigmoid(fc2(relu(fc1(mean(x)))))`: the tail of an SE-residual block (Hu et al., CVPR 2018).

    Args:
        x: (N, C, D, H, W), floating point.
        residual: the same shape; the same dtype too, unless autocast is active.
        fc1_weight: (R, C); R is usually C divided by a reduction. The dtype of both layers; the gate is computed in
            it, so float32 layers serve half-precision `x`.
        fc1_bias: (R,) or None.
        fc2_weight: (C, R).
        fc2_bias: (C,) or None.
        activation: "relu" to apply it to the result, or None.
        channel_sums: (N, C) sums of `x` over its voxels, where the producer of `x` has them already. The gate's
            gradient then flows into them instead of into `x`.

    Returns:
        (N, C, D, H, W).

    Raises:
        TypeError: wrong types, dtypes or devices.
        ValueError: shapes that do not fit, no voxels, or an unknown activation.
    """
    layers = Layers(fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    _check(x, residual, layers, channel_sums)
    if activation not in (None, "relu"):
        raise ValueError(f"activation must be None or 'relu', got {activation!r}")
    x, residual = same_kind(x, residual)
    # The gate's few numbers are not worth rounding to autocast's dtype.
    with torch.autocast(x.device.type, enabled=False):
        return _SEResidual.apply(x, residual, *layers, channel_sums, channelwise.ACTIVATIONS[activation])


def same_kind(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Both dense in the layout of `x` and in one dtype."""
    dtype = torch.promote_types(x.dtype, residual.dtype)
    if residual is x:
        residual = x.view_as(x)  # torch.compile takes no tensor twice
    x = channelwise.dense(x.to(dtype))
    return x, channelwise.dense(residual.to(dtype), x)


class _SEResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor | None,
        fc2_weight: Tensor,
        fc2_bias: Tensor | None,
        channel_sums: Tensor | None,
        activation: int,
    ) -> Tensor:
        layers = Layers(fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        if channel_sums is None:
            squeezed = channelwise.moments(x)[:, 0]
        else:
            squeezed = channel_sums.to(channelwise.table_dtype(x)) / x.shape[2:].numel()
        gate, hidden = reference.gate(squeezed, layers)
        y = channelwise.affine(x, reference.table(gate), residual, activation, 0.0)
        # The output tells where the activation let through; without one it is not needed.
        ctx.save_for_backward(x, y if activation else None, gate, hidden, squeezed, *layers)
        ctx.activation = activation
        ctx.sums_dtype = None if channel_sums is None else channel_sums.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        forbid_double_backward("se_residual")
        x, y, gate, hidden, squeezed, *weights = ctx.saved_tensors
        grad = channelwise.dense(grads[0], x)
        keep = y is not None
        sums, kept = channelwise.affine_sums(grad, x, reference.table(gate), y, ctx.activation, 0.0, keep)
        grad = kept if keep else grad
        through_gate = reference.gate_backward(sums[:, 1], gate, hidden, squeezed, Layers(*weights))
        per_voxel = through_gate.squeezed / x.shape[2:].numel()
        taken = ctx.sums_dtype is not None
        shift = torch.zeros_like(gate) if taken else per_voxel
        dx = channelwise.affine(grad, reference.shifted_table(gate, shift), None, 0, 0.0)
        return dx, grad, *through_gate.layers, per_voxel.to(ctx.sums_dtype) if taken else None, None


def _check(x: Tensor, residual: Tensor, layers: Layers, channel_sums: Tensor | None) -> None:
    check_branches(x, residual)
    check_layers(x, layers)
    if channel_sums is None:
        return
    require_float(channel_sums, "channel_sums", dim=2)
    if channel_sums.shape != x.shape[:2]:
        raise ValueError(f"channel_sums must be {tuple(x.shape[:2])}, got {tuple(channel_sums.shape)}")
    if channel_sums.device != x.device:
        raise TypeError(f"x lies on {x.device}, channel_sums on {channel_sums.device}")


def check_branches(x: Tensor, residual: Tensor) -> None:
    """Refuse two branches that do not fit each other."""
    require_float(x, "x")
    require_float(residual, "residual")
    if residual.shape != x.shape:
        raise ValueError(f"x and residual differ in shape: {tuple(x.shape)}, {tuple(residual.shape)}")
    if 0 in x.shape[2:]:
        raise ValueError(f"x has no voxels: {tuple(x.shape)}")
    if residual.device != x.device or (residual.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type)):
        raise TypeError(f"x is {x.dtype} on {x.device}, residual is {residual.dtype} on {residual.device}")


def check_layers(x: Tensor, layers: Layers) -> None:
    """Refuse layers that do not fit each other or the channels of `x`."""
    require_float(layers.fc1_weight, "fc1_weight", dim=2)
    require_float(layers.fc2_weight, "fc2_weight", dim=2)
    channels, hidden = x.shape[1], layers.fc1_weight.shape[0]
    shapes: tuple[tuple[int, ...], ...] = ((hidden, channels), (hidden,), (channels, hidden), (channels,))
    for name, tensor, shape in zip(Layers._fields, layers, shapes):
        if tensor is None:
            continue
        require_float(tensor, name, dim=len(shape))
        if tensor.shape != torch.Size(shape):
            raise ValueError(f"{name} must be {shape} for x of shape {tuple(x.shape)}, got {tuple(tensor.shape)}")
        if tensor.device != x.device or tensor.dtype != layers.fc1_weight.dtype:
            raise TypeError(
                f"{name} is {tensor.dtype} on {tensor.device}, fc1_weight is {layers.fc1_weight.dtype}, x on {x.device}"
            )
