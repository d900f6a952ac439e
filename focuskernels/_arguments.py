"""Argument handling that several public functions share."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Triple: TypeAlias = tuple[int, int, int]


def triple(value: int | Sequence[int], name: str) -> Triple:
    """Three positive integers (z, y, x) from one integer or three."""
    values: tuple[int, ...] = ()
    if isinstance(value, int | torch.SymInt):
        values = (value,) * 3
    elif isinstance(value, Sequence):
        values = tuple(value)
    if len(values) != 3 or not all(isinstance(v, int | torch.SymInt) for v in values):
        raise TypeError(f"{name} must be an integer or three integers (z, y, x), got {value!r}")
    if min(values) < 1:
        raise ValueError(f"{name} must be positive, got {value!r}")
    return values[0], values[1], values[2]


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
