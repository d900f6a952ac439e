"""Where each heat map has its maximum: the step from SOL-Net's maps to SOS-Net's regions of interest."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._lib import MOST_PROGRAMS, csrc_kernel, define, triton_kernel, unsupported, unsupported_by_triton
from .reference import heatmap_argmax3d as reference


class HeatmapPeaks(NamedTuple):
    """Maxima of N x K heat maps; coordinates in voxels, ordered (z, y, x)."""

    index: Tensor  # type: ignore[assignment]  #: (N, K, 3) int64; hides tuple.index
    value: Tensor  #: (N, K), the heat maps' dtype
    center: Tensor  #: (N, K, 3) float32


def heatmap_argmax_3d(heatmaps: Tensor, *, subvoxel: bool = False) -> HeatmapPeaks:
    """Position and value of the maximum of every channel of a stack of 3D heat maps.

    Args:
        heatmaps: (N, K, D, H, W), floating point, D, H, W > 0. N and K may be 0.
        subvoxel: refine `center` along each axis by the parabola through the logarithms of the peak and its
            two neighbours, which is exact for a Gaussian. The shift is limited to half a voxel; an axis on
            which the peak touches the border, or one of the three values is not positive and finite, keeps
            the index.

    Returns:
        HeatmapPeaks(index, value, center). Of equal maxima the first in (z, y, x) order is taken; a NaN
        counts as larger than any number, as in `torch.argmax`. `value` and the refined `center` are
        differentiable in `heatmaps`.

    Raises:
        TypeError: `heatmaps` is not a floating-point tensor.
        ValueError: it is not five-dimensional or a spatial size is 0.
    """
    _check(heatmaps)
    position, value = _ArgMax.apply(heatmaps)
    index = reference.unravel(position, heatmaps.shape[2:])
    center = index.to(torch.float32)
    if subvoxel:
        center = center + reference.subvoxel_offset(heatmaps, index).to(torch.float32)
    return HeatmapPeaks(index, value, center)


def _check(heatmaps: Tensor) -> None:
    if not isinstance(heatmaps, Tensor):
        raise TypeError(f"heatmaps must be a tensor, got {type(heatmaps).__name__}")
    if not heatmaps.is_floating_point():
        raise TypeError(f"heatmaps must be floating point, got {heatmaps.dtype}")
    if heatmaps.dim() != 5 or 0 in heatmaps.shape[2:]:
        raise ValueError(f"heatmaps must be (N, K, D, H, W) with D, H, W > 0, got {tuple(heatmaps.shape)}")


class _ArgMax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heatmaps: Tensor) -> tuple[Tensor, Tensor]:
        position, value = _forward(heatmaps)
        ctx.save_for_backward(position)
        ctx.shape = heatmaps.shape
        ctx.mark_non_differentiable(position)
        return position, value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # Differentiable itself, as scatter is: no second derivative to forbid.
        (position,) = ctx.saved_tensors
        grad = grads[1]
        flat = grad.new_zeros((*ctx.shape[:2], ctx.shape[2:].numel()))
        return flat.scatter(2, position.unsqueeze(2), grad.unsqueeze(2)).view(ctx.shape)


def _not_in_triton(heatmaps: Tensor) -> str | None:
    if max(heatmaps.shape[:2]) > MOST_PROGRAMS:
        return f"{tuple(heatmaps.shape[:2])} samples and maps, at most {MOST_PROGRAMS} are supported"
    return unsupported_by_triton(heatmaps)


def _fake_forward(heatmaps: Tensor) -> tuple[Tensor, Tensor]:
    shape = heatmaps.shape[:2]
    return heatmaps.new_empty(shape, dtype=torch.int64), heatmaps.new_empty(shape)


_forward = define(
    "heatmap_argmax_3d_fwd(Tensor heatmaps) -> (Tensor position, Tensor value)",
    op="heatmap_argmax_3d",
    reference=reference.argmax,
    fake=_fake_forward,
    cpu=[csrc_kernel("heatmap_argmax_3d", unsupported)],
    cuda=[triton_kernel("heatmap_argmax3d", "argmax", _not_in_triton)],
)
