"""The passes of norm_act and se_residual: C++ and Triton against the reference in double precision."""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_runs import skip_unless_kernels_run

from focuskernels import _lib, channelwise
from focuskernels.reference import channelwise as reference
from focuskernels.reference.channelwise import LEAKY_RELU, NONE, RELU

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}
LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]
SHAPES = [(2, 32, 5, 9, 8), (1, 19, 3, 5, 7), (2, 1, 3, 5, 7), (1, 3, 1, 1, 1), (1, 70, 2, 3, 5), (0, 4, 2, 2, 2)]


class Compiled:
    """The C++ kernels, under the names of the reference."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return getattr(torch.ops.focuskernels_C, f"channel_{name}")


@pytest.fixture(scope="module")
def compiled() -> Any:
    reason = _lib.csrc_missing()
    if reason is not None:
        pytest.skip(reason)
    return Compiled()


@pytest.fixture
def triton_kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    skip_unless_kernels_run()
    from focuskernels.kernels import channelwise

    if not torch.cuda.is_available():
        # Small, so that small inputs have several programs of several tiles.
        monkeypatch.setattr(channelwise, "TILES_PER_PROGRAM", 2)
        monkeypatch.setattr(channelwise, "ELEMENTS", 128)
    return channelwise


def maps(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, device: str = "cpu") -> list[Tensor]:
    values = (_eighths(torch.randn(shape) * 2 + 3), torch.randn(shape), torch.randn(shape))
    return [t.to(device, dtype).contiguous(memory_format=layout) for t in values]


def _eighths(x: Tensor) -> Tensor:
    """So that x times scale plus shift is exact: a rounding must not decide on which side of an activation it lies."""
    return x.mul(8).round().div(8)


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = float((actual.double() - expected).norm())
    assert error <= tolerance * float(expected.norm()) + 1e-12, (error, float(expected.norm()))


def assert_are_the_reference(kernels: Any, x: Tensor, residual: Tensor, grad: Tensor, activation: int) -> None:
    tolerance, sums_tolerance = TOLERANCE[x.dtype], max(TOLERANCE[torch.float32], TOLERANCE[x.dtype] * 1e-3)
    if x.dtype == torch.float64:
        sums_tolerance = tolerance
    sums_dtype = reference.table_dtype(x)
    table, weights = torch.randn(2, x.shape[0], 3, x.shape[1], dtype=sums_dtype).to(x.device)
    table = _eighths(table)
    found = kernels.moments(x)
    assert found.dtype == sums_dtype
    assert_near(found, reference.moments(x.double()), sums_tolerance)
    for added in (None, residual):
        y = kernels.affine(x, table, added, activation, 0.2)
        assert (y.dtype, y.stride()) == (x.dtype, x.stride())
        assert_near(y, reference.affine(*wide(x, table, added), activation, 0.2), tolerance)
        out = None if added is None else y
        for keep in (False, True):
            sums, kept = kernels.affine_sums(grad, x, table, out, activation, 0.2, keep)
            expected, expected_kept = reference.affine_sums(*wide(grad, x, table, out), activation, 0.2, keep)
            assert_near(sums, expected, sums_tolerance)
            assert_near(kept, expected_kept, tolerance)
    dx = kernels.affine_backward(grad, x, table, weights, activation, 0.2)
    assert (dx.dtype, dx.stride()) == (x.dtype, x.stride())
    assert_near(dx, reference.affine_backward(*wide(grad, x, table, weights), activation, 0.2), tolerance)


@pytest.mark.parametrize("activation", [NONE, RELU, LEAKY_RELU])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_compiled_kernels_are_the_reference(
    compiled: Any, dtype: torch.dtype, layout: torch.memory_format, activation: int
) -> None:
    for shape in SHAPES:
        assert_are_the_reference(compiled, *maps(shape, dtype, layout), activation)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_strips(compiled: Any, layout: torch.memory_format) -> None:
    assert_are_the_reference(compiled, *maps((1, 5, 40, 41, 50), torch.float32, layout), RELU)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moments_of_large_means_and_outliers(compiled: Any, layout: torch.memory_format) -> None:
    x = (torch.randn(1, 8, 12, 30, 30) + 1e4).contiguous(memory_format=layout)
    for outlier in (1e4, 0.0, -1e4):
        x[:, :, 0, 0, 0] = outlier
        actual, expected = compiled.moments(x).double(), reference.moments(x.double())
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_do_not_depend_on_threads(compiled: Any, layout: torch.memory_format) -> None:
    x, residual, grad = maps((1, 24, 20, 30, 30), torch.float32, layout)
    table = torch.randn(1, 3, 24)
    runs = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        sums, _ = compiled.affine_sums(grad, x, table, None, RELU, 0.0, False)
        runs.append((compiled.moments(x), sums, compiled.affine(x, table, residual, RELU, 0.0)))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_special_values(compiled: Any, dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([inf, -inf, nan, 0.0, -0.0, 1.0, -1.0, 6e-8, 65504.0, -3.0] * 2).to(dtype).view(1, 1, 1, 1, -1)
    table = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1)
    for activation in (NONE, RELU, LEAKY_RELU):
        actual = compiled.affine(x, table, None, activation, 0.5)
        expected = reference.affine(x, table, None, activation, 0.5)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_refuses_what_would_read_astray(compiled: Any) -> None:
    x, table = torch.zeros(2, 4, 3, 5, 6), torch.zeros(2, 3, 4)
    last = x.contiguous(memory_format=torch.channels_last_3d)
    for match, call in [
        ("expected a map", lambda: compiled.moments(x[0])),
        ("must be dense", lambda: compiled.moments(x[..., ::2])),
        ("contiguous table", lambda: compiled.affine(x, table[:1], None, NONE, 0.0)),
        ("contiguous table", lambda: compiled.affine(x, table.double(), None, NONE, 0.0)),
        ("residual must have", lambda: compiled.affine(x, table, last, NONE, 0.0)),
        ("gradient must have", lambda: compiled.affine_backward(x[:1], x, table, table, NONE, 0.0)),
        ("output must have", lambda: compiled.affine_sums(x, x, table, x.double(), RELU, 0.0, False)),
        ("no activation 3", lambda: compiled.affine(x, table, None, 3, 0.0)),
    ]:
        with pytest.raises(RuntimeError, match=match):
            call()


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("shape", "dtype", "layout", "activation"),
    [
        ((2, 3, 3, 5, 29), torch.float32, torch.contiguous_format, RELU),
        ((2, 5, 2, 5, 9), torch.float32, torch.channels_last_3d, LEAKY_RELU),
        ((1, 130, 1, 2, 3), torch.float16, torch.channels_last_3d, RELU),
        ((1, 2, 1, 1, 150), torch.float16, torch.contiguous_format, NONE),
    ],
)
def test_triton_kernels_are_the_reference(
    triton_kernels: Any, shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, activation: int
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert_are_the_reference(triton_kernels, *maps(shape, dtype, layout, device), activation)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "dtype", "layout", "activation"),
    [
        ((1, 24, 33, 65, 70), torch.float32, torch.channels_last_3d, RELU),
        ((1, 24, 33, 65, 70), torch.bfloat16, torch.contiguous_format, LEAKY_RELU),
        ((2, 300, 9, 8, 7), torch.bfloat16, torch.channels_last_3d, NONE),
        ((2, 300, 9, 8, 7), torch.float16, torch.contiguous_format, RELU),
        ((2, 32, 5, 9, 8), torch.float16, torch.channels_last_3d, LEAKY_RELU),
        ((1, 70, 2, 3, 5), torch.bfloat16, torch.channels_last_3d, RELU),
        ((2, 1, 3, 5, 7), torch.float32, torch.contiguous_format, NONE),
        ((1, 3, 1, 1, 1), torch.float32, torch.channels_last_3d, LEAKY_RELU),
        ((0, 4, 2, 2, 2), torch.float32, torch.contiguous_format, RELU),
    ],
)
def test_triton_kernels_are_the_reference_on_a_gpu(
    triton_kernels: Any, shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, activation: int
) -> None:
    assert_are_the_reference(triton_kernels, *maps(shape, dtype, layout, "cuda"), activation)


@pytest.mark.gpu
def test_repeats_bitwise_on_a_gpu(triton_kernels: Any) -> None:
    x, _, grad = maps((2, 32, 20, 40, 50), torch.bfloat16, torch.channels_last_3d, "cuda")
    table = torch.randn(2, 3, 32, device="cuda")
    runs = [
        (triton_kernels.moments(x), triton_kernels.affine_sums(grad, x, table, None, RELU, 0.0, False)[0])
        for _ in range(3)
    ]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_2_31_elements(triton_kernels: Any, layout: torch.memory_format) -> None:
    x = torch.zeros((1, 9, 1000, 512, 512), device="cuda", dtype=torch.bfloat16).contiguous(memory_format=layout)
    x[:, :, -1, -1, -1] = 4
    table = torch.tensor([1.0, 2.0, 3.0], device="cuda").view(1, 3, 1).repeat(1, 1, 9)
    y = channelwise.affine(x, table, None, NONE, 0.0)
    assert y[0, :, -1, -1, -1].tolist() == [9.0] * 9
    assert y[0, :, -1, -1, -2].tolist() == [1.0] * 9
    sums, _ = channelwise.affine_sums(x, x, table, None, NONE, 0.0, False)
    assert sums[0].tolist() == [[4.0] * 9, [12.0] * 9]
