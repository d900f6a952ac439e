"""The networks that the paper compares S-Net with, where they are no configuration of it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focuskernels.nn import DilatedConv3d, NormAct3d

from .blocks import MainNetwork, SNetOutput, by_backend, channels_last, conv_block, head, pool
from .config import ModelConfig


class UNet(MainNetwork):
    """3D U-Net (Çiçek et al., MICCAI 2016): `widths` lists the output of every convolution of the encoder.

    Its up-convolutions are trilinear here, as S-Net's are.
    """

    def __init__(self, config: ModelConfig, classes: int) -> None:
        super().__init__()
        self.strides = config.downsampling
        width = 1
        self.encoder = nn.ModuleList()
        for widths in config.widths:
            self.encoder.append(conv_block(config, width, widths))
            width = widths[-1]
        self.decoder = nn.ModuleList()
        for out in (widths[-1] for widths in reversed(config.widths[:-1])):
            self.decoder.append(conv_block(config, width + out, [out, out]))
            width = out
        self.head = head(config, width, classes)
        self.feature_channels = self.stem_channels = width

    def forward(self, image: Tensor) -> SNetOutput:
        """Segment `image` (N, 1, D, H, W)."""
        x = self.encoder[0](channels_last(image))
        skips = [x]
        for stride, convolutions in zip(self.strides, self.encoder[1:], strict=True):
            x = convolutions(pool(x, stride))
            skips.append(x)
        skips.pop()
        stem = skips[0]
        for convolutions in self.decoder:
            skip = skips.pop()
            x = convolutions(torch.cat([_resized(x, skip), skip], dim=1))
        return SNetOutput(self.head(x), x, stem)


class DeepLab(MainNetwork):
    """DeepLab-v3+ (Chen et al., ECCV 2018) in three dimensions.

    A residual encoder, the atrous spatial pyramid at its lowest resolution (`aspp_dilations`, every branch of
    `aspp_bottleneck` channels), and one decoder step at the resolution of the first downsampling, whose features are
    reduced to `aspp_growth` channels.
    """

    def __init__(self, config: ModelConfig, classes: int) -> None:
        super().__init__()
        self.strides = config.downsampling
        width = config.widths[0][0]
        self.stem = by_backend(config, DilatedConv3d(1, width, config.stem_kernel))
        self.encoder = nn.ModuleList()
        for widths in config.widths:
            blocks = []
            for out in widths:
                blocks.append(_Residual(config, width, out))
                width = out
            self.encoder.append(nn.Sequential(*blocks))
        inner = config.aspp_bottleneck
        self.pyramid = _Pyramid(config, width, inner)
        self.reduce = _pointwise(config, config.widths[min(1, len(config.widths) - 1)][-1], config.aspp_growth)
        self.decoder = conv_block(config, inner + config.aspp_growth, [inner, inner])
        self.head = head(config, inner, classes)
        self.feature_channels = inner
        self.stem_channels = config.widths[0][-1]

    def forward(self, image: Tensor) -> SNetOutput:
        """Segment `image` (N, 1, D, H, W)."""
        stem = self.encoder[0](self.stem(channels_last(image)).contiguous(memory_format=torch.channels_last_3d))
        levels = [stem]
        for stride, blocks in zip(self.strides, self.encoder[1:], strict=True):
            levels.append(blocks(pool(levels[-1], stride)))
        low = self.reduce(levels[1] if self.strides else stem)
        x = self.decoder(torch.cat([_resized(self.pyramid(levels[-1]), low), low], dim=1))
        features = _resized(x, stem)
        return SNetOutput(self.head(features), features, stem)


class _Residual(nn.Module):
    """Pre-activation residual block."""

    def __init__(self, config: ModelConfig, channels: int, out: int) -> None:
        super().__init__()
        layers = (
            NormAct3d(channels, config.norm),
            DilatedConv3d(channels, out),
            NormAct3d(out, config.norm),
            DilatedConv3d(out, out),
        )
        self.layers = by_backend(config, nn.Sequential(*layers))
        self.shortcut = nn.Identity() if channels == out else by_backend(config, DilatedConv3d(channels, out, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.layers(x)


class _Pyramid(nn.Module):
    """Atrous spatial pyramid pooling with the image's mean, projected to `out` channels."""

    def __init__(self, config: ModelConfig, channels: int, out: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList([_pointwise(config, channels, out)])
        for dilation in config.aspp_dilations:
            self.branches.append(conv_block(config, channels, [out], dilation))
        # no norm: there is one voxel
        self.mean = head(config, channels, out)
        self.project = _pointwise(config, (len(self.branches) + 1) * out, out)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean(x.mean(dim=(2, 3, 4), keepdim=True)).relu()
        parts = [branch(x) for branch in self.branches]
        return self.project(torch.cat([*parts, mean.expand_as(parts[0])], dim=1))


def _pointwise(config: ModelConfig, channels: int, out: int) -> nn.Sequential:
    return by_backend(config, nn.Sequential(DilatedConv3d(channels, out, 1), NormAct3d(out, config.norm)))


def _resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[2:], mode="trilinear", align_corners=False)
