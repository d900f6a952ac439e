"""Kills, dying processes and damaged files: what is there is whole, and going on gives what an undisturbed run does."""

import json
import multiprocessing
import os
import random
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

from focusnet import predict, prepare, train
from focusnet.checkpoint import Model, build_network, load_checkpoint, save_checkpoint
from focusnet.cli import run
from focusnet.config import StageConfig
from focusnet.data.images import read_labels
from focusnet.errors import FocusNetError
from focusnet.files import atomic_folder, atomic_write, clear_unfinished
from focusnet.prepare import prepare as prepare_data
from focusnet.stages import STAGES
from focusnet.train import start_training
from tests.tiny import tiny_config, write_data

CPU = torch.device("cpu")
# every process starts with what is imported, so that kills fall into the work
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.test_faults"])


class Command:
    """A command on the tiny data set in a folder of its own, killed and repeated until it ends.

    Args:
        name: "prepare", "train" or "predict".
        folder: Holds `data`, `config.json` and `model.pt`; gets `cache` and `out`.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder, self.out = name, folder, folder / ("cache" if name == "prepare" else "out")

    def arguments(self) -> list[str]:
        data, config, out = (str(self.folder / name) for name in ("data", "config.json", "out"))
        cache = ["--cache", str(self.folder / "cache")]
        if self.name == "prepare":
            return [data, "--config", config, *cache]
        if self.name == "predict":
            return [str(self.folder / "model.pt"), data, "--out", out, "--device", "cpu", "--continue"]
        resume = ["--resume"] if (self.folder / "out" / "last.pt").exists() else []
        return [data, "--out", out, "--config", config, *cache, "--device", "cpu", *resume]

    def start(self, event: int | None = None) -> multiprocessing.process.BaseProcess:
        """Start it; with `event`, it kills itself at that change of a file."""
        process = FORKS.Process(target=_run, args=(self.name, self.arguments(), str(self.folder), event))
        process.start()
        return process

    def finish(self) -> tuple[float, int]:
        """Run to the end; returns the seconds it took and the changes of files."""
        started, process = time.monotonic(), self.start()
        process.join()
        assert process.exitcode == 0
        return time.monotonic() - started, int((self.folder / "events").read_text())

    def kill(self, rng: random.Random, seconds: float, events: int) -> bool:
        """Kill it at a random time or at a random change of a file; False if it had ended before."""
        event = rng.randrange(events) if rng.random() < 0.5 else None
        process = self.start(event)
        process.join(None if event is not None else rng.uniform(0, seconds))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        return process.exitcode != 0


def _run(name: str, arguments: list[str], folder: str, event: int | None) -> None:
    torch.set_num_threads(1)
    happened = 0

    def count(what: str, details: tuple[object, ...]) -> None:
        nonlocal happened
        changes = what in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") or (
            what == "open" and details[2] & os.O_CREAT
        )
        if changes and str(details[0]).startswith(folder):
            if happened == event:
                os.kill(os.getpid(), signal.SIGKILL)
            happened += 1

    sys.addaudithook(count)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    status = {"prepare": prepare, "train": train, "predict": predict}[name].main(arguments)
    Path(folder, "events").write_text(str(happened))
    sys.exit(status)


def check_files(folder: Path) -> int:
    """Load every file that has its final name; returns their number."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    whole = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    for path in whole:
        if path.name.endswith(".npy"):
            np.load(path)
        elif path.name.endswith(".json"):
            json.loads(path.read_text())
        elif path.name.endswith(".csv"):
            assert len(path.read_text().splitlines()) % 3 == 1  # a heading, and three organs for each case
        elif path.name.endswith(".pt"):
            load_checkpoint(path, CPU)
        elif path.name.endswith(".nii.gz"):
            read_labels(path)
        elif path.name.endswith(".png"):
            imread(path)
        else:
            raise AssertionError(f"unexpected {path}")
    return len(whole)


