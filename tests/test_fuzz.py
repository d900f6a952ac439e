"""Everything that reads a file, fed mutated ones: each is read, or refused in one line; nothing crashes, hangs or
swallows the memory.

Mutation `i` of a target depends on the target and `i` alone: `python -m tests.test_fuzz TARGET I` repeats one.
"""

import gzip
import io
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import sys
import tempfile
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
import yaml

from focusnet.checkpoint import Model, build_network, load_checkpoint, save_checkpoint
from focusnet.cli import add_config, command_parser, config_of, parse
from focusnet.config import DataConfig
from focusnet.data.cache import prepare_cases
from focusnet.data.cases import find_cases, iter_masks
from focusnet.data.crops import label_values, load_case
from focusnet.data.images import Volume, read_grid, read_image, read_labels, write_image, write_labels
from focusnet.data.preprocess import prepare_image
from focusnet.errors import FocusNetError
from focusnet.prepare import prepare
from tests.test_images import dicom_series
from tests.tiny import GRID, SPACING, tiny_config, write_data

SECONDS = 30.0  # for one read of a few KB, which takes milliseconds
SPARE_BYTES = 1 << 30  # for code that is loaded later and for libraries' buffers; no input holds more than 100 KB
EXTREMES = (0, 1, -1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1)
TOKENS = (b"0", b"-1", b"1", b"999999999", b"4294967296", b"99999999999999999999", b"1e308", b"1e-308", b"nan", b"-inf",
          b"", b"true", b"null", b"[", b"{", b"/dev/zero", b"\xff\xfe", b"\n", b"\0" * 9, b"[" * 5000)  # fmt: skip

Mutate = Callable[[bytes, np.random.Generator], bytes]


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """One to three random changes; half of them in the first 512 bytes, where headers are."""
    changed = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        if not changed:
            break
        end = min(len(changed), 512) if rng.random() < 0.5 else len(changed)
        at = int(rng.integers(end))
        length = int(rng.integers(1, 1 + min(64, len(changed) - at)))
        match rng.integers(8):
            case 0:
                changed[at] ^= 1 << int(rng.integers(8))
            case 1:
                changed[at : at + length] = rng.bytes(length)
            case 2:
                del changed[at:]
            case 3:
                del changed[at : at + length]
            case 4:  # splice
                source = int(rng.integers(len(changed)))
                changed[at:at] = changed[source : source + length]
            case 5:  # a length field, perhaps
                size = int(rng.choice([1, 2, 4, 8]))
                value = EXTREMES[rng.integers(len(EXTREMES))] % (1 << 8 * size)
                changed[at : at + size] = value.to_bytes(size, "little" if rng.random() < 0.5 else "big")
            case _:  # a number, word or line of a text
                tokens = list(re.finditer(rb"[-+.\w]+", bytes(changed[: end + 64])))
                if tokens:
                    start, stop = tokens[rng.integers(len(tokens))].span()
                    changed[start:stop] = TOKENS[rng.integers(len(TOKENS))]
    return bytes(changed)


def mutate_unzipped(content: bytes, rng: np.random.Generator) -> bytes:
    """Mutate what was compressed, or in a fifth of the cases the compressed bytes."""
    return mutate(content, rng) if rng.random() < 0.2 else gzip.compress(mutate(gzip.decompress(content), rng))


def mutate_values(content: bytes, rng: np.random.Generator) -> bytes:
    """Mutate the configuration, plan and state of a checkpoint, so that it is a whole file of strange values."""
    if rng.random() < 0.5:
        return mutate(content, rng)
    state = torch.load(io.BytesIO(content), weights_only=True)
    for _ in range(rng.integers(1, 4)):
        _mutate_value(state, rng)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _mutate_value(node: Any, rng: np.random.Generator) -> None:
    strange = (None, True, -1, 0, 10**6, 1 << 62, float("nan"), float("inf"), "", "x", [], {}, [0], torch.zeros(2),
               torch.zeros(1).expand(10**6, 10**5), [[10**9]], 0.5)  # fmt: skip
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = keys[rng.integers(len(keys))]
        if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.9:
            node = node[key]
        elif isinstance(node[key], tuple) or rng.random() < 0.8:
            node[key] = strange[rng.integers(len(strange))]
            return
        else:
            del node[key]
            return


@dataclass(frozen=True)
class Target:
    """A whole sample written into a folder, the files in it to mutate, and what reads it.

    Attributes:
        write: Fills a folder.
        files: Glob of the files of which one is mutated.
        read: Reads the folder; may raise `FocusNetError` alone.
        mutate: How.
        share: Mutations per turn: fewer of what takes long.
    """

    write: Callable[[Path], object]
    files: str
    read: Callable[[Path], object]
    mutate: Mutate = mutate
    share: int = 3


