from collections.abc import Sequence
from math import inf, log

import torch
from torch import Tensor


def forward(labels: Tensor, logits: Sequence[Tensor], centers: Tensor, classes: Tensor, limit: float) -> Tensor:
    """Labels (N,D,H,W) with the voxels that each ROI claims by a logit above the limit; needs no synchronisation."""
    dtype = torch.float64 if any(roi.dtype == torch.float64 for roi in logits) else torch.float32
    voxels = labels.numel()
    # One more element takes the writes of the voxels outside the volume.
    painted = torch.cat([labels.flatten(), labels.new_zeros(1)])
    # Comparing logits instead of probabilities also ranks those whose sigmoid rounds to 1.
    best = torch.full((voxels + 1,), limit, dtype=dtype, device=labels.device)
    for k, roi in enumerate(logits):
        index = voxel_index(labels.shape, centers[k], roi.shape).flatten()
        value, current = roi.detach().to(dtype).flatten(), best[index]
        wins = value > current
        best[index] = torch.where(wins, value, current)
        painted[index] = torch.where(wins, classes[k].to(labels.dtype), painted[index])
    return painted[:voxels].view(labels.shape)


def logit(probability: float) -> float:
    """The number whose sigmoid is `probability`; infinite at 0 and 1."""
    if probability in (0, 1):
        return inf if probability else -inf
    return log(probability / (1 - probability))


def voxel_index(shape: torch.Size, center: Tensor, roi_size: torch.Size) -> Tensor:
    """Position in the flattened (N,D,H,W) volume of every voxel (d,h,w) of a ROI; outside it, the volume's size."""
    samples, *sizes = shape
    sample = center[0].to(torch.int64)
    index, inside = sample, (sample >= 0) & (sample < samples)
    for axis, (size, roi) in enumerate(zip(sizes, roi_size, strict=True)):
        # Far outside is outside; the limit keeps the conversion to integers exact.
        start = center[1 + axis].clamp(-roi, size + roi).to(torch.int64) - roi // 2
        position = start + torch.arange(roi, device=center.device)
        position = position.view([-1 if a == axis else 1 for a in range(3)])
        inside = inside & (position >= 0) & (position < size)
        index = index * size + position
    return torch.where(inside, index, shape.numel())
