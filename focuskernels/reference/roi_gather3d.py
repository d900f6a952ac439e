from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._arguments import Triple, values_are_readable

Scales = Sequence[tuple[float, float, float]]


def forward(
    sources: Sequence[Tensor],
    centers: Tensor,
    roi_size: Triple,
    output_size: Triple,
    scales: Scales,
    padding: str,
) -> Tensor:
    """ROIs (K, sum C_i, d, h, w) of sources (N, C_i, D_i, H_i, W_i) around centers (K, 4)."""
    if values_are_readable(centers) and len(centers):
        return gather_by_crops(sources, centers, roi_size, output_size, scales, padding)
    return gather_by_corners(sources, centers, roi_size, output_size, scales, padding)


def coordinates(center: Tensor, roi: int, out: int, scale: float, size: int) -> Tensor:
    """Where a ROI samples an axis of a source: centres (K,) in reference voxels -> (K, out) source voxels, float64."""
    # A ROI this far outside reads padding only; the limit keeps the later conversion to integers exact.
    margin = roi + 2 + 2 / scale
    center = center.to(torch.float64).clamp(-margin, size / scale + margin)
    step = (torch.arange(out, device=center.device, dtype=torch.float64) + 0.5) * (roi / out) - 0.5
    reference = center[:, None] - roi // 2 + step
    return (reference + 0.5) * scale - 0.5


def gather_by_corners(
    sources: Sequence[Tensor],
    centers: Tensor,
    roi_size: Triple,
    output_size: Triple,
    scales: Scales,
    padding: str,
) -> Tensor:
    """The definition: trilinear interpolation as a sum over eight corners. It never reads the values of `centers`."""
    batch = centers[:, 0]
    known = (batch >= 0) & (batch < sources[0].shape[0])
    batch = torch.where(known, batch, 0).to(torch.int64)
    regions = []
    for source, scale in zip(sources, scales, strict=True):
        axes = [
            _corners(coordinates(centers[:, 1 + a], roi_size[a], output_size[a], scale[a], size), size, padding)
            for a, size in enumerate(source.shape[2:])
        ]
        volume = source.transpose(0, 1)
        dtype = torch.promote_types(source.dtype, torch.float32)
        total = source.new_zeros((), dtype=dtype).expand(source.shape[1], len(centers), *output_size)
        for (z, wz), (y, wy), (x, wx) in product(*axes):
            voxels = volume[
                :, batch[:, None, None, None], z[:, :, None, None], y[:, None, :, None], x[:, None, None, :]
            ]
            weight = wz[:, :, None, None] * wy[:, None, :, None] * wx[:, None, None, :] * known[:, None, None, None]
            if not weight.requires_grad:
                # What has no part in a sample must not reach it as 0 * inf.
                voxels = voxels.masked_fill(weight == 0, 0)
            total = total + voxels.to(dtype) * weight.to(dtype)
        regions.append(total.transpose(0, 1).to(source.dtype))
    return torch.cat(regions, dim=1)


def _corners(position: Tensor, size: int, padding: str) -> list[tuple[Tensor, Tensor]]:
    """Index and weight of the two voxels around each position; a voxel outside has weight 0 with padding="zeros"."""
    if padding == "border":
        position = position.clamp(0, size - 1)
    lower = position.detach().floor()
    fraction = position - lower
    corners = []
    for index, weight in ((lower.to(torch.int64), 1 - fraction), (lower.to(torch.int64) + 1, fraction)):
        inside = (index >= 0) & (index < size)
        corners.append((index.clamp(0, size - 1), weight * inside))
    return corners


