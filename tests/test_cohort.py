"""Predicting a cohort: what is there already, and several processes, of which some die."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from focusnet import cohort, predict, report
from focusnet.checkpoint import Model, build_network, load_checkpoint, save_checkpoint
from focusnet.cohort import CLAIMS, RECORD, Cohort
from focusnet.data.images import Grid, Volume, read_image, read_labels, write_image
from focusnet.errors import FocusNetError
from focusnet.prepare import prepare
from tests.test_dicom import write_series
from tests.tiny import tiny_config, write_case, write_data

CASES = 6
# every process starts with what is imported, so that what takes the time is the work
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.test_cohort"])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data` of some cases, and `model.pt`."""
    root = tmp_path_factory.mktemp("cohort")
    config = tiny_config()
    plan = prepare(write_data(root / "training", cases=2), root / "cache", config.data)
    torch.manual_seed(0)
    save_checkpoint(root / "model.pt", Model(build_network(config, plan), config, plan, ("snet", "sol", "sos")), {})
    write_data(root / "data", CASES)
    return root


def arguments(source: Path, out: Path, *options: str) -> list[str]:
    return [str(source / "model.pt"), str(source / "data"), "--out", str(out), "--device", "cpu", *options]


def labels_in(out: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in sorted(out.glob("[!.]*/labels.nii.gz"))}


