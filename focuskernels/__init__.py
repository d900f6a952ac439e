"""Operations of 3D segmentation of small organs: losses, regions of interest, dilated convolution, norm and SE."""

from .heatmap_argmax3d import HeatmapPeaks, heatmap_argmax_3d

__all__ = ["HeatmapPeaks", "heatmap_argmax_3d"]
