"""The inverse of cutting ROIs out: small-organ masks written back into a label map."""

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._arguments import as_list, integer, require_float, require_number, values_are_readable
from ._lib import COPIES_FROM_HOST, MOST_PROGRAMS, MOST_VOXELS, csrc_kernel, define, triton_kernel
from .reference import paste_rois3d as reference
from .roi_gather3d import check_centers


def paste_rois_3d(
    labels: Tensor,
    logits: Sequence[Tensor],
    centers: Tensor,
    classes: Sequence[int] | Tensor,
    *,
    threshold: float = 0.5,
) -> Tensor:
    """Write the masks of K regions of interest into label maps.

    A voxel of ROI k whose sigmoid(logit) exceeds `threshold` becomes `classes[k]`. Where ROIs compete for a voxel the
    one with the larger probability has it, the first one of equals. The ROI starts at `c - size // 2` on each axis, as
    in `roi_gather_3d`; what lies outside the volume is cut off, and a NaN logit claims nothing.

    Args:
        labels: (N, D, H, W), uint8. Not changed.
        logits: K tensors (d_k, h_k, w_k), floating point.
        centers: (K, 4) = (sample, z, y, x) in voxels; whole numbers of any dtype.
        classes: K label values between 0 and 255.
        threshold: probability between 0 and 1.

    Returns:
        New labels (N, D, H, W), uint8.

    Raises:
        TypeError: wrong types, dtypes or devices.
        ValueError: counts or shapes that do not fit, a threshold or label value out of range; and, for `centers` on the
            CPU outside `torch.compile`, centres that are no whole numbers or samples out of range. Where values are
            not looked at, a sample out of range pastes nothing and fractions are truncated.
    """
    logits = as_list(logits, "logits", "tensors")
    _check(labels, logits, threshold)
    check_centers(centers, labels.shape[0], labels.device)
    if len(centers) != len(logits):
        raise ValueError(f"{len(logits)} logits need as many centers and classes, got centers {tuple(centers.shape)}")
    if centers.is_floating_point() and values_are_readable(centers) and bool((centers != centers.trunc()).any()):
        raise ValueError(f"centers must be whole voxels, got {centers.tolist()}")
    values = _class_values(classes, len(logits), labels).contiguous()
    places = centers.detach().to(torch.float64).contiguous()
    return _forward(labels, [roi.detach() for roi in logits], places, values, _limit(logits, threshold))


def _limit(logits: Sequence[Tensor], threshold: float) -> float:
    """The logit of the threshold, rounded as the logits are."""
    limit = reference.logit(threshold)
    if any(roi.dtype == torch.float64 for roi in logits):
        return limit
    return struct.unpack("f", struct.pack("f", limit))[0]


def _check(labels: Tensor, logits: Sequence[Tensor], threshold: float) -> None:
    if not isinstance(labels, Tensor) or labels.dtype != torch.uint8:
        raise TypeError(f"labels must be a uint8 tensor, got {getattr(labels, 'dtype', type(labels).__name__)}")
    if labels.dim() != 4:
        raise ValueError(f"labels must be (N, D, H, W), got {tuple(labels.shape)}")
    for k, roi in enumerate(logits):
        require_float(roi, f"logits[{k}]", dim=3)
        if roi.device != labels.device:
            raise TypeError(f"logits[{k}] lies on {roi.device}, labels on {labels.device}")
    require_number(threshold, "threshold")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be a probability, got {threshold}")


def _class_values(classes: Sequence[int] | Tensor, count: int, labels: Tensor) -> Tensor:
    if not isinstance(classes, Tensor):
        numbers = [integer(label, f"classes[{k}]") for k, label in enumerate(as_list(classes, "classes", "integers"))]
        classes = torch.tensor(numbers, dtype=torch.int64)
    if classes.numel() and (classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool):
        raise TypeError(f"classes must be integers, got {classes.dtype}")
    values = classes.to(labels.device, torch.int64)
    if values.shape != (count,):
        raise ValueError(f"{count} logits need as many classes, got shape {tuple(values.shape)}")
    if values_are_readable(values) and bool(((values < 0) | (values > 255)).any()):
        raise ValueError(f"classes must lie between 0 and 255, got {values.tolist()}")
    return values


def _not_in_triton(labels: Tensor, logits: Sequence[Tensor], *_: Any) -> str | None:
    if any(roi.dtype == torch.float64 for roi in logits):
        return "no kernel for torch.float64"
    samples, voxels = labels.shape[0], labels.shape[1:].numel()
    if samples > MOST_PROGRAMS or voxels > MOST_VOXELS:
        return f"labels of {tuple(labels.shape)} are too large"
    return None


def _fake_forward(labels: Tensor, *_: Any) -> Tensor:
    return labels.new_empty(labels.shape)


_forward = define(
    "paste_rois_3d_fwd(Tensor labels, Tensor[] logits, Tensor centers, Tensor classes, float limit) -> Tensor",
    op="paste_rois_3d",
    reference=reference.forward,
    fake=_fake_forward,
    cpu=[csrc_kernel("paste_rois_3d")],
    cuda=[triton_kernel("paste_rois3d", "forward", _not_in_triton)],
    tags=COPIES_FROM_HOST,
)
