"""Dilated 3D convolution that keeps the spatial size."""

from collections.abc import Sequence

from torch import Tensor

from ._arguments import cast_for_autocast, require_float, triple
from .reference import dilated_conv3d as reference


def dilated_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int | Sequence[int] = 1) -> Tensor:
    """Convolve with stride 1 and zero padding `dilation * (kernel - 1) / 2`, so that the spatial size stays.

    Args:
        x: (N, I, D, H, W), floating point. Cast to the autocast dtype where autocast is active, like `F.conv3d`.
        weight: (O, I, kd, kh, kw), odd kernel sizes, the dtype and device of `x`.
        bias: (O,) or None.
        dilation: one step for all axes or (dz, dy, dx). It may exceed the volume.

    Returns:
        (N, O, D, H, W), the dtype of `x` (or autocast's).

    Raises:
        TypeError: wrong types, dtypes or devices.
        ValueError: shapes that do not fit, no voxels, an even kernel size, a dilation below 1.
    """
    dilation = triple(dilation, "dilation")
    _check_shapes(x, weight, bias)
    x, weight, bias = cast_for_autocast(x, weight, bias)  # type: ignore[assignment]
    _check_types(x, weight, bias)
    return reference.forward(x, weight, bias, dilation)


def _check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    require_float(x, "x")
    require_float(weight, "weight")
    if 0 in x.shape[2:]:
        raise ValueError(f"x has no voxels: {tuple(x.shape)}")
    if weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight takes {weight.shape[1]} channels, x has {x.shape[1]}: {tuple(weight.shape)}, {tuple(x.shape)}"
        )
    if any(size % 2 == 0 for size in weight.shape[2:]):
        raise ValueError(f"kernel sizes must be odd, got weight of shape {tuple(weight.shape)}")
    if bias is not None:
        require_float(bias, "bias", dim=1)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")


def _check_types(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dtype != weight.dtype or x.device != weight.device:
        raise TypeError(f"x is {x.dtype} on {x.device}, weight is {weight.dtype} on {weight.device}")
    if bias is not None and (bias.dtype != x.dtype or bias.device != x.device):
        raise TypeError(f"x is {x.dtype} on {x.device}, bias is {bias.dtype} on {bias.device}")
