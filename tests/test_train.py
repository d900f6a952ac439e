import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

from focusnet import validation
from focusnet.checkpoint import load_checkpoint
from focusnet.config import AugmentConfig, LossConfig, StageConfig
from focusnet.data.cache import cache_folder
from focusnet.data.crops import Crop, load_case
from focusnet.distributed import Ranks
from focusnet.errors import FocusNetError
from focusnet.evaluate import OrganScore, summarize
from focusnet.files import alone_in, check_writable
from focusnet.inference import Segmentation
from focusnet.losses import gaussian_heatmaps, heatmap_loss
from focusnet.stages import STAGES, learning_rate, set_epochs
from focusnet.tensorboard import Board
from focusnet.train import _seconds, main, start_training
from focusnet.trainer import State, Trainer, _ema, seconds_left, split_cases
from focusnet.validation import Validation, validate
from tests.tiny import ORGANS, tiny_config, write_data

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("train") / "data")


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    start(data, out, tiny_config())
    return out


def start(data, out, config, **options) -> None:
    start_training(data, out, config, cache=data.parent / "cache", device=CPU, **options)


def weights(path):
    model, _ = load_checkpoint(path, CPU)
    return model.network.state_dict()


def test_all_stages_run_and_are_recorded(finished) -> None:
    history = json.loads((finished / "history.json").read_text())
    assert [entry["stage"] for entry in history] == [stage for stage in STAGES for _ in range(2)]
    assert all(math.isfinite(entry["loss"]) for entry in history)
    assert history[-1].keys() == {
        *("stage", "epoch", "loss", "lr", "seconds"),
        *("score", "dsc", "localisation_mm", "inside_roi"),
    }
    assert history[1]["stage"] == "snet" and history[1]["localisation_mm"] is history[1]["inside_roi"] is None
    assert history[-1]["localisation_mm"] > 0 and 0 <= history[-1]["inside_roi"] <= 1
    assert not list(finished.glob("**/.tmp*"))
    model, training = load_checkpoint(finished / "last.pt", CPU)
    assert model.parts == ("snet", "sol", "sos")
    whole = [entry for entry in history if entry["stage"] in ("sos", "joint") and "score" in entry]
    best = max(reversed(whole), key=lambda entry: entry["score"])
    state = training["state"]
    assert (state["best"], state["best_stage"], state["best_epoch"]) == (best["score"], best["stage"], best["epoch"])
    assert load_checkpoint(finished / "best.pt", CPU)[0].parts == model.parts


