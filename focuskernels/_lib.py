"""The only place that talks to torch.library and loads csrc; nothing here knows an op."""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("focuskernels")

DEVICE_TYPES = ("cpu", "cuda")
REFERENCE = "reference"
#: The dtypes that kernels in C++ take; those in Triton take all but float64. A number for one is its place here.
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
#: Along the second and the third axis of a CUDA grid.
MOST_PROGRAMS = 65535
#: What 32 bits number, with the rest of the last tile.
MOST_VOXELS = 2**31 - 2**12
#: Of an op that copies addresses from the host in every call: a CUDA graph of torch.compile must leave it out.
COPIES_FROM_HOST = (torch.Tag.cudagraph_unsafe,)

_LIBRARY = torch.library.Library("focuskernels", "DEF")
#: Of each op that serves a public function or module: device type -> kernels.
_KERNELS: dict[str, dict[str, dict[str, tuple["Kernel", ...]]]] = {}


def _works_for_any_input(*args: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Kernel:
    """One fast implementation of an op for one device type. The reasons are shown to people; None means it can run."""

    name: str
    run: Callable[..., Any]
    missing: Callable[[], str | None]  #: why it cannot run on this machine at all
    why_not: Callable[..., str | None] = _works_for_any_input  #: why it cannot run for these arguments


def define(
    schema: str,
    *,
    op: str | tuple[str, ...],
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cpu: Sequence[Kernel] = (),
    cuda: Sequence[Kernel] = (),
    tags: Sequence[torch.Tag] = (),
) -> Callable[..., Any]:
    """Declare one opaque, functional op that serves the public function or functions `op`; return its overload.

    The first of a device's kernels that can run does, else the reference; `backends` reads the same declaration.
    `tags` tell torch.compile what it must know of the op.
    """
    name = schema.split("(", 1)[0]
    publics = (op,) if isinstance(op, str) else op
    _LIBRARY.define(schema, tags=tuple(tags))
    for device_type, kernels in (("cpu", cpu), ("cuda", cuda)):
        body = _without_autocast(_first_that_can(", ".join(publics), tuple(kernels), reference), device_type)
        _LIBRARY.impl(name, body, device_type.upper())
        for public in publics:
            _KERNELS.setdefault(public, {}).setdefault(name, {})[device_type] = tuple(kernels)
    torch.library.register_fake(f"focuskernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.focuskernels, name).default


def served() -> list[str]:
    """The public functions and modules that ops were declared for."""
    return sorted(_KERNELS)


def backends(public: str, device_type: str) -> dict[str, tuple[str, str]]:
    """Of each op behind a public function or module: its backend on this machine, and why it is not a faster one."""
    return {name: _backend(kernels[device_type]) for name, kernels in _KERNELS[public].items()}


def _backend(kernels: Sequence[Kernel]) -> tuple[str, str]:
    reasons: list[str] = []
    for kernel in kernels:
        reason = kernel.missing()
        if reason is None:
            return kernel.name, "; ".join(reasons)
        reasons.append(f"{kernel.name}: {reason}")
    return REFERENCE, "; ".join(reasons) or "no kernel yet"


def _first_that_can(op: str, kernels: tuple[Kernel, ...], reference: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        for kernel in kernels:
            reason = kernel.missing() or kernel.why_not(*args)
            if reason is None:
                return kernel.run(*args)
            note_fallback(op, f"{kernel.name}: {reason}")
        return reference(*args)

    return run


def _without_autocast(body: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    # The fake kernel promises dtypes that an active autocast would change inside `body`.
    @functools.wraps(body)
    def run(*args: Any) -> Any:
        if not torch.is_autocast_enabled(device_type):
            return body(*args)
        with torch.autocast(device_type, enabled=False):
            return body(*args)

    return run


def is_channels_last(x: Tensor) -> bool:
    """Whether outputs and gradients of `x` are channels_last_3d; they are plain contiguous when both fit."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last_3d)


def layout(channels_last: bool) -> torch.memory_format:
    """channels_last_3d or plain contiguous."""
    return torch.channels_last_3d if channels_last else torch.contiguous_format


def layout_of(x: Tensor) -> torch.memory_format:
    """The dense layout an output takes from `x`."""
    return layout(is_channels_last(x))


def forbid_double_backward(op: str) -> None:
    """Call first in a backward without a second derivative."""
    # once_differentiable stays silent when grad_output does not require grad, so look at the mode instead.
    if torch.is_grad_enabled():
        raise RuntimeError(f"focuskernels.{op} has no second derivative; drop create_graph=True")


@functools.cache
def note_fallback(op: str, reason: str) -> None:
    """Say once that a fast kernel was passed over; FOCUSKERNELS_STRICT=1 makes it an error."""
    message = f"focuskernels.{op} falls back: {reason}"
    if os.environ.get("FOCUSKERNELS_STRICT") == "1":
        raise RuntimeError(message)
    log.warning(message)


@functools.cache
def csrc_missing() -> str | None:
    """Load the compiled library of this package once; None, or why its kernels are not there."""
    found = sorted(Path(__file__).parent.glob("_C.*so"))
    if not found:
        return "not built (see CONTRIBUTING.md; FOCUSKERNELS_BUILD=1 turns a skipped build into an error)"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        log.warning("focuskernels: %s does not load: %s", found[0].name, error)
        return f"{found[0].name} does not load: {error}"
    return None


def unsupported(x: Tensor, *_: Any) -> str | None:
    """None, or why no kernel in C++ serves the dtype of `x`."""
    return None if x.dtype in DTYPES else f"no kernel for {x.dtype}"


def unsupported_by_triton(x: Tensor, *_: Any) -> str | None:
    """None, or why no kernel in Triton serves the dtype of `x`."""
    return "no kernel for torch.float64" if x.dtype == torch.float64 else unsupported(x)


def too_many_samples(x: Tensor) -> str | None:
    """None, or why no kernel with a row of programs per sample of `x` (N, ...) can be launched."""
    return f"{len(x)} samples, at most {MOST_PROGRAMS} are supported" if len(x) > MOST_PROGRAMS else None


def csrc_kernel(name: str, why_not: Callable[..., str | None] = _works_for_any_input) -> Kernel:
    """The C++ CPU kernel `focuskernels_C::<name>`; its schema stands in csrc."""

    def run(*args: Any) -> Any:
        return getattr(torch.ops.focuskernels_C, name)(*args)

    return Kernel("C++ (csrc)", run, csrc_missing, why_not)


@functools.cache
def triton_missing() -> str | None:
    """None, or why Triton kernels cannot run; looks without importing."""
    return None if importlib.util.find_spec("triton") is not None else "Triton is not installed"


def triton_kernel(module: str, name: str, why_not: Callable[..., str | None] = _works_for_any_input) -> Kernel:
    """The launcher `name` of `focuskernels.kernels.<module>`, imported at its first call."""

    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(f"focuskernels.kernels.{module}"), name)(*args)

    return Kernel("Triton", run, triton_missing, why_not)


def triton_kernel_or(
    module: str, name: str, other: Callable[..., Any], why_not: Callable[..., str | None], label: str
) -> Kernel:
    """`triton_kernel`, or `other` where the docs say so: that is no fallback to warn of, so both are one kernel."""
    kernel = triton_kernel(module, name)

    def run(*args: Any) -> Any:
        reason = why_not(*args)
        if reason is None:
            return kernel.run(*args)
        log.debug("focuskernels.%s: %s handed over: %s", module, name, reason)
        return other(*args)

    return Kernel(label, run, triton_missing)
