"""Argument handling that several public functions share."""

import operator
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Triple: TypeAlias = tuple[int, int, int]


def triple(value: int | Sequence[int], name: str) -> Triple:
    """Three positive integers (z, y, x) from one integer or three."""
    try:
        values = [_index(v) for v in value] if isinstance(value, Iterable) else [_index(value)] * 3
    except TypeError:
        values = []
    if len(values) != 3:
        raise TypeError(f"{name} must be an integer or three integers (z, y, x), got {value!r}")
    if min(values) < 1:
        raise ValueError(f"{name} must be positive, got {value!r}")
    return values[0], values[1], values[2]


def positive_scale(value: float | Sequence[float], name: str) -> tuple[float, float, float]:
    """Three positive numbers (z, y, x) from one number or three."""
    values: list[Any] = list(value) if _is_iterable(value) else [value] * 3
    if not all(_is_number(v) for v in values):
        raise TypeError(f"{name} must be one or three positive numbers, got {value!r}")
    if len(values) != 3 or not all(0 < v < float("inf") for v in values):
        raise ValueError(f"{name} must be one or three positive numbers, got {value!r}")
    return float(values[0]), float(values[1]), float(values[2])


def integer(value: Any, name: str) -> int:
    """An integer, also NumPy's, but no bool."""
    try:
        return _index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def _index(value: Any) -> Any:
    if isinstance(value, bool):
        raise TypeError
    return value if isinstance(value, int | torch.SymInt) else operator.index(value)


def require_bool(value: bool, name: str) -> None:
    """Refuse what is no bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")


def require_number(value: float, name: str, least: float | None = None) -> None:
    """Refuse what is no number, and where the value is readable one that is not finite or below `least`."""
    if not _is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if isinstance(value, Tensor) and not values_are_readable(value):
        return
    if not abs(value) < float("inf") or (least is not None and value < least):
        bound = "" if least is None else f" and at least {least}"
        raise ValueError(f"{name} must be finite{bound}, got {value}")


def _is_number(value: Any) -> bool:
    """A real one, also as a tensor without dimensions, unless that requires a gradient: it would get none."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.is_complex() and not value.requires_grad
    return isinstance(value, Real)


def as_list(values: Iterable[Any], name: str, content: str) -> list[Any]:
    """The elements of what holds `content`."""
    if not _is_iterable(values) or isinstance(values, str):
        raise TypeError(f"{name} must hold {content}, got {values!r}")
    return list(values)


def _is_iterable(value: Any) -> TypeGuard[Iterable[Any]]:
    """Not tensors and arrays without dimensions, which are `Iterable` but refuse to be iterated over."""
    return isinstance(value, Iterable) and getattr(value, "ndim", 1) > 0


def require_float(tensor: Tensor, name: str, dim: int = 5) -> None:
    """Refuse what is not a floating-point tensor with `dim` dimensions."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if tensor.dim() != dim:
        raise ValueError(f"{name} must have {dim} dimensions, got shape {tuple(tensor.shape)}")


def values_are_readable(tensor: Tensor) -> bool:
    """Whether looking at the values costs no device synchronisation and breaks no trace."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(tensor, FakeTensor)


def cast_for_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in the dtype of an active autocast, as PyTorch's own convolutions take them."""
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    # Autocast leaves float64 alone.
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
