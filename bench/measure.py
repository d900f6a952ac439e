"""Time and memory of one call, on the CPU or a CUDA GPU.

Every timed call finds cold caches: a buffer twice their size is read first (read, not written: dirty lines would be
written back at the expense of the timed call). Memory is the peak during the call beyond what was there before and
beyond what the call returns. On the CPU it is followed by torch's profiler, which records every allocation of torch's
allocator exactly, whichever heap is underneath; the resident size would depend on what the heap kept from the calls
before. What a C++ kernel takes from the C heap by itself is not in it.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .case import Function, Inputs, Mode, leaves, tensors_in
from .environment import l2_bytes, last_level_cache

#: A CPU sample is set aside when our threads waited longer than this share of it for a processor.
MAX_WAIT = 0.03


@dataclass(frozen=True)
class Effort:
    """How long to measure: every provider at least `least` and at most `most` times, all of them about `seconds`."""

    least: int
    most: int
    seconds: float


EFFORT = {
    ("cpu", "full"): Effort(7, 30, 15.0),
    ("cuda", "full"): Effort(10, 50, 3.0),
    ("cpu", "quick"): Effort(2, 2, 0.0),
    ("cuda", "quick"): Effort(3, 3, 0.0),
}


@dataclass
class Samples:
    """Times of one provider in ms; `noisy` are those that waited for a processor."""

    quiet: list[float] = field(default_factory=list)
    noisy: list[float] = field(default_factory=list)
    spent: float = 0.0

    def add(self, milliseconds: float, quiet: bool) -> None:
        """Record one call."""
        (self.quiet if quiet else self.noisy).append(milliseconds)
        self.spent += milliseconds / 1000

    def enough(self, effort: Effort, share: float) -> bool:
        """Whether no more are needed; noisy ones are repeated, but not for ever."""
        if len(self.quiet) + len(self.noisy) >= 3 * effort.most:
            return True
        if self.spent < share:
            return len(self.quiet) >= effort.most
        return len(self.quiet) >= effort.least or len(self.noisy) >= 2 * effort.least

    def summary(self) -> dict[str, Any]:
        """Median and quantiles of the quiet samples, of all where too few were quiet."""
        times = self.quiet if len(self.quiet) >= min(3, len(self.quiet) + len(self.noisy)) else self.quiet + self.noisy
        low, high = quantile(times, 0.2), quantile(times, 0.8)
        return {
            "median_ms": statistics.median(times),
            "p20_ms": low,
            "p80_ms": high,
            "samples": len(times),
            "noisy_samples": len(self.noisy),
        }


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between the sorted values."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    lower = math.floor(position)
    upper = min(lower + 1, len(ordered) - 1)
    return ordered[lower] + (position - lower) * (ordered[upper] - ordered[lower])


class Timer(Protocol):
    """What a device must offer."""

    def time(self, call: Callable[[], Any]) -> tuple[float, bool]:
        """(ms, whether nobody else was in the way) of one call that finds cold caches."""
        ...

    def peak(self, call: Callable[[], Any]) -> int:
        """Bytes beyond what was there before and what the call returns."""
        ...


class CpuTimer:
    """Wall-clock time; knows from the scheduler whether our threads had to wait for a processor."""

    def __init__(self, flush: int) -> None:
        # The profiler, which `peak` uses, would else say on stderr whenever it starts and stops.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        self._flush = torch.ones(flush // 4)

    def time(self, call: Callable[[], Any]) -> tuple[float, bool]:
        """See `Timer`."""
        self._flush.sum()
        waited, started = waiting_ns(), time.perf_counter_ns()
        result = call()
        elapsed = time.perf_counter_ns() - started
        waited = waiting_ns() - waited
        del result
        return elapsed / 1e6, waited <= MAX_WAIT * elapsed

    def peak(self, call: Callable[[], Any]) -> int:
        """See `Timer`."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
            result = call()
        recorded = profiler.profiler
        assert recorded is not None and recorded.kineto_results is not None
        changes = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
        live = highest = 0
        for event in sorted(changes, key=lambda event: event.start_ns()):
            live += event.nbytes()
            highest = max(highest, live)
        return max(0, highest - new_bytes(result))


