"""How long our kernels are compiled, and how many candidates are raced for a tile, while something runs."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Compilation:
    """Of Triton kernels, in this process; what was compiled before comes from Triton's cache on disk.

    Attributes:
        compiled: kernels.
        compile_s: seconds that took.
        cached: kernels found in the cache.
        trials: candidates for a tile that were run and timed.
        trial_s: seconds that took, their compilation included.
    """

    compiled: int = 0
    compile_s: float = 0.0
    cached: int = 0
    trials: int = 0
    trial_s: float = 0.0

    def as_json(self) -> dict[str, Any] | None:
        """For a result file; None where no kernel was needed."""
        values = {name: round(value, 3) for name, value in asdict(self).items()}
        return values if any(values.values()) else None


@contextmanager
def watch(into: Compilation) -> Iterator[None]:
    """Add to `into` what happens meanwhile. Without Triton nothing does."""
    try:
        from triton import knobs
    except ImportError:
        yield
        return
    from focuskernels.kernels import dilated_conv3d_tiles as tiles

    def listener(*, times: Any, cache_hit: bool, **_: Any) -> None:
        if cache_hit:
            into.cached += 1
        else:
            into.compiled += 1
            into.compile_s += times.total / 1e6

    before = knobs.compilation.listener, tiles.race
    knobs.compilation.listener, tiles.race = listener, _counted(tiles.race, into)
    try:
        yield
    finally:
        knobs.compilation.listener, tiles.race = before


def _counted(race: Callable[..., Any], into: Compilation) -> Callable[..., Any]:
    def run(candidates: Any, milliseconds: Callable[[Any], float | None], *rest: Any, **options: Any) -> Any:
        def counted(candidate: Any) -> float | None:
            started = time.monotonic()
            try:
                return milliseconds(candidate)
            finally:
                into.trials += 1
                into.trial_s += time.monotonic() - started

        return race(candidates, counted, *rest, **options)

    return run
