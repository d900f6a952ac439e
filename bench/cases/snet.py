"""The whole of S-Net with its loss: forward, and a training step without the optimizer.

The floor counts the FLOPs of convolutions and matrix products, and of bytes only the image, the labels and the weights.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from focuskernels import focal_dice_loss
from focuskernels.reference.nn import to_reference
from focusnet.config import ModelConfig
from focusnet.model import SNet

from ..case import Case, Cost, Function, Inputs, Mode, Op, compiled, cost_by_mode, eager, memory_format, ours, random
from ..networks import Parameters, checkpointed, count_flops, functional, parameters_of
from .focal_dice_loss import plain as plain_loss

Triple = tuple[int, int, int]
CLASSES = 10
LAYOUT = "channels_last_3d"
TINY = ModelConfig(widths=[[4], [6, 8]], dilated_blocks=1, aspp_growth=4, aspp_bottleneck=8)
#: Volumes, in the order they are measured.
SIZES: dict[tuple[str, str], list[Triple]] = {
    ("cpu", "quick"): [(4, 12, 12)],
    ("cpu", "full"): [(16, 64, 64), (8, 64, 64), (16, 96, 96)],
    ("cuda", "quick"): [(4, 12, 12)],
    ("cuda", "full"): [(40, 192, 192), (80, 256, 256), (120, 384, 384), (160, 512, 512)],
}
#: Where results of larger volumes are checked: the formula in high precision does not fit beside those.
CHECKED: dict[str, Triple] = {"cpu": (8, 64, 64), "cuda": (40, 192, 192)}


def cases(device: str, size: str) -> Sequence[Case]:
    """Case list of `OP`."""
    config = TINY if size == "quick" else ModelConfig()
    amp = torch.bfloat16 if device == "cuda" else None
    return [_case(volume, config, amp) for volume in SIZES[device, size]]


def _case(volume: Triple, config: ModelConfig, amp: torch.dtype | None) -> Case:
    def build() -> SNet:
        return SNet(dataclasses.replace(config), CLASSES)

    def maker(volume: Triple) -> Callable[[torch.Generator], Inputs]:
        def make(generator: torch.Generator) -> Inputs:
            device = generator.device
            image = random(generator, 1, 1, *volume, dtype=torch.float32).contiguous(
                memory_format=memory_format(LAYOUT)
            )
            return {
                "image": image,
                "labels": torch.randint(CLASSES, (1, *volume), generator=generator, device=device),
                "alpha": torch.ones(CLASSES, device=device),
                "parameters": parameters_of(build, generator),
            }

        return make

    weights = 4 * sum(p.numel() for p in build().parameters())
    read, flops = 12 * math.prod(volume) + weights, count_flops(to_reference(build()), 1, 1, *volume)
    return training_step(
        "x".join(map(str, volume)),
        volume,
        amp,
        maker,
        cost_by_mode(Cost(read, flops), Cost(read + weights, 2 * flops)),
        fused=_function(build(), our_loss, amp),
        plain=_function(to_reference(build()), plain_loss, amp),
        oracle=_function(to_reference(build()), plain_loss, None),
    )


def training_step(
    name: str,
    volume: Triple,
    amp: torch.dtype | None,
    maker: Callable[[Triple], Callable[[torch.Generator], Inputs]],
    cost: dict[Mode, Cost],
    *,
    fused: Function,
    plain: Function,
    oracle: Function,
) -> Case:
    """A network with its loss: ours, and the plain layers in eager mode, checkpointed and compiled."""
    checked = CHECKED["cuda" if amp else "cpu"]
    return Case(
        name=f"{name} {'autocast to bfloat16' if amp else 'float32'}",
        make=maker(volume),
        cost=cost,
        oracle=oracle,
        providers=[
            ours(fused),
            eager(plain),
            eager(checkpointed(plain), "eager, checkpointed", "peer"),
            # off by 1e-2 in float32
            dataclasses.replace(compiled(plain), tolerance=2e-2 if amp is None else None),
        ],
        shape={"volume": volume, "voxels": math.prod(volume)},
        dtype=amp or torch.float32,
        layout=LAYOUT,
        oracle_dtype=torch.float32 if amp else torch.float64,
        # rectifiers switch and gradients cancel through thirty layers
        tolerance=5e-3 if amp is None else 1e-1,
        rounded=plain,
        make_small=maker(checked) if math.prod(volume) > math.prod(checked) else None,
    )


def _function(network: SNet, loss: Function, amp: torch.dtype | None) -> Function:
    run = functional(network, amp)

    def step(image: Tensor, labels: Tensor, alpha: Tensor, parameters: Parameters) -> Tensor:
        return loss(run(parameters, image).logits, labels, alpha)

    return step


def our_loss(logits: Tensor, labels: Tensor, alpha: Tensor) -> Tensor:
    """Of the logits."""
    return focal_dice_loss(logits, labels, alpha=alpha)


STEMS = (
    "nn",
    "dense_aspp3d",
    "dilated_conv3d",
    "dilated_conv3d_tiles",
    "onednn",
    "up_cat_conv3d",
    "norm_act",
    "se_residual",
    "channelwise",
    "norm_tables",
    "focal_dice",
)
FILES = ("focusnet/model.py", "focusnet/blocks.py")
OP = Op("snet", ("dilated_conv3d", "norm_act", "se_residual"), STEMS, cases, files=FILES)
