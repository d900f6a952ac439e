"""ROI-align in three dimensions, with the semantics of `torchvision.ops.roi_align`."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ._arguments import as_list, integer, positive_scale, require_bool, require_float, triple, values_are_readable
from ._lib import (
    DTYPES,
    MOST_PROGRAMS,
    MOST_VOXELS,
    csrc_kernel,
    define,
    forbid_double_backward,
    is_channels_last,
    triton_kernel,
)
from .reference import roi_align3d as reference


def roi_align_3d(
    input: Tensor,
    rois: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float | Sequence[float] = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = True,
    *,
    box_order: str = "zyxzyx",
) -> Tensor:
    """Average trilinear samples of the bins of boxes (He et al. 2017, Mask R-CNN), as torchvision does in 2D.

    Along each axis a box from `low * scale - 0.5` to `high * scale - 0.5` (without 0.5 and at least one voxel wide if
    not `aligned`) is cut into bins, and a bin averages `sampling_ratio` evenly spaced samples. A sample up to one voxel
    outside [0, size - 1] reads the border, one farther away is 0. A volume one voxel deep with boxes from 0 to 1
    along z reproduces the 2D op.

    Args:
        input: (N, C, D, H, W), floating point.
        rois: (K, 7) = (sample, box), or one (K_n, 6) of boxes per sample; in voxels of the grid that `spatial_scale`
            leads from. K may be 0. Never modified, and without gradient, as in torchvision. Geometry is computed in
            their dtype, at least float32.
        output_size: bins per axis, one number or (d, h, w).
        spatial_scale: voxels of `input` per voxel of the boxes, one number or (z, y, x).
        sampling_ratio: samples per bin and axis; if not positive, ceil(box / bins) along each axis.
        aligned: half a voxel's shift, so that voxel centres lie at whole numbers.
        box_order: what the six numbers are. z, y, x name the axes D, H, W of `input`; of each axis the first number is
            the low end, the second the high one. "zyxzyx" (default); "xyzxyz" is MONAI's StandardMode; "yxyxzz" the
            order of medicaldetectiontoolkit and nnDetection, (y1, x1, y2, x2, z1, z2). Their tensors are
            (N, C, Y, X, Z): one that was not permuted takes "zyzyxx".

    Returns:
        (K, C, d, h, w) in dtype and layout of `input`, in which it is differentiable. Every run gives the same bits, in
        backward too.

    Raises:
        TypeError: wrong types, dtypes or devices.
        ValueError: shapes or parameters that do not fit; and, for boxes on the CPU outside `torch.compile`, one that is
            not finite, has a negative size, or names no sample. Where values are not looked at, a sample number out of
            range and a box of negative size give zeros, and so does a coordinate that is not finite.
    """
    require_float(input, "input")
    if 0 in input.shape[2:]:
        raise ValueError(f"input has no voxels: {tuple(input.shape)}")
    out = triple(output_size, "output_size")
    scale = list(positive_scale(spatial_scale, "spatial_scale"))
    sampling_ratio = integer(sampling_ratio, "sampling_ratio")
    require_bool(aligned, "aligned")
    check_box_order(box_order)
    boxes = _ordered(_rows(rois, input), box_order)
    _check_values(boxes, input.shape[0])
    return _ROIAlign.apply(input, boxes, list(out), scale, sampling_ratio, aligned)


def _rows(rois: Tensor | Sequence[Tensor], input: Tensor) -> Tensor:
    """(K, 7), at least float32, a new tensor or the caller's."""
    if not isinstance(rois, Tensor):
        boxes = as_list(rois, "rois", "one tensor of boxes per sample, or be (K, 7)")
        if len(boxes) != input.shape[0]:
            raise ValueError(
                f"rois holds boxes of {len(boxes)} samples, input {tuple(input.shape)} has {input.shape[0]}"
            )
        for n, some in enumerate(boxes):
            _check_rows(some, f"rois[{n}]", 6, input.device)
        if not boxes:
            return torch.zeros((0, 7), device=input.device)
        boxes = [some.to(_geometry(some)) for some in boxes]
        rois = torch.cat([torch.cat([torch.full_like(b[:, :1], n), b], dim=1) for n, b in enumerate(boxes)])
    _check_rows(rois, "rois", 7, input.device)
    return rois.detach().to(_geometry(rois))


def _geometry(rois: Tensor) -> torch.dtype:
    if rois.is_floating_point():
        return torch.promote_types(rois.dtype, torch.float32)
    return torch.float64 if rois.dtype == torch.int64 else torch.float32