def stopped(data, out, config, epoch: int, **options) -> None:
    """A run that Ctrl-C stops in its `epoch`-th epoch."""
    train_epoch, calls = Trainer._train_epoch, itertools.count(1)

    def train_or_stop(self, *arguments):
        if next(calls) == epoch:
            raise KeyboardInterrupt
        return train_epoch(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_train_epoch", train_or_stop)
        with pytest.raises(KeyboardInterrupt):
            start(data, out, config, **options)


# within a stage, and after its last epoch
@pytest.mark.parametrize("epoch", [4, 5])
def test_a_stopped_run_resumes_to_the_same_weights(data, finished, tmp_path, epoch) -> None:
    out = tmp_path / "stopped"
    stopped(data, out, tiny_config(), epoch)
    _, training = load_checkpoint(out / "last.pt", CPU)
    assert len(training["state"]["history"]) == epoch - 1
    copied = shutil.copytree(data, tmp_path / "copied")  # other path, other times
    start_training(copied, out, tiny_config(), cache=tmp_path / "cache", resume=True, device=CPU)
    expected, found = weights(finished / "last.pt"), weights(out / "last.pt")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    states = [load_checkpoint(folder / "last.pt", CPU)[1]["state"] for folder in (finished, out)]
    for state in states:
        for entry in (state, *state["history"]):
            del entry["seconds"]
    assert states[0] == states[1]
    best_expected, best_found = weights(finished / "best.pt"), weights(out / "best.pt")
    assert all(torch.equal(best_expected[name], best_found[name]) for name in best_expected)


def raw(path):
    """The weights that `path` holds beside their average."""
    return load_checkpoint(path, CPU)[1]["weights"]


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_average_of_the_weights(data, tmp_path) -> None:
    """Resumed, it is the same; best.pt and the next stage have it."""

    def config(**epochs):
        return tiny_config(**{s: StageConfig(epochs=epochs.get(s, 0), lr=1e-2) for s in STAGES}, ema=0.9)

    start(data, tmp_path / "whole", config(snet=2, sol=1))
    stopped(data, tmp_path / "run", config(snet=2, sol=1), epoch=2)
    start(data, tmp_path / "run", config(snet=2, sol=1), resume=True)
    (model, training), (other, resumed) = (
        load_checkpoint(tmp_path / name / "last.pt", CPU) for name in ("whole", "run")
    )
    average, again = model.network.state_dict(), other.network.state_dict()
    for name in average:
        assert torch.equal(again[name], average[name]) and torch.equal(
            resumed["weights"][name], training["weights"][name]
        )
    changing = [name for name in average if not torch.equal(average[name], training["weights"][name])]
    assert {name.partition(".")[0] for name in changing} == {"sol"}  # S-Net handed its average over

    start(data, tmp_path / "alone", config(snet=2))
    alone, _ = load_checkpoint(tmp_path / "alone" / "last.pt", CPU)
    assert not same(weights(tmp_path / "alone" / "last.pt"), raw(tmp_path / "alone" / "last.pt"))
    assert all(torch.equal(tensor, average[f"snet.{name}"]) for name, tensor in alone.network.snet.state_dict().items())
    best, training = load_checkpoint(tmp_path / "alone" / "best.pt", CPU)
    assert same(best.network.state_dict(), alone.network.state_dict())
    cache = cache_folder(data.parent / "cache", data, best.config.data)
    best.network.eval()
    held_out = split_cases(best.plan, best.config)[1]
    assert validate(best, cache, held_out, CPU).score == training["state"]["best"]


def test_an_average_soon_leaves_what_a_stage_begins_with() -> None:
    for count, decay in ((1, 2 / 11), (1000, 0.9)):
        average = torch.tensor([1.0])
        _ema(0.9)([average], [torch.tensor([0.0])], torch.tensor(count))
        assert average.item() == pytest.approx(decay)


def test_a_time_limit_stops_between_epochs(data, finished, tmp_path, monkeypatch, capsys) -> None:
    """Where the next one would take too long, if it takes as long as the longest did."""
    out, hour, epochs = tmp_path / "run", 3600.0, itertools.count(1)
    run_epoch = Trainer._epoch

    def slow_third_epoch(self, *arguments):
        run_epoch(self, *arguments)
        self.longest_epoch = 2 * hour if next(epochs) == 3 else 0.0

    monkeypatch.setattr(Trainer, "_epoch", slow_third_epoch)
    start(data, out, tiny_config(), end=time.monotonic() + hour)
    assert len(json.loads((out / "history.json").read_text())) == 3
    said = f"stopped for --time-limit: {out / 'last.pt'} holds the last finished epoch; go on with --resume"
    assert said in capsys.readouterr().out
    start(data, out, tiny_config(), resume=True, end=time.monotonic() + hour)
    expected, found = weights(finished / "last.pt"), weights(out / "last.pt")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_time_limit_that_is_over_ends_well(data, tmp_path, capsys) -> None:
    out = tmp_path / "run"
    options = ["--cache", str(data.parent / "cache"), "--data.small_organs", "[Eye_L,Eye_R]", "--device", "cpu"]
    assert main([str(data), "--out", str(out), *options, "--data.spacing", "[3,2,2]", "--time-limit", "0:00"]) == 0
    assert "stopped for --time-limit: no epoch was finished" in capsys.readouterr().out
    assert not (out / "last.pt").exists()


@pytest.mark.parametrize(("text", "seconds"), [("90", 5400), ("0.5", 30), ("7:30", 27000), ("0:05", 300)])
def test_time_limits(text, seconds) -> None:
    assert _seconds(text) == seconds
    assert _seconds(None) == math.inf


@pytest.mark.parametrize("text", ["", "7:60", "7:3", "-1", "1h", "1:2:3", "nan", "²", "9" * 400, "9" * 5000 + ":00"])
def test_what_is_no_time_limit(text) -> None:
    with pytest.raises(FocusNetError, match="^--time-limit .*expected minutes, or hours and minutes as 7:30$"):
        _seconds(text)


def test_epochs_are_those_of_every_stage_that_has_any(data, begun, tmp_path) -> None:
    config = tiny_config(joint=StageConfig(epochs=0))
    set_epochs(config.train, 7)
    assert [getattr(config.train, stage).epochs for stage in STAGES] == [7, 7, 7, 0]
    with pytest.raises(FocusNetError, match=r"^train.snet.epochs: not as in the run"):
        resume_by_command(data, begun[0], "--epochs", "3")
    out = shutil.copytree(begun[0], tmp_path / "run")
    assert resume_by_command(data, out, "--epochs", "2") == 0
    with pytest.raises(FocusNetError, match="--epochs: expected a whole number above 0"):
        resume_by_command(data, out, "--epochs", "0")


def test_tensorboard_shows_curves_and_slices(data, tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    config = tiny_config(**{stage: StageConfig(epochs=2 * (stage in ("snet", "sol"))) for stage in STAGES})
    stopped(data, out, config, epoch=3, tensorboard=True)
    # of an epoch that a kill kept out of last.pt
    lost = Board(out, load_checkpoint(out / "last.pt", CPU)[0].plan, 2)
    lost.write(3, {"stage": "sol", "loss": -1.0, "lr": 1.0, "seconds": 1.0})
    lost.close()
    start(data, out, config, resume=True, tensorboard=True)
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    history = json.loads((out / "history.json").read_text())

    def curve(tag):
        return {event.step: pytest.approx(event.value) for event in events.Scalars(tag)}

    steps = dict(enumerate(history, start=1))
    for stage in ("snet", "sol"):
        assert {step: e["loss"] for step, e in steps.items() if e["stage"] == stage} == curve(f"loss/{stage}")
    for name in ("lr", "seconds"):
        assert {step: entry[name] for step, entry in steps.items()} == curve(name)
    assert {2: history[1]["score"], 4: history[3]["score"]} == curve("validation/score")
    assert {4: history[3]["localisation_mm"]} == curve("validation/localisation_mm")
    for organ in ORGANS:
        assert {step: steps[step]["dsc"][organ] for step in (2, 4)} == curve(f"dsc/{organ}")
    model, _ = load_checkpoint(out / "last.pt", CPU)
    (case,) = split_cases(model.plan, model.config)[1]
    assert [event.step for event in events.Images(f"validation/{case.name}")] == [2, 4]
    picture = imread(io.BytesIO(events.Images(f"validation/{case.name}")[0].encoded_image_string))
    assert picture.shape[:2] == (300, 900) and len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 100


def test_tensorboard_that_is_not_installed(data, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        FocusNetError, match=r'^--tensorboard needs tensorboard: pip install "focuskernels\[tensorboard\]"$'
    ):
        start(data, tmp_path / "run", tiny_config(), tensorboard=True)


def test_a_killed_worker_is_reported_with_its_case(data, tmp_path, monkeypatch) -> None:
    here = os.getpid()

    def die(cache, case):
        assert os.getpid() != here
        if case.name == "case_2":
            os.kill(os.getpid(), signal.SIGKILL)
        return load_case(cache, case)

    monkeypatch.setattr("focusnet.data.crops.load_case", die)
    config = tiny_config(workers=2, validation_cases=["case_3"], steps_per_epoch=8)
    expected = (
        r"^a process that loads training crops died at case case_2, maybe for lack of memory \(.*\): lower train\."
    )
    with pytest.raises(FocusNetError, match=expected):
        start(data, tmp_path / "run", config)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_is_shown_with_its_case(data, tmp_path, monkeypatch, workers) -> None:
    def fail(cache, case):
        if case.name == "case_2":
            raise ZeroDivisionError("by nothing")
        return load_case(cache, case)

    monkeypatch.setattr("focusnet.data.crops.load_case", fail)
    config = tiny_config(workers=workers, validation_cases=["case_3"], steps_per_epoch=8)
    with pytest.raises(RuntimeError, match="a training crop of case case_2 failed: ZeroDivisionError: by nothing"):
        start(data, tmp_path / "run", config)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_signal_loses_at_most_one_epoch(data, tmp_path, number) -> None:
    out, file = tmp_path / "run", tmp_path / "config.yaml"
    config = tiny_config(validate_every=100, steps_per_epoch=1)
    config.train.snet.epochs = 1000
    file.write_text(json.dumps(config.to_dict()))
    options = ["--out", out, "--cache", data.parent / "cache", "--config", file, "--device", "cpu"]
    command = [sys.executable, "-m", "focusnet.train", data, *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = subprocess.Popen(list(map(str, command)), env={**os.environ, "PYTHONUNBUFFERED": "1"}, **pipes)
    deadline = time.monotonic() + 120
    while not (out / "last.pt").exists() and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.01)
    running.send_signal(number)
    printed, errors = running.communicate()
    _, training = load_checkpoint(out / "last.pt", CPU)
    reported, saved = len(re.findall(r"^snet \d+/1000", printed, re.MULTILINE)), len(training["state"]["history"])
    assert saved >= 1 and reported - saved in (0, 1)
    if number == signal.SIGINT:
        assert (running.returncode, errors) == (130, "interrupted\n")
        assert f"stopped: {out / 'last.pt'} holds the last finished epoch; go on with --resume" in printed


def test_the_best_epoch_is_kept_through_a_resumption(data, tmp_path, monkeypatch) -> None:
    scores = iter([0.2, 0.9, 0.1])
    monkeypatch.setattr(Trainer, "_validate", lambda self: Validation(next(scores), []))
    config = tiny_config(validate_every=1, steps_per_epoch=1, **{s: StageConfig(epochs=0) for s in STAGES[1:]})
    config.train.snet.epochs = 3
    out = tmp_path / "run"
    stopped(data, out, config, epoch=3)
    before = (out / "best.pt").read_bytes()
    start(data, out, config, resume=True)
    assert (out / "best.pt").read_bytes() == before
    _, training = load_checkpoint(out / "last.pt", CPU)
    assert (training["state"]["best"], training["state"]["best_epoch"]) == (0.9, 2)


# a score per stage; the last stage is stopped before it begins, or not
@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(
    ("scores", "best"), [((0.9, 0.8, 0.5, 0.4), ("sos", 0.5)), ((0.9, 0.8, 0.5, 0.6), ("joint", 0.6))]
)
def test_the_last_stage_competes_with_the_one_before(
    data, tmp_path, monkeypatch, capsys, scores, best, resumed
) -> None:
    left = iter(scores)
    monkeypatch.setattr(Trainer, "_validate", lambda self: Validation(next(left), []))
    config = tiny_config(**{stage: StageConfig(epochs=1) for stage in STAGES}, steps_per_epoch=1)
    out = tmp_path / "run"
    if resumed:
        stopped(data, out, config, epoch=4)
    start(data, out, config, resume=resumed)
    state = load_checkpoint(out / "last.pt", CPU)[1]["state"]
    assert (state["best_stage"], state["best"]) == best
    model, training = load_checkpoint(out / "best.pt", CPU)
    assert training["state"]["stage"] == best[0] and model.parts == ("snet", "sol", "sos")
    assert f"best.pt is epoch 1 of stage {best[0]}, validation DSC {best[1]:.3f}" in "".join(
        capsys.readouterr().out.splitlines()
    )


def test_frozen_parts_do_not_move_nor_do_their_norms(data, tmp_path) -> None:
    def train(name, **epochs):
        config = tiny_config()
        config.model.norm = "batch"
        for stage in STAGES:
            getattr(config.train, stage).epochs = epochs.get(stage, 0)
        start(data, tmp_path / name, config)
        return weights(tmp_path / name / "last.pt")

    snet_only, with_sol, with_sos = (
        train("a", snet=1),
        train("b", snet=1, sol=1),
        train("c", snet=1, sol=1, sos=1),
    )

    def changed(before, after):
        return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}

    assert changed(snet_only, with_sol) == {"sol"}
    assert changed(with_sol, with_sos) == {"sos"}


def test_learning_reduces_the_loss(data, tmp_path) -> None:
    stage = StageConfig(epochs=4, optimizer="adam", lr=1e-2, warmup=0, weight_decay=0.0, schedule="cosine")
    none = StageConfig(epochs=0)
    config = tiny_config(
        snet=stage,
        sol=none,
        sos=none,
        joint=none,
        validate_every=100,
        crop=(12, 20, 20),
        steps_per_epoch=20,
        augment=AugmentConfig(rotation_deg=(0.0, 0.0, 0.0), zoom=(0.0, 0.0, 0.0), mirror=False),
    )
    start(data, tmp_path / "run", config)
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert history[-1]["loss"] < 0.6 * history[0]["loss"]


def test_a_resumed_run_keeps_the_crop_that_memory_chose(data, begun, tmp_path) -> None:
    out = shutil.copytree(begun[0], tmp_path / "run")
    assert resume_by_command(data, out, "--train.crop", "[40,192,192]", "--memory", "8") == 0
    assert load_checkpoint(out / "last.pt", CPU)[0].config.train.crop == (8, 16, 16)


def _held(folder, ready, done) -> None:
    with alone_in(folder):
        ready.set()
        done.wait(60)


def test_one_process_trains_in_a_folder(data, begun, tmp_path) -> None:
    out = shutil.copytree(begun[0], tmp_path / "run")
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_held, args=(out, ready, done))
    other.start()
    assert ready.wait(60)
    with pytest.raises(FocusNetError, match=f"^another process works in {out}: wait until it ends$"):
        resume_by_command(data, out)
    other.kill()
    other.join()
    assert resume_by_command(data, out) == 0


