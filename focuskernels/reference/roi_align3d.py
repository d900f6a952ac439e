from collections.abc import Sequence

import torch
from torch import Tensor

from .._lib import DTYPES, layout, layout_of
from .roi_sampling import Taps, accumulation, gather, scatter


def forward(
    input: Tensor, rois: Tensor, output_size: Sequence[int], scale: Sequence[float], sampling_ratio: int, aligned: bool
) -> Tensor:
    """ROIs (K, C, d, h, w) of input (N, C, D, H, W); rois (K, 7) = (sample, z1, y1, x1, z2, y2, x2), float32 or 64."""
    out = empty_output(input, rois, output_size)
    for k in range(rois.shape[0]):
        axes = _axes(rois[k], input.shape, output_size, scale, sampling_ratio, aligned)
        gather(out[k : k + 1], input, _sample(rois, k), axes)
    return out


def backward(
    grad: Tensor,
    rois: Tensor,
    scale: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    shape: Sequence[int],
    dtype: int,
    channels_last: bool,
) -> Tensor:
    """Gradient of the input, of the given shape, dtype (a position in `DTYPES`) and layout."""
    result = empty_gradient(grad, shape, dtype, channels_last)
    total = torch.zeros_like(result, dtype=accumulation(result.dtype))
    for k in range(rois.shape[0]):
        axes = _axes(rois[k], shape, grad.shape[2:], scale, sampling_ratio, aligned)
        scatter(total, grad[k : k + 1], _sample(rois, k), axes)
    return result.copy_(total)


def empty_output(input: Tensor, rois: Tensor, output_size: Sequence[int]) -> Tensor:
    """What `forward` returns, in the layout of the input."""
    shape = (rois.shape[0], input.shape[1], *output_size)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout_of(input))


def empty_gradient(grad: Tensor, shape: Sequence[int], dtype: int, channels_last: bool) -> Tensor:
    """What `backward` returns."""
    return torch.empty(tuple(shape), dtype=DTYPES[dtype], device=grad.device, memory_format=layout(channels_last))


def _sample(rois: Tensor, k: int) -> Tensor:
    return rois[k : k + 1, 0].floor().nan_to_num(nan=-1).to(torch.int64)


def _axes(
    roi: Tensor,
    shape: Sequence[int],
    output_size: Sequence[int],
    scale: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
) -> list[Taps]:
    return [
        _taps(
            *samples(roi[1 + a], roi[4 + a], scale[a], output_size[a], sampling_ratio, aligned, shape[2 + a]),
            shape[2 + a],
        )
        for a in range(3)
    ]


def samples(
    low: Tensor, high: Tensor, scale: float, out: int, sampling_ratio: int, aligned: bool, size: int
) -> tuple[Tensor, float]:
    """Coordinates (out, S) of the samples along an axis, in the arithmetic of the boxes, and the weight of each.

    Of a box far larger than the axis only samples near the axis are there, so that S is bounded by its size.
    """
    offset = 0.5 if aligned else 0.0
    start = low * scale - offset
    extent = high * scale - offset - start
    if not aligned:
        extent = torch.where(extent > 1, extent, torch.ones_like(extent))
    bin_size = extent / out
    count = sampling_ratio if sampling_ratio > 0 else int(bin_size.ceil().nan_to_num(0, 0, 0))
    count = count if extent >= 0 else 0
    bins = start + torch.arange(out, dtype=low.dtype, device=low.device) * bin_size
    first = torch.zeros_like(bins)
    if count:
        first = ((-1 - bins) / (bin_size / count)).floor().sub(1).nan_to_num(0, 0, 0).clamp(0, count - 1)
    number = first[:, None] + torch.arange(_at_most(count, bin_size, size), dtype=low.dtype, device=low.device)
    position = bins[:, None] + (number + 0.5) * bin_size / max(count, 1)
    return torch.where(number < count, position, torch.nan), 1 / max(count, 1)


def _at_most(count: int, bin_size: Tensor, size: int) -> int:
    """How many samples of a bin to look at: those within the axis and some more, in case of rounding; at least one."""
    step = float(bin_size) / count if count else 0.0
    return max(1, min(count, int((size + 1) / step) + 4) if step > 0 else count)


def _taps(position: Tensor, weight: float, size: int) -> Taps:
    """Linear interpolation at (out, S) positions, those of a bin averaged; (1, out, 2 S)."""
    # Written so that NaN is outside.
    inside = (position >= -1) & (position <= size)
    position = torch.where(inside, position, 0).clamp(0, size - 1)
    lower = position.floor()
    fraction = position - lower
    index = torch.stack([lower, (lower + 1).clamp(max=size - 1)], dim=-1).to(torch.int64)
    weights = torch.stack([1 - fraction, fraction], dim=-1) * inside[..., None]
    return Taps(index.flatten(1)[None], (weights.double() * weight).flatten(1)[None])