def gather_by_crops(
    sources: Sequence[Tensor],
    centers: Tensor,
    roi_size: Triple,
    output_size: Triple,
    scales: Scales,
    padding: str,
) -> Tensor:
    """The same by cutting each ROI out first; axes whose samples fall on voxels are copied, not interpolated."""
    batch = [int(b) for b in centers[:, 0].tolist()]
    dtype = sources[0].dtype
    regions = []
    for source, scale in zip(sources, scales, strict=True):
        dtype = torch.promote_types(dtype, source.dtype)
        axes = [
            coordinates(centers[:, 1 + a], roi_size[a], output_size[a], scale[a], size)
            for a, size in enumerate(source.shape[2:])
        ]
        rois = [
            [_axis(axis[k], size, padding) for axis, size in zip(axes, source.shape[2:])] for k in range(len(batch))
        ]
        crops = _Crops.apply(source, batch, [[axis.span for axis in roi] for roi in rois])
        regions.append([_interpolate(crop, roi) for crop, roi in zip(crops, rois)])
    # one copy straight to the result
    pieces = [region[k].to(dtype) for k in range(len(batch)) for region in regions]
    return torch.cat(pieces).unflatten(0, (len(batch), -1))


class _Axis(NamedTuple):
    """How a ROI reads one axis of a source."""

    span: tuple[int, int]  #: the voxels it needs, from first to last + 1; they may lie outside
    lower: Tensor  #: (out,) position of the lower neighbour within the span
    fraction: Tensor | None  #: (out,) weight of the upper neighbour; None where all samples fall on voxels


def _axis(position: Tensor, size: int, padding: str) -> _Axis:
    if padding == "border":
        position = position.clamp(0, size - 1)
    lower = position.detach().floor()
    fraction = position - lower
    whole = not position.requires_grad and not bool(fraction.any())
    first, last = int(lower[0]), int(lower[-1]) + (0 if whole else 1)
    return _Axis((first, last + 1), lower.to(torch.int64) - first, None if whole else fraction)


class _Crops(torch.autograd.Function):
    """Boxes of samples of a source, 0 outside. All boxes share one gradient; slicing would fill a volume for each.

    Border positions exceed the volume only as the upper corner of weight 0, so zeros serve both paddings.
    """

    @staticmethod
    def forward(ctx: Any, source: Tensor, batch: list[int], boxes: list[list[tuple[int, int]]]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.batch, ctx.boxes = source.shape, batch, boxes
        ctx.channels_last = source.is_contiguous(memory_format=torch.channels_last_3d)
        crops = []
        for sample, box in zip(batch, boxes):
            crop = source.new_zeros((source.shape[1], *(stop - first for first, stop in box)))
            inside, within = _overlap(box, source.shape[2:])
            crop[within] = source[sample][inside]
            crops.append(crop)
        return tuple(crops)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        layout = torch.channels_last_3d if ctx.channels_last else torch.contiguous_format
        total = torch.empty(ctx.shape, dtype=grads[0].dtype, device=grads[0].device, memory_format=layout).zero_()
        for grad, sample, box in zip(grads, ctx.batch, ctx.boxes):
            inside, within = _overlap(box, ctx.shape[2:])
            total[sample][inside] += grad[within]
        return total, None, None


def _overlap(box: Sequence[tuple[int, int]], sizes: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The part of a box that lies in the volume: of (C, D, H, W), and of the box (C, d, h, w)."""
    inside, within = [slice(None)], [slice(None)]
    for (first, stop), size in zip(box, sizes):
        start = min(max(first, 0), size)
        end = max(start, min(stop, size))
        inside.append(slice(start, end))
        offset = min(max(start - first, 0), stop - first)
        within.append(slice(offset, offset + end - start))
    return tuple(inside), tuple(within)


def _interpolate(crop: Tensor, axes: Sequence[_Axis]) -> Tensor:
    """(C, d, h, w) samples of a crop, in its dtype."""
    volume = crop
    if any(axis.fraction is not None for axis in axes):
        volume = crop.to(torch.promote_types(crop.dtype, torch.float32))
    for dim, axis in enumerate(axes, start=1):
        volume = _along(volume, dim, axis.lower, axis.fraction)
    return volume.to(crop.dtype)


def _along(volume: Tensor, dim: int, index: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        copied = torch.equal(index, torch.arange(volume.shape[dim], device=index.device))
        return volume if copied else volume.index_select(dim, index)
    shape = [1, 1, 1, 1]
    shape[dim] = -1
    lower, upper = volume.index_select(dim, index), volume.index_select(dim, index + 1)
    return torch.lerp(lower, upper, weight.to(volume.dtype).view(shape))