def test_processes_that_cannot_share_batches_are_refused_first(tmp_path) -> None:
    with pytest.raises(FocusNetError, match="^train.batch_size is 1, expected a multiple of 2"):
        start(tmp_path / "nowhere", tmp_path / "run", tiny_config(), memory="8", ranks=Ranks(0, 2))


def test_a_run_is_not_overwritten(data, finished) -> None:
    with pytest.raises(FocusNetError, match="--resume"):
        start(data, finished, tiny_config())


@pytest.fixture(scope="module")
def begun(data, tmp_path_factory):
    """A run after the first of its two epochs, and its configuration as a file."""
    out = tmp_path_factory.mktemp("begun") / "run"
    config = tiny_config(**{stage: StageConfig(epochs=2 * (stage == "snet")) for stage in STAGES}, steps_per_epoch=1)
    stopped(data, out, config, epoch=2)
    file = out.parent / "config.yaml"
    file.write_text(json.dumps(config.to_dict()))
    return out, file


def resume_by_command(data, out, *options) -> int:
    return main(
        [str(data), "--out", str(out), "--cache", str(data.parent / "cache"), "--device", "cpu", "--resume", *options]
    )


def test_a_run_does_not_go_on_with_other_data(begun, tmp_path) -> None:
    other = write_data(tmp_path / "data", 3)
    with pytest.raises(FocusNetError, match="other cases"):
        resume_by_command(other, begun[0])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--train.seed", "1"], "train.seed"),
        (["--model.norm", "group", "--data.roi_scale=2"], "data.roi_scale, model.norm"),
        # the default is named, but not the run's own
        (["--train.batch_size", "1", "--train.validate_every", "10"], "train.validate_every"),
        (["--train.snet.epochs", "3", "--train.snet.lr", "1"], "train.snet.epochs"),
    ],
)
def test_resume_refuses_options_that_differ(data, begun, options, named) -> None:
    before = (begun[0] / "last.pt").read_bytes()
    with pytest.raises(FocusNetError, match=f"^{named}: not as in the run"):
        resume_by_command(data, begun[0], *options)
    assert (begun[0] / "last.pt").read_bytes() == before


