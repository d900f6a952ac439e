"""Tiles of the dilated convolution: which fit a problem, best guess first, and a file of the measured best.

The file is JSON: {problem: winner}. A problem is written out by `problem`; a winner is a tile as a list of numbers, or
"vendor" where the vendor's library was faster. An entry that is not among today's candidates is measured anew. It lies
at FOCUSKERNELS_TILES, by default ~/.cache/focuskernels/dilated_conv3d.json, and may be copied to other machines.
"""

import functools
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

log = logging.getLogger("focuskernels")

VENDOR = "vendor"
#: Seconds after which a race starts no further candidate.
PATIENCE = 3.0


class Tile(NamedTuple):
    """How forward, and the gradient of the input, are cut up."""

    bh: int  #: rows of a tile
    bw: int  #: voxels of a row
    bn: int  #: outputs, or both planes' outputs with `pair`
    bk: int  #: inputs at a time
    warps: int
    stages: int
    tma: bool
    pair: bool = False  #: two planes at once

    @property
    def shared_memory(self) -> int:
        """Bytes in flight."""
        return self.stages * (self.bh * self.bw + self.bn) * self.bk * 2

    def roomy(self) -> "Tile":
        """The same tile with registers left for reading or reducing the result."""
        crowded = self.bh * self.bw * self.bn > self.warps * 32 * 64
        return self._replace(warps=2 * self.warps) if crowded else self


class WeightTile(NamedTuple):
    """How the gradient of the weight is cut up."""

    bw: int  #: voxels of a row at a time
    bc: int  #: inputs
    bn: int  #: outputs
    shares: int  #: parts of all rows, each with its own sums; from the shape alone, so that sums are alike everywhere
    warps: int
    stages: int
    tma: bool

    @property
    def shared_memory(self) -> int:
        """Bytes in flight."""
        return self.stages * self.bw * (self.bc + 3 * self.bn) * 2


AnyTile = TypeVar("AnyTile", bound=Tile | WeightTile)
Capability = tuple[int, int]
#: Tiles of 256 and of 128 voxels, (rows, voxels of a row).
BOXES = {
    256: ((1, 256), (2, 128), (4, 64), (8, 32), (16, 16)),
    128: ((1, 128), (2, 64), (4, 32), (8, 16)),
}
#: Programs that fill the largest GPU about twice.
PLENTY = 264


