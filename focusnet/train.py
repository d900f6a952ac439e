"""`python -m focusnet.train SOURCE --out RUN`: the paper's stages in one command, by one process or several."""

import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from focuskernels.nn import convert_sync_norm

from .checkpoint import Model, build_network, load_checkpoint, save_checkpoint
from .cli import add_config, command_parser, config_of, console, parse, run
from .config import Config, StageConfig, settings_of
from .data.cache import DEFAULT_CACHE, cache_folder
from .data.crops import Crop, CropDataset
from .data.plan import CaseRecord, Plan
from .distributed import ALONE, Ranks, is_lost, joined
from .errors import FocusNetError
from .evaluate import print_table
from .files import alone_in, atomic_write, check_writable, clear_unfinished
from .loading import crop_batches
from .losses import focal_alpha
from .model import FocusNet
from .plan import fitting_crop
from .prepare import prepare
from .stages import (
    AVAILABLE,
    STAGES,
    WHOLE,
    Shares,
    check_stages,
    learning_rate,
    make_optimizer,
    set_epochs,
    set_trained,
    stage_loss,
    stages,
)
from .tensorboard import Board, check_tensorboard_extra
from .validation import Validation, validate

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
        processes = f"{self.ranks.world} processes, " if self.ranks.world > 1 else ""
        self._say(
            f"{processes}{len(self.training_cases)} training cases, validation on {names}; {len(plan.organs)} organs, "
            f"{len(plan.small_organs)} of them small; {parameters:,} parameters; prepared data in {self.cache}"
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
        ends = f"  about {_duration(left)} left" if left else ""
        took = f"{entry['seconds']:.0f} s"
        score = f"  validation DSC {result.score:.3f}" if result is not None else ""
        self._say(f"{stage} {entry['epoch']}/{settings.epochs}  {loss}  lr {entry['lr']:.2g}  {took}{ends}{score}")
        if result is not None:
            print_table(result.table(), self.console)
        if self.board is not None:
            self.board.write(len(self.state.history), entry)

    def _say(self, line: str) -> None:
        _say(self.console, line)

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


def _check_shared(config: Config, ranks: Ranks) -> None:
    """Refuse what several processes cannot share."""
    if config.train.batch_size % ranks.world:
        raise FocusNetError(
            f"train.batch_size is {config.train.batch_size}, expected a multiple of {ranks.world}: it counts the crops "
            "of a step, and every process takes as many of them"
        )
    if config.model.backend == "reference" and config.model.norm == "batch":
        raise FocusNetError(
            "model.backend is reference, which takes the statistics of model.norm batch from one process alone: "
            "expected fused, or one process"
        )


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
    tensorboard: bool = False,
    end: float = math.inf,
    device: torch.device,
    ranks: Ranks = ALONE,
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
        tensorboard: Write curves and pictures for TensorBoard too.
        end: Begin no epoch that may end after this time: see `Trainer.run`.
        device: Where to compute.
        ranks: This process among those that train together; they share the folders.
    """
    check_stages(config.train)
    if ranks.world > 1:
        _check_shared(config, ranks)
    if tensorboard:
        check_tensorboard_extra()
    reporter, last = console(), out / "last.pt"
    reporter.quiet = ranks.rank > 0

    def tell(line: str) -> None:
        _say(reporter, f"left out {line}")

    stored = _load_run(last, config, device) if resume else None
    if stored is None and last.exists():
        raise FocusNetError(f"{out} already holds a run: add --resume to go on with it, or choose another --out")
    if stored is not None and _is_complete(*stored):
        clear_unfinished(out)
        _say(reporter, f"{out} is complete: nothing is left to train")
        return
    folder = cache_folder(cache, source, config.data)

    def prepared() -> Plan:
        check_writable(out)
        return prepare(source, folder, config.data, skip_bad=skip_bad, tell=tell)

    plan = ranks.first(prepared)
    if stored is None and memory is not None:
        crop = ranks.first(lambda: fitting_crop(config, plan, memory, device, ranks.world))
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
    trainer = Trainer(model, folder, out, device, reporter, ranks)
    if stored is not None:
        trainer.resume(training)
    with alone_in(out) if ranks.rank == 0 else nullcontext():
        if tensorboard and ranks.rank == 0:
            trainer.board = Board(out, plan, len(trainer.state.history))
        trainer.announce()
        _train(trainer, end)


def _train(trainer: Trainer, end: float) -> None:
    """Train, and say how it ended and how to go on."""
    last, state = trainer.out / "last.pt", trainer.state

    def saved() -> str:
        held = f"{last} holds the last finished epoch; go on with --resume"
        return held if last.exists() else "no epoch was finished"

    try:
        complete = trainer.run(end)
    except KeyboardInterrupt:
        trainer._say(f"stopped: {saved()}")
        raise
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise FocusNetError(f"another process of this training ended: {saved()}") from error
    finally:
        if trainer.board is not None:
            trainer.board.close()
    if not complete:
        trainer._say(f"stopped for --time-limit: {saved()}")
        return
    trainer._say(
        f"done: {trainer.out / 'best.pt'} is epoch {state.best_epoch} of stage {state.best_stage}, "
        f"validation DSC {state.best:.3f}; training took {_duration(state.seconds)}"
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


def _seconds(text: str | None) -> float:
    """What `--time-limit` means; without one, for ever.

    Raises:
        FocusNetError: it is neither minutes nor hours and minutes.
    """
    if text is None:
        return math.inf
    found = re.fullmatch(r"(\d{1,6}):([0-5]\d)|(\d{1,6}(?:\.\d*)?)", text, re.ASCII)
    if found is None:
        raise FocusNetError(f"--time-limit {text}: expected minutes, or hours and minutes as 7:30")
    hours, minutes, alone = found.groups()
    return 60 * (float(alone) if alone else 60 * int(hours) + int(minutes))


def main(argv: list[str] | None = None) -> int:
    """The command."""
    with joined() as ranks:
        _main(argv, ranks)
    return 0


def _main(argv: list[str] | None, ranks: Ranks) -> None:
    started = time.monotonic()
    parser = command_parser(
        "train",
        "DATA --out RUN",
        "Train S-Net, SOL-Net, SOS-Net, then all of them end to end. Several GPUs share every batch with "
        "`torchrun --nproc-per-node N -m focusnet.train`.",
        ["DATA --out RUN --config demo", "DATA --out RUN --resume --time-limit 7:30"],
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
    parser.add_argument(
        "--epochs", type=PositiveInt, help="epochs of every stage that has any, in place of train.*.epochs"
    )
    parser.add_argument(
        "--time_limit",
        type=str,
        metavar="MIN|HH:MM",
        help="stop before an epoch that would end later than this, to go on with --resume",
    )
    parser.add_argument("--tensorboard", action="store_true", help="write OUT/tensorboard: curves, and outlines on CTs")
    add_config(parser)
    arguments: Namespace = parse(parser, argv)
    if arguments.resume:
        if not (arguments.out / "last.pt").is_file():
            raise FocusNetError(f"{arguments.out / 'last.pt'}: nothing to resume: leave out --resume")
        # what is not given again stays as it was
        stored, _ = load_checkpoint(arguments.out / "last.pt", torch.device("cpu"))
        parser.set_defaults(stored.config.to_dict())
        arguments = parse(parser, argv)
    config = config_of(arguments)
    if arguments.resume and arguments.memory is not None:
        config.train.crop = stored.config.train.crop
    if arguments.epochs is not None:
        set_epochs(config.train, arguments.epochs)
    start_training(
        arguments.source,
        arguments.out,
        config,
        cache=arguments.cache,
        resume=arguments.resume,
        skip_bad=arguments.skip_bad,
        memory=arguments.memory,
        tensorboard=arguments.tensorboard,
        end=started + _seconds(arguments.time_limit),
        device=ranks.device(arguments.device),
        ranks=ranks,
    )


if __name__ == "__main__":
    run(main)