def test_resume_takes_options_that_agree_or_may_change(data, begun, tmp_path, capsys) -> None:
    out = shutil.copytree(begun[0], tmp_path / "run")
    options = [
        "--config",
        str(begun[1]),
        "--train.crop",
        "[8,16,16]",
        "--train.snet.lr",
        "1e-5",
        "--train.workers",
        "1",
        "--model.backend",
        "reference",
    ]
    assert resume_by_command(data, out, *options) == 0
    model, training = load_checkpoint(out / "last.pt", CPU)
    assert [entry["epoch"] for entry in training["state"]["history"]] == [1, 2]
    assert training["state"]["history"][1]["lr"] == pytest.approx(
        0.25 * 1e-5
    )  # the second third of the "step" schedule
    assert (model.config.train.workers, model.config.train.snet.lr) == (1, 1e-5)
    assert model.config.model.backend == "reference"
    assert "done" in capsys.readouterr().out
    whole = (out / "last.pt").read_bytes()
    assert resume_by_command(tmp_path / "anywhere", out) == 0
    assert f"{out} is complete" in capsys.readouterr().out
    assert (out / "last.pt").read_bytes() == whole


def test_a_loss_that_is_not_a_number_stops_training(data, begun, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("focusnet.trainer.stage_loss", lambda *_, **__: torch.tensor(math.nan, requires_grad=True))
    with pytest.raises(FocusNetError, match=r"became nan in stage snet, epoch 1: lower train.snet.lr and start again"):
        start(data, tmp_path / "new", tiny_config())
    assert not (tmp_path / "new" / "last.pt").exists()
    out = shutil.copytree(begun[0], tmp_path / "run")
    with pytest.raises(FocusNetError, match=r"epoch 2: lower train.snet.lr and go on .* with --resume"):
        resume_by_command(data, out)
    assert (out / "last.pt").read_bytes() == (begun[0] / "last.pt").read_bytes()


def test_an_epoch_without_any_loss_is_null_in_the_history(data, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("focusnet.trainer.stage_loss", lambda *_, **__: None)
    start(data, tmp_path / "run", tiny_config(**{stage: StageConfig(epochs=int(stage == "snet")) for stage in STAGES}))
    text = (tmp_path / "run" / "history.json").read_text()
    assert json.loads(text)[0]["loss"] is None and "NaN" not in text
    assert "snet 1/1  no small organ" in capsys.readouterr().out


def test_a_terminal_shows_loss_and_time_left(data, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, color_system=None, width=120)
    monkeypatch.setattr("focusnet.train.console", lambda: terminal)
    monkeypatch.setattr("focusnet.trainer.stage_loss", lambda *_, **__: torch.tensor(1.25, requires_grad=True))
    monkeypatch.setattr(Trainer, "_validates", lambda self, settings: False)
    bracketed = shutil.copytree(data / "case_0", tmp_path / "data" / "[b]ob:a:").parent
    shutil.copytree(data / "case_2", bracketed / "case_2")
    config = tiny_config(**{stage: StageConfig(epochs=2 * (stage in ("snet", "sol"))) for stage in STAGES})
    config.train.validation_cases = ["[b]ob:a:"]
    start_training(bracketed, tmp_path / "run", config, cache=tmp_path / "cache", device=CPU)
    assert "validation on [b]ob:a:;" in shown.getvalue()
    assert re.search(r"snet 1/2 .* 3/3 .* loss 1\.2500", shown.getvalue())
    assert len(re.findall(r"(?:snet|sol) ./2  loss 1\.2500 .* about .* left", shown.getvalue())) == 3  # not the last


def test_an_organ_found_where_nobody_contoured_it_is_spurious_and_enters_no_mean(data, finished, monkeypatch) -> None:
    model, _ = load_checkpoint(finished / "last.pt", CPU)
    model.network.eval()
    cache = cache_folder(data.parent / "cache", data, model.config.data)
    with_eye, without = model.plan.cases[:2]
    assert "Eye_R" in with_eye.organs and "Eye_R" not in without.organs

    def find(wanted):
        def segmented(model, hu, device):
            labels = torch.zeros(hu.shape, dtype=torch.uint8)
            for organ in wanted:
                labels[1, 1, model.plan.organ_names.index(organ)] = model.plan.organ_names.index(organ) + 1
            return Segmentation(labels, torch.ones(4), torch.zeros(2, 3, dtype=torch.int64), torch.ones(2), [])

        monkeypatch.setattr(validation, "segment_hu", segmented)
        return validate(model, cache, [with_eye, without], CPU)

    absent, spurious = find(["Brainstem", "Eye_L"]), find(["Brainstem", "Eye_L", "Eye_R"])
    rows = [{row.organ: row for row in result.rows} for result in (absent, spurious)]
    assert [found["Eye_R"].spurious for found in rows] == [0, 1]
    assert [found["mean of all"].spurious for found in rows] == [0, 1]
    for found in rows:
        assert (found["Eye_R"].n, found["Eye_L"].n) == (1, 2)
        assert found["Eye_R"].dsc.sd is None and found["Eye_R"].localisation_mm.sd is None  # of one case alone
    assert rows[0]["Eye_R"].missed == 1 and rows[1]["Eye_R"].missed == 0


@pytest.mark.parametrize("width", [None, 40])
def test_the_validation_table_is_never_cut(data, tmp_path, monkeypatch, capsys, width) -> None:
    def ok(case, organ, value):
        return OrganScore(case, organ, "ok", value, 120.25 - value, value, localisation_mm=60 * value, inside_roi=True)

    missed = OrganScore("a", "OpticNrv_L", "missed", 0.0, 512.34)
    scores = [
        missed,
        ok("b", "OpticNrv_L", 0.75),
        *(ok(case, "Glnd_Submand_L", len(case) / 9) for case in ("a", "bcd")),
    ]
    rows = summarize(scores, {"OpticNrv_L"})
    monkeypatch.setattr(Trainer, "_validate", lambda self: Validation(0.5, rows))
    shown = io.StringIO()
    if width is not None:
        terminal = Console(file=shown, force_terminal=True, color_system=None, width=width)
        monkeypatch.setattr("focusnet.train.console", lambda: terminal)
    none = {stage: StageConfig(epochs=int(stage == "snet")) for stage in STAGES}
    start(data, tmp_path / "run", tiny_config(**none, steps_per_epoch=1))
    printed = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out if width is None else shown.getvalue())
    assert "…" not in printed
    assert re.search(r"organ +DSC % +95HD mm +n +missed +spurious +DSC % +95HD mm +mm +%", printed)
    assert re.search(r"OpticNrv_L +37\.5 ± 53\.0 +315\.92 ± 277\.78 +2 +1 +0 +75\.0 +119\.50 +45\.00 +100", printed)


def test_the_time_left_covers_all_stages() -> None:
    epochs = {"snet": 10, "sol": 4, "joint": 2}
    state = State("snet", 2, history=[{"stage": "snet", "seconds": 30.0}, {"stage": "snet", "seconds": 50.0}])
    assert seconds_left(state, epochs) == (8 + 4 + 2) * 40
    later = State("joint", 1, history=[*state.history, {"stage": "joint", "seconds": 7.0}])
    assert seconds_left(later, epochs) == 7


def test_a_run_without_epochs(data, tmp_path) -> None:
    with pytest.raises(FocusNetError, match="nothing to train"):
        start(data, tmp_path / "run", tiny_config(**{stage: StageConfig(epochs=0) for stage in STAGES}))


@pytest.mark.parametrize(
    ("epochs", "named"),
    [
        ((0, 0, 1, 0), "train.sos.epochs is 1, but train.sol.epochs is 0"),
        ((0, 2, 1, 1), "train.sol.epochs is 2, but train.snet.epochs is 0"),
        ((1, 0, 3, 1), "train.sos.epochs is 3, but train.sol.epochs is 0"),
        ((1, 1, 0, 1), "train.joint.epochs is 1, but train.sos.epochs is 0"),
    ],
)
def test_a_stage_on_untrained_parts_is_refused_first(tmp_path, epochs, named) -> None:
    config = tiny_config(**{stage: StageConfig(epochs=n) for stage, n in zip(STAGES, epochs, strict=True)})
    with pytest.raises(FocusNetError, match=f"^{named}"):
        start(tmp_path / "nowhere", tmp_path / "run", config)


@pytest.mark.parametrize("name", ["file", "file/run", "read_only"])
def test_a_folder_that_cannot_be_written_is_noticed_first(data, tmp_path, monkeypatch, name) -> None:
    (tmp_path / "file").write_text("no folder")
    write, out = Path.write_bytes, tmp_path / name

    def refuse(path, content):
        if path.parent == tmp_path / "read_only":  # a stand-in: root writes whatever the permissions say
            raise PermissionError(13, "Permission denied", str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", refuse)
    monkeypatch.setattr("focusnet.train.prepare", lambda *arguments, **options: pytest.fail("prepared"))
    with pytest.raises(FocusNetError, match=f"^cannot write into {out}: [^/]+$"):
        start(data, out, tiny_config())


def test_the_probe_of_the_folder_leaves_nothing(tmp_path) -> None:
    check_writable(tmp_path / "new" / "run")
    assert [path.name for path in (tmp_path / "new").rglob("*")] == ["run"]


def test_unusable_cases_are_left_out_on_demand(data, tmp_path, capsys) -> None:
    copied = shutil.copytree(data, tmp_path / "data")
    (copied / "case_3" / "img.nrrd").write_bytes(b"")
    config = tiny_config(**{stage: StageConfig(epochs=0) for stage in STAGES[1:]}, steps_per_epoch=1)
    config.train.snet.epochs = 1
    with pytest.raises(FocusNetError, match=r"--skip-bad.*case_3"):
        start(copied, tmp_path / "run", config)
    start(copied, tmp_path / "run", config, skip_bad=True)
    assert "left out case_3" in capsys.readouterr().out
    model, _ = load_checkpoint(tmp_path / "run" / "last.pt", CPU)
    assert [case.name for case in model.plan.cases] == ["case_0", "case_1", "case_2"]


def test_an_organ_of_validation_cases_alone_is_warned_of(data, tmp_path, capsys) -> None:
    copied = shutil.copytree(data, tmp_path / "data")
    for name in ("case_0", "case_2"):
        (copied / name / "structures" / "Eye_R.nrrd").unlink()
    config = tiny_config(**{stage: StageConfig(epochs=0) for stage in STAGES[1:]}, steps_per_epoch=1)
    config.train.snet.epochs = 1
    config.train.validation_cases = ["case_3"]
    start(copied, tmp_path / "run", config)
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert "no training case has Eye_R, only validation" in warning


def test_resume_without_a_run(data, tmp_path) -> None:
    with pytest.raises(FocusNetError, match="last.pt"):
        resume_by_command(data, tmp_path / "none")


def test_truncated_checkpoint(finished, tmp_path) -> None:
    whole = (finished / "last.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    for name in ("cut.pt", "text.pt", "other.pt"):
        with pytest.raises(FocusNetError, match=name):
            load_checkpoint(tmp_path / name, CPU)


def test_a_truncated_run_is_not_resumed(data, begun, tmp_path) -> None:
    out = shutil.copytree(begun[0], tmp_path / "run")
    whole = (out / "last.pt").read_bytes()
    (out / "last.pt").write_bytes(whole[:-100])
    with pytest.raises(FocusNetError, match=r"run/last\.pt.* damaged"):
        resume_by_command(data, out)
    assert (out / "last.pt").read_bytes() == whole[:-100]


def test_validation_cases_are_never_trained_on(finished) -> None:
    model, _ = load_checkpoint(finished / "last.pt", CPU)
    training, validation = split_cases(model.plan, model.config)
    assert len(validation) == 1 and len(training) == 3
    assert not {c.name for c in training} & {c.name for c in validation}
    model.config.train.validation_cases = ["nobody"]
    with pytest.raises(FocusNetError, match="nobody"):
        split_cases(model.plan, model.config)


def test_learning_rates() -> None:
    steps = StageConfig(epochs=300, lr=1.0, milestones=[1 / 3, 2 / 3], decay=0.1)
    assert [learning_rate(steps, e) for e in (0, 99, 100, 200)] == pytest.approx([1, 1, 0.1, 0.01])
    warm = StageConfig(epochs=10, lr=1.0, warmup=4, schedule="cosine")
    rates = [learning_rate(warm, e) for e in range(10)]
    assert rates[:5] == sorted(rates[:5]) and rates[4] == 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[-1] > 0


def test_heatmaps_are_gaussians_in_mm() -> None:
    spacing = (2.5, 1.0, 1.0)
    heat = gaussian_heatmaps(torch.tensor([[[4.0, 10.0, 12.0]]]), (9, 21, 25), spacing, 5.0)[0, 0]
    assert heat[4, 10, 12] == 1.0
    assert heat[6, 10, 12].item() == pytest.approx(math.exp(-0.5), rel=1e-6)
    assert heat[4, 10, 17].item() == pytest.approx(math.exp(-0.5), rel=1e-6)


@pytest.mark.parametrize("error", ["squared", "cross_entropy"])
def test_heatmap_loss_leaves_out_missing_organs(error: str) -> None:
    crop, config = heatmap_crop(), LossConfig(heatmap_sigma_mm=2.0, heatmap_error=error)
    logits = torch.randn(1, 2, 9, 11, 11, requires_grad=True)
    loss = heatmap_loss(logits, logits.sigmoid(), crop, (2.0, 1.0, 1.0), config)
    loss.backward()
    assert loss.isfinite() and logits.grad[0, 0].any() and not logits.grad[0, 1].any()


@pytest.mark.parametrize("error", ["squared", "cross_entropy"])
def test_heatmap_loss_is_least_for_the_gaussian(error: str) -> None:
    crop, config = heatmap_crop(), LossConfig(heatmap_sigma_mm=2.0, heatmap_error=error)
    perfect = gaussian_heatmaps(crop.centers, (9, 11, 11), (2.0, 1.0, 1.0), 2.0).nan_to_num().double().logit()
    logits = perfect.clamp(-10, 10).requires_grad_()
    heatmap_loss(logits, logits.sigmoid(), crop, (2.0, 1.0, 1.0), config).backward()
    assert logits.grad.abs().max() < 1e-5


def test_a_heatmap_of_zeros_is_left_by_cross_entropy() -> None:
    logits = torch.full((1, 2, 9, 11, 11), -20.0, requires_grad=True)
    pull = {}
    for error in ("squared", "cross_entropy"):
        config = LossConfig(heatmap_sigma_mm=2.0, heatmap_error=error)
        loss = heatmap_loss(logits, logits.sigmoid(), heatmap_crop(), (2.0, 1.0, 1.0), config)
        (gradient,) = torch.autograd.grad(loss, logits)
        pull[error] = -gradient[0, 0, 4, 5, 5].item()
    assert pull["squared"] < 1e-8 and pull["cross_entropy"] > 1e-2


def heatmap_crop() -> Crop:
    """One organ in the middle of 9x11x11 voxels; another one that was not contoured."""
    centers = torch.tensor([[[4.0, 5.0, 5.0], [math.nan] * 3]])
    return Crop(torch.zeros(1, 1, 9, 11, 11), torch.zeros(1, 9, 11, 11), torch.ones(1, 3, dtype=torch.bool), centers)


def test_a_region_larger_than_a_crop_is_warned_of(data, tmp_path, capsys) -> None:
    config = tiny_config(**{stage: StageConfig(epochs=0) for stage in STAGES[1:]}, steps_per_epoch=1)
    config.train.snet.epochs = 1
    config.data.roi_size = (9, 16, 16)
    start(data, tmp_path / "run", config)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 2
    assert "the ROI of Eye_L, (9, 16, 16) voxels (z, y, x), is larger than train.crop, (8, 16, 16)" in warnings[0]
