"""What stands between the passes of a norm: C++ and Triton against the reference in double precision."""

import importlib.util
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton_runs import skip_unless_kernels_run

from focuskernels import _lib
from focuskernels.nn import NormAct3d
from focuskernels.reference import norm_act as reference

#: (N, C), groups
SHAPES = [((2, 32), 4), ((1, 19), 19), ((3, 40), 1), ((5, 6), 2), ((1, 1), 1), ((0, 4), 2), ((2, 0), 1), ((2, 70), 10)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-7}


@pytest.fixture(params=["C++", pytest.param("Triton", marks=pytest.mark.kernels)])
def kernels(request: pytest.FixtureRequest) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The two functions of a backend."""
    if request.param == "C++":
        if (reason := _lib.csrc_missing()) is not None:
            pytest.skip(reason)
        return torch.ops.focuskernels_C.norm_table, torch.ops.focuskernels_C.norm_gradient
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    skip_unless_kernels_run()
    from focuskernels.kernels import norm_tables

    return norm_tables.table, norm_tables.gradient


def is_triton(kernels: tuple[Callable[..., Any], ...]) -> bool:
    return "kernels" in getattr(kernels[0], "__module__", "")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("norm", range(3))
def test_kernels_are_the_reference(kernels: Any, norm: int, dtype: torch.dtype) -> None:
    if is_triton(kernels) and dtype == torch.float64:
        pytest.skip("float64 is the reference's")
    device = "cuda" if is_triton(kernels) and torch.cuda.is_available() else "cpu"
    for ((samples, channels), groups), given in ((shape, given) for shape in SHAPES for given in (True, False)):
        voxels = 37
        moments = torch.rand(samples, 2, channels, dtype=dtype, device=device) * 3 + 1
        weight, bias = torch.randn(2, channels, dtype=dtype, device=device) if given else (None, None)
        sets = (norm, groups, voxels)
        found = kernels[0](moments, weight, bias, *sets, 1e-5)
        assert_near(found, reference.norm_table(*wide(moments, weight, bias), *sets, 1e-5), dtype)
        sums, (table, rstd, _) = torch.randn_like(moments), found
        actual = kernels[1](sums, table, rstd, *sets)
        assert_near(actual, reference.norm_gradient(*wide(sums, table, rstd), *sets), dtype)


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def assert_near(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype and a.is_contiguous() and a.shape == e.shape
        assert float((a.double() - e).norm()) <= TOLERANCE[dtype] * float(e.norm()) + 1e-12


def test_statistics_of_large_means(kernels: Any) -> None:
    """Means apart by little beside their size: of the variance nothing cancels."""
    device = "cuda" if is_triton(kernels) and torch.cuda.is_available() else "cpu"
    moments = torch.tensor([[[1e4], [37.0]], [[1e4 + 1], [74.0]]], device=device)
    _, _, variance = kernels[0](moments, None, None, 0, 1, 37, 0.0)
    torch.testing.assert_close(variance.cpu(), torch.full((2, 1), 1.75))


def test_refuses_what_would_read_astray() -> None:
    if (reason := _lib.csrc_missing()) is not None:
        pytest.skip(reason)
    table, gradient = torch.ops.focuskernels_C.norm_table, torch.ops.focuskernels_C.norm_gradient
    moments, channels = torch.rand(2, 2, 6), torch.rand(6)
    for call in (
        lambda: table(moments, channels[:5], None, 0, 1, 8, 0.0),
        lambda: table(moments, channels.double(), None, 0, 1, 8, 0.0),
        lambda: table(moments, None, None, 2, 4, 8, 0.0),
        lambda: table(moments, None, None, 3, 1, 8, 0.0),
        lambda: table(moments.half(), None, None, 0, 1, 8, 0.0),
        lambda: table(moments[..., ::2], None, None, 0, 1, 8, 0.0),
        lambda: gradient(moments, torch.rand(2, 3, 5), torch.rand(2, 6), 0, 1, 8),
        lambda: gradient(moments, torch.rand(2, 3, 6), torch.rand(1, 6), 0, 1, 8),
    ):
        with pytest.raises(RuntimeError, match="norm_tables"):
            call()


@pytest.mark.parametrize(("norm", "most"), [("batch", (7, 3)), ("instance", (3, 3)), ("group", (3, 3))])
def test_a_norm_is_few_launches(norm: Any, most: tuple[int, int]) -> None:
    """Three each, and what moves the running statistics: around small maps launches are all that takes time."""
    module, x = NormAct3d(8, norm), torch.randn(2, 8, 3, 4, 5, requires_grad=True)
    with Launches() as forward:
        y = module(x)
    grad = torch.ones_like(y)
    with Launches() as backward:
        torch.autograd.grad(y, [x, *module.parameters()], grad)
    assert forward.count.total() <= most[0] and backward.count.total() <= most[1], (forward.count, backward.count)


class Launches(TorchDispatchMode):
    """Counts the ops that compute something."""

    VIEWS = ("alias", "detach", "empty", "expand", "permute", "select", "t", "transpose", "unsqueeze", "view")

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name not in self.VIEWS:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))
