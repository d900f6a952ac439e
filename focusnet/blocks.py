"""What the networks are made of: layers of `focuskernels.nn`, with the backend and the norm of the configuration."""

from contextlib import nullcontext
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focuskernels.nn import DilatedConv3d, NormAct3d, SEResBlock3d
from focuskernels.reference.nn import to_reference

from .config import ModelConfig, Triple

Layer = TypeVar("Layer", bound=nn.Module)


class SNetOutput(NamedTuple):
    """What S-Net, or a network in its place, computes for images (N, 1, D, H, W).

    Attributes:
        logits: (N, 1 + organs, D, H, W); class 0 is the background.
        features: The decoder's last features (N, F, D, H, W), which SOL-Net and SOS-Net read.
        stem: The first encoder layer's features (N, F, D, H, W).
    """

    logits: Tensor
    features: Tensor
    stem: Tensor


class MainNetwork(nn.Module):
    """A network that segments all organs: images (N, 1, D, H, W) -> `SNetOutput`, of every spatial size.

    Attributes:
        strides: Stride of every downsampling.
        feature_channels: Channels of `SNetOutput.features`.
        stem_channels: Channels of `SNetOutput.stem`.
    """

    strides: list[Triple]
    feature_channels: int
    stem_channels: int


def by_backend(config: ModelConfig, layer: Layer) -> Layer:
    """`layer`, or the same in stock PyTorch."""
    return to_reference(layer) if config.backend == "reference" else layer


def se_block(
    config: ModelConfig, channels: int, out: int, kernel_size: int | Triple = 3, dilation: int | Triple = 1
) -> SEResBlock3d:
    """An SE-residual block."""
    block = SEResBlock3d(channels, out, kernel_size, dilation, reduction=config.se_reduction, norm=config.norm)
    return by_backend(config, block)


def conv_block(config: ModelConfig, channels: int, widths: list[int], dilation: int | Triple = 1) -> nn.Sequential:
    """A 3x3x3 convolution, norm and ReLU for each of `widths`."""
    layers: list[nn.Module] = []
    for out in widths:
        layers += [DilatedConv3d(channels, out, 3, dilation), NormAct3d(out, config.norm)]
        channels = out
    return by_backend(config, nn.Sequential(*layers))


def head(config: ModelConfig, channels: int, out: int) -> DilatedConv3d:
    """The 1x1x1 convolution that ends a network."""
    # Of nn.Conv3d, a 1x1x1 kernel would tell oneDNN nothing of the layout.
    return by_backend(config, DilatedConv3d(channels, out, 1, bias=True))


def channels_last(image: Tensor) -> Tensor:
    """(N, 1, D, H, W), which is in both layouts, with the strides that let a convolution write channels_last_3d."""
    return image.squeeze(1).unsqueeze(-1).movedim(-1, 1)


def pool(x: Tensor, stride: Triple) -> Tensor:
    """Max-pooling; what is left at the far end counts too."""
    # autocast on the CPU would pool, and keep its input, in float32; the meta device knows none
    with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        return F.max_pool3d(x, stride, ceil_mode=True)
