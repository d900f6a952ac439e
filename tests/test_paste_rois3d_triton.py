"""The Triton kernel of paste_rois_3d: interpreted without a GPU, and on the GPU at hand."""

import importlib.util
import math
from typing import Any

import pytest
import torch
from triton_runs import skip_unless_kernels_run

from focuskernels import paste_rois_3d
from focuskernels.reference import paste_rois3d as reference

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    skip_unless_kernels_run()
    from focuskernels.kernels import paste_rois3d

    if not torch.cuda.is_available():
        # Small, so that small volumes have several tiles, and several blocks of ROIs.
        monkeypatch.setattr(paste_rois3d, "BLOCK_V", 256)
        monkeypatch.setattr(paste_rois3d, "BLOCK_K", 4)
    return paste_rois3d


@pytest.mark.parametrize(
    ("dtypes", "dense"),
    [
        ([torch.float32], True),
        ([torch.float16], False),
        ([torch.float32, torch.float16], True),
        pytest.param([torch.bfloat16], True, marks=pytest.mark.gpu),
    ],
)
def test_kernel_is_the_reference(kernels: Any, dtypes: list[torch.dtype], dense: bool) -> None:
    # coarse values, so that there are ties
    logits = [torch.randn(3 + k % 3, 4, 9).mul(2).round().to(dtypes[k % len(dtypes)]) for k in range(9)]
    logits[3][2] = math.nan
    logits[4] = logits[4].transpose(0, 2)
    centers = torch.cat([torch.randint(0, 2, (9, 1)), torch.randint(-3, 9, (9, 3))], dim=1).double()
    # outside of the samples, far outside of the volume, and cut off by the two corners
    centers[5:] = torch.tensor([[2, 1, 1, 1], [0, 1e300, 2, 2], [1, 0, 0, 0], [-0.5, 5.9, 6.9, 12.9]])
    centers[4] = torch.tensor([-1, 2, 2, 2])
    labels = torch.randint(0, 20, (2, 6, 7, 13), dtype=torch.uint8)
    labels = labels if dense else labels.transpose(1, 3).contiguous().transpose(1, 3)
    for limit in (0.0, -math.inf, 1.0):
        rest = (centers, torch.arange(100, 109), limit)
        expected = reference.forward(labels, logits, *rest)
        on_device = ([roi.to(DEVICE) for roi in logits], *(t.to(DEVICE) for t in rest[:2]), limit)
        actual = kernels.forward(labels.to(DEVICE), *on_device)
        assert actual.is_contiguous() and torch.equal(actual.cpu(), expected)
        assert not torch.equal(expected, labels)


def test_a_center_that_is_no_number_pastes_nothing(kernels: Any) -> None:
    labels, roi = torch.zeros(1, 3, 3, 3, dtype=torch.uint8, device=DEVICE), torch.ones(3, 3, 3, device=DEVICE)
    centers = torch.tensor([[0, 1, math.nan, 1], [math.nan, 1, 1, 1]], dtype=torch.float64, device=DEVICE)
    assert not kernels.forward(labels, [roi, roi], centers, torch.tensor([1, 2], device=DEVICE), 0.0).any()


def test_nothing_to_paste(kernels: Any) -> None:
    labels = torch.randint(0, 20, (1, 3, 3, 3), dtype=torch.uint8, device=DEVICE)
    none = (torch.zeros(0, 4, device=DEVICE).double(), torch.zeros(0, device=DEVICE).long(), 0.0)
    result = kernels.forward(labels, [], *none)
    assert torch.equal(result, labels) and result.data_ptr() != labels.data_ptr()
    assert kernels.forward(labels[:0], [], *none).shape == (0, 3, 3, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_same_labels_and_no_volume_but_the_result(dtype: torch.dtype) -> None:
    labels = torch.randint(0, 20, (1, 61, 127, 129), dtype=torch.uint8, device="cuda")
    logits = [torch.randn(24 + k, 40, 33, device="cuda", dtype=dtype) for k in range(12)]
    centers = torch.cat([torch.zeros(12, 1), torch.rand(12, 3).mul(120).round()], dim=1).cuda()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    pasted = paste_rois_3d(labels, logits, centers, range(30, 42))
    assert torch.cuda.max_memory_allocated() - before <= labels.nbytes + 2**16
    assert torch.equal(pasted, paste_rois_3d(labels, logits, centers, range(30, 42)))
    arguments = (labels.cpu(), [roi.cpu() for roi in logits], centers.cpu().double(), torch.arange(30, 42), 0.0)
    assert torch.equal(pasted.cpu(), reference.forward(*arguments))
