"""Writing files: whole or not at all, and a failing disk is one line."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from focusnet.checkpoint import Model, build_network, load_checkpoint, save_checkpoint
from focusnet.data.images import Grid, write_labels
from focusnet.data.plan import Plan
from focusnet.errors import FocusNetError
from focusnet.files import atomic_folder, atomic_write
from tests.tiny import tiny_config


@contextmanager
def full_disk(size: int = 4096) -> Iterator[None]:
    """No file may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write(path: Path, text: str, error: type[BaseException] | None = None) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text)
        if error is not None:
            raise error


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    with atomic_write(path) as temporary:
        temporary.write_text("1")
        assert not path.exists() and temporary.suffix == ".json"
    assert path.read_text() == "1" and names(path.parent) == ["a.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_last_good_file(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "a").write_text("good")
    with pytest.raises(error):
        write(tmp_path / "a", "half", error)
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "good"


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("good")
    with pytest.raises(FocusNetError, match="cannot write .*a: File too large"), full_disk():
        write(tmp_path / "a", "long" * 10_000)
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "good"


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    config = tiny_config()
    plan = Plan(config.data.spacing, 0.5, [], [], "")
    model = Model(build_network(config, plan), config, plan, ("snet",))
    save_checkpoint(tmp_path / "last.pt", model, {"epoch": 1})
    with pytest.raises(FocusNetError, match="cannot write .*last.pt: .*is the disk full"), full_disk():
        save_checkpoint(tmp_path / "last.pt", model, {"epoch": 2})
    assert names(tmp_path) == ["last.pt"]
    assert load_checkpoint(tmp_path / "last.pt", torch.device("cpu"))[1] == {"epoch": 1}


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_a_full_disk_leaves_no_part_of_a_label_map(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (20, 40, 40)).astype(np.uint8)
    with pytest.raises(FocusNetError, match=f"cannot write .*labels{suffix}"), full_disk():
        write_labels(tmp_path / f"labels{suffix}", noise, Grid(noise.shape))
    assert names(tmp_path) == []


def test_a_file_in_the_way_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(FocusNetError, match="cannot write .*out/a"), atomic_write(tmp_path / "out" / "a"):
        pass


@pytest.mark.parametrize("name", ["", ".", "/", "folder"])
def test_a_folder_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(FocusNetError, match=f"^cannot write {Path(name)}: it is a folder, expected a file$"):
        write(Path(name), "1")
    assert names(tmp_path) == ["folder"]


def write_folder(path: Path, name: str, error: type[BaseException] | None = None) -> None:
    with atomic_folder(path) as temporary:
        write(temporary / name, "new")
        if error is not None:
            raise error


def test_a_folder_is_replaced_with_all_it_held(tmp_path: Path) -> None:
    write_folder(tmp_path / "out" / "case", "a")
    write_folder(tmp_path / "out" / "case", "b")
    assert names(tmp_path / "out") == ["case"] and names(tmp_path / "out" / "case") == ["b"]
    (tmp_path / "link").symlink_to(tmp_path / "out" / "case")
    write_folder(tmp_path / "link", "c")
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "out" / "case") == ["c"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_last_good_folder(tmp_path: Path, error: type[BaseException]) -> None:
    write_folder(tmp_path / "case", "a")
    with pytest.raises(error):
        write_folder(tmp_path / "case", "b", error)
    assert names(tmp_path) == ["case"] and names(tmp_path / "case") == ["a"]


def test_a_failed_exchange_brings_the_last_good_folder_back(tmp_path: Path, monkeypatch) -> None:
    write_folder(tmp_path / "case", "a")
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name.startswith(".tmp-"):
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(FocusNetError, match="cannot write .*case: Permission denied"):
        write_folder(tmp_path / "case", "b")
    assert names(tmp_path) == ["case"] and names(tmp_path / "case") == ["a"]


def test_a_full_disk_names_the_final_folder(tmp_path: Path) -> None:
    with pytest.raises(FocusNetError) as caught, full_disk(), atomic_folder(tmp_path / "case") as temporary:
        write(temporary / "a", "long" * 10_000)
    assert str(caught.value) == f"cannot write {tmp_path / 'case' / 'a'}: File too large"
    assert names(tmp_path) == []
