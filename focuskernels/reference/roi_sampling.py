"""Sampling of boxes, separable along the three axes: what `roi_gather_3d` and `roi_align_3d` have in common."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Taps(NamedTuple):
    """What the samples of K ROIs read along one axis: T voxels each, (K, out, T); what has weight 0 is not read."""

    index: Tensor  # type: ignore[assignment]  #: int64, within the axis; hides tuple.index
    weight: Tensor  #: float64

    def only(self, k: int) -> "Taps":
        """Those of one ROI, (1, out, T)."""
        return Taps(self.index[k : k + 1], self.weight[k : k + 1])

    def of(self, k: int) -> "Taps":
        """Those of one ROI, (out, T)."""
        return Taps(self.index[k], self.weight[k])


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The dtype to add up in."""
    return torch.promote_types(dtype, torch.float32)


def gather(out: Tensor, source: Tensor, batch: Tensor, axes: Sequence[Taps]) -> None:
    """Write the samples of source (N, C, D, H, W) into out (K, C, d, h, w); zeros where batch (K,) is out of range."""
    for k, n in enumerate(batch.tolist()):
        if not 0 <= n < source.shape[0]:
            out[k].zero_()
            continue
        spans, taps = _spans([axis.of(k) for axis in axes])
        volume = source[n][spans].to(accumulation(out.dtype))
        for dim, (index, weight) in enumerate(taps, start=1):
            volume = _along(volume, dim, index, weight)
        out[k] = volume


def scatter(total: Tensor, grad: Tensor, batch: Tensor, axes: Sequence[Taps]) -> None:
    """The transpose of `gather`: add grad (K, C, d, h, w) to total (N, C, D, H, W), ROI by ROI."""
    for k, n in enumerate(batch.tolist()):
        if not 0 <= n < total.shape[0]:
            continue
        spans, taps = _spans([axis.of(k) for axis in axes])
        box = grad[k].to(total.dtype)
        for dim, (index, weight) in reversed(list(enumerate(taps, start=1))):
            box = _along_transposed(box, dim, index, weight, spans[dim].stop - spans[dim].start)
        total[n][spans] += box


def _spans(taps: Sequence[Taps]) -> tuple[tuple[slice, ...], list[Taps]]:
    """The part of (C, D, H, W) that is needed, and the taps counted from its first voxel."""
    spans = [slice(int(index.min()), int(index.max()) + 1) for index, _ in taps]
    moved = [Taps(index - span.start, weight) for (index, weight), span in zip(taps, spans, strict=True)]
    return (slice(None), *spans), moved


def _along(volume: Tensor, dim: int, index: Tensor, weight: Tensor) -> Tensor:
    shape = list(volume.shape)
    shape[dim] = len(index)
    total = volume.new_zeros(shape)
    for t in range(index.shape[1]):
        w = _broadcast(weight[:, t], dim, volume.dtype)
        if bool(w.any()):
            # What has no part in a sample must not reach it as 0 * inf.
            total += torch.where(w == 0, 0, volume.index_select(dim, index[:, t]) * w)
    return total


def _along_transposed(box: Tensor, dim: int, index: Tensor, weight: Tensor, size: int) -> Tensor:
    shape = list(box.shape)
    shape[dim] = size
    total = box.new_zeros(shape)
    for t in range(index.shape[1]):
        w = _broadcast(weight[:, t], dim, box.dtype)
        if not bool(w.any()):
            continue
        owed = torch.where(w == 0, 0, box * w)
        if total.device.type == "cpu":
            total.index_add_(dim, index[:, t], owed)
        else:
            # index_add_ on a GPU, unlike this, adds in no fixed order.
            total.movedim(dim, 0).index_put_((index[:, t],), owed.movedim(dim, 0), accumulate=True)
    return total


def _broadcast(weight: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).view([-1 if d == dim else 1 for d in range(4)])
