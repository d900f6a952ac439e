"""Whole-volume inference: S-Net and SOL-Net in overlapping windows, SOS-Net around the peaks, one label map."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from focuskernels import heatmap_argmax_3d, paste_rois_3d

from .checkpoint import Model
from .config import Triple, total_stride
from .data.preprocess import normalize
from .model import FocusNet, SNetOutput


@dataclass
class Segmentation:
    """The result for one volume of D x H x W voxels.

    Attributes:
        labels: (D, H, W) uint8; 0 is the background.
        confidence: (1 + organs,) mean probability of each label over its voxels; NaN where there are none.
        peaks: (small organs, 3) voxel coordinates of the heat maps' maxima; empty without SOL-Net.
        peak_values: (small organs,) heights of these maxima.
        empty_rois: Numbers of the small organs whose branch found nothing around the peak: what is there is S-Net's.
    """

    labels: Tensor
    confidence: Tensor
    peaks: Tensor
    peak_values: Tensor
    empty_rois: list[int]


def segment_hu(model: Model, hu: np.ndarray, device: torch.device) -> Segmentation:
    """Segment one volume as `model.config` says.

    Args:
        model: With its network in evaluation mode on `device`.
        hu: (D, H, W) on the network's grid.
        device: Where to compute.
    """
    config = model.config
    return segment(
        model.network,
        normalize(torch.from_numpy(hu.astype(np.float32)), config.data).to(device),
        model.small_labels,
        window=config.train.crop,
        overlap=config.predict.overlap,
        min_peak=config.predict.min_peak,
        largest_component=config.predict.largest_component,
        parts=model.parts,
    )


@torch.inference_mode()
def segment(
    network: FocusNet,
    image: Tensor,
    small_labels: list[int],
    *,
    window: Triple,
    overlap: float,
    min_peak: float,
    largest_component: bool = False,
    parts: tuple[str, ...] = ("snet", "sol", "sos"),
) -> Segmentation:
    """Segment one volume.

    Args:
        network: In evaluation mode.
        image: Normalised intensities (D, H, W) on the network's device.
        small_labels: Label value of every small organ, in the order of the heat maps.
        window: Size of the windows in voxels; they shrink to volumes that are smaller.
        overlap: Share by which neighbouring windows overlap, in [0, 1).
        min_peak: A small organ whose heat map stays below this, or whose branch finds nothing in its ROI, keeps S-Net's
            segmentation.
        largest_component: Keep the largest connected part alone of every organ that S-Net segments.
        parts: The trained parts; without "sos" the label map is S-Net's.
    """
    shape = tuple(image.shape)
    padded, size = padded_size(shape, window, network.snet.strides)
    windows = Windows(network, _pad(image, padded), size)
    probability, heatmaps = windows.average(window_starts(padded, size, overlap), with_heatmaps="sol" in parts)
    peaks = heatmap_argmax_3d(_crop(heatmaps, shape)[None])
    located = [k for k, height in enumerate(peaks.value[0].tolist()) if "sos" in parts and height >= min_peak]
    found = _segment_small_organs(windows, shape, peaks.index[0], located)
    for organ in found:
        probability[small_labels[organ]] = 0
    probability = _crop(probability, shape)
    best, labels = probability.max(dim=0)
    labels = labels.to(torch.uint8)
    if largest_component:
        labels = _largest_components(labels)
    if found:
        labels, best = _paste_small_organs(labels, best, peaks.index[0], found, small_labels)
    confidence = torch.stack([best[labels == value].mean() for value in range(len(probability))])
    empty_rois = [organ for organ in located if organ not in found]
    return Segmentation(labels, confidence, peaks.index[0], peaks.value[0], empty_rois)


class Windows:
    """Runs the network on windows of one padded volume (D, H, W); the last window's features are kept."""

    def __init__(self, network: FocusNet, volume: Tensor, size: Triple) -> None:
        self.network, self.volume, self.size = network, volume, size
        self._last: tuple[Triple, tuple[Tensor, SNetOutput, Tensor]] | None = None

    def run(self, start: Triple) -> tuple[Tensor, SNetOutput, Tensor]:
        """Image (1, 1, d, h, w), S-Net's output and heat maps of the window at `start`."""
        if self._last is None or self._last[0] != start:
            image = self.volume[_slices(start, self.size)][None, None]
            snet = self.network.snet(image)
            self._last = (start, (image, snet, self.network.locate(snet).sigmoid()))
        return self._last[1]

    def holding(self, boxes: list[Triple]) -> "Windows":
        """Itself; with larger windows where a box would not fit into one."""
        strides = total_stride(self.network.snet.strides)
        longest = [max(side) for side in zip(self.size, *boxes, strict=True)]
        d, h, w = (min(-(-a // t) * t, n) for a, t, n in zip(longest, strides, self.volume.shape, strict=True))
        return self if (d, h, w) == self.size else Windows(self.network, self.volume, (d, h, w))

    def average(self, starts: Sequence[Triple], with_heatmaps: bool) -> tuple[Tensor, Tensor]:
        """Probabilities (C, D, H, W) and heat maps (K or 0, D, H, W), averaged over windows with Gaussian weights."""
        weight = _importance(self.size, self.volume.device)
        total = torch.zeros_like(self.volume)
        sums: list[Tensor] = []
        for start in starts:
            _, snet, heatmaps = self.run(start)
            z, y, x = window = _slices(start, self.size)
            values = (
                snet.logits[0].float().softmax(dim=0),
                heatmaps[0, : None if with_heatmaps else 0].float(),
            )
            if not sums:
                sums = [v.new_zeros((len(v), *self.volume.shape)) for v in values]
            for into, value in zip(sums, values, strict=True):
                into[:, z, y, x].addcmul_(value, weight)
            total[window] += weight
        return sums[0].div_(total), sums[1].div_(total)


def _largest_components(labels: Tensor) -> Tensor:
    """Every label's largest part whose voxels touch by faces, edges or corners; the other parts become background."""
    from scipy import ndimage

    array = labels.cpu().numpy()
    kept = np.zeros_like(array)
    for value, box in enumerate(ndimage.find_objects(array), start=1):
        if box is None:
            continue
        parts, _ = ndimage.label(array[box] == value, structure=np.ones((3, 3, 3)))
        largest = np.bincount(parts.ravel())[1:].argmax() + 1
        kept[box][parts == largest] = value
    return torch.from_numpy(kept).to(labels.device)


def _segment_small_organs(
    windows: Windows, shape: tuple[int, ...], peaks: Tensor, organs: list[int]
) -> dict[int, Tensor]:
    """SOS-Net's logits (d, h, w) of those of the organs that it finds around their peaks in a volume of `shape`."""
    logits: dict[int, Tensor] = {}
    sizes = windows.network.roi_sizes
    windows = windows.holding([sizes[organ] for organ in organs])
    for start, members in _group(peaks, organs, sizes, windows.size, tuple(windows.volume.shape)):
        image, snet, heatmaps = windows.run(start)
        in_window = peaks[members] - peaks.new_tensor(start)
        centers = torch.cat([peaks.new_zeros(len(members), 1), in_window], dim=1)
        found_here = windows.network.segment_rois(members, image, snet, heatmaps, centers)
        logits |= {organ: roi[0].float() for organ, roi in zip(members, found_here, strict=True)}
    inside = {organ: _roi_overlap(peaks[organ].tolist(), sizes[organ], shape)[1] for organ in organs}
    return {organ: logits[organ] for organ in organs if (logits[organ][inside[organ]] > 0).any()}


def _paste_small_organs(
    labels: Tensor, best: Tensor, peaks: Tensor, found: dict[int, Tensor], small_labels: list[int]
) -> tuple[Tensor, Tensor]:
    """Paste the logits `found` over `labels`; returns labels and their probabilities."""
    organs = list(found)
    classes = torch.tensor([small_labels[organ] for organ in organs], device=labels.device)
    centers = torch.cat([peaks.new_zeros(len(organs), 1), peaks[organs]], dim=1)
    pasted = paste_rois_3d(labels[None], list(found.values()), centers, classes)[0]
    best = best.clone()
    for organ, roi in found.items():
        inside, in_roi = _roi_overlap(peaks[organ].tolist(), roi.shape, labels.shape)
        won = pasted[inside] == small_labels[organ]
        best[inside] = torch.where(won, roi.sigmoid()[in_roi], best[inside])
    return pasted, best


def _group(
    peaks: Tensor, found: list[int], sizes: list[Triple], window: Triple, shape: tuple[int, ...]
) -> list[tuple[Triple, list[int]]]:
    """Windows (starts) for SOS-Net, each holding the ROIs of as many organs as fit, so that few windows run again."""
    groups: list[tuple[list[int], list[int], list[int]]] = []
    for organ in found:
        low = [p - n // 2 for p, n in zip(peaks[organ].tolist(), sizes[organ], strict=True)]
        high = [a + n for a, n in zip(low, sizes[organ], strict=True)]
        for members, group_low, group_high in groups:
            new_low, new_high = list(map(min, group_low, low)), list(map(max, group_high, high))
            if all(b - a <= w for a, b, w in zip(new_low, new_high, window, strict=True)):
                members.append(organ)
                group_low[:], group_high[:] = new_low, new_high
                break
        else:
            groups.append(([organ], low, high))

    def start(low: list[int], high: list[int]) -> Triple:
        z, y, x = (max(0, min((a + b - w) // 2, n - w)) for a, b, w, n in zip(low, high, window, shape, strict=True))
        return z, y, x

    return [(start(low, high), members) for members, low, high in groups]


def _roi_overlap(
    center: Sequence[int], size: Sequence[int], shape: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The part of an ROI inside the volume, as slices of the volume and of the ROI."""
    starts = [c - n // 2 for c, n in zip(center, size, strict=True)]
    low = [max(0, s) for s in starts]
    high = [min(s + n, limit) for s, n, limit in zip(starts, size, shape, strict=True)]
    volume = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    roi = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, starts, strict=True))
    return volume, roi


def padded_size(shape: Sequence[int], window: Triple, strides: list[Triple]) -> tuple[Triple, Triple]:
    """Sizes of volume and window as multiples of the total stride.

    The norms need two voxels at the lowest resolution, so that a smaller volume is padded to twice the stride.
    """
    total = total_stride(strides)
    depth, height, width = (max(2, -(-n // t)) * t for n, t in zip(shape, total, strict=True))
    d, h, w = (min(-(-a // t) * t, n) for a, t, n in zip(window, total, (depth, height, width), strict=True))
    return (depth, height, width), (d, h, w)


def _pad(image: Tensor, shape: Triple) -> Tensor:
    """The far end filled up with the volume's minimum."""
    padding = [amount for n, m in zip(reversed(image.shape), reversed(shape), strict=True) for amount in (0, m - n)]
    return F.pad(image, padding, value=float(image.min()))


def window_starts(shape: Triple, size: Triple, overlap: float) -> list[Triple]:
    """Where the windows of a volume begin."""
    axes = []
    for n, w in zip(shape, size, strict=True):
        steps = -(-(n - w) // max(1, int(w * (1 - overlap))))
        axes.append([round(i * (n - w) / steps) for i in range(steps + 1)] if steps else [0])
    return [(z, y, x) for z, y, x in product(*axes)]


def _importance(size: Triple, device: torch.device) -> Tensor:
    """Gaussian window weights (d, h, w), standard deviation an eighth of the side: a window knows its middle best."""
    weight = torch.ones(size, device=device)
    for axis, n in enumerate(size):
        x = torch.arange(n, device=device, dtype=torch.float32) - (n - 1) / 2
        shape = [1, 1, 1]
        shape[axis] = n
        weight = weight * torch.exp(-0.5 * (x / (n / 8)) ** 2).clamp_min(1e-3).view(shape)
    return weight


def _slices(start: Triple, size: Triple) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))


def _crop(channels: Tensor, shape: tuple[int, ...]) -> Tensor:
    return channels[:, : shape[0], : shape[1], : shape[2]]
