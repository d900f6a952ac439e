"""Measures cases one by one and hands over every row as soon as it is known."""

import itertools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch

from focuskernels._lib import backends

from . import environment
from .case import Case, Function, Inputs, Missing, Mode, Op, Provider, Role, dtype_name, leaves, size_of, tensors_in
from .ceilings import floor_ms, measure_ceilings
from .check import Oracle, WrongResult, check, check_finite, results
from .compilation import Compilation, watch
from .measure import EFFORT, Cotangents, Samples, Step, Timer, new_bytes, sample, timer
from .results import Results, Row, groups
from .sources import commit, source_hash

#: Several input sets, so that nobody learns one set of numbers; as many as fit into this.
INPUT_SETS, INPUT_BYTES = 3, {"cpu": 2**30, "cuda": 2**32}


@dataclass
class Ready:
    """A provider that was built and gave the right result."""

    provider: Provider
    function: Function
    error: float | None
    first_call: dict[Mode, float]
    kernels: Compilation


class Runner:
    """One run: measures ceilings once, then cases.

    Args:
        device: "cpu" or "cuda".
        size: "full" or "quick".
        store: Where rows go.
        resume: Leave out what the store holds already, measured with the same machine, versions and sources.
        without: Roles of providers that are left out.
        report: Called with the rows of one case and mode.
        say: Called with a line about what is going on.
    """

    def __init__(
        self,
        device: str,
        size: str,
        store: Results,
        *,
        resume: bool = False,
        without: Collection[Role] = (),
        report: Callable[[list[Row]], None] = lambda rows: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.device, self.size, self.store, self.resume = device, size, store, resume
        self.without = without
        self.report, self.say = report, say
        self.timer: Timer = timer(device, size)
        self.failed = False
        self.run: dict[str, Any] = {}

    def measure(self, chosen: Sequence[Op]) -> None:
        """Measure all cases; the first case of every op comes before any second one, so that a cut run shows most."""
        planned = list(interleave([[(op, case) for case in op.cases(self.device, self.size)] for op in chosen]))
        self.say("measuring the ceilings: copy and matrix multiplication")
        self._start({case.dtype for _, case in planned})
        for op, case in planned:
            self._case(op, case)
        self.store.finish(self.run, now())

    def _start(self, dtypes: set[torch.dtype]) -> None:
        head, dirty = commit()
        self.run = self.store.start(
            {
                "started": now(),
                "device": self.device,
                "device_name": environment.device_name(self.device),
                "threads": torch.get_num_threads(),
                "heap": environment.heap() if self.device == "cpu" else "cuda",
                "size": self.size,
                "hardware": environment.hardware(self.device),
                "versions": environment.versions(),
                "ceilings": measure_ceilings(self.device, self.size, sorted(dtypes, key=str), self.timer),
                "clocks": environment.clocks(self.device),
                "cudnn_plans": (torch.backends.cudnn.benchmark_limit or "all") if self.device == "cuda" else None,
                "commit": head,
                "dirty": dirty,
            }
        )

    def _case(self, op: Op, case: Case) -> None:
        sources, names = source_hash(op, self.device), [p.name for p in case.providers if p.role not in self.without]
        modes = list(case.cost)
        if self.resume:
            done = self.store.complete
            modes = [m for m in modes if not done(self.run, op.name, case.name, m, names, sources)]
        if not modes:
            self.say(f"{op.name}, {case.name}: already measured")
            return
        self.say(f"{op.name}, {case.name}")
        work = _Work(self, op, case, sources, modes)
        try:
            work.check_all()
            for mode in modes:
                work.time(mode)
        finally:
            work.release()


class _Work:
    """What belongs to one case while it is measured."""

    def __init__(self, runner: Runner, op: Op, case: Case, sources: str, modes: list[Mode]) -> None:
        self.runner, self.op, self.case, self.sources, self.modes = runner, op, case, sources, modes
        self.cotangents = Cotangents(runner.device)
        self.ready: list[Ready] = []
        self.sets: list[Inputs] = []

    def check_all(self) -> None:
        """Build every provider and check its result; rows for those that are out."""
        self.sets = self._input_sets()
        inputs = self.sets[0]
        if self.case.make_small is not None:
            inputs = self.case.make_small(torch.Generator(self.runner.device).manual_seed(0))
        oracle = Oracle(self.case, inputs, self.cotangents)
        for provider in self.case.providers:
            if provider.role in self.runner.without:
                continue
            if self.runner.size == "quick" and provider.role == "compile":
                self._out(provider, "skipped", "--quick leaves out what compiles for long")
                continue
            try:
                self.ready.append(self._checked(provider, oracle, inputs))
            except Missing as error:
                self._out(provider, "missing", str(error))
            except WrongResult as error:
                self._out(provider, "wrong", str(error))
            except Exception as error:  # a peer may raise anything, and must not keep the others from being measured
                self._out(provider, "failed", _one_line(error))
            _empty_cache(self.runner.device)

    def time(self, mode: Mode) -> None:
        """Memory, then time in turns, of all that are left; their rows are written even when it is cut short."""
        samples: dict[str, Samples] = {}
        steps, memory, partial = {}, {}, True
        for ready in list(self.ready):
            step = Step(ready.function, mode, self.cotangents, ready.provider.adapt)
            try:
                with watch(ready.kernels):
                    # the real size, once more: gradients' buffers, plans, caches
                    returned = new_bytes(step.prepare(self.sets[0])())
                memory[ready.provider.name] = (self.runner.timer.peak(step.prepare(self.sets[0])), returned)
            except Exception as error:  # out of memory, most likely
                self.ready.remove(ready)
                for other in self.modes[self.modes.index(mode) :]:
                    self._row(ready.provider, other, "failed", _one_line(error))
                _empty_cache(self.runner.device)
                continue
            steps[ready.provider.name] = step
        effort = EFFORT[self.runner.device, self.runner.size]
        try:
            sample(steps, self.sets, self.runner.timer, effort, samples)
            partial = False
        finally:
            self._write(mode, samples, memory, partial)

    def release(self) -> None:
        """Free what the case held."""
        self.sets, self.ready = [], []
        torch.compiler.reset()
        _empty_cache(self.runner.device)

    def _input_sets(self) -> list[Inputs]:
        device = self.runner.device
        first = self.case.make(torch.Generator(device).manual_seed(0))
        size = sum(size_of(*t.shape, dtype=t.dtype) for t in tensors_in(first))
        count = max(1, min(INPUT_SETS, INPUT_BYTES[device] // max(1, size)))
        return [first] + [self.case.make(torch.Generator(device).manual_seed(seed)) for seed in range(1, count)]

    def _checked(self, provider: Provider, oracle: Oracle, inputs: Inputs) -> Ready:
        backward = bool(leaves(inputs)) and any(mode != "fwd" for mode in self.case.cost)
        function, kernels = provider.build(), Compilation()
        first_call: dict[Mode, float] = {}
        actual = []
        modes: list[Mode] = ["fwd", "fwdbwd"] if backward else ["fwd"]
        for mode in modes:
            started = time.perf_counter()
            with watch(kernels):
                actual = results(function, inputs, mode == "fwdbwd", self.cotangents, provider.adapt)
            if self.runner.device == "cuda":
                torch.cuda.synchronize()
            first_call[mode] = time.perf_counter() - started
        if not provider.checked:
            check_finite(actual)
            return Ready(provider, function, None, first_call, kernels)
        expected = oracle.expected(provider, backward)
        error = check(provider, self.case, actual, expected, oracle.slack(backward))
        return Ready(provider, function, error, first_call, kernels)

    def _write(
        self, mode: Mode, samples: dict[str, Samples], memory: dict[str, tuple[int, int]], partial: bool
    ) -> None:
        clocks = environment.clocks(self.runner.device)
        for ready in self.ready:
            name = ready.provider.name
            if name not in samples or not (samples[name].quiet or samples[name].noisy):
                continue
            summary = samples[name].summary()
            cost = self.case.cost[mode]
            self._row(
                ready.provider,
                mode,
                "ok",
                None,
                **summary,
                peak_extra_bytes=memory[name][0],
                returned_bytes=memory[name][1],
                gb_s=cost.bytes / summary["median_ms"] / 1e6,
                tflop_s=cost.flops / summary["median_ms"] / 1e9,
                first_call_s=ready.first_call.get(mode),
                relative_error=ready.error,
                partial=partial,
                clocks=clocks,
                kernels=ready.kernels.as_json() if ready.provider.role == "ours" else None,
            )
        mine = groups(self.runner.store.rows).get((self.op.name, self.case.name, mode), [])
        self.runner.report([row for row in mine if row["run"] == self.runner.run["id"]])

    def _out(self, provider: Provider, status: str, reason: str) -> None:
        for mode in self.modes:
            self._row(provider, mode, status, reason)

    def _row(self, provider: Provider, mode: Mode, status: str, reason: str | None, **measured: Any) -> None:
        if status == "wrong" or (status == "failed" and provider.role == "ours"):
            self.runner.failed = True
        cost = self.case.cost[mode]
        self.runner.store.add(
            {
                "run": self.runner.run["id"],
                "op": self.op.name,
                "case": self.case.name,
                "mode": mode,
                "provider": provider.name,
                "role": provider.role,
                "status": status,
                "reason": reason,
                "backend": self._backend() if provider.role == "ours" else None,
                "shape": self.case.shape,
                "dtype": dtype_name(self.case.dtype),
                "layout": self.case.layout,
                "min_bytes": cost.bytes,
                "flops": cost.flops,
                "floor_ms": floor_ms(cost, self.case.dtype, self.runner.run["ceilings"]),
                "sources": self.sources,
                **measured,
            }
        )

    def _backend(self) -> str | None:
        found = (backends(public, self.runner.device) for public in self.op.backend_of)
        names = (name for ops in found for name, _ in ops.values())
        return ", ".join(dict.fromkeys(names)) or None


def interleave(lists: Iterable[list[Any]]) -> Iterator[Any]:
    """First elements, then second elements, and so on."""
    missing = object()
    for row in itertools.zip_longest(*lists, fillvalue=missing):
        yield from (item for item in row if item is not missing)


def now() -> str:
    """UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _one_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _empty_cache(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()
