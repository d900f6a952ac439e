from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._lib import DTYPES, layout, layout_of
from .roi_sampling import Taps, accumulation, gather, scatter


class Boxes(NamedTuple):
    """Where K ROIs lie and what they read.

    `roi_size` and `output_size` hold three numbers for all ROIs, which make one tensor, or three for each, which make
    K. `scales` holds three per source; `channels`, K per source: the one channel that a ROI reads, or -1 for all; or
    nothing.
    """

    centers: Tensor
    roi_size: Sequence[int]
    output_size: Sequence[int]
    scales: Sequence[float]
    channels: Sequence[int]
    border: bool

    def groups(self) -> list[slice]:
        """The ROIs of every output."""
        outputs, rois = len(self.roi_size) // 3, self.centers.shape[0]
        return [slice(0, rois)] if outputs == 1 else [slice(k, k + 1) for k in range(outputs)]

    def sizes(self, group: int) -> tuple[Sequence[int], Sequence[int]]:
        """ROI and output size of an output."""
        return self.roi_size[3 * group : 3 * group + 3], self.output_size[3 * group : 3 * group + 3]

    def channel(self, source: int, roi: int) -> int:
        """The one channel that a ROI reads, or -1."""
        return self.channels[source * self.centers.shape[0] + roi] if self.channels else -1

    def width(self, source: int, channels: int) -> int:
        """Channels of the output that come from a source of so many."""
        return channels if self.channel(source, 0) < 0 else 1


def forward(
    sources: Sequence[Tensor],
    centers: Tensor,
    roi_size: Sequence[int],
    output_size: Sequence[int],
    scales: Sequence[float],
    channels: Sequence[int],
    border: bool,
) -> list[Tensor]:
    """ROIs (K, sum C_i, d, h, w), or K of (1, sum C_i, d_k, h_k, w_k), of sources (N, C_i, D_i, H_i, W_i)."""
    boxes = Boxes(centers, roi_size, output_size, scales, channels, border)
    outputs = empty_outputs(sources, boxes)
    for group, (rois, out) in enumerate(zip(boxes.groups(), outputs, strict=True)):
        first = 0
        for i, source in enumerate(sources):
            width = boxes.width(i, source.shape[1])
            axes = _axes(boxes, group, i, source.shape)
            for k in range(out.shape[0]):
                part = source.narrow(1, max(boxes.channel(i, rois.start + k), 0), width)
                batch = sample_numbers(centers)[rois][k : k + 1]
                gather(out[k : k + 1, first : first + width], part, batch, [axis.only(k) for axis in axes])
            first += width
    return outputs


def backward(
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    centers: Tensor,
    roi_size: Sequence[int],
    output_size: Sequence[int],
    scales: Sequence[float],
    channels: Sequence[int],
    shapes: Sequence[int],
    first_channels: Sequence[int],
    dtypes: Sequence[int],
    channels_last: Sequence[int],
    border: bool,
) -> list[Tensor]:
    """Gradients of some sources, added to `bases` where there are any.

    Args:
        grads: of the outputs.
        bases: other gradients of the same sources, in shape, dtype and layout theirs; or none.
        shapes: five sizes per source.
        first_channels: of each source within the outputs.
        dtypes: of each source, as positions in `DTYPES`.
        channels_last: whether each source has this layout.
    """
    boxes = Boxes(centers, roi_size, output_size, scales, channels, border)
    results = empty_gradients(centers, shapes, dtypes, channels_last)
    for i, result in enumerate(results):
        wide = accumulation(result.dtype)
        total = bases[i].to(wide, copy=True) if bases else torch.zeros_like(result, dtype=wide)
        width = boxes.width(i, total.shape[1])
        for group, (rois, grad) in enumerate(zip(boxes.groups(), grads, strict=True)):
            axes = _axes(boxes, group, i, result.shape)
            for k in range(grad.shape[0]):
                part = total.narrow(1, max(boxes.channel(i, rois.start + k), 0), width)
                owed = grad[k : k + 1, first_channels[i] : first_channels[i] + width]
                batch = sample_numbers(centers)[rois][k : k + 1]
                scatter(part, owed, batch, [axis.only(k) for axis in axes])
        result.copy_(total)
    return results