class Predicted:
    """The cases that were computed since it was last asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        work = predict.predict_case

        def note(job: predict.Job, name: str, path: Path) -> None:
            self.names.append(name)
            work(job, name, path)

        monkeypatch.setattr(predict, "predict_case", note)

    def take(self) -> list[str]:
        names, self.names = self.names, []
        return names


def no_picture(path: Path, *arguments: object) -> None:
    """In place of `draw_qc`, which takes most of the time."""
    path.write_bytes(b"no picture")


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "draw_qc", no_picture)


@pytest.fixture(scope="module")
def predicted_source(source: Path) -> Path:
    """`data` of two cases, `model.pt` and their predictions in `out`."""
    root = source / "small"
    write_data(root / "data", 2)
    shutil.copy(source / "model.pt", root / "model.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "draw_qc", no_picture)
        assert predict.main(arguments(root, root / "out")) == 0
    return root


@pytest.fixture
def small(predicted_source: Path, tmp_path: Path) -> Path:
    """A copy of it, with the times of its files: the same CTs."""
    return shutil.copytree(predicted_source, tmp_path / "small")


def goes_on(small: Path, *options: str) -> int:
    return predict.main(arguments(small, small / "out", "--continue", *options))


def test_what_is_there_is_left_as_it_is(small: Path, monkeypatch, capsys) -> None:
    predicted = Predicted(monkeypatch)
    before = {path: path.stat().st_mtime_ns for path in (small / "out").glob("*/*")}
    assert goes_on(small) == 0 and predicted.take() == []
    assert "segmented 0 of 2 CTs" in (printed := capsys.readouterr().out) and "; 2 were there already" in printed
    assert {path: path.stat().st_mtime_ns for path in (small / "out").glob("*/*")} == before
    assert predict.main(arguments(small, small / "out")) == 0  # without --continue, all is computed anew
    assert predicted.take() == ["case_0", "case_1"]
    assert "were there already" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [["--overlap", "0.25"], ["--min_peak", "0.9"], ["--backend", "reference"], ["--format", "nrrd"], ["--per_organ"]],
)
def test_other_settings_and_outputs_are_another_prediction(small: Path, monkeypatch, options) -> None:
    predicted = Predicted(monkeypatch)
    assert goes_on(small, *options) == 0 and predicted.take() == ["case_0", "case_1"]
    assert goes_on(small, *options) == 0 and predicted.take() == []


def test_another_checkpoint_is_another_prediction(small: Path, monkeypatch) -> None:
    predicted = Predicted(monkeypatch)
    shutil.move(small / "model.pt", small / "moved.pt")
    shutil.copy(small / "moved.pt", small / "model.pt")  # the same, as a new file
    assert goes_on(small) == 0 and predicted.take() == []
    state = torch.load(small / "model.pt")
    state["weights"][next(iter(state["weights"]))].add_(0.01)
    torch.save(state, small / "model.pt")
    assert goes_on(small) == 0 and predicted.take() == ["case_0", "case_1"]


def test_the_same_voxels_are_the_same_ct(small: Path, monkeypatch) -> None:
    predicted, image = Predicted(monkeypatch), small / "data" / "case_0" / "img.nrrd"
    os.utime(image, (1, 1))
    assert goes_on(small) == 0 and predicted.take() == []
    volume = read_image(image)
    image.unlink()
    write_image(image.with_name("img.nii.gz"), volume)
    volume.array[0, 0, 0] += 1
    assert goes_on(small) == 0 and predicted.take() == []
    write_image(image.with_name("img.nii.gz"), volume)
    assert goes_on(small) == 0 and predicted.take() == ["case_0"]


@pytest.mark.parametrize("suffix", [".nhdr", ".nrrd"])
def test_voxels_in_a_file_of_their_own_are_looked_at(small: Path, monkeypatch, suffix: str) -> None:
    predicted, image = Predicted(monkeypatch), small / "data" / "case_0" / "img.nrrd"
    volume = read_image(image)
    image.unlink()
    header = "NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: {} {} {}\n".format(
        *volume.grid.shape[::-1]
    )
    z, y, x = volume.grid.spacing
    header += f"space directions: ({x},0,0) (0,{y},0) (0,0,{z})\nspace origin: {volume.grid.origin}\n"
    (image.with_suffix(suffix)).write_text(header + "encoding: raw\nendian: little\ndata file: voxels.raw\n")
    voxels = image.with_name("voxels.raw")
    volume.array.astype("<i2").tofile(voxels)
    assert goes_on(small) == 0 and predicted.take() == []
    assert predict.main(arguments(small, small / "out")) == 0 and predicted.take()  # which notes the files' times
    times = voxels.stat().st_mtime_ns
    (volume.array + np.int16(1)).astype("<i2").tofile(voxels)
    os.utime(voxels, ns=(times, times))
    assert goes_on(small) == 0 and predicted.take() == ["case_0"]


def test_dicom_objects_refer_to_their_own_slices(small: Path, monkeypatch) -> None:
    predicted, image = Predicted(monkeypatch), read_image(small / "data" / "case_0" / "img.nrrd")
    shutil.rmtree(small / "data")
    write_series(small / "data" / "scan", image.grid, "1.2.3", image.array)
    assert goes_on(small, "--dicom") == 0 and predicted.take() == ["scan"]
    assert goes_on(small, "--dicom") == 0 and predicted.take() == []
    shutil.rmtree(small / "data")
    write_series(small / "data" / "scan", image.grid, "1.2.4", image.array)
    assert goes_on(small, "--dicom") == 0 and predicted.take() == ["scan"]


@pytest.mark.parametrize("name", ["labels.nii.gz", "qc.png", RECORD, "statistics.json"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_what_is_not_whole_is_computed_anew(small: Path, monkeypatch, name, damage) -> None:
    predicted = Predicted(monkeypatch)
    damage(small / "out" / "case_1" / name)
    assert goes_on(small) == 0 and predicted.take() == ["case_1"]
    assert goes_on(small) == 0 and predicted.take() == []


def test_the_record_says_what_it_was_made_with(small: Path) -> None:
    record = json.loads((small / "out" / "case_0" / RECORD).read_text())
    assert record["made_with"]["checkpoint_sha256"] == cohort.file_digest(small / "model.pt")
    assert record["made_with"]["predict"] == {"overlap": 0.5, "min_peak": 0.2, "largest_component": True}
    assert record["input"]["path"].endswith("small/data/case_0/img.nrrd")
    assert record["training_cases"] == 2 and record["shape"] == [14, 24, 26]


def test_a_failure_is_written_beside_the_cases_until_it_succeeds(small: Path, capsys) -> None:
    image, error = small / "data" / "case_0" / "img.nrrd", small / "out" / "case_0.error.txt"
    whole = image.read_bytes()
    image.write_bytes(whole[:-99])
    assert goes_on(small) == 2
    printed = capsys.readouterr()
    assert "segmented 0 of 2 CTs" in printed.out and "1 were there already" in printed.out
    assert f"error: case_0: {error.read_text()}" in printed.err and "truncated" in printed.err
    assert goes_on(small) == 2  # another command tries again
    image.write_bytes(whole)
    os.utime(image, (1, 1))
    (small / "out" / "case_0" / "qc.png").unlink()
    assert goes_on(small) == 0 and not error.exists()


def test_what_was_killed_before_it_took_its_failure_back(small: Path, monkeypatch) -> None:
    predicted, error = Predicted(monkeypatch), small / "out" / "case_0.error.txt"
    error.write_text("no memory\n")
    os.utime(error, (1, 1))
    assert goes_on(small) == 0 and predicted.take() == [] and not error.exists()


def test_a_checkpoint_that_is_replaced_while_it_is_read(small: Path, monkeypatch) -> None:
    def load(path: Path, *arguments: object):
        loaded = load_checkpoint(path, *arguments)
        path.write_bytes(b"what training wrote")
        return loaded

    monkeypatch.setattr(predict, "load_checkpoint", load)
    with pytest.raises(FocusNetError, match=r"model.pt was replaced while it was read: start again$"):
        goes_on(small)


def test_names_that_are_no_utf8(small: Path) -> None:
    """In a process of its own: ITK's bindings end it at such a name."""
    odd = os.fsencode(small / "data") + b"/M\xfcller"
    try:
        os.rename(small / "data" / "case_0", odd)
    except OSError:
        pytest.skip("the file system takes no such names")
    command = [sys.executable, "-m", "focusnet.predict", *arguments(small, small / "out", "--continue")]
    here = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, env=here, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "segmented 0 of 2 CTs" in done.stdout
    line = rf"error: M\udcfcller: cannot open {small}/data/M\udcfcller/img.nrrd: its name is not in UTF-8; rename it"
    assert done.stderr.splitlines()[-1] == line
    assert "its name is not in UTF-8" in report.make_report(small / "out", pictures="none")


