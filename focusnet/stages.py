"""The paper's stages of training: what each trains, with which loss, optimizer and learning rate.

S-Net; then SOL-Net with S-Net fixed, its norm statistics too; then SOS-Net with both fixed; then all parts end to end.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .checkpoint import Model
from .config import StageConfig, TrainConfig
from .data.crops import Crop
from .errors import FocusNetError
from .losses import heatmap_loss, in_crop, segmentation_loss, sos_loss
from .model import FocusNet

if TYPE_CHECKING:  # it speaks to people, for which it needs more packages
    from .distributed import Ranks

STAGES = ("snet", "sol", "sos", "joint")
TRAINED = {"snet": ("snet",), "sol": ("sol",), "sos": ("sos",), "joint": ("snet", "sol", "sos")}
AVAILABLE = {
    "snet": ("snet",),
    "sol": ("snet", "sol"),
    "sos": ("snet", "sol", "sos"),
    "joint": ("snet", "sol", "sos"),
}


def stages(model: Model) -> list[str]:
    """The stages that a model goes through: those that have epochs; the small organs' only if there are any."""
    wanted = [stage for stage in STAGES if getattr(model.config.train, stage).epochs]
    return wanted if model.plan.small_organs else wanted[:1]


def check_stages(config: TrainConfig) -> None:
    """Refuse stages that would train on parts that no stage before has trained.

    Raises:
        FocusNetError: a stage has epochs and the one before has none, or none has any.
    """
    epochs = {stage: getattr(config, stage).epochs for stage in STAGES}
    if not any(epochs.values()):
        raise FocusNetError("there is nothing to train: train.snet.epochs and those of the other stages are 0")
    for before, stage in pairwise(STAGES):
        if epochs[stage] and not epochs[before]:
            raise FocusNetError(
                f"train.{stage}.epochs is {epochs[stage]}, but train.{before}.epochs is 0: stage {stage} needs what "
                f"stage {before} trains; give {before} epochs too, or only the last stages none"
            )


def set_epochs(config: TrainConfig, epochs: int) -> None:
    """Give every stage that has any epochs so many."""
    for stage in STAGES:
        settings: StageConfig = getattr(config, stage)
        settings.epochs = epochs if settings.epochs else 0


def learning_rate(settings: StageConfig, epoch: int) -> float:
    """The learning rate of an epoch (counted from 0): warm-up, then steps or half a cosine."""
    if epoch < settings.warmup:
        return settings.lr * math.exp(-5 * (1 - (epoch + 1) / (settings.warmup + 1)) ** 2)
    if settings.schedule == "cosine":
        done = (epoch - settings.warmup) / max(1, settings.epochs - settings.warmup)
        return settings.lr * (1 + math.cos(math.pi * done)) / 2
    passed = sum(epoch >= milestone * settings.epochs for milestone in settings.milestones)
    return settings.lr * settings.decay**passed


class Shares(NamedTuple):
    """What one process has of a batch that several share, so that the mean of their losses is the loss of all crops.

    Losses are means over crops, of which each process has as many, but also over heat maps and ROIs, of which one may
    have more than another.

    Attributes:
        heatmaps: Number of heat maps over their mean number per process.
        rois: Likewise of ROIs.
        organs: The small organs with an ROI in any process.
    """

    heatmaps: float = 1.0
    rois: float = 1.0
    organs: tuple[int, ...] = ()

    @classmethod
    def of(cls, crop: Crop, ranks: "Ranks") -> "Shares":
        """Of this process's crops; every process must call it."""
        heatmaps = int((~crop.centers.isnan().any(dim=-1)).sum())
        rois = in_crop(crop).sum(dim=0).tolist()
        all_heatmaps, *all_rois = ranks.sum([heatmaps, *rois])
        return cls(
            ranks.world * heatmaps / max(1, all_heatmaps),
            ranks.world * sum(rois) / max(1, sum(all_rois)),
            tuple(organ for organ, count in enumerate(all_rois) if count),
        )


WHOLE = Shares()


def stage_loss(
    model: Model,
    stage: str,
    crop: Crop,
    alpha: Tensor,
    loss_of_small: Callable[..., Tensor | None] = sos_loss,
    shares: Shares = WHOLE,
) -> Tensor | None:
    """The loss of a stage on a batch of crops; None if the batch has none. `loss_of_small` is called as `sos_loss`."""
    network, plan, config = model.network, model.plan, model.config.loss
    with torch.set_grad_enabled("snet" in TRAINED[stage]):
        snet = network.snet(crop.image)
    if stage == "snet":
        return segmentation_loss(snet.logits, crop, alpha, config)
    with torch.set_grad_enabled("sol" in TRAINED[stage]):
        logits = network.locate(snet)
        heatmaps = logits.sigmoid()
    if stage == "sos":
        small = loss_of_small(network, crop, snet, heatmaps, plan, config, shares.organs)
        return None if small is None else shares.rois * small
    located = shares.heatmaps * heatmap_loss(logits, heatmaps, crop, plan.spacing, config)
    if stage == "sol":
        return located
    loss = segmentation_loss(snet.logits, crop, alpha, config) + config.heatmap_weight * located
    small = loss_of_small(network, crop, snet, heatmaps, plan, config, shares.organs)
    return loss if small is None else loss + config.sos_weight * shares.rois * small


def set_trained(network: FocusNet, stage: str) -> list[nn.Parameter]:
    """Let a stage's parts alone have gradients and move their norm statistics; returns their parameters."""
    network.eval()
    parameters: list[nn.Parameter] = []
    for name in ("snet", "sol", "sos"):
        part = getattr(network, name)
        if part is not None:
            part.requires_grad_(name in TRAINED[stage]).train(name in TRAINED[stage])
            parameters += [p for p in part.parameters() if p.requires_grad]
    return parameters


def make_optimizer(parameters: list[nn.Parameter], settings: StageConfig) -> torch.optim.Optimizer:
    """The optimizer of a stage."""
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, settings.lr, momentum=0.9, weight_decay=settings.weight_decay)
    return torch.optim.Adam(parameters, settings.lr, weight_decay=settings.weight_decay)