class CudaTimer:
    """Events on the current stream."""

    def __init__(self, flush: int) -> None:
        self._flush = torch.ones(flush // 4, device="cuda")

    def time(self, call: Callable[[], Any]) -> tuple[float, bool]:
        """See `Timer`."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        self._flush.sum()
        start.record()
        result = call()
        end.record()
        torch.cuda.synchronize()
        del result
        return start.elapsed_time(end), True

    def peak(self, call: Callable[[], Any]) -> int:
        """See `Timer`."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return max(0, torch.cuda.max_memory_allocated() - before - new_bytes(result))


def timer(device: str, size: str) -> Timer:
    """The timer of a device type; a quick run does without cold caches."""
    cache = l2_bytes() if device == "cuda" else last_level_cache()
    flush = 2 * cache if size == "full" else 2**12
    return CudaTimer(flush) if device == "cuda" else CpuTimer(flush)


def waiting_ns() -> int:
    """How long all our threads have waited for a processor so far; 0 where the system does not tell."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[1])
        except (OSError, IndexError):  # the thread has ended
            continue
    return total


def new_bytes(result: tuple[Any, Inputs]) -> int:
    """Bytes of the storages in a call's result that its inputs do not own; `result` is (what it returned, inputs)."""
    returned, inputs = result
    owned = {t.untyped_storage().data_ptr() for t in tensors_in(inputs)}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(returned)}
    return sum(size for pointer, size in storages.items() if pointer not in owned)


class Cotangents:
    """The gradients that flow into outputs: the same numbers for everyone, in the layout of each output."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._values: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """One per output; 1 for a scalar, else random normal."""
        return [self._one(i, output) for i, output in enumerate(outputs)]

    def _one(self, index: int, output: Tensor) -> Tensor:
        if output.dim() == 0:
            return torch.ones_like(output)
        key = (index, output.shape, output.dtype, output.stride())
        if key not in self._values:
            generator = torch.Generator(self._device).manual_seed(index)
            # float32 first, so that every dtype gets the same numbers up to rounding
            plain = torch.empty(output.shape, device=output.device).normal_(generator=generator)
            self._values[key] = torch.empty_like(output.detach()).copy_(plain)
        return self._values[key]


@dataclass(frozen=True)
class Step:
    """One mode of a function, split into what is timed and what must come before."""

    function: Function
    mode: Mode
    cotangents: Cotangents
    adapt: Callable[[Inputs], Inputs] | None = None

    def prepare(self, inputs: Inputs) -> Callable[[], tuple[Any, Inputs]]:
        """The timed call. It returns (outputs and gradients, inputs)."""
        if self.adapt is not None:
            inputs = self.adapt(inputs)
        if self.mode == "fwd":
            return lambda: (self._forward(inputs), inputs)
        if self.mode == "fwdbwd":
            return lambda: ((outputs := self.function(**inputs), self._gradients(outputs, inputs)), inputs)
        outputs = self.function(**inputs)
        self.cotangents(differentiable(outputs))
        return lambda: (self._gradients(outputs, inputs), inputs)

    def _forward(self, inputs: Inputs) -> Any:
        with torch.no_grad():
            return self.function(**inputs)

    def _gradients(self, outputs: Any, inputs: Inputs) -> tuple[Tensor | None, ...]:
        out = differentiable(outputs)
        return torch.autograd.grad(out, leaves(inputs), self.cotangents(out), allow_unused=True)


def differentiable(outputs: Any) -> list[Tensor]:
    """The outputs that carry a gradient."""
    return [t for t in tensors_in(outputs) if t.requires_grad]


def sample(
    steps: dict[str, Step], sets: Sequence[Inputs], timer: Timer, effort: Effort, into: dict[str, Samples]
) -> None:
    """Time everyone in turns, in an order that rotates, on inputs that rotate; fills `into` as it goes."""
    names, share = list(steps), effort.seconds / max(1, len(steps))
    for name in names:
        into[name] = Samples()
    turn = 0
    while waiting := [name for name in names if not into[name].enough(effort, share)]:
        start = turn % len(waiting)
        for name in waiting[start:] + waiting[:start]:
            call = steps[name].prepare(sets[turn % len(sets)])
            into[name].add(*timer.time(call))
            del call
        turn += 1
