"""Operations of 3D segmentation of small organs: losses, regions of interest, dilated convolution, norm and SE."""

from .dilated_conv3d import dilated_conv3d
from .focal_dice import FocalDiceSums, focal_dice_loss, focal_dice_sums
from .heatmap_argmax3d import HeatmapPeaks, heatmap_argmax_3d
from .linear_focal_dice import LinearArgmax, linear_argmax, linear_focal_dice_loss
from .norm_act import norm_act
from .norm_se_residual import norm_se_residual
from .paste_rois3d import paste_rois_3d
from .roi_align3d import roi_align_3d
from .roi_gather3d import roi_gather_3d, roi_gather_each_3d
from .se_residual import se_residual

__all__ = [
    "FocalDiceSums",
    "HeatmapPeaks",
    "LinearArgmax",
    "dilated_conv3d",
    "focal_dice_loss",
    "focal_dice_sums",
    "heatmap_argmax_3d",
    "linear_argmax",
    "linear_focal_dice_loss",
    "norm_act",
    "norm_se_residual",
    "paste_rois_3d",
    "roi_align_3d",
    "roi_gather_3d",
    "roi_gather_each_3d",
    "se_residual",
]
