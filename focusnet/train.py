"""`python -m focusnet.train SOURCE --out RUN`: the paper's stages in one command.

S-Net; then SOL-Net with S-Net fixed, its norm statistics too; then SOS-Net with both fixed; then all parts end to end.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import Namespace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .checkpoint import Model, build_network, load_checkpoint, save_checkpoint
from .cli import add_config, command_parser, config_of, console, parse, pick_device, run
from .config import Config, StageConfig, TrainConfig, settings_of
from .data.cache import DEFAULT_CACHE, cache_folder
from .data.crops import Crop, CropDataset
from .data.plan import CaseRecord, Plan
from .errors import FocusNetError
from .evaluate import print_table
from .files import atomic_write, check_writable, clear_unfinished
from .losses import focal_alpha, heatmap_loss, segmentation_loss, sos_loss
from .model import FocusNet
from .prepare import prepare
from .validation import Validation, validate

STAGES = ("snet", "sol", "sos", "joint")
TRAINED = {"snet": ("snet",), "sol": ("sol",), "sos": ("sos",), "joint": ("snet", "sol", "sos")}
AVAILABLE = {
    "snet": ("snet",),
    "sol": ("snet", "sol"),
    "sos": ("snet", "sol", "sos"),
    "joint": ("snet", "sol", "sos"),
}
RESUMABLE = ("train.workers", "model.backend", *(f"train.{stage}.lr" for stage in STAGES))


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
    "sos". Every stage goes on from the last weights of the one before.

    Args:
        model: What to train.
        cache: Folder of the prepared data set.
        out: Folder of the run.
        device: Where to compute.
        console: Where to report.
    """

    def __init__(self, model: Model, cache: Path, out: Path, device: torch.device, console: Console) -> None:
        self.model, self.cache, self.out, self.device, self.console = model, cache, out, device, console
        self.config = model.config.train
        self.training_cases, self.validation_cases = split_cases(model.plan, model.config)
        self.alpha = focal_alpha(model.plan, model.config.loss).to(device)
        self.state = State()
        self.optimizer: torch.optim.Optimizer | None = None

    @property
    def steps(self) -> int:
        """Steps per epoch."""
        return self.config.steps_per_epoch or math.ceil(len(self.training_cases) / self.config.batch_size)

    def resume(self, training: dict[str, Any]) -> None:
        """Go on from the state that a checkpoint holds."""
        # runs begun before `best_stage` was stored had the best of their current stage
        self.state = State(**{"best_stage": training["state"]["stage"], **training["state"]})
        if training["optimizer"] is not None:
            self._start_stage(self.state.stage)
            assert self.optimizer is not None
            self.optimizer.load_state_dict(training["optimizer"])

    def announce(self) -> None:
        """Say what will be trained on which cases, and warn of organs that cannot be learnt, or only in part."""
        plan = self.model.plan
        unlearnt = _unlearnt(plan, self.training_cases)
        if unlearnt:
            self._say(
                f"warning: no training case has {', '.join(unlearnt)}, only validation cases have: nothing can be "
                "learnt of it; choose other train.validation_cases, another train.seed, or data.organs without it"
            )
        crop = self.config.crop
        for organ in plan.organs:
            if organ.roi_size is not None and any(side > most for side, most in zip(organ.roi_size, crop, strict=True)):
                self._say(
                    f"warning: the ROI of {organ.name}, {organ.roi_size} voxels (z, y, x), is larger than train.crop, "
                    f"{crop}: training never sees all of it; enlarge train.crop or lower data.roi_scale"
                )
        names = ", ".join(case.name for case in self.validation_cases)
        parameters = sum(parameter.numel() for parameter in self.model.network.parameters())
        self._say(
            f"{len(self.training_cases)} training cases, validation on {names}; {len(plan.organs)} organs, "
            f"{len(plan.small_organs)} of them small; {parameters:,} parameters; prepared data in {self.cache}"
        )

    def run(self) -> None:
        """Train what is left of all stages."""
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
                self._epoch(stage, settings)

    def _start_stage(self, stage: str) -> None:
        """Set what is trained, and its optimizer."""
        settings: StageConfig = getattr(self.config, stage)
        self.optimizer = make_optimizer(set_trained(self.model.network, stage), settings)
        self.model.parts = AVAILABLE[stage]

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
        self._report(stage, settings, entry, result)
        self._save(result)

    def _train_epoch(self, stage: str, epoch: int, settings: StageConfig) -> float | None:
        """The mean loss; None if no crop had one."""
        set_trained(self.model.network, stage)  # validation has put all in evaluation mode
        losses: list[float] = []
        with _progress(self.console) as progress:
            task = progress.add_task(f"{stage} {epoch + 1}/{settings.epochs}", total=self.steps, loss="")
            with self._explained_workers():
                for crop in self._batches(stage, epoch):
                    loss = self._step(stage, epoch, crop)
                    losses += [] if loss is None else [loss]
                    progress.update(task, advance=1, loss=f"loss {losses[-1]:.4f}" if losses else "")
        return statistics.fmean(losses) if losses else None

    def _step(self, stage: str, epoch: int, crop: Crop) -> float | None:
        """One step of the optimizer; returns the loss, or None if the batch has none."""
        assert self.optimizer is not None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp):
            loss = stage_loss(self.model, stage, crop, self.alpha)
        if loss is None:
            return None
        value = loss.item()
        if not math.isfinite(value):
            raise FocusNetError(
                f"the loss became {value} in stage {stage}, epoch {epoch + 1}: lower train.{stage}.lr and "
                f"{self._again()}"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return value

    def _again(self) -> str:
        saved = (self.out / "last.pt").exists()
        return "go on from the epoch before with --resume" if saved else "start again"

    @contextmanager
    def _explained_workers(self) -> Iterator[None]:
        """One line for a worker that failed or died, in place of torch's traceback."""
        try:
            yield
        except FocusNetError as error:
            raise FocusNetError(str(error).rstrip().rpartition(f"{FocusNetError.__name__}: ")[2]) from error
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            raise FocusNetError(
                f"a process that loads training crops died, maybe for lack of memory ({str(error).strip()}): lower "
                f"train.workers and {self._again()}"
            ) from error

    def _batches(self, stage: str, epoch: int) -> Iterator[Crop]:
        """The crops of one epoch, on the device."""
        focus = self.model.plan.organ_names if stage == "snet" else self.model.plan.small_organs
        size, length = self.config.batch_size, self.steps * self.config.batch_size
        # every epoch of every stage has crops of its own
        first = (STAGES.index(stage) * 1_000_000 + epoch) * length
        dataset = CropDataset(self.model.plan, self.cache, self.training_cases, self.model.config, length, focus)
        loader = DataLoader(
            dataset,
            size,
            sampler=range(first, first + length),
            num_workers=self.config.workers,
            pin_memory=self.device.type == "cuda",
        )
        for crop in loader:
            yield Crop(*(tensor.to(self.device, non_blocking=True) for tensor in crop))

    def _validates(self, settings: StageConfig) -> bool:
        return self.state.epoch % self.config.validate_every == 0 or self.state.epoch == settings.epochs

    def _validate(self) -> Validation:
        self.model.network.eval()
        return validate(self.model, self.cache, self.validation_cases, self.device)

    def _report(self, stage: str, settings: StageConfig, entry: dict[str, Any], result: Validation | None) -> None:
        loss = "no small organ in any crop" if entry["loss"] is None else f"loss {entry['loss']:.4f}"
        epochs = {name: getattr(self.config, name).epochs for name in stages(self.model)}
        left = seconds_left(self.state, epochs)
        ends = f"  about {_duration(left)} left" if left else ""
        took = f"{entry['seconds']:.0f} s"
        score = f"  validation DSC {result.score:.3f}" if result is not None else ""
        self._say(f"{stage} {entry['epoch']}/{settings.epochs}  {loss}  lr {entry['lr']:.2g}  {took}{ends}{score}")
        if result is not None:
            print_table(result.table(), self.console)

    def _say(self, line: str) -> None:
        _say(self.console, line)

    def _save(self, result: Validation | None) -> None:
        best = result is not None and result.score >= self.state.best
        if best and result is not None:
            self.state.best = result.score
            self.state.best_stage, self.state.best_epoch = self.state.stage, self.state.epoch
        training = {
            "state": vars(self.state),
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
        }
        if best:
            save_checkpoint(self.out / "best.pt", self.model, {"state": vars(self.state), "optimizer": None})
        # last.pt comes last: until it is there, resuming does the epoch and all these files again
        with atomic_write(self.out / "history.json") as temporary:
            temporary.write_text(json.dumps(self.state.history, indent=1, allow_nan=False))
        save_checkpoint(self.out / "last.pt", self.model, training)


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


def changed_settings(config: Config, stored: Config) -> list[str]:
    """The settings, named as options, that differ and may not change when a run is resumed."""
    before = settings_of(stored)
    return [name for name, value in settings_of(config).items() if value != before[name] and name not in RESUMABLE]


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


def _unlearnt(plan: Plan, training: list[CaseRecord]) -> list[str]:
    contoured = {organ for case in training for organ in case.organs}
    return [name for name in plan.organ_names if name not in contoured]


def learning_rate(settings: StageConfig, epoch: int) -> float:
    """The learning rate of an epoch (counted from 0): warm-up, then steps or half a cosine."""
    if epoch < settings.warmup:
        return settings.lr * math.exp(-5 * (1 - (epoch + 1) / (settings.warmup + 1)) ** 2)
    if settings.schedule == "cosine":
        done = (epoch - settings.warmup) / max(1, settings.epochs - settings.warmup)
        return settings.lr * (1 + math.cos(math.pi * done)) / 2
    passed = sum(epoch >= milestone * settings.epochs for milestone in settings.milestones)
    return settings.lr * settings.decay**passed


def seconds_left(state: State, epochs: dict[str, int]) -> float:
    """Estimate of the time until all stages end: every epoch left takes as long as those of this stage did.

    Args:
        state: Where training stands; its stage has a finished epoch.
        epochs: Epochs of every stage that is trained.
    """
    spent = [entry["seconds"] for entry in state.history if entry["stage"] == state.stage]
    ahead = sum(count for stage, count in epochs.items() if STAGES.index(stage) >= STAGES.index(state.stage))
    return (ahead - state.epoch) * statistics.fmean(spent)


def stage_loss(
    model: Model,
    stage: str,
    crop: Crop,
    alpha: Tensor,
    loss_of_small: Callable[..., Tensor | None] = sos_loss,
) -> Tensor | None:
    """The loss of a stage on a batch of crops; None if the batch has none. `loss_of_small` is called as `sos_loss`."""
    network, plan, config = model.network, model.plan, model.config.loss
    with torch.set_grad_enabled("snet" in TRAINED[stage]):
        snet = network.snet(crop.image)
    if stage == "snet":
        return segmentation_loss(snet.logits, crop, alpha, config)
    with torch.set_grad_enabled("sol" in TRAINED[stage]):
        heatmaps = network.locate(snet)
    if stage == "sos":
        return loss_of_small(network, crop, snet, heatmaps, plan, config)
    located = heatmap_loss(heatmaps, crop, plan.spacing, config.heatmap_sigma_mm)
    if stage == "sol":
        return located
    loss = segmentation_loss(snet.logits, crop, alpha, config) + config.heatmap_weight * located
    small = loss_of_small(network, crop, snet, heatmaps, plan, config)
    return loss if small is None else loss + config.sos_weight * small


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


def _say(console: Console, line: str) -> None:
    """Print a line that may hold names and paths, which are no markup."""
    console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def start_training(
    source: Path,
    out: Path,
    config: Config,
    *,
    cache: Path = DEFAULT_CACHE,
    resume: bool = False,
    skip_bad: bool = False,
    memory: str | None = None,
    device: torch.device,
) -> None:
    """Prepare `source`, then train in `out`; what the command does.

    Args:
        source: Folder of cases with CTs and organs.
        out: Folder of the run; must not hold another run unless `resume`.
        config: The configuration; to resume, the run's own, in which `RESUMABLE` settings alone may differ.
        cache: Folder for prepared data of all data sets and settings.
        resume: Go on from `out`/last.pt.
        skip_bad: Leave out unusable cases instead of failing.
        memory: Of the device: a new run takes the largest `train.crop` that fits; see `fitting_crop`.
        device: Where to compute.
    """
    check_stages(config.train)
    reporter, last = console(), out / "last.pt"

    def tell(line: str) -> None:
        _say(reporter, f"left out {line}")

    stored = _load_run(last, config, device) if resume else None
    if stored is None and last.exists():
        raise FocusNetError(f"{out} already holds a run: add --resume to go on with it, or choose another --out")
    if stored is not None and _is_complete(*stored):
        clear_unfinished(out)
        _say(reporter, f"{out} is complete: nothing is left to train")
        return
    check_writable(out)
    folder = cache_folder(cache, source, config.data)
    plan = prepare(source, folder, config.data, skip_bad=skip_bad, tell=tell)
    if stored is None and memory is not None:
        from .plan import fitting_crop  # which imports this file

        crop = fitting_crop(config, plan, memory, device)
        config = replace(config, train=replace(config.train, crop=crop))
        _say(reporter, f"train.crop is {crop}, the largest that fits")
    if stored is None:
        torch.manual_seed(config.train.seed)
        model = Model(build_network(config, plan).to(device), config, plan, ())
    else:
        model, training = stored
        if plan.fingerprint != model.plan.fingerprint:
            raise FocusNetError(
                f"{source} holds other cases or contours than those of {last}; train anew with another --out"
            )
    trainer = Trainer(model, folder, out, device, reporter)
    if stored is not None:
        trainer.resume(training)
    trainer.announce()
    try:
        trainer.run()
    except KeyboardInterrupt:
        saved = (
            f"{last} holds the last finished epoch; go on with --resume" if last.exists() else "no epoch was finished"
        )
        _say(reporter, f"stopped: {saved}")
        raise
    state = trainer.state
    _say(
        reporter,
        f"done: {out / 'best.pt'} is epoch {state.best_epoch} of stage {state.best_stage}, "
        f"validation DSC {state.best:.3f}; training took {_duration(state.seconds)}",
    )


def _load_run(last: Path, config: Config, device: torch.device) -> tuple[Model, dict[str, Any]]:
    model, training = load_checkpoint(last, device, config.model.backend)
    changed = changed_settings(config, model.config)
    if changed:
        raise FocusNetError(
            f"{', '.join(changed)}: not as in the run that {last} holds; leave this out to go on as before, or train "
            f"anew with another --out (what may change: {', '.join(RESUMABLE)})"
        )
    model.config = config
    return model, training


def _is_complete(model: Model, training: dict[str, Any]) -> bool:
    state, last = State(**training["state"]), stages(model)[-1]
    return state.stage == last and state.epoch >= getattr(model.config.train, last).epochs


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = command_parser(
        "train",
        "DATA --out RUN",
        "Train S-Net, SOL-Net, SOS-Net, then all of them end to end.",
        ["DATA --out RUN --config demo", "DATA --out RUN --resume"],
    )
    parser.add_argument("source", type=Path, metavar="DATA", help="folder of cases with CTs and organs (docs/data.md)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run: last.pt, best.pt, history.json")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder for prepared data, as of prepare")
    parser.add_argument("--skip_bad", action="store_true", help="leave out unusable cases instead of failing")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/last.pt with its own settings")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--memory",
        type=str,
        metavar="GB|auto",
        help="of the device: take the largest train.crop, up to a whole CT, that fits; a resumed run keeps its own",
    )
    add_config(parser)
    arguments: Namespace = parse(parser, argv)
    if arguments.resume:
        if not (arguments.out / "last.pt").is_file():
            raise FocusNetError(f"{arguments.out / 'last.pt'}: nothing to resume: leave out --resume")
        # what is not given again stays as it was
        stored, _ = load_checkpoint(arguments.out / "last.pt", torch.device("cpu"))
        parser.set_defaults(stored.config.to_dict())
        arguments = parse(parser, argv)
    start_training(
        arguments.source,
        arguments.out,
        config_of(arguments),
        cache=arguments.cache,
        resume=arguments.resume,
        skip_bad=arguments.skip_bad,
        memory=arguments.memory,
        device=pick_device(arguments.device),
    )
    return 0


if __name__ == "__main__":
    run(main)
