"""Trains one model stage by stage: what `python -m focusnet.train` runs."""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from focuskernels.nn import convert_sync_norm

from .checkpoint import Model, save_checkpoint
from .cli import say
from .config import Config, StageConfig
from .data.crops import Crop, CropDataset
from .data.plan import CaseRecord, Plan
from .distributed import ALONE, Ranks
from .errors import FocusNetError
from .evaluate import print_table
from .files import atomic_write
from .loading import crop_batches
from .losses import focal_alpha
from .model import FocusNet
from .stages import (
    AVAILABLE,
    STAGES,
    WHOLE,
    Shares,
    learning_rate,
    make_optimizer,
    set_trained,
    stage_loss,
    stages,
)
from .tensorboard import Board
from .validation import Validation, validate


@dataclass
class State:
    """Where training stands; stored in every checkpoint.

    Attributes:
        stage: Name of the current stage.
        epoch: Finished epochs of that stage.
        best: Best validation score so far among the stages with all parts that are trained by now.
        best_stage: The stage that had it.
        best_epoch: The epoch of that stage.
        seconds: Training time so far.
        history: One entry per finished epoch: what `history.json` holds.
    """

    stage: str = STAGES[0]
    epoch: int = 0
    best: float = -1.0
    best_stage: str = STAGES[0]
    best_epoch: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """Trains one model in the folder `out`: `last.pt` after every epoch, `best.pt`, `history.json`.

    `best.pt` is the best validation among the stages with all parts that are trained by now: "joint" competes with
    "sos". Every stage goes on from the last weights of the one before; with `train.ema`, from their average.

    Args:
        model: What to train.
        cache: Folder of the prepared data set.
        out: Folder of the run.
        device: Where to compute.
        console: Where to report.
        ranks: This process among those that share every batch; rank 0 alone writes.
    """

    def __init__(
        self, model: Model, cache: Path, out: Path, device: torch.device, console: Console, ranks: Ranks = ALONE
    ) -> None:
        self.model, self.cache, self.out, self.device, self.console = model, cache, out, device, console
        self.config = model.config.train
        self.ranks = ranks
        if ranks.world > 1:
            convert_sync_norm(model.network)
        self.training_cases, self.validation_cases = split_cases(model.plan, model.config)
        self.alpha = focal_alpha(model.plan, model.config.loss).to(device)
        self.state = State()
        self.optimizer: torch.optim.Optimizer | None = None
        self.average: AveragedModel | None = None
        self.board: Board | None = None
        self.longest_epoch = 0.0

    @property
    def steps(self) -> int:
        """Steps per epoch."""
        return self.config.steps_per_epoch or math.ceil(len(self.training_cases) / self.config.batch_size)

    @property
    def result(self) -> Model:
        """The model to validate and to predict with: with the average of the weights if there is one."""
        if self.average is None:
            return self.model
        return replace(self.model, network=cast(FocusNet, self.average.module))

    def resume(self, training: dict[str, Any]) -> None:
        """Go on from the state that a checkpoint holds."""
        # runs begun before `best_stage` was stored had the best of their current stage
        self.state = State(**{"best_stage": training["state"]["stage"], **training["state"]})
        if training["optimizer"] is not None:
            self._start_stage(self.state.stage)
            assert self.optimizer is not None
            self.optimizer.load_state_dict(training["optimizer"])
            if self.average is not None:
                # the checkpoint's own weights are the average
                self.average.n_averaged.fill_(training["averaged"])
                self.model.network.load_state_dict(training["weights"])

    def announce(self) -> None:
        """Say what will be trained on which cases, and warn of organs that cannot be learnt, or only in part."""
        plan = self.model.plan
        unlearnt = _unlearnt(plan, self.training_cases)
        if unlearnt:
            say(
                self.console,
                f"warning: no training case has {', '.join(unlearnt)}, only validation cases have: nothing can be "
                "learnt of it; choose other train.validation_cases, another train.seed, or data.organs without it",
            )
        crop = self.config.crop
        for organ in plan.organs:
            if organ.roi_size is not None and any(side > most for side, most in zip(organ.roi_size, crop, strict=True)):
                say(
                    self.console,
                    f"warning: the ROI of {organ.name}, {organ.roi_size} voxels (z, y, x), is larger than train.crop, "
                    f"{crop}: training never sees all of it; enlarge train.crop or lower data.roi_scale",
                )
        names = ", ".join(case.name for case in self.validation_cases)
        parameters = sum(parameter.numel() for parameter in self.model.network.parameters())
        processes = f"{self.ranks.world} processes, " if self.ranks.world > 1 else ""
        say(
            self.console,
            f"{processes}{len(self.training_cases)} training cases, validation on {names}; {len(plan.organs)} organs, "
            f"{len(plan.small_organs)} of them small; {parameters:,} parameters; prepared data in {self.cache}",
        )

    def run(self, end: float = math.inf) -> bool:
        """Train what is left of all stages.

        Args:
            end: No epoch is begun that may end after this time (`time.monotonic`), if it takes as long as the longest
                one so far.

        Returns:
            Whether nothing is left.
        """
        for stage in stages(self.model):
            settings: StageConfig = getattr(self.config, stage)
            if STAGES.index(stage) < STAGES.index(self.state.stage):
                continue
            if stage != self.state.stage or self.optimizer is None:
                if AVAILABLE[stage] != AVAILABLE[self.state.stage]:
                    self.state.best = -1.0
                self.state.stage, self.state.epoch = stage, 0
                self._start_stage(stage)
            while self.state.epoch < settings.epochs:
                if self._has_to_end(end):
                    return False
                begun = time.monotonic()
                self._epoch(stage, settings)
                self.longest_epoch = max(self.longest_epoch, time.monotonic() - begun)
        return True

    def _has_to_end(self, end: float) -> bool:
        return self.ranks.first(lambda: time.monotonic() + self.longest_epoch > end)

    def _start_stage(self, stage: str) -> None:
        """Set what is trained, its optimizer and average."""
        network, settings = self.model.network, getattr(self.config, stage)
        if self.average is not None:
            network.load_state_dict(self.average.module.state_dict())
        parameters = set_trained(network, stage)
        self.optimizer = make_optimizer(parameters, settings)
        self.model.parts = AVAILABLE[stage]
        if self.config.ema:
            self.average = AveragedModel(network, multi_avg_fn=_ema(self.config.ema), use_buffers=True)

        def loss_of(crop: Crop, shares: Shares) -> Tensor | None:
            return stage_loss(self.model, stage, crop, self.alpha, shares=shares)

        self.loss_of = self.ranks.replicate(parameters, loss_of)

    def _epoch(self, stage: str, settings: StageConfig) -> None:
        started, epoch = time.monotonic(), self.state.epoch
        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, epoch)
        loss = self._train_epoch(stage, epoch, settings)
        self.state.epoch += 1
        result = self._validate() if self._validates(settings) else None
        seconds = time.monotonic() - started
        entry = {
            "stage": stage,
            "epoch": self.state.epoch,
            "loss": loss,
            "lr": learning_rate(settings, epoch),
            "seconds": round(seconds, 3),
            **(result.to_dict() if result is not None else {}),
        }
        self.state.seconds += seconds
        self.state.history.append(entry)
        best = self._is_best(result)
        if self.ranks.rank == 0:
            self._report(stage, settings, entry, result)
            self._save(best)

    def _train_epoch(self, stage: str, epoch: int, settings: StageConfig) -> float | None:
        """The mean loss; None if no crop had one."""
        set_trained(self.model.network, stage)  # validation has put all in evaluation mode
        losses: list[float] = []
        with _progress(self.console) as progress:
            task = progress.add_task(f"{stage} {epoch + 1}/{settings.epochs}", total=self.steps, loss="")
            for crop in self._batches(stage, epoch):
                loss = self._step(stage, epoch, crop)
                losses += [] if loss is None else [loss]
                progress.update(task, advance=1, loss=f"loss {losses[-1]:.4f}" if losses else "")
        return statistics.fmean(losses) if losses else None

    def _step(self, stage: str, epoch: int, crop: Crop) -> float | None:
        """One step of the optimizer; returns the loss, or None if the batch has none."""
        assert self.optimizer is not None
        shares = WHOLE if self.ranks.world == 1 or stage == "snet" else Shares.of(crop, self.ranks)
        if stage == "sos" and shares is not WHOLE and not shares.organs:
            return None
        crop = Crop(*(tensor.to(self.device, non_blocking=True) for tensor in crop))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp):
            loss = self.loss_of(crop, shares)
        if loss is None:
            return None
        value = self.ranks.mean(loss)
        if not math.isfinite(value):
            raise FocusNetError(
                f"the loss became {value} in stage {stage}, epoch {epoch + 1}: lower train.{stage}.lr and "
                f"{self._again()}"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model.network)
        return value

    def _again(self) -> str:
        saved = (self.out / "last.pt").exists()
        return "go on from the epoch before with --resume" if saved else "start again"

    def _batches(self, stage: str, epoch: int) -> Iterator[Crop]:
        """This process's crops of one epoch."""
        focus = self.model.plan.organ_names if stage == "snet" else self.model.plan.small_organs
        size, length = self.config.batch_size, self.steps * self.config.batch_size
        # every epoch of every stage has crops of its own
        first = (STAGES.index(stage) * 1_000_000 + epoch) * length
        dataset = CropDataset(self.model.plan, self.cache, self.training_cases, self.model.config, length, focus)
        starts = range(first, first + length, size)
        return crop_batches(
            dataset,
            [list(range(start + self.ranks.rank, start + size, self.ranks.world)) for start in starts],
            workers=self.config.workers,
            pin_memory=self.device.type == "cuda",
            again=self._again,
        )

    def _validates(self, settings: StageConfig) -> bool:
        return self.state.epoch % self.config.validate_every == 0 or self.state.epoch == settings.epochs

    def _validate(self) -> Validation:
        model, look = self.result, self.board.look if self.board is not None else None
        model.network.eval()
        return validate(model, self.cache, self.validation_cases, self.device, self.ranks, look)

    def _report(self, stage: str, settings: StageConfig, entry: dict[str, Any], result: Validation | None) -> None:
        loss = "no small organ in any crop" if entry["loss"] is None else f"loss {entry['loss']:.4f}"
        epochs = {name: getattr(self.config, name).epochs for name in stages(self.model)}
        left = seconds_left(self.state, epochs)
        ends = f"  about {duration(left)} left" if left else ""
        took = f"{entry['seconds']:.0f} s"
        score = f"  validation DSC {result.score:.3f}" if result is not None else ""
        say(
            self.console,
            f"{stage} {entry['epoch']}/{settings.epochs}  {loss}  lr {entry['lr']:.2g}  {took}{ends}{score}",
        )
        if result is not None:
            print_table(result.table(), self.console)
        if self.board is not None:
            self.board.write(len(self.state.history), entry)

    def _is_best(self, result: Validation | None) -> bool:
        """Whether no validation was better; notes which one is."""
        if result is None or result.score < self.state.best:
            return False
        self.state.best = result.score
        self.state.best_stage, self.state.best_epoch = self.state.stage, self.state.epoch
        return True

    def _save(self, best: bool) -> None:
        training: dict[str, Any] = {"state": vars(self.state), "optimizer": None}
        if best:
            save_checkpoint(self.out / "best.pt", self.result, training)
        # last.pt comes last: until it is there, resuming does the epoch and all these files again
        with atomic_write(self.out / "history.json") as temporary:
            temporary.write_text(json.dumps(self.state.history, indent=1, allow_nan=False))
        if self.optimizer is not None:
            training["optimizer"] = self.optimizer.state_dict()
        if self.average is not None:
            training["averaged"] = int(self.average.n_averaged)
            training["weights"] = self.model.network.state_dict()
        save_checkpoint(self.out / "last.pt", self.result, training)


