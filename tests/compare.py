"""Checks that every op of focuskernels goes through."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in tensors_in(item)] if isinstance(value, list | tuple) else []


def gradients(output: Any, inputs: Iterable[Tensor]) -> list[Tensor | None]:
    """Gradients of a fixed, uneven weighting of the floating-point outputs."""
    total = sum(
        (t.double() * torch.linspace(1, 2, t.numel(), dtype=torch.float64).view(t.shape)).sum()
        for t in tensors_in(output)
        if t.requires_grad
    )
    return list(torch.autograd.grad(total, [i for i in inputs if i.requires_grad], allow_unused=True))


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The values of a 5-dimensional tensor in the memory layouts that callers have."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
    wide[..., ::2] = x
    return {
        "channels_last_3d": x.clone(memory_format=torch.channels_last_3d),
        "strided": wide[..., ::2],
        "transposed": x.transpose(2, 4).contiguous().transpose(2, 4),
        "expanded": x[:, :, :, :, :1].expand_as(x),
    }


def assert_layouts_agree(function: Callable[[Tensor], Any], x: Tensor, **tolerance: float) -> None:
    """`function` gives the same values and gradients for every layout of `x`."""
    for name, other in layouts(x).items():
        plain = other.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        other = other.detach().requires_grad_()
        expected, actual = function(plain), function(other)
        for a, e in zip(tensors_in(actual), tensors_in(expected), strict=True):
            torch.testing.assert_close(a, e, msg=lambda m, name=name: f"{name}: {m}", **tolerance)
        torch.testing.assert_close(gradients(actual, [other]), gradients(expected, [plain]), **tolerance)


def assert_traceable(function: Callable[..., Any], *arguments: Any, **tolerance: float) -> None:
    """Compiles as one graph, static and dynamic, with the same values and gradients, and runs on fake tensors."""
    expected = function(*arguments)
    leaves = [t for t in tensors_in(arguments) if t.requires_grad]
    expected_gradients = gradients(expected, leaves) if leaves else []
    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        actual = compiled(*arguments)
        torch.testing.assert_close(actual, expected, **tolerance)
        if leaves:
            torch.testing.assert_close(gradients(actual, leaves), expected_gradients, **tolerance)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = function(*_to_fake(arguments, mode))
    for a, e in zip(tensors_in(fake), tensors_in(expected), strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)


def _to_fake(value: Any, mode: FakeTensorMode) -> Any:
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    if isinstance(value, list | tuple):
        return type(value)(_to_fake(item, mode) for item in value)
    return value
