from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
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
        total = source.new_zeros(()).expand(source.shape[1], len(centers), *output_size)
        for (z, wz), (y, wy), (x, wx) in product(*axes):
            voxels = volume[
                :, batch[:, None, None, None], z[:, :, None, None], y[:, None, :, None], x[:, None, None, :]
            ]
            weight = wz[:, :, None, None] * wy[:, None, :, None] * wx[:, None, None, :] * known[:, None, None, None]
            total = total + voxels * weight.to(source.dtype)
        regions.append(total.transpose(0, 1))
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
    """The same by slicing each ROI out first; axes whose samples fall on voxels are copied, not interpolated."""
    batch = centers[:, 0].tolist()
    positions = [
        [
            coordinates(centers[:, 1 + a], roi_size[a], output_size[a], scale[a], size)
            for a, size in enumerate(source.shape[2:])
        ]
        for source, scale in zip(sources, scales, strict=True)
    ]
    pieces = []
    for k in range(len(centers)):
        for source, axes in zip(sources, positions, strict=True):
            pieces.append(_sample(source[int(batch[k])], [axis[k] for axis in axes], padding))
    dtype = pieces[0].dtype
    for piece in pieces:
        dtype = torch.promote_types(dtype, piece.dtype)
    return torch.cat([piece.to(dtype) for piece in pieces]).unflatten(0, (len(centers), -1))


def _sample(volume: Tensor, positions: Sequence[Tensor], padding: str) -> Tensor:
    """Interpolate (C, D, H, W) at the grid of three coordinate vectors."""
    pads: list[int] = []
    axes: list[tuple[Tensor, Tensor | None]] = []
    for dim, position in enumerate(positions, start=1):
        size = volume.shape[dim]
        if padding == "border":
            position = position.clamp(0, size - 1)
        lower = position.detach().floor()
        fraction = position - lower
        whole = not position.requires_grad and not bool(fraction.any())
        first, last = int(lower[0]), int(lower[-1]) + (0 if whole else 1)
        start, stop = min(max(first, 0), size), min(max(last + 1, 0), size)
        volume = volume.narrow(dim, start, max(stop - start, 0))
        length, before = last + 1 - first, min(max(-first, 0), last + 1 - first)
        pads = [before, length - before - max(stop - start, 0), *pads]
        axes.append((lower.to(torch.int64) - first, None if whole else fraction))
    if any(pads):
        # border positions exceed the volume only as the upper corner of weight 0, so zeros serve both paddings
        volume = F.pad(volume, pads)
    for dim, (index, weight) in enumerate(axes, start=1):
        volume = _along(volume, dim, index, weight)
    return volume


def _along(volume: Tensor, dim: int, index: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        copied = torch.equal(index, torch.arange(volume.shape[dim]))
        return volume if copied else volume.index_select(dim, index)
    shape = [1, 1, 1, 1]
    shape[dim] = -1
    lower, upper = volume.index_select(dim, index), volume.index_select(dim, index + 1)
    return torch.lerp(lower, upper, weight.to(volume.dtype).view(shape))
