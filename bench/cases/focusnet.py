"""All of FocusNet, end to end: the joint stage's loss of S-Net, heat maps and small organs' ROIs, and its gradients.

The ROIs lie at fixed places in the volume, so that everyone computes the same and the graph of torch.compile is whole.
The floor is S-Net's, with the FLOPs of the whole network.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focuskernels import focal_dice_loss
from focuskernels.reference.nn import to_reference
from focusnet.config import ModelConfig
from focusnet.losses import gaussian_heatmaps
from focusnet.model import FocusNet

from ..case import Case, Cost, Function, Inputs, Op, cost_by_mode, memory_format, random
from ..networks import count_flops, functional, parameters_of
from . import snet
from .focal_dice_loss import plain as plain_loss
from .snet import CLASSES, LAYOUT, TINY, Triple, our_loss

SMALL = 3
SPACING, SIGMA_MM = (2.5, 1.0, 1.0), 5.0
#: Volumes and the size of every ROI, in the order they are measured.
SIZES: dict[tuple[str, str], list[tuple[Triple, Triple]]] = {
    # not 2 slices: oneDNN's weight gradient in bfloat16 is wrong there, for the peers (focuskernels/onednn.py)
    ("cpu", "quick"): [((6, 16, 16), (4, 8, 8))],
    ("cpu", "full"): [((16, 64, 64), (8, 32, 32))],
    ("cuda", "quick"): [((6, 16, 16), (4, 8, 8))],
    ("cuda", "full"): [(size, (12, 64, 64)) for size in snet.SIZES["cuda", "full"]],
}


class Joint(nn.Module):
    """FocusNet and the loss of its last stage, by this package's functions or by plain formulas."""

    def __init__(self, config: ModelConfig, roi: Triple, plain: bool) -> None:
        super().__init__()
        self.network, self.roi, self.plain = FocusNet(config, CLASSES - 1, [roi] * SMALL), roi, plain

    def forward(self, image: Tensor, labels: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
        """Image (1, 1, D, H, W), labels (1, D, H, W), heat maps to reach (1, SMALL, D, H, W) -> the loss."""
        snet = self.network.snet(image)
        heatmaps = self.network.locate(snet).sigmoid()
        corners = corners_of(labels.shape[1:], self.roi)
        if self.plain:
            sources = [snet.features, snet.stem, image]
            logits = [
                branch(
                    torch.cat(
                        [*(_cut(s, corner, self.roi) for s in sources), _cut(heatmaps[:, k : k + 1], corner, self.roi)],
                        1,
                    )
                )
                for k, (branch, corner) in enumerate(zip(self.network.sos, corners, strict=True))
            ]
        else:
            middle = [side // 2 for side in self.roi]
            centers = [[0, *(c + m for c, m in zip(corner, middle, strict=True))] for corner in corners]
            found = torch.tensor(centers, device=image.device)
            logits = [roi[None] for roi in self.network.segment_rois(range(SMALL), image, snet, heatmaps, found)]
        loss = (plain_loss if self.plain else our_loss)(snet.logits, labels, alpha)
        loss = loss + 2 * (heatmaps.float() - target).square().mean()
        truths = (_cut(labels[:, None] == k + 1, corner, self.roi) for k, corner in enumerate(corners))
        binary = _plain_binary if self.plain else _our_binary
        return loss + torch.stack([binary(x, y) for x, y in zip(logits, truths, strict=True)]).mean()


def corners_of(shape: Sequence[int], roi: Triple) -> list[Triple]:
    """Lowest voxel of every ROI: spread along the volume's diagonal, overlapping where it is small."""
    z, y, x = (
        [round(k * (n - side) / (SMALL + 1)) for k in range(1, SMALL + 1)] for n, side in zip(shape, roi, strict=True)
    )
    return list(zip(z, y, x, strict=True))


def cases(device: str, size: str) -> Sequence[Case]:
    """Case list of `OP`."""
    config = TINY if size == "quick" else ModelConfig()
    amp = torch.bfloat16 if device == "cuda" else None
    return [_case(volume, roi, config, amp) for volume, roi in SIZES[device, size]]


def _case(volume: Triple, roi: Triple, config: ModelConfig, amp: torch.dtype | None) -> Case:
    def build(plain: bool = False) -> Joint:
        return Joint(dataclasses.replace(config), roi, plain)

    def maker(volume: Triple) -> Callable[[torch.Generator], Inputs]:
        def make(generator: torch.Generator) -> Inputs:
            device = generator.device
            image = random(generator, 1, 1, *volume, dtype=torch.float32)
            middles = torch.tensor([corners_of(volume, roi)], dtype=torch.float32) + torch.tensor(roi) // 2
            return {
                "image": image.contiguous(memory_format=memory_format(LAYOUT)),
                "labels": torch.randint(CLASSES, (1, *volume), generator=generator, device=device),
                "target": gaussian_heatmaps(middles, volume, SPACING, SIGMA_MM).to(device),
                "alpha": torch.ones(CLASSES, device=device),
                "parameters": parameters_of(build, generator),
            }

        return make

    weights = 4 * sum(p.numel() for p in build().parameters())
    read = (12 + 4 * SMALL) * math.prod(volume) + weights
    flops = count_flops(to_reference(build().network), 1, 1, *volume)
    return snet.training_step(
        f"{'x'.join(map(str, volume))}, {SMALL} ROIs of {'x'.join(map(str, roi))},",
        volume,
        amp,
        maker,
        cost_by_mode(Cost(read, flops), Cost(read + weights, 2 * flops)),
        fused=_function(build(), amp),
        plain=_function(to_reference(build(plain=True)), amp),
        oracle=_function(to_reference(build(plain=True)), None),
    )


def _function(network: Joint, amp: torch.dtype | None) -> Function:
    run = functional(network, amp)

    def step(image: Tensor, labels: Tensor, target: Tensor, alpha: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return run(parameters, image, labels, target, alpha)

    return step


def _cut(x: Tensor, corner: Triple, size: Triple) -> Tensor:
    z, y, x_ = (slice(c, c + n) for c, n in zip(corner, size, strict=True))
    return x[:, :, z, y, x_]


def _our_binary(logits: Tensor, truth: Tensor) -> Tensor:
    return focal_dice_loss(logits, truth, activation="sigmoid")


def _plain_binary(logits: Tensor, truth: Tensor) -> Tensor:
    """Binary focal (gamma 2) plus dice loss."""
    logits = logits.float()
    p, target = logits.sigmoid(), truth.float()
    error = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    focal = ((1 - torch.where(truth, p, 1 - p)).square() * error).mean()
    return focal + 1 - (2 * (p * target).sum()) / (p.sum() + target.sum())


OP = Op(
    "focusnet",
    ("dilated_conv3d", "norm_act", "se_residual", "roi_gather_each_3d"),
    (*snet.STEMS, "roi_gather3d", "roi_sampling"),
    cases,
    files=snet.FILES,
)