def tiles(
    capability: Capability, inputs: int, outputs: int, kernel: Sequence[int], batch: int, volume: Sequence[int],
    dilation: Sequence[int],
) -> list[Tile]:  # fmt: skip
    """Candidates for forward, best guess first."""
    tma = capability >= (9, 0)
    bn, bk = _block(outputs, 64), _block(inputs, 64 if tma else 32)
    sizes = [256, 128] if tma else [128]
    if tma and batch * volume[0] * _cover(volume, _box(volume, 256)) * (outputs // bn) < PLENTY:
        sizes.reverse()
    found = []
    if tma and outputs == 32 and kernel[0] == 3 and volume[0] > dilation[0]:
        found += [Tile(*_box(volume, size), 64, bk, 4, 3, tma, True) for size in sizes]
    for size in sizes if bn >= 64 else [128]:
        found.append(Tile(*_box(volume, size), bn, bk, 4, 3 if tma else 4, tma))
    if not tma and inputs % 64 == 0:
        found.append(Tile(*_box(volume, 128), bn, 64, 8, 3, tma))
    found.append(Tile(*_box(volume, 256), bn, bk, 8, 4 if tma else 3, tma))
    return _that_fit(found, capability)


def weight_tiles(
    capability: Capability, inputs: int, outputs: int, kernel: Sequence[int], batch: int, volume: Sequence[int]
) -> list[WeightTile]:
    """Candidates for the gradient of the weight, best guess first."""
    tma = capability >= (9, 0)
    bn, bw = _block(outputs, 64), 64 if volume[2] > 32 else 32
    found = []
    for bc in dict.fromkeys((_block(inputs, 128 if tma else 64), _block(inputs, 64))):
        programs = kernel[0] * 3 * (inputs // bc) * (outputs // bn)
        lines = batch * volume[0] * volume[1] * -(-volume[2] // bw)
        shares = max(1, min(4 * PLENTY // programs, lines // 16, 64))
        warps = 8 if bc * bn > 64 * 64 else 4
        found += [WeightTile(bw, bc, bn, n, warps, 3, tma) for n in dict.fromkeys((shares, max(1, shares // 2)))]
    fit = _that_fit(found, capability)
    return fit or [t._replace(stages=2) for t in found]


def problem(
    device: str, version: str, dtype: str, product: str, channels: tuple[int, int], kernel: Sequence[int],
    dilation: Sequence[int], volume: Sequence[int], dense: bool,
) -> str:  # fmt: skip
    """A line that names a problem; volumes up to the next power of two along each axis are one."""
    sizes = (1 << (size - 1).bit_length() for size in volume)
    parts = [device, f"triton {version}", dtype, product, f"{channels[0]}->{channels[1]}"]
    parts += [f"{name} {'x'.join(map(str, v))}" for name, v in (("kernel", kernel), ("dilation", dilation))]
    return ", ".join([*parts, f"volume {'x'.join(map(str, sizes))}", "dense" if dense else "strided"])


def tuning() -> bool:
    """Whether candidates may be raced; FOCUSKERNELS_TUNE=0 says no."""
    return os.environ.get("FOCUSKERNELS_TUNE") != "0"


class Undecided(Exception):
    """No candidate could be measured, which says nothing about the next call."""


def choose(
    name: str, candidates: Sequence[AnyTile], race: Callable[[Sequence[AnyTile | None]], AnyTile | None] | None
) -> AnyTile | None:
    """The tile for the problem `name`: as stored, else the winner of `race`, else the first, which is not stored.

    None is the vendor's library.
    """
    table = _table(_path())
    stored = table.get(name)
    if stored == VENDOR:
        return None
    for candidate in candidates:
        if stored == list(candidate):
            return candidate
    if race is None or not tuning():
        return candidates[0]
    try:
        winner = race([*candidates, None])
    except Undecided:
        return candidates[0]
    table[name] = VENDOR if winner is None else list(winner)
    _store(_path(), table)
    return winner


def race(
    candidates: Sequence[AnyTile | None],
    milliseconds: Callable[[AnyTile | None], float | None],
    clock: Callable[[], float] = time.monotonic,
) -> AnyTile | None:
    """The fastest; `milliseconds` is None for one that fails. Runs out of patience, not out of the first two.

    Raises:
        Undecided: all that were tried failed.
    """
    start = clock()
    # The vendor's library, last in the list, is the one to beat, hence the first to run.
    order = [*candidates[-1:], *candidates[:-1]]
    best, fastest = candidates[0], float("inf")
    for i, candidate in enumerate(order):
        if i >= 2 and clock() - start > PATIENCE:
            break
        taken = milliseconds(candidate)
        if taken is not None and taken < fastest:
            best, fastest = candidate, taken
    if fastest == float("inf"):
        raise Undecided
    return best


def _block(channels: int, largest: int) -> int:
    """The largest power of two up to `largest` that divides the channels."""
    return min(largest, channels & -channels)


def _box(volume: Sequence[int], voxels: int) -> tuple[int, int]:
    """Rows and voxels of a row that cover a plane with the fewest tiles; of equal ones the longest rows."""
    return min(BOXES[voxels], key=lambda box: (_cover(volume, box), box[0]))


def _cover(volume: Sequence[int], box: tuple[int, int]) -> int:
    return -(-volume[1] // box[0]) * -(-volume[2] // box[1])


def _that_fit(candidates: Sequence[AnyTile], capability: Capability) -> list[AnyTile]:
    """Those whose buffers fit into the shared memory of one program."""
    limit = {(8, 0): 163, (8, 7): 163}.get(capability, 227 if 9 <= capability[0] < 12 else 99) * 1024
    return [t for t in dict.fromkeys(candidates) if t.shared_memory + 1024 <= limit]


def _path() -> Path:
    named = os.environ.get("FOCUSKERNELS_TILES")
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "focuskernels", "dilated_conv3d.json")


@functools.cache
def _table(path: Path) -> dict[str, Any]:
    return _read(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("focuskernels: %s is not a table of tiles: %s", path, error)
        return {}
    return table if isinstance(table, dict) else {}


def _store(path: Path, table: dict[str, Any]) -> None:
    """Add the table to the file, which other processes may have added to."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        merged = {**_read(path), **table}
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            json.dump(merged, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError as error:
        log.warning("focuskernels: the tiles measured are not kept: %s", error)
