"""Micro-benchmarks on the CPU: `pytest bench --benchmark-autosave`, later `pytest bench --benchmark-compare`.

The first case of every op, ours and the plain formula, with warm caches. `python -m bench` is the careful measurement,
and the only one of whole networks.
"""

from typing import Any

import pytest
import torch

from .case import Case, Mode, Provider, ops
from .measure import Cotangents, Step

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark: pip install -e '.[bench]'")


NETWORKS = ("focusnet", "snet")


def _selected() -> list[Any]:
    found = []
    for op in ops().values():
        if op.name in NETWORKS:
            continue
        case = op.cases("cpu", "full")[0]
        mode: Mode = "fwdbwd" if "fwdbwd" in case.cost else "fwd"
        for provider in case.providers:
            if provider.role in ("ours", "eager"):
                found.append(pytest.param(op.name, case, provider, mode, id=f"{op.name}-{provider.name}-{mode}"))
    return found


@pytest.mark.parametrize(("op", "case", "provider", "mode"), _selected())
def test_speed(benchmark: Any, op: str, case: Case, provider: Provider, mode: Mode) -> None:
    benchmark.group = f"{op}, {case.name}, {mode}"
    inputs = case.make(torch.Generator().manual_seed(0))
    benchmark(Step(provider.build(), mode, Cotangents("cpu"), provider.adapt).prepare(inputs))
