"""Training by two processes, over gloo: the losses of one process, and one message whatever ends them."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from focusnet.checkpoint import load_checkpoint
from focusnet.cli import run
from focusnet.config import StageConfig
from focusnet.losses import in_crop
from focusnet.stages import STAGES, stage_loss
from focusnet.train import main
from focusnet.trainer import Trainer
from tests.tiny import tiny_config, write_data

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")

CPU = torch.device("cpu")
# processes that have imported everything
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.test_distributed"])
SECONDS = 120


@dataclass
class Run:
    """A run of the command in a folder of its own."""

    folder: Path
    data: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def arguments(self, *options: str) -> list[str]:
        cache, config = self.data.parent / "cache", self.folder / "config.json"
        settings = [] if "--resume" in options else ["--config", str(config)]
        return [str(self.data), "--out", str(self.out), "--cache", str(cache), "--device", "cpu", *settings, *options]

    def history(self) -> list[dict]:
        return json.loads((self.out / "history.json").read_text())

    def wait_for_an_epoch(self, running) -> None:
        deadline = time.monotonic() + SECONDS
        while not (self.out / "last.pt").exists() and time.monotonic() < deadline and running():
            time.sleep(0.01)

    def check_saved(self) -> None:
        model, training = load_checkpoint(self.out / "last.pt", CPU)
        assert len(training["state"]["history"]) >= 1 and model.parts == ("snet",)
        assert not list(self.out.glob(".tmp*"))


def start(run_: Run, *options: str) -> list[BaseProcess]:
    """Two processes as `torchrun` would start them, without its supervision."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    arguments = run_.arguments(*options)
    processes = [
        FORKS.Process(target=_process, args=(rank, store.port, arguments, str(run_.folder))) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
        process.store = store  # lives as long
    return processes


def finish(processes: list[BaseProcess]) -> list[int | None]:
    for process in processes:
        process.join(SECONDS)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _process(rank: int, port: int, arguments: list[str], folder: str) -> None:
    for name, stream in (("out", 1), ("err", 2)):
        os.dup2(os.open(Path(folder, f"{name}{rank}"), os.O_WRONLY | os.O_CREAT), stream)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    run(lambda: main(arguments))


def said(folder: Path, name: str) -> str:
    """What both processes printed, but for the line that the progress of preparing ends with."""
    return "".join((folder / f"{name}{rank}").read_text() for rank in (0, 1)).strip()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("distributed") / "data", 5)


def make(folder: Path, data: Path, norm: str = "batch", **train) -> Run:
    folder.mkdir(exist_ok=True)
    # SGD, since Adam divides what is nothing but rounding by itself
    stage = {"epochs": 1, "optimizer": "sgd", "lr": 0.01}
    settings = {stage_: StageConfig(**stage) for stage_ in STAGES}
    config = tiny_config(**{**settings, "batch_size": 2, "ema": 0.5, "organ_crops": 0.5, **train})
    config.model.norm = norm
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return Run(folder, data)


def test_two_processes_learn_as_one(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through all stages, with batch norm, and where organs lie in the crops of one process alone or of none."""
    inside = []

    def watched_loss(model, stage, crop, *more, **options):
        inside.extend([in_crop(crop)] if stage in ("sos", "joint") else [])
        return stage_loss(model, stage, crop, *more, **options)

    monkeypatch.setattr("focusnet.trainer.stage_loss", watched_loss)
    one, two = make(tmp_path / "one", data), make(tmp_path / "two", data)
    assert main(one.arguments()) == 0
    shares = [(crops[0::2].any(dim=0), crops[1::2].any(dim=0)) for crops in inside]
    assert any(bool((first != second).any()) for first, second in shares)
    assert any(not first.any() and not second.any() for first, second in shares)
    assert finish(start(two)) == [0, 0], said(two.folder, "err")
    compare(one, two)
    assert said(two.folder, "err") == "" and (two.folder / "out1").read_text() == ""
    assert "2 processes, 4 training cases" in (two.folder / "out0").read_text()


def compare(one: Run, two: Run) -> None:
    histories = one.history(), two.history()
    for ours, theirs in zip(*histories, strict=True):
        # float32, summed up in another order
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4), ours["stage"]
        assert theirs.get("dsc") == pytest.approx(ours.get("dsc"), abs=0.02)
    (model, ours), (other, theirs) = (load_checkpoint(run_.out / "last.pt", CPU) for run_ in (one, two))
    torch.testing.assert_close(other.network.state_dict(), model.network.state_dict(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(theirs["weights"], ours["weights"], rtol=1e-3, atol=1e-4)


def test_the_number_of_processes_may_change(data: Path, tmp_path: Path) -> None:
    one, two = make(tmp_path / "one", data, "instance"), make(tmp_path / "two", data, "instance")
    assert main(one.arguments()) == 0
    train_epoch = Trainer._train_epoch

    def stop_in_the_second(self, stage, *arguments):
        if stage == "sol":
            raise KeyboardInterrupt
        return train_epoch(self, stage, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_train_epoch", stop_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            main(two.arguments())
    assert finish(start(two, "--resume")) == [0, 0], said(two.folder, "err")
    compare(one, two)


def test_what_cannot_be_shared_is_refused_once(data: Path, tmp_path: Path) -> None:
    run_ = make(tmp_path / "run", data, batch_size=3)
    assert finish(start(run_)) == [2, 2]
    assert re.fullmatch(r"error: train.batch_size is 3, expected a multiple of 2: .*", said(run_.folder, "err"))


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other(data: Path, tmp_path: Path, killed: int) -> None:
    run_ = make(tmp_path / "run", data, validate_every=10000, snet=StageConfig(epochs=10000, lr=1e-4))
    processes = start(run_)
    run_.wait_for_an_epoch(processes[0].is_alive)
    processes[killed].kill()
    codes = finish(processes)
    assert (codes[killed], codes[1 - killed]) == (-signal.SIGKILL, 2)
    last = re.escape(str(run_.out / "last.pt"))
    expected = f"error: another process of this training ended: {last} holds the last finished epoch; go on with .*"
    assert re.fullmatch(expected, said(run_.folder, "err"))
    run_.check_saved()


def test_ctrl_c_ends_torchrun_with_one_message(data: Path, tmp_path: Path) -> None:
    run_ = make(tmp_path / "run", data, validate_every=10000, snet=StageConfig(epochs=10000, lr=1e-4))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "focusnet.train"]
    running = subprocess.Popen(
        [*launch, *run_.arguments()],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        run_.wait_for_an_epoch(lambda: running.poll() is None)
        os.killpg(running.pid, signal.SIGINT)  # as the terminal does
        printed, errors = running.communicate(timeout=SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode != 0
    assert printed.count("stopped: ") == 1, printed
    assert f"stopped: {run_.out / 'last.pt'} holds the last finished epoch; go on with --resume" in printed
    assert len(re.findall("^interrupted$", errors, re.MULTILINE)) == 1, errors
    run_.check_saved()
