"""Whether a provider computes what it should, before it is timed."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .case import Case, Function, Inputs, Provider, map_tensors, tensors_in
from .ceilings import tf32
from .environment import without_search
from .measure import Cotangents, Step

#: Relative L2 error allowed per dtype of the inputs.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


class WrongResult(Exception):
    """A result differs from the reference; the message says which and by how much."""


class Oracle:
    """Results of the plain formula in high precision, for one case's check inputs; computed when first asked for."""

    def __init__(self, case: Case, inputs: Inputs, cotangents: Cotangents) -> None:
        self._case, self._inputs, self._cotangents = case, inputs, cotangents
        self._results: dict[tuple[Function, bool], list[Tensor | None]] = {}
        self._slack: dict[bool, list[float]] = {}

    def expected(self, provider: Provider, backward: bool) -> list[Tensor | None]:
        """Outputs, and gradients where asked for."""
        function = provider.oracle or self._case.oracle
        if (function, backward) not in self._results:
            inputs = map_tensors(self._precise, self._inputs)
            with tf32(False), without_search():
                self._results[function, backward] = results(function, inputs, backward, self._cotangents)
        return self._results[function, backward]

    def slack(self, backward: bool) -> list[float]:
        """What rounding allows per result, beside the tolerance."""
        function = self._case.rounded
        if function is None:
            return []
        if backward not in self._slack:
            expected = self.expected(Provider("", "eager", lambda: function), backward)
            found = results(function, self._inputs, backward, self._cotangents)
            errors = [relative_error(a, e) for a, e in zip(found, expected, strict=True)]
            # a result of few numbers may be rounded kindly by chance
            usual = statistics.fmean(error**2 for error in errors) ** 0.5
            self._slack[backward] = [2 * max(error, usual) for error in errors]
        return self._slack[backward]

    def _precise(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        return x.detach().to(self._case.oracle_dtype).requires_grad_(x.requires_grad)


def results(
    function: Function,
    inputs: Inputs,
    backward: bool,
    cotangents: Cotangents,
    adapt: Callable[[Inputs], Inputs] | None = None,
) -> list[Tensor | None]:
    """Outputs, then gradients of all leaves."""
    step = Step(function, "fwdbwd" if backward else "fwd", cotangents, adapt)
    returned, _ = step.prepare(inputs)()
    if not backward:
        return [t.detach() for t in tensors_in(returned)]
    outputs, gradients = returned
    return [t.detach() for t in tensors_in(outputs)] + list(gradients)


def check(
    provider: Provider,
    case: Case,
    actual: list[Tensor | None],
    expected: list[Tensor | None],
    slack: Sequence[float] = (),
) -> float:
    """The largest relative error; `slack` is allowed per result beside the tolerance.

    Raises:
        WrongResult: an error above the tolerance, other shapes, NaN.
    """
    if len(actual) != len(expected):
        raise WrongResult(f"{len(actual)} tensors instead of {len(expected)}")
    tolerance = provider.tolerance or case.tolerance or TOLERANCE[case.dtype]
    largest = 0.0
    for i, (a, e) in enumerate(zip(actual, expected)):
        if a is None and e is None:
            continue
        error = relative_error(a, e)
        bound = max(tolerance, slack[i] if slack else 0.0) if e is None or e.is_floating_point() else 0.0
        # written so that NaN fails
        if not error <= bound:
            raise WrongResult(f"result {i}, {_describe(a)}, is off by {error:.2g} (relative), allowed {bound:.2g}")
        largest = max(largest, error)
    return largest


def check_finite(actual: list[Tensor | None]) -> None:
    """What is left to check for work that has no counterpart here."""
    for i, a in enumerate(actual):
        if a is not None and not bool(torch.isfinite(a).all()):
            raise WrongResult(f"result {i}, {_describe(a)}, is not finite")


def relative_error(actual: Tensor | None, expected: Tensor | None) -> float:
    """L2 norm of the difference over that of the expected; the share of differing elements for integers."""
    if actual is None or expected is None:
        # no gradient is a gradient of zero
        present = actual if actual is not None else expected
        assert present is not None
        return 0.0 if not bool(present.any()) else float("inf")
    if actual.shape != expected.shape:
        raise WrongResult(f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    if actual.numel() == 0:
        return 0.0
    if not expected.is_floating_point():
        return float((actual != expected).double().mean())
    difference = torch.linalg.vector_norm(actual.to(expected.dtype) - expected, dtype=torch.float64).item()
    size = torch.linalg.vector_norm(expected, dtype=torch.float64).item()
    return difference / size if size else difference


def _describe(x: Any) -> str:
    return "no tensor" if x is None else f"{tuple(x.shape)} {x.dtype}"