def _check_rows(rois: Tensor, name: str, columns: int, device: torch.device) -> None:
    if not isinstance(rois, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(rois).__name__}")
    if rois.dtype == torch.bool or rois.is_complex():
        raise TypeError(f"{name} must be integer or floating point, got {rois.dtype}")
    if rois.device != device:
        raise TypeError(f"{name} lies on {rois.device}, input on {device}")
    if rois.dim() != 2 or rois.shape[1] != columns:
        raise ValueError(f"{name} must be (K, {columns}), got {tuple(rois.shape)}")


def check_box_order(box_order: str) -> None:
    """Refuse what names other axes than each of three twice."""
    if not isinstance(box_order, str):
        raise TypeError(f"box_order must be a string, got {box_order!r}")
    if sorted(box_order) != sorted("zyxzyx"):
        raise ValueError(f"box_order must name each of z, y, x twice, got {box_order!r}")


def _ordered(rois: Tensor, box_order: str) -> Tensor:
    """Columns (sample, z1, y1, x1, z2, y2, x2)."""
    if box_order == "zyxzyx":
        return rois
    columns = [0, *(1 + box_order.index(a) for a in "zyx"), *(1 + box_order.rindex(a) for a in "zyx")]
    return torch.stack([rois[:, column] for column in columns], dim=1)


def _check_values(rois: Tensor, samples: int) -> None:
    if not values_are_readable(rois):
        return
    if not bool(torch.isfinite(rois).all()):
        raise ValueError(f"rois must be finite, got {rois.tolist()}")
    sample, low, high = rois[:, 0], rois[:, 1:4], rois[:, 4:]
    if not bool(((sample >= 0) & (sample < samples) & (sample == sample.trunc())).all()):
        raise ValueError(f"rois name samples {sample.tolist()}, expected integers in [0, {samples})")
    if not bool((high >= low).all()):
        bad = rois[(high < low).any(dim=1)].tolist()
        raise ValueError(f"rois of negative size, as (sample, z1, y1, x1, z2, y2, x2): {bad}")


class _ROIAlign(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        rois: Tensor,
        output_size: list[int],
        scale: list[float],
        sampling_ratio: int,
        aligned: bool,
    ) -> Tensor:
        ctx.save_for_backward(rois)
        ctx.options = (scale, sampling_ratio, aligned)
        ctx.input = (list(input.shape), DTYPES.index(input.dtype), is_channels_last(input))
        return _forward(input, rois, output_size, scale, sampling_ratio, aligned)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        forbid_double_backward("roi_align_3d")
        (rois,) = ctx.saved_tensors
        return _backward(grads[0], rois, *ctx.options, *ctx.input), None, None, None, None, None


def _fake_forward(input: Tensor, rois: Tensor, output_size: Sequence[int], *_: Any) -> Tensor:
    return reference.empty_output(input, rois, output_size)


def _fake_backward(grad: Tensor, *arguments: Any) -> Tensor:
    return reference.empty_gradient(grad, *arguments[-3:])


def _forward_not_in_triton(input: Tensor, rois: Tensor, output_size: Sequence[int], *_: Any) -> str | None:
    if input.dtype == torch.float64:
        return "no kernel for torch.float64"
    if len(rois) > MOST_PROGRAMS:
        return f"{len(rois)} ROIs, at most {MOST_PROGRAMS} are supported"
    return _too_large(input.shape, output_size)


def _backward_not_in_triton(grad: Tensor, *arguments: Any) -> str | None:
    *_, shape, dtype, _channels_last = arguments
    if torch.float64 in (grad.dtype, DTYPES[dtype]):
        return "no kernel for torch.float64"
    if shape[0] > MOST_PROGRAMS:
        return f"{shape[0]} samples, at most {MOST_PROGRAMS} are supported"
    return _too_large(shape, grad.shape[2:])


def _too_large(shape: Sequence[int], output_size: Sequence[int]) -> str | None:
    voxels = max(prod(shape[2:]), prod(output_size))
    return f"{voxels} voxels, at most {MOST_VOXELS} are supported" if voxels > MOST_VOXELS else None


_OPTIONS = "float[] scale, int sampling_ratio, bool aligned"
_forward = define(
    f"roi_align_3d_fwd(Tensor input, Tensor rois, SymInt[] output_size, {_OPTIONS}) -> Tensor",
    op="roi_align_3d",
    reference=reference.forward,
    fake=_fake_forward,
    cpu=[csrc_kernel("roi_align_3d_forward")],
    cuda=[triton_kernel("roi_align3d", "forward", _forward_not_in_triton)],
)
_backward = define(
    f"roi_align_3d_bwd(Tensor grad, Tensor rois, {_OPTIONS}, SymInt[] shape, int dtype, bool channels_last) -> Tensor",
    op="roi_align_3d",
    reference=reference.backward,
    fake=_fake_backward,
    cpu=[csrc_kernel("roi_align_3d_backward")],
    cuda=[triton_kernel("roi_align3d", "backward", _backward_not_in_triton)],
)
