"""The Triton kernels of roi_align_3d: interpreted without a GPU, and on the GPU at hand."""

import importlib.util
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_runs import skip_unless_kernels_run

from focuskernels import roi_align_3d
from focuskernels._lib import DTYPES
from focuskernels.reference import roi_align3d as reference

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of values about 1; sums are in float32, in another order than the reference's, and rounded once.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
INF, NAN = math.inf, math.nan
ROWS = [
    (0, 1.3, 0.2, 3.1, 4.4, 6.6, 8.2),
    (1, -4, 2, 2, 3, 3, 3),  # partly outside
    (0, 0, 0, 0, 6, 7, 9),  # all, and overlapping the first
    (1, -1e9, -1e4, 2, 1e9, 1e4, 8),  # of more samples than integers count
    (1, 2, 2, 2, 2, 2, 2),  # of no size
    (1, -8, -8, -30, 30, 22, 41),  # samples far apart
    (0, 20, 1, 1, 24, 4, 4),  # outside
    (-1, 1, 1, 1, 5, 6, 8),
    (2, 1, 1, 1, 5, 6, 8),
    (NAN, 1, 1, 1, 5, 6, 8),
    (0, 3, 1, 1, 1, 6, 8),  # of negative size
    (0, 1, NAN, 1, 5, 6, 8),
    (0, 1, 1, -INF, 5, 6, 8),
    (0, 1, 1, 1, 5, 6, INF),
]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    skip_unless_kernels_run()
    from focuskernels.kernels import roi_align3d

    if not torch.cuda.is_available():
        # Small, so that small inputs have several tiles, and several blocks of ROIs, bins and voxels.
        for name, value in {"TILE": 512, "CHANNELS": 2, "CHANNELS_LAST": 2, "BLOCK_K": 4, "BLOCK_J": 8}.items():
            monkeypatch.setattr(roi_align3d, name, value)
    return roi_align3d


