"""FocusNet (Gao et al., MICCAI 2019): S-Net segments all organs, SOL-Net finds small ones, SOS-Net segments those."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from focuskernels import heatmap_argmax_3d, roi_gather_each_3d
from focuskernels.nn import DenseASPP3d, DilatedConv3d, NormAct3d, UpSEResBlock3d

from .baselines import DeepLab, UNet
from .blocks import MainNetwork, SNetOutput, by_backend, channels_last, head, pool, se_block
from .config import ModelConfig, Triple


class SNet(MainNetwork):
    """SE-residual 3D U-Net with few downsamplings and DenseASPP at the lowest resolution (section 2.1 of the paper)."""

    def __init__(self, config: ModelConfig, classes: int) -> None:
        super().__init__()
        config.check_resolutions()
        self.strides = config.downsampling
        width = config.widths[0][0]
        self.stem = by_backend(config, DilatedConv3d(1, width, config.stem_kernel))
        self.encoder = nn.ModuleList()
        for level, widths in enumerate(config.widths):
            kernel = config.stem_kernel if level == 0 else (3, 3, 3)
            blocks = []
            for out in widths:
                blocks.append(se_block(config, width, out, kernel_size=kernel))
                width = out
            self.encoder.append(nn.Sequential(*blocks))
        self.context, width = _context(config, width)
        self.decoder = nn.ModuleList()
        for widths in reversed(config.widths[:-1]):
            block = UpSEResBlock3d(width + widths[-1], widths[-1], reduction=config.se_reduction, norm=config.norm)
            self.decoder.append(by_backend(config, block))
            width = widths[-1]
        self.head = head(config, width, classes)
        self.feature_channels = width
        self.stem_channels = config.widths[0][-1]

    def forward(self, image: Tensor) -> SNetOutput:
        """Segment `image` (N, 1, D, H, W); every spatial size works, multiples of the total stride are best."""
        x = self.encoder[0](self.stem(channels_last(image)).contiguous(memory_format=torch.channels_last_3d))
        skips = [x]
        for stride, blocks in zip(self.strides, self.encoder[1:], strict=True):
            x = blocks(pool(x, stride))
            skips.append(x)
        skips.pop()
        x = self.context(x)
        for block in self.decoder:
            skip = skips.pop()
            stem, x = skip, block(x, skip)
        return SNetOutput(self.head(x), x, stem)


def _context(config: ModelConfig, width: int) -> tuple[nn.Sequential, int]:
    """In-plane dilated blocks and DenseASPP, and the channels that come out."""
    layers: list[nn.Module] = [se_block(config, width, width, dilation=(1, 2, 2)) for _ in range(config.dilated_blocks)]
    if config.aspp_dilations:
        aspp = DenseASPP3d(
            width,
            growth=config.aspp_growth,
            bottleneck=config.aspp_bottleneck,
            dilations=config.aspp_dilations,
            norm=config.norm,
        )
        layers.append(by_backend(config, aspp))
        width += config.aspp_growth * len(config.aspp_dilations)
    return nn.Sequential(*layers), width


class SOLNet(nn.Module):
    """One Gaussian heat map per small organ from S-Net's last features (section 2.2 of the paper)."""

    def __init__(self, config: ModelConfig, channels: int, organs: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(se_block(config, channels, channels), se_block(config, channels, channels))
        # the blocks end in a sum of any scale, which would saturate the sigmoid at once
        self.norm = by_backend(config, NormAct3d(channels, config.norm))
        self.head = head(config, channels, organs)
        assert self.head.bias is not None
        # sigmoid(-6) is about a Gaussian's share of a crop, so that peaks pull as hard as the background; from a higher
        # start the background wins at first, and the map of an organ that is hard to find stays at zero
        nn.init.constant_(self.head.bias, -6.0)

    def forward(self, features: Tensor) -> Tensor:
        """(N, F, D, H, W) -> logits of the heat maps (N, organs, D, H, W)."""
        return self.head(self.norm(self.blocks(features)))


class SOSBranch(nn.Module):
    """The binary segmentation of one small organ inside its ROI (section 2.3 of the paper)."""

    def __init__(self, config: ModelConfig, channels: int) -> None:
        super().__init__()
        width = config.sos_width
        self.blocks = nn.Sequential(se_block(config, channels, width), se_block(config, width, width))
        self.head = head(config, width, 1)

    def forward(self, roi: Tensor) -> Tensor:
        """(K, channels, d, h, w) -> logits (K, 1, d, h, w)."""
        return self.head(self.blocks(roi))


MAIN_NETWORKS: dict[str, Callable[[ModelConfig, int], MainNetwork]] = {"snet": SNet, "unet": UNet, "deeplab": DeepLab}


class FocusNetOutput(NamedTuple):
    """What FocusNet computes for images (N, 1, D, H, W).

    Attributes:
        snet: S-Net's output.
        heatmaps: (N, small organs, D, H, W).
        peaks: Arg-max of every heat map (N, small organs, 3) in voxels.
        roi_logits: One tensor (N, 1, d, h, w) per small organ, around its peak.
    """

    snet: SNetOutput
    heatmaps: Tensor
    peaks: Tensor
    roi_logits: list[Tensor]


class FocusNet(nn.Module):
    """S-Net, SOL-Net and one SOS-Net branch per small organ.

    Args:
        config: The layout.
        organs: Number of organs, small ones included.
        roi_sizes: One ROI size (d, h, w) in voxels per small organ.
    """

    def __init__(self, config: ModelConfig, organs: int, roi_sizes: Sequence[Triple]) -> None:
        super().__init__()
        self.sos_input = config.sos_input
        self.roi_sizes = [(d, h, w) for d, h, w in roi_sizes]
        self.snet: MainNetwork = MAIN_NETWORKS[config.network](config, organs + 1)
        self.roi_channels = 1
        if config.sos_input == "features":
            self.roi_channels += self.snet.feature_channels + self.snet.stem_channels + 1
        self.sol = SOLNet(config, self.snet.feature_channels, len(self.roi_sizes)) if self.roi_sizes else None
        self.sos = nn.ModuleList(SOSBranch(config, self.roi_channels) for _ in self.roi_sizes)

    def forward(self, image: Tensor) -> FocusNetOutput:
        """Run all three parts on `image` (N, 1, D, H, W); gradients flow through the pooled features."""
        snet = self.snet(image)
        heatmaps = self.locate(snet).sigmoid()
        peaks = heatmap_argmax_3d(heatmaps).index
        samples, organs = len(image), len(self.sos)
        numbers = torch.arange(samples, device=image.device).expand(organs, samples)
        centers = torch.cat([numbers[..., None], peaks.transpose(0, 1)], dim=-1).flatten(0, 1)
        owners = [organ for organ in range(organs) for _ in range(samples)]
        logits = self.segment_rois(owners, image, snet, heatmaps, centers)
        grouped = [torch.stack(logits[start : start + samples]) for start in range(0, organs * samples, samples)]
        return FocusNetOutput(snet, heatmaps, peaks, grouped)

    def locate(self, snet: SNetOutput) -> Tensor:
        """Logits of the heat maps (N, small organs, D, H, W); without small organs that tensor is empty."""
        if self.sol is None:
            return snet.logits[:, :0]
        return self.sol(snet.features)

    def segment_rois(
        self,
        organs: Sequence[int],
        image: Tensor,
        snet: SNetOutput,
        heatmaps: Tensor,
        centers: Tensor,
        also: Sequence[int] = (),
    ) -> list[Tensor]:
        """Logits (1, d, h, w) of ROI k around `centers[k]` = (sample, z, y, x), of small organ number `organs[k]`.

        Branches of organs in `also` run even without an ROI, since batch norms over several processes wait for all of
        them; their logits (0, 1, d, h, w) come last.
        """
        sources: list[Tensor] = [image]
        channels: list[Sequence[int] | None] = [None]
        if self.sos_input == "features":
            sources = [snet.features, snet.stem, image, heatmaps]
            channels = [None, None, None, organs]
        rois = roi_gather_each_3d(sources, centers, [self.roi_sizes[organ] for organ in organs], channels=channels)
        logits: dict[int, Tensor] = {}
        empty: list[Tensor] = []
        for organ in sorted({*organs, *also}):
            members = [k for k, owner in enumerate(organs) if owner == organ]
            if not members:
                nothing = snet.features.new_empty(0, self.roi_channels, *self.roi_sizes[organ])
                empty.append(self.sos[organ](nothing))
                continue
            # the image may have made them float32
            found = self.sos[organ](torch.cat([rois[k] for k in members]).to(snet.features.dtype))
            logits.update(zip(members, found, strict=True))
        return [logits[k] for k in range(len(organs))] + empty
