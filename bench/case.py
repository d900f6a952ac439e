"""What is measured: an op's inputs, its unavoidable bytes and FLOPs, and everyone who computes it."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .results import OURS

Mode = Literal["fwd", "bwd", "fwdbwd"]
Role = Literal["ours", "eager", "compile", "peer", "other"]
Inputs = dict[str, Any]
Function = Callable[..., Any]


class Missing(Exception):
    """A provider cannot be had on this machine; the message says why."""


@dataclass(frozen=True)
class Cost:
    """What no implementation can avoid: bytes read and written once, and floating-point operations."""

    bytes: int
    flops: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Provider:
    """Someone who computes an op.

    Attributes:
        name: Unique within a case.
        role: "ours", "eager" (the plain formula), "compile" (the same under torch.compile), "peer" (another package's
            way to the same result), or "other": different work, shown for orientation and in no ratio.
        build: Imports what it needs and returns the function that takes the inputs by name. Raises `Missing`.
        oracle: What its result is checked against, in place of the case's.
        tolerance: Relative L2 error allowed, where the dtype's usual bound does not hold.
        checked: Whether it is compared at all; only work without a counterpart here goes without.
        adapt: Changes the inputs beforehand, outside the time taken, such as to the layout it is best in.
    """

    name: str
    role: Role
    build: Callable[[], Function]
    oracle: Function | None = None
    tolerance: float | None = None
    checked: bool = True
    adapt: Callable[[Inputs], Inputs] | None = None


@dataclass(frozen=True)
class Case:
    """One size of one op.

    Attributes:
        name: Unique within the op and device; shape, dtype and layout in words.
        make: Fresh inputs from a seeded generator on the device; leaves of the gradient require grad.
        cost: Minimum cost per mode; its keys are the modes that are measured.
        oracle: The formula in plain PyTorch, called with inputs of high precision.
        shape: The sizes that matter, for people and plots.
        dtype: Of the inputs.
        layout: "contiguous" or "channels_last_3d".
        oracle_dtype: Precision of the oracle.
        tolerance: Relative L2 error allowed, where the dtype's usual bound does not hold.
        make_small: Inputs on which results are checked, where the oracle does not fit beside the real ones.
        rounded: The formula in the precision of the providers, where rounding alone may be worse than any fixed
            tolerance, as in a deep network: then twice its error is allowed too.
    """

    name: str
    make: Callable[[torch.Generator], Inputs]
    cost: dict[Mode, Cost]
    oracle: Function
    providers: Sequence[Provider]
    shape: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    oracle_dtype: torch.dtype = torch.float64
    tolerance: float | None = None
    make_small: Callable[[torch.Generator], Inputs] | None = None
    rounded: Function | None = None


@dataclass(frozen=True)
class Op:
    """A public function, or the model, with its cases.

    Attributes:
        name: As on the command line.
        backend_of: Public functions and modules of focuskernels whose backends explain the numbers.
        stems: File stems of the kernels behind it (see `bench.sources`); a change there makes results stale.
        cases: (device type, size) -> cases, the most telling first; size is "full" or "quick".
        files: Further files behind it, relative to the repository.
    """

    name: str
    backend_of: tuple[str, ...]
    stems: tuple[str, ...]
    cases: Callable[[str, str], Sequence[Case]]
    files: tuple[str, ...] = ()


def ours(function: Function, name: str = OURS) -> Provider:
    """A function of this project."""
    return Provider(name, "ours", lambda: function)


def eager(function: Function, name: str = "eager", role: Role = "eager") -> Provider:
    """Plain PyTorch."""
    return Provider(name, role, lambda: function)


def compiled(function: Function, name: str = "torch.compile", **options: Any) -> Provider:
    """The same under torch.compile, for fixed shapes."""

    def build() -> Function:
        torch.compiler.reset()
        return torch.compile(function, dynamic=False, **options)

    return Provider(name, "compile", build)


def random(generator: torch.Generator, *shape: int, dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    """Normal random numbers; drawn in `dtype`, so that half-precision volumes need no larger buffer."""
    x = torch.empty(shape, dtype=dtype, device=generator.device, memory_format=memory_format(layout))
    return x.normal_(generator=generator)


def memory_format(layout: str) -> torch.memory_format:
    """The torch constant of a layout's name."""
    return {"contiguous": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}[layout]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested dictionaries, lists and tuples, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same nesting with every tensor replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_tensors(function, item) for item in value]
    return value


def in_layout(layout: str) -> Callable[[Inputs], Inputs]:
    """Inputs with every 5-dimensional tensor in that layout, as new leaves."""

    def convert(x: Tensor) -> Tensor:
        if x.dim() != 5:
            return x
        return x.detach().contiguous(memory_format=memory_format(layout)).requires_grad_(x.requires_grad)

    return lambda inputs: map_tensors(convert, inputs)


def leaves(inputs: Inputs) -> list[Tensor]:
    """The tensors whose gradient is asked for."""
    return [t for t in tensors_in(inputs) if t.requires_grad]


def size_of(*shape: int, dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" and the like."""
    return str(dtype).removeprefix("torch.")


def cost_by_mode(fwd: Cost, bwd: Cost) -> dict[Mode, Cost]:
    """Costs of an op with a backward."""
    return {"fwd": fwd, "bwd": bwd, "fwdbwd": fwd + bwd}


@functools.cache
def ops() -> dict[str, Op]:
    """All ops, by name: every module in bench/cases holds one as OP."""
    import importlib
    import pkgutil

    from . import cases

    names = sorted(module.name for module in pkgutil.iter_modules(cases.__path__))
    found = [importlib.import_module(f"bench.cases.{name}").OP for name in names]
    return {op.name: op for op in found}