def content(command: Command) -> dict[str, object]:
    """What a command wrote, without the times in it."""
    found: dict[str, object] = {}
    for path in sorted(path for path in command.out.rglob("*") if path.is_file()):
        name = str(path.relative_to(command.out))
        if path.suffix == ".pt":
            model, training = load_checkpoint(path, CPU)
            state = {**training["state"], "seconds": 0, "history": _without_seconds(training["state"]["history"])}
            found[name] = {name: tensor.numpy().tobytes() for name, tensor in model.network.state_dict().items()}, state
        elif path.name == "history.json":
            found[name] = _without_seconds(json.loads(path.read_text()))
        else:
            found[name] = path.read_bytes()
    return found


def _without_seconds(history: list[dict[str, object]]) -> list[dict[str, object]]:
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in history]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, a configuration that goes through all stages, and a model."""
    folder = tmp_path_factory.mktemp("source")
    stages = {stage: StageConfig(epochs=2, optimizer="adam", lr=1e-2) for stage in STAGES}
    config = tiny_config(**stages, steps_per_epoch=2, validate_every=2)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    plan = prepare_data(write_data(folder / "data", 4), folder / "first", config.data)
    torch.manual_seed(0)
    save_checkpoint(folder / "model.pt", Model(build_network(config, plan), config, plan, ("snet", "sol", "sos")), {})
    shutil.rmtree(folder / "first")
    return folder


def kill_and_go_on(source: Path, folder: Path, kills: dict[str, int], in_a_row: int) -> None:
    """Kill every command so often, `in_a_row` times before it may end."""
    rng = random.Random(0)
    for name, count in kills.items():
        command = Command(name, shutil.copytree(source, folder / name))
        command.finish()  # which starts the server of processes too
        expected, killed = content(command), 0
        clear(command)
        seconds, events = command.finish()
        while killed < count:
            clear(command)
            for _ in range(min(in_a_row, count - killed)):
                fell = command.kill(rng, seconds, events)
                check_files(command.folder / "cache")
                check_files(command.folder / "out")
                killed += fell
                if not fell:  # it had ended
                    break
            for path in command.folder.rglob(".*"):  # as if a minute had passed
                os.utime(path, (1, 1))
            command.finish()
            assert content(command) == expected
            print(f"{name}: {killed} kills", flush=True)


def clear(command: Command) -> None:
    for part in ("cache", "out"):
        shutil.rmtree(command.folder / part, ignore_errors=True)


def test_killed_commands_go_on(source: Path, tmp_path: Path) -> None:
    kill_and_go_on(source, tmp_path, {"train": 2, "predict": 1}, in_a_row=2)


@pytest.mark.nightly
def test_fifty_kills(source: Path, tmp_path: Path) -> None:
    kill_and_go_on(source, tmp_path, {"prepare": 14, "train": 22, "predict": 14}, in_a_row=3)


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    """By the next one that writes there; what a living one writes stays, and a folder not yet replaced comes back."""
    for name in (".tmp-0123abcd-a", ".tmp-0123abcd-b", ".old-0123abcd-c", ".old-0123abcd-d", ".tmp-9999aaaa-e"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    for name in (".tmp-0123abcd-f.pt", ".tmp-of-the-user", ".hidden"):
        (tmp_path / name).write_text("")
    (tmp_path / "d").mkdir()
    for path in tmp_path.iterdir():
        os.utime(path, (1, 1))
    (tmp_path / ".tmp-9999aaaa-e" / "new").write_text("")  # just begun
    with atomic_write(tmp_path / "living") as living:
        os.utime(living, (1, 1))
        with atomic_folder(tmp_path / "folder") as folder:
            os.utime(folder, (1, 1))
            clear_unfinished(tmp_path)
            assert folder.is_dir() and living.exists()
            (folder / "x").write_text("")
        living.write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(".hidden", ".tmp-9999aaaa-e", ".tmp-of-the-user", "c", "d", "folder", "living")
    ]
    assert (tmp_path / "c" / "file").read_text() == ".old-0123abcd-c" and not list((tmp_path / "d").iterdir())


@pytest.fixture
def config_and_data(source: Path, tmp_path: Path) -> Path:
    return shutil.copytree(source, tmp_path / "work")


def start(folder: Path, **changes: object) -> None:
    epochs = {stage: StageConfig(epochs=2 * (stage == "snet"), optimizer="adam") for stage in STAGES}
    config = tiny_config(**{**epochs, "steps_per_epoch": 2, "validate_every": 9, **changes})
    start_training(folder / "data", folder / "out", config, cache=folder / "cache", device=CPU)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda path: path.unlink(), "No such file or directory"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "it is damaged"),
        (lambda path: path.write_bytes(b""), "it is damaged"),
        (lambda path: np.save(path, np.zeros((3, 4, 5), np.int16)), r"has int16 \(3, 4, 5\), expected int16 \("),
    ],
)
def test_arrays_damaged_after_preparing_are_named(config_and_data: Path, monkeypatch, workers, damage, cause) -> None:
    work = train.prepare

    def prepare_and_damage(*arguments, **options):
        plan = work(*arguments, **options)
        for path in (config_and_data / "cache").rglob("*.image.npy"):
            damage(path)
        return plan

    monkeypatch.setattr(train, "prepare", prepare_and_damage)
    with pytest.raises(
        FocusNetError, match=rf"^case case_\d: .*image\.npy.* {cause}.*prepare the data again$"
    ) as caught:
        start(config_and_data, workers=workers)
    assert "\n" not in str(caught.value)


def test_sigterm_is_as_gentle_as_ctrl_c(config_and_data: Path) -> None:
    folder = config_and_data
    options = [
        "--out",
        folder / "out",
        "--cache",
        folder / "cache",
        "--config",
        folder / "config.json",
        "--device",
        "cpu",
    ]
    options += ["--train.snet.epochs", "1000", "--train.validate_every", "10000"]
    running = subprocess.Popen(
        [sys.executable, "-u", "-m", "focusnet.train", folder / "data", *map(str, options)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (folder / "out" / "last.pt").exists() and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.01)
    running.terminate()
    printed, errors = running.communicate()
    assert (running.returncode, errors.strip()) == (143, "terminated")
    assert f"stopped: {folder / 'out' / 'last.pt'} holds the last finished epoch; go on with --resume" in printed
    assert check_files(folder / "out") == 2
    assert not list((folder / "out").glob(".tmp*"))


def test_a_terminated_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stopped:
            run(lambda: signal.raise_signal(signal.SIGTERM) or 0)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 143 and capsys.readouterr().err == "terminated\n"


WORKERS = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from focusnet.processes import follow_parent

def begin(folder):
    Path(folder, str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), follow_parent) as pool:
        list(pool.map(begin, [sys.argv[1]] * 2))
"""


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(WORKERS)
    (tmp_path / "pids").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    running = subprocess.Popen([sys.executable, tmp_path / "script.py", tmp_path / "pids"], env=environment)
    deadline, pids = time.monotonic() + 60, []
    while len(pids) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
        pids = [path.name for path in (tmp_path / "pids").iterdir()]
    running.kill()
    running.wait()
    assert len(pids) == 2
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_alive, pids))