def centers_backward(
    grads: Sequence[Tensor],
    sources: Sequence[Tensor],
    centers: Tensor,
    roi_size: Sequence[int],
    output_size: Sequence[int],
    scales: Sequence[float],
    channels: Sequence[int],
    border: bool,
) -> Tensor:
    """Gradient (K, 4) of centers; 0 for the sample number."""
    boxes = Boxes(centers, roi_size, output_size, scales, channels, border)
    result = torch.zeros_like(centers, dtype=torch.float64)
    for group, (rois, grad) in enumerate(zip(boxes.groups(), grads, strict=True)):
        first = 0
        for i, source in enumerate(sources):
            width = boxes.width(i, source.shape[1])
            owed = grad[:, first : first + width].double()
            first += width
            for a in range(3):
                axes = _axes(boxes, group, i, source.shape, slope=a)
                for k in range(owed.shape[0]):
                    part = source.narrow(1, max(boxes.channel(i, rois.start + k), 0), width)
                    slopes = torch.empty_like(owed[k : k + 1])
                    gather(slopes, part, sample_numbers(centers)[rois][k : k + 1], [axis.only(k) for axis in axes])
                    result[rois.start + k, 1 + a] += (owed[k : k + 1] * slopes).sum()
    return result.to(centers.dtype)


def sample_numbers(centers: Tensor) -> Tensor:
    """(K,) int64; out of range where it is no number."""
    number = centers[:, 0]
    return number.floor().nan_to_num(nan=-1).to(torch.int64) if number.is_floating_point() else number.to(torch.int64)


def coordinates(center: Tensor, roi: int, out: int, scale: float, size: int) -> Tensor:
    """Where ROIs sample an axis of a source: centres (K,) in reference voxels -> (K, out) source voxels, float64."""
    # A ROI this far outside reads padding only; the limit keeps the later conversion to integers exact.
    margin = roi + 2 + 2 / scale
    center = center.to(torch.float64).clamp(-margin, size / scale + margin)
    step = (torch.arange(out, device=center.device, dtype=torch.float64) + 0.5) * (roi / out) - 0.5
    reference = center[:, None] - roi // 2 + step
    return (reference + 0.5) * scale - 0.5


def empty_outputs(sources: Sequence[Tensor], boxes: Boxes) -> list[Tensor]:
    """What `forward` returns: of the promoted dtype, in the first source's layout."""
    first, dtype = sources[0], sources[0].dtype
    for source in sources[1:]:
        dtype = torch.promote_types(dtype, source.dtype)
    width = sum(boxes.width(i, source.shape[1]) for i, source in enumerate(sources))
    rois = boxes.centers.shape[0] if len(boxes.output_size) == 3 else 1
    return [
        torch.empty((rois, width, *boxes.sizes(g)[1]), dtype=dtype, device=first.device, memory_format=layout_of(first))
        for g in range(len(boxes.output_size) // 3)
    ]


def empty_gradients(
    centers: Tensor,
    shapes: Sequence[int],
    dtypes: Sequence[int],
    channels_last: Sequence[int],
) -> list[Tensor]:
    """One tensor for each source."""
    return [
        torch.empty(
            tuple(shapes[5 * i : 5 * i + 5]),
            dtype=DTYPES[dtype],
            device=centers.device,
            memory_format=layout(bool(channels_last[i])),
        )
        for i, dtype in enumerate(dtypes)
    ]


def _axes(boxes: Boxes, group: int, i: int, shape: Sequence[int], slope: int | None = None) -> list[Taps]:
    """Taps of a group's ROIs in source i; along the axis `slope`, the derivative by the centre's coordinate instead."""
    roi, out = boxes.sizes(group)
    axes = []
    for a, size in enumerate(shape[2:]):
        scale = boxes.scales[3 * i + a]
        x = coordinates(boxes.centers[boxes.groups()[group], 1 + a], roi[a], out[a], scale, size)
        inside = (x >= 0) & (x <= size - 1) if boxes.border else torch.ones_like(x, dtype=torch.bool)
        x = x.clamp(0, size - 1) if boxes.border else x
        fraction = x - x.floor()
        axes.append(
            _pair(x, -scale * inside, scale * inside, size) if a == slope else _pair(x, 1 - fraction, fraction, size)
        )
    return axes


def _pair(x: Tensor, lower: Tensor, upper: Tensor, size: int) -> Taps:
    """Taps at the two voxels around x; those outside have weight 0."""
    index = torch.stack([x.floor(), x.floor() + 1], dim=-1).to(torch.int64)
    weight = torch.stack([lower, upper], dim=-1)
    inside = (index >= 0) & (index < size)
    # A coordinate that is not a number gives weights that are none either.
    return Taps(index.clamp(0, size - 1), torch.where(inside | weight.isnan(), weight, 0))