@pytest.mark.parametrize(
    ("dtype", "kind", "ratio", "aligned", "channels_last", "bins", "rows"),
    [
        (torch.float32, torch.float32, -1, True, False, (2, 1, 3), ROWS),
        (torch.float32, torch.float64, 2, False, True, (1, 9, 1), ROWS[1:6]),
        (torch.float16, torch.float64, 1, True, True, (1, 2, 1), ROWS[2:6]),
        (torch.float16, torch.float32, 0, False, False, (9, 1, 1), ROWS[:3]),
        (torch.float32, torch.float32, 5, True, False, (1, 1, 12), ROWS[:3]),
        pytest.param(torch.bfloat16, torch.float32, -1, True, True, (7, 7, 7), ROWS, marks=pytest.mark.gpu),
        pytest.param(torch.bfloat16, torch.float64, 2, False, False, (5, 6, 7), ROWS, marks=pytest.mark.gpu),
    ],
)
def test_kernels_are_the_reference(
    kernels: Any,
    dtype: torch.dtype,
    kind: torch.dtype,
    ratio: int,
    aligned: bool,
    channels_last: bool,
    bins: Any,
    rows: Any,
) -> None:
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    volume = torch.randn(2, 3, 6, 7, 9).to(dtype).contiguous(memory_format=layout)
    rois = torch.tensor(rows, dtype=kind)
    options = ([1.0, 0.7, 1.0], ratio, aligned)
    expected = reference.forward(volume, rois, bins, *options)
    actual = kernels.forward(volume.to(DEVICE), rois.to(DEVICE), bins, *options)
    tolerance = TOLERANCE[dtype]
    assert (actual.stride(), actual.dtype) == (expected.stride(), expected.dtype)
    torch.testing.assert_close(actual.cpu(), expected, rtol=tolerance, atol=tolerance)
    grad = torch.randn(expected.shape).to(dtype)
    about = (list(volume.shape), DTYPES.index(dtype), channels_last)
    expected = reference.backward(grad, rois, *options, *about)
    actual = kernels.backward(grad.to(DEVICE), rois.to(DEVICE), *options, *about)
    assert (actual.stride(), actual.dtype) == (expected.stride(), expected.dtype)
    torch.testing.assert_close(actual.cpu(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_any_strides_and_a_gradient_without_memory(kernels: Any) -> None:
    volume = torch.randn(2, 4, 7, 5, 6).transpose(2, 4)[:, ::2]
    rois, bins, options = torch.tensor(ROWS[:3]), (2, 3, 2), ([1.0, 1.0, 1.0], 2, True)
    expected = reference.forward(volume, rois, bins, *options)
    actual = kernels.forward(volume.to(DEVICE), rois.to(DEVICE), bins, *options)
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-5)
    about = ([2, 3, *volume.shape[2:]], 0, False)
    grad = torch.ones(()).expand(3, 3, *bins)
    expected = reference.backward(grad, rois, *options, *about)
    actual = kernels.backward(grad.to(DEVICE), rois.to(DEVICE), *options, *about)
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_what_no_sample_reads_does_not_leak_in(kernels: Any) -> None:
    volume = torch.full((1, 1, 6, 6, 6), NAN)
    volume[0, 0, 1:4, 1:4, 1:4] = 7
    rois, options = torch.tensor([[0, 1, 1, 1, 4, 4, 4.0]], device=DEVICE), ([1.0] * 3, -1, True)
    assert bool((kernels.forward(volume.to(DEVICE), rois, [3] * 3, *options) == 7).all())
    grad = torch.full((1, 1, 3, 3, 3), INF, device=DEVICE)
    owed = kernels.backward(grad, rois, *options, [1, 1, 6, 6, 6], 0, False)
    assert int(owed.isinf().sum()) == 27 and not bool(owed.isnan().any())


def test_nothing_to_do(kernels: Any) -> None:
    options, none = ([1.0] * 3, -1, True), torch.zeros(0, 7, device=DEVICE)
    volume = torch.zeros(2, 3, 4, 5, 6, device=DEVICE)
    assert kernels.forward(volume, none, [1, 2, 3], *options).shape == (0, 3, 1, 2, 3)
    grad = torch.zeros(0, 3, 1, 2, 3, device=DEVICE)
    assert not kernels.backward(grad, none, *options, [2, 3, 4, 5, 6], 0, True).any()
    box = torch.tensor([ROWS[0]], device=DEVICE)
    assert not kernels.forward(volume[:0], box, [1, 2, 3], *options).any()
    assert kernels.forward(volume[:, :0], box, [1, 2, 3], *options).shape == (1, 0, 1, 2, 3)


def boxes(count: int, size: int) -> Tensor:
    low = torch.rand(count, 3) * size * 0.8
    return torch.cat([torch.zeros(count, 1), low, low + torch.rand(count, 3) * size * 0.4], dim=1).cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("ratio", [-1, 2])
@pytest.mark.parametrize("channels_last", [False, True])
def test_same_bits_and_no_volume_but_the_gradient(ratio: int, channels_last: bool) -> None:
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    volume = torch.randn(1, 32, 48, 96, 96, device="cuda").contiguous(memory_format=layout).requires_grad_()
    rois = boxes(300, 96)
    pooled = roi_align_3d(volume, rois, 7, 1.0, ratio)
    grad = torch.randn_like(pooled)
    (first,) = torch.autograd.grad(pooled, volume, grad, retain_graph=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    (again,) = torch.autograd.grad(pooled, volume, grad)
    # Tables: a few bytes per ROI and voxel of an axis.
    assert torch.cuda.max_memory_allocated() - before <= volume.nbytes + 300 * 16 * (48 + 96 + 96 + 4 * 21)
    assert torch.equal(first, again) and torch.equal(pooled, roi_align_3d(volume, rois, 7, 1.0, ratio))
    options = ([1.0] * 3, ratio, True)
    expected = reference.backward(grad.double(), rois, *options, list(volume.shape), 1, channels_last)
    torch.testing.assert_close(first.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.gpu
@pytest.mark.large
def test_more_than_2_31_elements() -> None:
    volume = torch.zeros(1, 40, 256, 512, 512, device="cuda", dtype=torch.float16)
    volume[:, -1, -4:, -4:, -4:] = 3
    rois = torch.tensor([[0, 252, 508, 508, 256, 512, 512.0]], device="cuda")
    assert bool((roi_align_3d(volume, rois, 2)[0, -1] == 3).all())