def test_another_process_failure_is_not_repeated(small: Path, monkeypatch, capsys) -> None:
    predicted = Predicted(monkeypatch)
    shutil.rmtree(small / "out" / "case_0")
    work = Cohort.share

    def share(self, names):
        for name in work(self, names):
            if name == "case_0":
                self.note_failure(name, "no memory")  # as another process does
            yield name

    monkeypatch.setattr(Cohort, "share", share)
    assert goes_on(small) == 2 and predicted.take() == []
    assert "error: case_0: no memory" in capsys.readouterr().err


def test_a_broken_card_stops_its_process(small: Path, monkeypatch, capsys) -> None:
    def fail(*arguments: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nMore")

    monkeypatch.setattr(predict, "predict_volume", fail)
    with pytest.raises(FocusNetError, match=r"case_0: cpu failed: CUDA error: an illegal .*; go on with --continue$"):
        predict.main(arguments(small, small / "out"))
    assert (small / "out" / "case_1" / RECORD).exists() and not (small / "out" / "case_1.error.txt").exists()


def start_and_join(processes: list[multiprocessing.process.BaseProcess], log: Path) -> None:
    """The first one, and the others when it is at work."""
    processes[0].start()
    deadline = time.monotonic() + 60
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in processes[1:]:
        process.start()
    for process in processes:
        process.join(120)


def _share(out: Path, log: Path, kill_at: int | None, seconds: float) -> None:
    """Claim cases and log them; kill itself while it works on the case of that number."""
    with Cohort(out, shared=True) as shared:
        number = 0
        for name in shared.share([f"case_{i}" for i in range(CASES)]):
            if (out / name).exists():
                continue
            with log.open("a") as file:
                file.write(f"{os.getpid()} {name}\n")
            if number == kill_at:
                time.sleep(1)  # so that the others have to wait for this case
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(seconds)
            (out / name).touch()
            number += 1


def test_claims_end_with_their_process(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    log, kills = tmp_path / "log", [0, None, None]
    processes = [FORKS.Process(target=_share, args=(tmp_path / "out", log, kill, 0.05)) for kill in kills]
    start_and_join(processes, log)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, 0, 0]
    claimed = [line.split() for line in log.read_text().splitlines()]
    by_killed = [name for pid, name in claimed if pid == str(processes[0].pid)]
    names = [name for _, name in claimed]
    assert len(by_killed) == 1 and names.count(by_killed[-1]) == 2  # by the killed one, and by the one that took over
    assert sorted(set(names)) == sorted(f"case_{i}" for i in range(CASES)) and len(names) == CASES + 1


def _predict(source: Path, out: Path, log: Path, kill_at: int | None) -> None:
    """The command with --continue, which logs every case it computes."""
    torch.set_num_threads(1)
    work, number = predict.predict_case, 0

    def note(job: predict.Job, name: str, path: Path) -> None:
        nonlocal number
        with log.open("a") as file:
            file.write(f"{os.getpid()} {name}\n")
        if number == kill_at:
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        work(job, name, path)
        number += 1

    predict.predict_case, predict.draw_qc = note, no_picture
    sys.exit(predict.main(arguments(source, out, "--continue")))


def test_three_processes_predict_a_cohort_and_one_is_killed(source: Path, tmp_path: Path) -> None:
    assert predict.main(arguments(source, tmp_path / "alone")) == 0
    log, out = tmp_path / "log", tmp_path / "out"
    processes = [FORKS.Process(target=_predict, args=(source, out, log, kill)) for kill in (0, None, None)]
    start_and_join(processes, log)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, 0, 0]
    claimed = [line.split() for line in log.read_text().splitlines()]
    killed = [name for pid, name in claimed if pid == str(processes[0].pid)][-1]
    names = [name for _, name in claimed]
    assert sorted(names) == sorted([*(f"case_{i}" for i in range(CASES)), killed])
    assert labels_in(out) == labels_in(tmp_path / "alone")
    assert (out / "statistics.csv").read_bytes() == (tmp_path / "alone" / "statistics.csv").read_bytes()


