"""Squeeze-and-excitation of one branch, added to another."""

from typing import Literal

import torch
from torch import Tensor

from ._arguments import require_float
from .reference import se_residual as reference


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
    _check(x, residual, fc1_weight, fc1_bias, fc2_weight, fc2_bias, channel_sums)
    if activation not in (None, "relu"):
        raise ValueError(f"activation must be None or 'relu', got {activation!r}")
    return reference.forward(x, residual, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, channel_sums)


def _check(
    x: Tensor,
    residual: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    channel_sums: Tensor | None,
) -> None:
    require_float(x, "x")
    require_float(residual, "residual")
    require_float(fc1_weight, "fc1_weight", dim=2)
    require_float(fc2_weight, "fc2_weight", dim=2)
    if residual.shape != x.shape:
        raise ValueError(f"x and residual differ in shape: {tuple(x.shape)}, {tuple(residual.shape)}")
    if 0 in x.shape[2:]:
        raise ValueError(f"x has no voxels: {tuple(x.shape)}")
    if residual.device != x.device or (residual.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type)):
        raise TypeError(f"x is {x.dtype} on {x.device}, residual is {residual.dtype} on {residual.device}")
    _check_layers(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, channel_sums)


def _check_layers(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    channel_sums: Tensor | None,
) -> None:
    channels, hidden = x.shape[1], fc1_weight.shape[0]
    expected = {
        "fc1_weight": (fc1_weight, (hidden, channels)),
        "fc1_bias": (fc1_bias, (hidden,)),
        "fc2_weight": (fc2_weight, (channels, hidden)),
        "fc2_bias": (fc2_bias, (channels,)),
        "channel_sums": (channel_sums, (x.shape[0], channels)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        require_float(tensor, name, dim=len(shape))
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape} for x of shape {tuple(x.shape)}, got {tuple(tensor.shape)}")
        if tensor.device != x.device or (tensor.dtype != fc1_weight.dtype and name != "channel_sums"):
            raise TypeError(
                f"{name} is {tensor.dtype} on {tensor.device}, fc1_weight is {fc1_weight.dtype}, x on {x.device}"
            )
