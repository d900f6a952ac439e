"""`python -m focusnet.train SOURCE --out RUN`: the paper's stages in one command, by one process or several."""

import math
import re
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt
from rich.console import Console

from .checkpoint import Model, build_network, load_checkpoint
from .cli import add_config, command_parser, config_of, console, parse, run, say
from .config import Config, settings_of
from .data.cache import DEFAULT_CACHE, cache_folder
from .data.plan import Plan
from .distributed import ALONE, Ranks, is_lost, joined
from .errors import FocusNetError
from .files import alone_in, check_writable, clear_unfinished
from .memory import fitting_crop
from .prepare import prepare
from .stages import STAGES, check_stages, set_epochs, stages
from .tensorboard import Board, check_tensorboard_extra
from .trainer import State, Trainer, duration

RESUMABLE = ("train.workers", "model.backend", *(f"train.{stage}.lr" for stage in STAGES))


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
        say(reporter, f"left out {line}")

    stored = _load_run(last, config, device) if resume else None
    if stored is None and last.exists():
        raise FocusNetError(f"{out} already holds a run: add --resume to go on with it, or choose another --out")
    if stored is not None and _is_complete(*stored):
        clear_unfinished(out)
        say(reporter, f"{out} is complete: nothing is left to train")
        return
    folder = cache_folder(cache, source, config.data)

    def prepared() -> Plan:
        check_writable(out)
        return prepare(source, folder, config.data, skip_bad=skip_bad, tell=tell)

    plan = ranks.first(prepared)
    if stored is None:
        model = _new_model(config, plan, memory, device, ranks, reporter)
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
        say(trainer.console, f"stopped: {saved()}")
        raise
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise FocusNetError(f"another process of this training ended: {saved()}") from error
    finally:
        if trainer.board is not None:
            trainer.board.close()
    if not complete:
        say(trainer.console, f"stopped for --time-limit: {saved()}")
        return
    say(
        trainer.console,
        f"done: {trainer.out / 'best.pt'} is epoch {state.best_epoch} of stage {state.best_stage}, "
        f"validation DSC {state.best:.3f}; training took {duration(state.seconds)}",
    )


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


def _new_model(
    config: Config, plan: Plan, memory: str | None, device: torch.device, ranks: Ranks, reporter: Console
) -> Model:
    if memory is not None:
        crop = ranks.first(lambda: fitting_crop(config, plan, memory, device, ranks.world))
        config = replace(config, train=replace(config.train, crop=crop))
        say(reporter, f"train.crop is {crop}, the largest that fits")
    torch.manual_seed(config.train.seed)
    return Model(build_network(config, plan).to(device), config, plan, ())


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


def changed_settings(config: Config, stored: Config) -> list[str]:
    """The settings, named as options, that differ and may not change when a run is resumed."""
    before = settings_of(stored)
    return [name for name, value in settings_of(config).items() if value != before[name] and name not in RESUMABLE]


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


def _parser() -> ArgumentParser:
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
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command."""
    with joined() as ranks:
        _main(argv, ranks)
    return 0


def _main(argv: list[str] | None, ranks: Ranks) -> None:
    started, parser = time.monotonic(), _parser()
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