def split_cases(plan: Plan, config: Config) -> tuple[list[CaseRecord], list[CaseRecord]]:
    """Training and validation cases: as named in the configuration, else a seeded draw."""
    named, cases = config.train.validation_cases, plan.cases
    if named is None:
        count = max(1, round(config.train.validation * len(cases)))
        order = np.random.default_rng(config.train.seed).permutation(len(cases))
        named = [cases[i].name for i in order[:count]]
    unknown = set(named) - {case.name for case in cases}
    if unknown:
        raise FocusNetError(f"train.validation_cases: no case named {', '.join(sorted(unknown))}")
    training = [case for case in cases if case.name not in named]
    if not training:
        raise FocusNetError(f"no case is left to train on: {len(cases)} in all, {len(named)} held out for validation")
    return training, [case for case in cases if case.name in named]


def _ema(decay: float) -> Callable[..., None]:
    """The running average, which soon leaves the weights with which a stage begins."""

    def update(averages: list[Tensor], weights: list[Tensor], count: Tensor) -> None:
        step = int(count)
        get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))(averages, weights, count)

    return update


def _unlearnt(plan: Plan, training: list[CaseRecord]) -> list[str]:
    contoured = {organ for case in training for organ in case.organs}
    return [name for name in plan.organ_names if name not in contoured]


def seconds_left(state: State, epochs: dict[str, int]) -> float:
    """Estimate of the time until all stages end: every epoch left takes as long as those of this stage did.

    Args:
        state: Where training stands; its stage has a finished epoch.
        epochs: Epochs of every stage that is trained.
    """
    spent = [entry["seconds"] for entry in state.history if entry["stage"] == state.stage]
    ahead = sum(count for stage, count in epochs.items() if STAGES.index(stage) >= STAGES.index(state.stage))
    return (ahead - state.epoch) * statistics.fmean(spent)


def _progress(console: Console) -> Progress:
    count, left, loss = MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[loss]}")
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        count,
        left,
        loss,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def duration(seconds: float) -> str:
    """In words: hours and minutes, or minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