def _torchrun(source: Path, out: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.Popen(
        [*command, "-m", "focusnet.predict", *arguments(source, out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_torchrun_goes_on_where_a_killed_rank_stopped_it(source: Path, tmp_path: Path) -> None:
    cases, out = 16, tmp_path / "out"
    data = tmp_path / "source"
    shutil.copytree(source, data)
    for number in range(CASES, cases):
        write_case(data / "data" / f"case_{number}", number)
    first = _torchrun(data, out)
    deadline = time.monotonic() + 300
    while len(labels_in(out)) < 2 and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.01)
    ranks = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    first.communicate(timeout=300)
    done = len(labels_in(out))
    assert first.returncode != 0 and 2 <= done < cases
    second = _torchrun(data, out)
    printed, errors = second.communicate(timeout=300)
    assert second.returncode == 0, errors
    (line,) = [line for line in printed.splitlines() if line.startswith("segmented ")]  # rank 0 speaks for all
    assert f" of {cases} CTs into {out}; " in line
    new, old = int(line.split()[1]), int(line.split()[-4])
    assert new + old == cases and old >= done
    assert len(labels_in(out)) == cases
    assert len((out / "statistics.csv").read_text().splitlines()) == 1 + 3 * cases
    assert not read_labels(out / "case_9" / "labels.nii.gz").grid.difference(
        read_image(data / "data" / "case_9" / "img.nrrd").grid
    )


def test_every_rank_takes_its_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert predict._device_of_rank("auto").index is None
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [str(predict._device_of_rank(name)) for name in ("auto", "cuda", "cuda:0", "cpu")] == [
        *("cuda:1", "cuda:1", "cuda:0", "cpu")
    ]
    monkeypatch.setenv("LOCAL_RANK", "2")  # more processes than cards
    assert str(predict._device_of_rank("auto")) == "cuda:0"


def test_ranks_need_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(cohort.fcntl, "lockf", refuse)
    with Cohort(tmp_path, shared=False) as alone:
        assert list(alone.share(["a", "b"])) == ["a", "b"]
    with (
        Cohort(tmp_path, shared=True) as shared,
        pytest.raises(FocusNetError, match=r"no locks, which several processes need \(No locks available\)$"),
    ):
        list(shared.share(["a"]))
    assert (tmp_path / CLAIMS).exists()


def test_a_digest_does_not_depend_on_the_layout() -> None:
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    grid = Grid(array.shape)
    view = Volume(np.asfortranarray(array), grid)
    assert cohort.content_digest(view, []) == cohort.content_digest(Volume(array, grid), [])
    assert cohort.content_digest(view, ["1.2"]) != cohort.content_digest(view, [])
