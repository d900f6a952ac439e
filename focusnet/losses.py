"""The losses of the three parts, on a batch of crops."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from focuskernels import focal_dice_loss, heatmap_argmax_3d, roi_gather_each_3d

from .config import LossConfig
from .data.crops import Crop
from .data.plan import Plan
from .errors import FocusNetError
from .model import FocusNet, SNetOutput


def segmentation_loss(logits: Tensor, crop: Crop, alpha: Tensor, config: LossConfig) -> Tensor:
    """Focal plus dice loss of S-Net (equations 1 to 3), each case without the organs nobody contoured."""
    return focal_dice_loss(
        logits,
        crop.labels,
        gamma=config.gamma,
        alpha=alpha,
        dice_weight=config.dice_weight,
        smooth=config.smooth,
        class_mask=crop.contoured,
    )


def focal_alpha(plan: Plan, config: LossConfig) -> Tensor:
    """Focal weights of the background and of every organ: as configured, else from the plan.

    Raises:
        FocusNetError: the configuration has another number of weights.
    """
    values = config.alpha or [plan.background_alpha, *(organ.alpha for organ in plan.organs)]
    if len(values) == 1:
        values = values * (len(plan.organs) + 1)
    if len(values) != len(plan.organs) + 1:
        names = ", ".join(["background", *plan.organ_names])
        raise FocusNetError(f"loss.alpha has {len(values)} values, expected {len(plan.organs) + 1}: {names}")
    return torch.tensor(values)


def gaussian_heatmaps(centers: Tensor, shape: Sequence[int], spacing: Sequence[float], sigma_mm: float) -> Tensor:
    """Gaussians of height 1 and standard deviation `sigma_mm` (section 2.2 of the paper).

    Args:
        centers: (N, K, 3) voxel coordinates; NaN gives a map of NaN.
        shape: (D, H, W).
        spacing: Voxel size in mm.

    Returns:
        (N, K, D, H, W).
    """
    profiles = []
    for axis, (size, side) in enumerate(zip(shape, spacing, strict=True)):
        position = torch.arange(size, device=centers.device, dtype=centers.dtype)
        distance = (position - centers[..., axis, None]) * side
        profiles.append(torch.exp(-0.5 * (distance / sigma_mm) ** 2))
    z, y, x = profiles
    return z[..., :, None, None] * y[..., None, :, None] * x[..., None, None, :]


def heatmap_loss(logits: Tensor, heatmaps: Tensor, crop: Crop, spacing: Sequence[float], config: LossConfig) -> Tensor:
    """Error of the heat maps: its sum over voxels per Gaussian's volume, averaged over the contoured organs.

    Dividing by the Gaussian's volume in voxels, not by the crop's, keeps the loss of order one for every crop size.

    Args:
        logits: (N, small organs, D, H, W).
        heatmaps: Their sigmoids, which the caller has.
        crop: The batch of crops.
        spacing: Voxel size in mm.
        config: With `heatmap_error`: squared as in section 2.2 of the paper, or cross-entropy, whose minimum is at the
            same maps.
    """
    sigma_mm = config.heatmap_sigma_mm
    target = gaussian_heatmaps(crop.centers, logits.shape[2:], spacing, sigma_mm).nan_to_num()
    known = ~crop.centers.isnan().any(dim=-1)
    if config.heatmap_error == "squared":
        errors = (heatmaps.float() - target).square()
    else:
        errors = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none")
    voxel_mm3 = spacing[0] * spacing[1] * spacing[2]
    gaussian_voxels = (2 * torch.pi) ** 1.5 * sigma_mm**3 / voxel_mm3
    return (errors.sum(dim=(2, 3, 4)) * known).sum() / (gaussian_voxels * known.sum().clamp_min(1))


def in_crop(crop: Crop) -> Tensor:
    """(N, small organs) bool: whether the organ's centre lies in the crop."""
    shape = crop.centers.new_tensor(crop.labels.shape[1:])
    return ((crop.centers >= 0) & (crop.centers <= shape - 1)).all(dim=-1)


def sos_loss(
    network: FocusNet,
    crop: Crop,
    snet: SNetOutput,
    heatmaps: Tensor,
    plan: Plan,
    config: LossConfig,
    also: Sequence[int] = (),
) -> Tensor | None:
    """Mean binary focal plus dice loss of the small organs whose centre lies in their crop; None if there is none.

    Without one, but with `also` of `FocusNet.segment_rois`, it is 0.
    """
    samples, organs = in_crop(crop).nonzero(as_tuple=True)
    if len(samples) == 0 and not also:
        return None
    owners = organs.tolist()
    sizes = torch.tensor(network.roi_sizes, device=organs.device)[organs]
    peaks = heatmap_argmax_3d(heatmaps.detach()).index[samples, organs]
    found = _roi_centers(peaks, crop.centers[samples, organs].round().long(), sizes)
    centers = torch.cat([samples[:, None], found], dim=1)
    return rois_loss(network, crop, snet, heatmaps, owners, centers, plan, config, also)


def rois_loss(
    network: FocusNet,
    crop: Crop,
    snet: SNetOutput,
    heatmaps: Tensor,
    owners: Sequence[int],
    centers: Tensor,
    plan: Plan,
    config: LossConfig,
    also: Sequence[int] = (),
) -> Tensor:
    """Mean binary focal plus dice loss of ROI k around `centers[k]` = (sample, z, y, x), of small organ `owners[k]`.

    Branches in `also` take part in forward and backward even without an ROI: see `FocusNet.segment_rois`.
    """
    sizes = [network.roi_sizes[organ] for organ in owners]
    logits = network.segment_rois(owners, crop.image, snet, heatmaps, centers, also)
    labels = roi_gather_each_3d([crop.labels.unsqueeze(1).float()], centers, sizes)
    values = [plan.organ_names.index(plan.small_organs[organ]) + 1 for organ in owners]
    losses = [
        focal_dice_loss(
            roi[None],
            label == value,
            activation="sigmoid",
            gamma=config.gamma,
            dice_weight=config.dice_weight,
            smooth=config.smooth,
        )
        for roi, label, value in zip(logits, labels, values)
    ]
    loss = torch.stack(losses).mean() if losses else heatmaps.new_zeros((), dtype=torch.float32)
    for empty in logits[len(owners) :]:
        loss = loss + empty.sum()
    return loss


def _roi_centers(peaks: Tensor, truth: Tensor, sizes: Tensor) -> Tensor:
    """The heat map's peak, as in prediction; the true centre where the peak is so far off that the ROI misses.

    All of them (K, 3).
    """
    near = ((peaks - truth).abs() <= sizes // 4).all(dim=1, keepdim=True)
    return torch.where(near, peaks, truth)
