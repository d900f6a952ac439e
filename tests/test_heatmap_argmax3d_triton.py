"""The Triton kernels of heatmap_argmax_3d: interpreted without a GPU, and on the GPU at hand."""

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_runs import skip_unless_kernels_run

from focuskernels import heatmap_argmax_3d
from focuskernels.reference import heatmap_argmax3d as reference

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    skip_unless_kernels_run()
    from focuskernels.kernels import heatmap_argmax3d

    if not torch.cuda.is_available():
        # Small, so that small maps have several passes and chunks, and more chunks than a block.
        for name, value in {"TILE": 64, "PASSES": 2, "MAPS": 2, "BLOCK": 2}.items():
            monkeypatch.setattr(heatmap_argmax3d, name, value)
    return heatmap_argmax3d


def assert_is_the_reference(kernels: Any, heatmaps: Tensor) -> None:
    position, value = kernels.argmax(heatmaps)
    expected, expected_value = reference.argmax(heatmaps.cpu())
    assert torch.equal(position.cpu(), expected)
    assert value.dtype == heatmaps.dtype
    torch.testing.assert_close(value.cpu(), expected_value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shape", [(1, 3, 3, 9, 11), (1, 2, 1, 1, 1), (3, 1, 4, 1, 9)])
def test_kernels_are_the_reference(kernels: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    # few distinct values, so that ties are the rule
    heatmaps = torch.randint(-4, 4, shape).to(dtype).to(DEVICE)
    assert_is_the_reference(kernels, heatmaps)
    assert_is_the_reference(kernels, heatmaps.contiguous(memory_format=torch.channels_last_3d))
    assert_is_the_reference(kernels, heatmaps[:, -1:])
    assert_is_the_reference(kernels, heatmaps.transpose(2, 4))


def test_nan_infinity_and_zeros(kernels: Any) -> None:
    heatmaps = torch.randn(1, 6, 5, 6, 7)
    flat = heatmaps.flatten(2)[0]
    flat[0, [3, 150, 209]] = torch.tensor([INF, NAN, NAN])
    flat[1] = -INF
    flat[2] = -INF
    flat[2, 207] = NAN
    flat[3] = NAN
    flat[4] = -0.0
    flat[4, 100] = 0.0  # equal to -0.0, which comes first
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        assert_is_the_reference(kernels, heatmaps.contiguous(memory_format=layout).to(DEVICE))


def test_no_maps(kernels: Any) -> None:
    for shape in ((0, 3, 2, 2, 2), (2, 0, 2, 2, 2)):
        assert kernels.argmax(torch.zeros(shape, device=DEVICE))[0].shape == shape[:2]


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_memory_and_without_waiting(dtype: torch.dtype, channels_last: bool) -> None:
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    heatmaps = torch.randn(2, 9, 61, 127, 129, device="cuda", dtype=dtype).contiguous(memory_format=layout)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        peaks = heatmap_argmax_3d(heatmaps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before <= heatmaps.nbytes // 100
    expected, value = reference.argmax(heatmaps.cpu())
    assert torch.equal(peaks.index.cpu(), reference.unravel(expected, heatmaps.shape[2:]))
    assert torch.equal(peaks.value.cpu(), value)


@pytest.mark.gpu
@pytest.mark.large
def test_more_than_2_31_voxels() -> None:
    heatmaps = torch.zeros(1, 1, 2050, 1024, 1024, device="cuda", dtype=torch.float16)
    heatmaps[..., -1] = 1
    heatmaps[:, :, -1, -1, -2] = 2
    assert heatmap_argmax_3d(heatmaps).index.tolist() == [[[2049, 1023, 1022]]]
