import math

import pytest
import torch
from compare import assert_traceable
from torch import Tensor

from focuskernels import paste_rois3d as module
from focuskernels import paste_rois_3d, roi_gather_3d
from focuskernels.reference import paste_rois3d as reference


def by_loop(
    labels: Tensor, logits: list[Tensor], centers: list[list[int]], classes: list[int], threshold: float
) -> Tensor:
    result = labels.clone()
    for n, z, y, x in torch.ones(labels.shape).nonzero().tolist():
        best = threshold
        for roi, (sample, *center), label in zip(logits, centers, classes):
            place = [v - (c - s // 2) for v, c, s in zip((z, y, x), center, roi.shape)]
            if sample != n or not all(0 <= p < s for p, s in zip(place, roi.shape)):
                continue
            probability = 1 / (1 + math.exp(-float(roi[tuple(place)])))
            if probability > best:
                best = probability
                result[n, z, y, x] = label
    return result


def labels_of(*shape: int) -> Tensor:
    return torch.randint(0, 20, shape, dtype=torch.uint8)


@pytest.mark.parametrize("threshold", [0.5, 0.2, 0.9])
def test_matches_a_loop(threshold: float) -> None:
    labels = labels_of(2, 5, 6, 1)
    # overlapping, partly and wholly outside, of different sizes
    centers = [[0, 2, 3, 0], [0, 3, 3, 0], [1, 0, 0, 0], [0, 4, 5, 1], [1, 90, 2, 0], [1, -3, 2, 0], [0, 2, 3, 0]]
    sizes = [(3, 3, 3), (4, 2, 1), (5, 6, 7), (2, 4, 3), (3, 3, 3), (2, 2, 2), (1, 1, 1)]
    logits = [2 * torch.randn(s) for s in sizes]
    classes = [20, 21, 22, 255, 24, 25, 0]
    expected = by_loop(labels, logits, centers, classes, threshold)
    before = labels.clone()
    for places in (torch.tensor(centers), torch.tensor(centers).float()):
        actual = paste_rois_3d(labels, logits, places, classes, threshold=threshold)
        assert actual.dtype == torch.uint8
        assert torch.equal(actual, expected)
    assert torch.equal(paste_rois_3d(labels, logits, places, torch.tensor(classes), threshold=threshold), expected)
    assert torch.equal(labels, before)
    assert not torch.equal(expected, labels)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_op_is_the_reference(dtype: torch.dtype, threads: int) -> None:
    # coarse values, so that there are ties
    logits = [torch.randn(7, 6, 30).mul(2).round().to(dtype) for _ in range(12)]
    logits[3][2] = math.nan
    centers = torch.cat([torch.randint(0, 2, (12, 1)), torch.randint(-3, 12, (12, 3))], dim=1).double()
    arguments = (labels_of(2, 8, 9, 40), logits, centers, torch.arange(100, 112), 0.0)
    torch.set_num_threads(threads)
    actual = module._forward(*arguments)
    torch.set_num_threads(1)
    assert torch.equal(actual, reference.forward(*arguments))


def test_undoes_the_gather() -> None:
    mask = torch.rand(1, 1, 8, 9, 10) > 0.5
    centers = torch.tensor([[0, 4, 4, 5], [0, 0, 9, 3]])
    rois = roi_gather_3d([mask.float()], centers, (8, 9, 10))[:, 0] - 0.5
    pasted = paste_rois_3d(torch.zeros(1, 8, 9, 10, dtype=torch.uint8), rois, centers, [1, 1])
    assert torch.equal(pasted.bool(), mask[0])


def paste_one_voxel(values: list[float], dtype: torch.dtype = torch.float32, threshold: float = 0.5) -> int:
    """The label that a voxel of 9 has after ROIs 1, 2, ... with these logits."""
    logits = [torch.full((1, 1, 1), v, dtype=dtype) for v in values]
    labels = torch.full((1, 1, 1, 1), 9, dtype=torch.uint8)
    centers = torch.zeros(len(values), 4, dtype=torch.int64)
    return int(paste_rois_3d(labels, logits, centers, range(1, len(values) + 1), threshold=threshold))


def test_competition() -> None:
    assert paste_one_voxel([1, 2, 2]) == 2  # the larger one, of equals the first
    assert paste_one_voxel([0, -1]) == 9  # not above the threshold
    assert paste_one_voxel([100, 200, 150]) == 2  # whose sigmoids are all 1 in float32
    assert paste_one_voxel([math.nan, 1, math.nan]) == 2
    assert paste_one_voxel([1, math.inf]) == 2
    assert paste_one_voxel([-1e4], threshold=0) == 1
    assert paste_one_voxel([-math.inf], threshold=0) == 9
    assert paste_one_voxel([math.inf], threshold=1) == 9
    assert paste_one_voxel([1, 1 + 1e-12], torch.float64) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    labels, centers = labels_of(1, 4, 4, 4), [[0, 2, 2, 2], [0, 1, 2, 3]]
    logits = [torch.randn(3, 3, 3).to(dtype) for _ in centers]
    expected = by_loop(labels, logits, centers, [30, 40], 0.5)
    assert torch.equal(paste_rois_3d(labels, logits, torch.tensor(centers), [30, 40]), expected)


def test_layouts() -> None:
    labels, centers = labels_of(2, 4, 5, 6), torch.tensor([[0, 2, 2, 2], [1, 1, 2, 3]])
    rois = torch.randn(2, 3, 4, 5)
    expected = paste_rois_3d(labels, rois, centers, [30, 40])
    transposed = labels.transpose(1, 3).contiguous().transpose(1, 3)
    strided = torch.stack([rois, rois], dim=-1)[..., 0]
    assert torch.equal(paste_rois_3d(transposed, list(strided), centers, [30, 40]), expected)


def test_nothing_to_paste() -> None:
    labels = labels_of(1, 3, 3, 3)
    result = paste_rois_3d(labels, [], torch.zeros(0, 4), [])
    assert torch.equal(result, labels)
    assert result.data_ptr() != labels.data_ptr()
    none = paste_rois_3d(labels[:0], [], torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert none.shape == (0, 3, 3, 3)


def test_is_deterministic() -> None:
    labels, rois = labels_of(1, 9, 9, 9), torch.randn(6, 7, 7, 7)
    centers = torch.cat([torch.zeros(6, 1, dtype=torch.int64), torch.randint(0, 9, (6, 3))], dim=1)
    first, second = (paste_rois_3d(labels, rois, centers, range(30, 36)) for _ in range(2))
    assert torch.equal(first, second)


def test_compile_and_fake_tensors() -> None:
    labels, centers = labels_of(2, 4, 5, 6), torch.tensor([[1, 0, 2, 3]])
    assert_traceable(lambda a, b, c: paste_rois_3d(a, [b], c, [30]), labels, torch.randn(3, 4, 5), centers)


def test_compiled_code_knows_no_sample_out_of_range() -> None:
    labels, roi = labels_of(1, 3, 3, 3), torch.ones(1, 1, 1)
    compiled = torch.compile(lambda *a: paste_rois_3d(*a, [30, 40]), fullgraph=True, backend="eager")
    assert torch.equal(compiled(labels, [roi, roi], torch.tensor([[-1, 1, 1, 1], [1, 1, 1, 1]])), labels)


def test_bad_input() -> None:
    labels, roi, centers = labels_of(1, 3, 4, 5), torch.zeros(2, 2, 2), torch.zeros(1, 4)
    for error, match, arguments in [
        (TypeError, "labels must be a uint8 tensor, got torch.int64", (labels.long(), [roi], centers, [1])),
        (TypeError, r"logits\[0\] must be floating point, got torch.int64", (labels, [roi.long()], centers, [1])),
        (TypeError, "logits must hold tensors, got None", (labels, None, centers, [1])),
        (TypeError, "classes must be integers, got torch.float32", (labels, [roi], centers, torch.ones(1))),
        (TypeError, "classes must hold integers, got None", (labels, [roi], centers, None)),
        (TypeError, r"classes\[0\] must be an integer, got 1.5", (labels, [roi], centers, [1.5])),
        (TypeError, r"classes\[1\] must be an integer, got 'a'", (labels, [roi], centers, [1, "a"])),
        (TypeError, "centers must be a tensor", (labels, [roi], [[0, 1, 1, 1]], [1])),
        (ValueError, r"labels must be \(N, D, H, W\), got \(3, 4, 5\)", (labels[0], [roi], centers, [1])),
        (
            ValueError,
            r"logits\[0\] must have 3 dimensions, got shape \(1, 2, 2, 2\)",
            (labels, [roi[None]], centers, [1]),
        ),
        (ValueError, r"2 logits need as many .* \(1, 4\)", (labels, [roi, roi], centers, [1, 2])),
        (ValueError, r"1 logits need as many classes, got shape \(2,\)", (labels, [roi], centers, [1, 2])),
        (ValueError, "whole voxels", (labels, [roi], centers + torch.tensor([0, 0.5, 0, 0]), [1])),
        (ValueError, r"expected integers in \[0, 1\)", (labels, [roi], centers + 1, [1])),
        (ValueError, r"between 0 and 255, got \[256\]", (labels, [roi], centers, [256])),
    ]:
        with pytest.raises(error, match=match):
            paste_rois_3d(*arguments)  # type: ignore[arg-type]
    for error, match, threshold in [
        (ValueError, "threshold must be a probability, got 1.5", 1.5),
        (ValueError, "threshold must be finite, got nan", math.nan),
        (TypeError, "threshold must be a number, got 'a'", "a"),
    ]:
        with pytest.raises(error, match=match):
            paste_rois_3d(labels, [roi], centers, [1], threshold=threshold)  # type: ignore[arg-type]
