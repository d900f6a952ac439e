"""Regions of interest cut out of several feature volumes and concatenated: SOS-Net's input."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ._arguments import require_float, triple, values_are_readable
from .reference import roi_gather3d as reference


def roi_gather_3d(
    sources: Sequence[Tensor],
    centers: Tensor,
    roi_size: int | Sequence[int],
    output_size: int | Sequence[int] | None = None,
    *,
    spatial_scales: Sequence[float | Sequence[float]] | None = None,
    padding: Literal["zeros", "border"] = "zeros",
) -> Tensor:
    """Sample a box around each centre from every source and concatenate the channels.

    Along an axis with a ROI of R voxels and S output samples, sample o lies at `c - R // 2 + (o + 0.5) * R / S - 0.5`
    on the reference grid and at `(x + 0.5) * s - 0.5` in a source of scale s, read trilinearly (the half-pixel
    convention of `grid_sample` with align_corners=False). An integer centre with S = R and s = 1 is an exact copy
    that starts at `c - R // 2`.

    Args:
        sources: one or more (N, C_i, D_i, H_i, W_i), floating point, same N and device. Mixed dtypes are promoted.
        centers: (K, 4) = (sample, z, y, x), integer or floating point, in voxels of the reference grid; K may be 0.
            Floating-point centres that require grad receive one (half-precision ones should not be used: they cannot
            hold large coordinates).
        roi_size: size of the box in reference voxels, one number or (d, h, w).
        output_size: samples per axis, one number or (d, h, w). Default `roi_size`.
        spatial_scales: per source its voxels per reference voxel, one number or (z, y, x); 0.5 for features after one
            downsampling. Default 1 for each.
        padding: what is read outside a source: 0, or the nearest voxel.

    Returns:
        (K, sum C_i, d, h, w); differentiable in `sources` and `centers`.

    Raises:
        TypeError: wrong types, dtypes or devices.
        ValueError: shapes that do not fit, sizes or scales that are not positive, an unknown padding; and, for
            `centers` on the CPU outside `torch.compile`, a coordinate that is not finite or a sample number out of
            range. Where values are not looked at, a sample number out of range gives zeros and a NaN coordinate NaN.
    """
    if isinstance(sources, Tensor):
        raise TypeError(f"sources must be a sequence of tensors, got one tensor of shape {tuple(sources.shape)}")
    sources = list(sources)
    roi = triple(roi_size, "roi_size")
    out = roi if output_size is None else triple(output_size, "output_size")
    _check_sources(sources)
    scales = _scales(spatial_scales, len(sources))
    check_centers(centers, sources[0].shape[0], sources[0].device)
    if padding not in ("zeros", "border"):
        raise ValueError(f"padding must be 'zeros' or 'border', got {padding!r}")
    return reference.forward(sources, centers, roi, out, scales, padding)


def _check_sources(sources: Sequence[Tensor]) -> None:
    if not sources:
        raise ValueError("sources is empty, expected at least one (N, C, D, H, W) tensor")
    for i, source in enumerate(sources):
        require_float(source, f"sources[{i}]")
        if 0 in source.shape[2:]:
            raise ValueError(f"sources[{i}] has no voxels: {tuple(source.shape)}")
        if source.shape[0] != sources[0].shape[0]:
            raise ValueError(f"sources differ in batch size: {[tuple(s.shape) for s in sources]}")
        if source.device != sources[0].device:
            raise TypeError(f"sources lie on different devices: {[str(s.device) for s in sources]}")


def _scales(spatial_scales: Sequence[float | Sequence[float]] | None, count: int) -> list[tuple[float, float, float]]:
    if spatial_scales is None:
        return [(1.0, 1.0, 1.0)] * count
    if not isinstance(spatial_scales, Sequence) or isinstance(spatial_scales, str):
        raise TypeError(f"spatial_scales must hold one scale per source, got {spatial_scales!r}")
    if len(spatial_scales) != count:
        raise ValueError(f"spatial_scales has {len(spatial_scales)} entries for {count} sources")
    scales = []
    for i, value in enumerate(spatial_scales):
        scale = (value,) * 3 if isinstance(value, int | float) else tuple(value)
        if len(scale) != 3 or not all(0 < s < float("inf") for s in scale):
            raise ValueError(f"spatial_scales[{i}] must be one or three positive numbers, got {value!r}")
        scales.append((float(scale[0]), float(scale[1]), float(scale[2])))
    return scales


def check_centers(centers: Tensor, samples: int, device: torch.device) -> None:
    """Refuse `centers` that are not (K, 4) numbers with sample numbers in range."""
    if not isinstance(centers, Tensor):
        raise TypeError(f"centers must be a tensor, got {type(centers).__name__}")
    if centers.dtype == torch.bool or centers.is_complex():
        raise TypeError(f"centers must be integer or floating point, got {centers.dtype}")
    if centers.device != device:
        raise TypeError(f"centers lie on {centers.device}, the volumes on {device}")
    if centers.dim() != 2 or centers.shape[1] != 4:
        raise ValueError(f"centers must be (K, 4) = (sample, z, y, x), got {tuple(centers.shape)}")
    if not values_are_readable(centers):
        return
    if not bool(torch.isfinite(centers).all()):
        raise ValueError(f"centers must be finite, got {centers.tolist()}")
    batch = centers[:, 0]
    if not bool(((batch >= 0) & (batch < samples) & (batch == batch.trunc())).all()):
        raise ValueError(f"centers name samples {batch.tolist()}, expected integers in [0, {samples})")