def _image(name: str, compress: bool = False) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        array = np.random.default_rng(0).integers(0, 300, GRID.shape).astype(np.int16)
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(GRID.spacing[::-1])
        image.SetOrigin(GRID.origin)
        sitk.WriteImage(image, str(folder / name), useCompression=compress)

    return write


def _read_image(folder: Path) -> None:
    path = next(path for path in sorted(folder.iterdir()) if path.suffix != ".raw")
    read_image_and_prepare(path)
    read_grid(path)
    read_labels(path)


def read_image_and_prepare(path: Path) -> None:
    volume = read_image(path)
    prepare_image(volume, DataConfig(spacing=SPACING))


def _write_stray(folder: Path) -> None:
    """A label map of every kind of voxel type with stray values."""
    write_data(folder, 1)
    case, rng = folder / "case_0", np.random.default_rng(0)
    shutil.rmtree(case / "structures")
    (case / "labels.json").write_text('{"1": "Brainstem", "2": "Eye_L", "300": "Eye_R"}')
    write_labels(case / "labels.nrrd", rng.integers(0, 3, GRID.shape).astype(np.uint8), GRID)


def _mutate_voxels(content: bytes, rng: np.random.Generator) -> bytes:
    dtype = rng.choice(["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
    values = rng.integers(0, 3, GRID.shape).astype(dtype)
    low, high = (np.iinfo(dtype).min, np.iinfo(dtype).max) if values.dtype.kind in "iu" else (-1e30, 1e30)
    strays = [0, 1, low, high, 255, 256, 300, 65535, 65536, -1, 0.5, np.nan, np.inf]
    strays = [value for value in strays if values.dtype.kind == "f" or (value % 1 == 0 and low <= value <= high)]
    for _ in range(rng.integers(1, 4)):
        values[tuple(rng.integers(GRID.shape))] = strays[rng.integers(len(strays))]
    with tempfile.TemporaryDirectory() as folder:
        write_image(Path(folder) / "a.nrrd", Volume(values, GRID))
        return (Path(folder) / "a.nrrd").read_bytes()


def _read_cases(folder: Path) -> None:
    for case in find_cases(folder):
        for _ in iter_masks(case):
            pass


def _prepare(folder: Path) -> None:
    prepare(folder, folder.parent / "cache", tiny_config().data, skip_bad=True)


def _write_nnunet(folder: Path) -> None:
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir()
    write_labels(folder / "labelsTr" / "a.nrrd", np.ones(GRID.shape, np.uint8), GRID)
    write_labels(folder / "imagesTr" / "a_0000.nrrd", np.ones(GRID.shape, np.uint8), GRID)
    (folder / "dataset.json").write_text('{"labels": {"background": 0, "Brainstem": 1, "Eye_L": 2}, "name": "x"}')


def _write_cache(folder: Path) -> None:
    prepare(write_data(folder / "data", 1), folder / "cache", tiny_config().data)


def _read_cache(folder: Path) -> None:
    """What is in the cache is right, or made anew."""
    config = tiny_config().data
    (case,) = find_cases(folder / "data")
    (report,) = prepare_cases([case], folder / "cache", config)
    assert report.record is not None and report.record.organs == ["Brainstem", "Eye_L", "Eye_R"], report
    (fresh,) = prepare_cases([case], folder / "fresh", config)
    assert report == fresh


def _read_arrays(folder: Path) -> None:
    """As training reads them: the record is the plan's by then."""
    config = tiny_config().data
    (report,) = prepare_cases(find_cases(folder / "data"), folder / "fresh", config)
    plan = prepare(folder / "data", folder / "fresh", config)
    assert report.record is not None
    _, labels = load_case(folder / "cache", report.record)
    label_values(plan.cases[0], plan)[labels]


def _write_config(folder: Path) -> None:
    (folder / "a.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(tiny_config().to_dict()))))


def _read_config(folder: Path) -> None:
    parser = command_parser("test", "", "A command.", [])
    add_config(parser)
    config_of(parse(parser, ["--config", str(folder / "a.yaml")]))


def _write_checkpoint(folder: Path) -> None:
    config = tiny_config()
    plan = prepare(write_data(folder / "data", 1), folder / "cache", config.data)
    shutil.rmtree(folder / "data")
    shutil.rmtree(folder / "cache")
    save_checkpoint(folder / "a.pt", Model(build_network(config, plan), config, plan, ("snet",)), {"state": {}})


def _read_checkpoint(folder: Path) -> None:
    load_checkpoint(folder / "a.pt", torch.device("cpu"))


TARGETS = {
    "nrrd": Target(_image("a.nrrd"), "a.nrrd", _read_image),
    "nrrd_gzip": Target(_image("a.nrrd", compress=True), "a.nrrd", _read_image),
    "nhdr": Target(_image("a.nhdr"), "a.nhdr", _read_image),
    "nifti": Target(_image("a.nii"), "a.nii", _read_image),
    "nifti_gzip": Target(_image("a.nii.gz"), "a.nii.gz", _read_image, mutate_unzipped),
    "mha": Target(_image("a.mha"), "a.mha", _read_image),
    "mha_zlib": Target(_image("a.mha", compress=True), "a.mha", _read_image),
    "mhd": Target(_image("a.mhd"), "a.mhd", _read_image),
    "dicom": Target(lambda folder: dicom_series(folder, [0.0, 2.0, 4.0]), "*.dcm", read_image_and_prepare),
    "voxels": Target(_write_stray, "case_0/labels.nrrd", _read_cases, _mutate_voxels),
    "labels_json": Target(_write_stray, "case_0/labels.json", _read_cases),
    "dataset_json": Target(_write_nnunet, "dataset.json", _read_cases),
    "case": Target(lambda folder: write_data(folder, 1), "case_0/**/*.nrrd", _prepare, share=1),
    "cache": Target(_write_cache, "cache/cases/*", _read_cache, share=1),
    "arrays": Target(_write_cache, "cache/cases/*.npy", _read_arrays, share=1),
    "config": Target(_write_config, "a.yaml", _read_config, share=1),
    "checkpoint": Target(_write_checkpoint, "a.pt", _read_checkpoint, mutate_values, share=1),
}  # fmt: skip


def run_one(name: str, index: int, whole: Path, work: Path) -> str:
    """Mutate one file of the sample in `whole` and read it; "read", "refused", or what is wrong with how it failed."""
    target = TARGETS[name]
    shutil.rmtree(work, ignore_errors=True)
    folder = shutil.copytree(whole, work / name)
    rng = np.random.default_rng([list(TARGETS).index(name), index])
    files = sorted(folder.glob(target.files))
    file = files[rng.integers(len(files))]
    stamp = file.stat().st_mtime_ns
    file.write_bytes(target.mutate(file.read_bytes(), rng))
    os.utime(file, ns=(stamp, stamp))
    try:
        target.read(folder)
    except FocusNetError as error:
        message = str(error)
        if "\n" in message or len(message) > 500:
            return f"not one line: {message[:600]!r}"
        if re.search(r"memory|allocat|bad_alloc", message) and "unreadable memory" not in message:
            return f"memory: {message}"
        return "refused"
    except Exception:
        return traceback.format_exc()
    return "read"


def _serve(connection: Connection, root: str) -> None:
    """Answer for mutations until there are no more."""
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    _limit_memory()
    while (job := connection.recv()) is not None:
        name, index = job
        connection.send(run_one(name, index, Path(root) / "whole" / name, Path(root) / "work"))


class Pool:
    """One process for the reads, replaced when it crashes or hangs."""

    def __init__(self, root: Path) -> None:
        self.root, self.context = root, multiprocessing.get_context("spawn")
        self._start()

    def _start(self) -> None:
        self.connection, theirs = self.context.Pipe()
        self.process = self.context.Process(target=_serve, args=(theirs, str(self.root)), daemon=True)
        self.process.start()
        theirs.close()
        self.seconds = 60.0  # it has to import everything first

    def run(self, name: str, index: int) -> str:
        self.connection.send((name, index))
        answered = self.connection.poll(self.seconds + SECONDS)
        self.seconds = 0.0
        if answered:
            try:
                return str(self.connection.recv())
            except EOFError:
                self.process.join()
                outcome = f"crashed: exit code {self.process.exitcode}"
        else:
            self.process.kill()
            outcome = f"hung for {SECONDS} s"
        self._start()
        return outcome

    def close(self) -> None:
        self.connection.send(None)
        self.process.join()


def fuzz(root: Path, count: int) -> tuple[Counter[tuple[str, str]], dict[str, str]]:
    """`count` mutations in all; how many of each target were read and refused, and what went wrong with the others."""
    for name, target in TARGETS.items():
        (root / "whole" / name).mkdir(parents=True)
        target.write(root / "whole" / name)
    pool, counts, faults = Pool(root), Counter(), {}
    turn = [name for name, target in TARGETS.items() for _ in range(target.share)]
    indices: Counter[str] = Counter()
    for number in range(count):
        name = turn[number % len(turn)]
        outcome = pool.run(name, indices[name])
        kind = outcome if outcome in ("read", "refused") else "fault"
        counts[name, kind] += 1
        if kind == "fault":
            faults[f"{name} {indices[name]}"] = outcome
            print(name, indices[name], outcome, flush=True)
        indices[name] += 1
    pool.close()
    return counts, faults


def _check(root: Path, count: int) -> None:
    counts, faults = fuzz(root, count)
    print("\n".join(f"{name}: {counts[name, 'read']} read, {counts[name, 'refused']} refused" for name in TARGETS))
    assert not faults, "\n\n".join(f"python -m tests.test_fuzz {name}\n{what}" for name, what in faults.items())
    assert all(counts[name, "refused"] for name in TARGETS if name != "cache")  # which is made anew instead


def test_mutated_files(tmp_path: Path) -> None:
    _check(tmp_path, 200)


@pytest.mark.nightly
def test_ten_thousand_mutated_files(tmp_path: Path) -> None:
    _check(tmp_path, 10_000)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    _write_checkpoint(folder)
    return folder / "a.pt"


class _Touch:
    """What a hostile pickle does when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def _rewritten(checkpoint: Path, path: Path, content: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """The checkpoint with another pickle in it."""
    with zipfile.ZipFile(checkpoint) as whole, zipfile.ZipFile(path, "w", compression) as other:
        for part in whole.namelist():
            other.writestr(part, content if part.endswith("/data.pkl") else whole.read(part))
    return path


def test_a_checkpoint_runs_no_code(checkpoint: Path, tmp_path: Path) -> None:
    hostile = _rewritten(
        checkpoint, tmp_path / "a.pt", pickle.dumps({"format": 1, "config": _Touch(tmp_path / "b")}, 2)
    )
    (tmp_path / "old.pt").write_bytes(pickle.dumps(_Touch(tmp_path / "b"), 2))
    for path in (hostile, tmp_path / "old.pt"):
        with pytest.raises(FocusNetError, match=r"\.pt: not a checkpoint, or damaged"):
            load_checkpoint(path, torch.device("cpu"))
    assert not (tmp_path / "b").exists()


def test_a_checkpoint_holds_no_more_than_its_file(checkpoint: Path, tmp_path: Path) -> None:
    packed = _rewritten(checkpoint, tmp_path / "packed.pt", bytes(1 << 24), zipfile.ZIP_DEFLATED)
    state = torch.load(checkpoint, weights_only=True)
    state["weights"] = {name: torch.zeros(1).expand(10**6, 10**6) for name in state["weights"]}
    torch.save(state, tmp_path / "expanded.pt")
    state = torch.load(checkpoint, weights_only=True)
    state["config"]["model"]["widths"][0] = [10**5]
    torch.save(state, tmp_path / "wide.pt")
    state = torch.load(checkpoint, weights_only=True)
    state["config"]["model"]["dilated_blocks"] = 10**9
    torch.save(state, tmp_path / "deep.pt")
    shared: list[Any] = []
    for _ in range(60):
        shared = [shared, shared]
    state = torch.load(checkpoint, weights_only=True)
    state["config"]["model"]["widths"] = shared
    torch.save(state, tmp_path / "shared.pt")
    state["config"]["model"]["widths"] = torch.zeros(1).expand(10**6, 10**5)
    torch.save(state, tmp_path / "tensor.pt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path, cause in (
        (packed, "damaged"),
        (tmp_path / "expanded.pt", "larger than the file"),
        (tmp_path / "wide.pt", "configuration asks for"),
        (tmp_path / "deep.pt", "too few"),
        (tmp_path / "shared.pt", "more than 1000000 values"),
        (tmp_path / "tensor.pt", "larger than the file"),
    ):
        with pytest.raises(FocusNetError, match=cause):
            load_checkpoint(path, torch.device("cpu"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KB


def test_a_flipped_bit_of_a_weight_is_noticed(checkpoint: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(checkpoint) as whole:
        part = max(whole.infolist(), key=lambda part: part.file_size * ("/data/" in part.filename))
    content = bytearray(checkpoint.read_bytes())
    content[part.header_offset + 300] ^= 1
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(FocusNetError, match="damaged"):
        load_checkpoint(tmp_path / "a.pt", torch.device("cpu"))


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / "whole").mkdir()
        TARGETS[sys.argv[1]].write(Path(temporary) / "whole")
        _limit_memory()
        print(run_one(sys.argv[1], int(sys.argv[2]), Path(temporary) / "whole", Path(temporary) / "work"))