def _alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# a file system of its own for the run's folder, whose content is copied out before it goes
MOUNTED = """
mount -t tmpfs -o "$1" tmpfs "$2" || exit 77
shift 2
"$@"
status=$?
cp -a "$OUT/." "$KEPT"
exit $status
"""


@pytest.mark.parametrize(
    ("options", "errors", "kept"),
    [
        ("size=450k", r"error: cannot write {out}/last\.pt: .*\n", 3),
        ("ro", r"error: cannot write into {out}: Read-only file system\n", 0),
    ],
)
def test_a_real_full_or_read_only_disk(config_and_data: Path, options: str, errors: str, kept: int) -> None:
    folder, out = config_and_data, config_and_data / "out"
    out.mkdir()
    (folder / "kept").mkdir()
    start(folder, steps_per_epoch=1)  # fills the cache
    shutil.rmtree(out)
    out.mkdir()
    command = [sys.executable, "-m", "focusnet.train", folder / "data", "--out", out, "--cache", folder / "cache"]
    command += ["--config", folder / "config.json", "--device", "cpu", "--train.validate_every", "1"]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", MOUNTED, "sh", options, out, *map(str, command)],
        env={**os.environ, "OUT": str(out), "KEPT": str(folder / "kept")},
        capture_output=True,
        text=True,
    )
    if done.returncode in (1, 77) and "error:" not in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 2
    assert re.fullmatch(errors.format(out=re.escape(str(out))), done.stderr), done.stderr
    assert check_files(folder / "kept") == kept and not list((folder / "kept").glob(".tmp*"))
