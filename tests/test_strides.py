"""Maps whose elements lie more than 2^31 apart, by their strides or because they are huge, without the memory.

An expanded map repeats one voxel; `torch.empty` of gigabytes takes none until it is written, and reads as zeros.
"""

import pytest
import torch
from torch import Tensor

import focuskernels as fk

FAR = 2**31 + 4096  # elements


def spread(x: Tensor, axis: int) -> Tensor:
    """`x` with its slices along an axis `FAR` elements apart, in memory of which only they are touched."""
    size = x.shape[axis]
    inner = x.movedim(axis, 0).contiguous()
    storage = torch.empty(FAR * (size - 1) + inner[0].numel(), dtype=x.dtype)
    view = storage.as_strided(inner.shape, (FAR, *inner[0].stride()))
    return view.copy_(inner).movedim(0, axis)


@pytest.mark.parametrize("axis", range(5))
def test_rois_of_a_spread_map(axis: int) -> None:
    shape = [2, 2, 3, 4, 5]
    shape[axis] = 2
    x = torch.randn(shape).half()
    far = spread(x, axis)
    assert max((size - 1) * stride for size, stride in zip(far.shape, far.stride())) > 2**31
    centers = torch.tensor([[1, 1, 1, 1], [0, 1, 2, 2.5]])
    torch.testing.assert_close(fk.roi_gather_3d([far], centers, 3), fk.roi_gather_3d([x], centers, 3), rtol=0, atol=0)
    boxes = torch.tensor([[1.0, 0, 0, 0, 2, 3, 4], [0, 0.5, 1, 0, 1, 1, 1]])
    torch.testing.assert_close(fk.roi_align_3d(far, boxes, 2), fk.roi_align_3d(x, boxes, 2), rtol=0, atol=0)


@pytest.mark.parametrize("axis", range(5))
def test_gradients_that_come_spread(axis: int) -> None:
    x = torch.randn(2, 2, 3, 4, 5, dtype=torch.float16, requires_grad=True)
    centers, boxes = torch.tensor([[1, 1, 1, 1], [0, 1, 2, 3]]), torch.tensor([[1.0, 0, 0, 0, 2, 3, 4]] * 2)
    for out in (fk.roi_gather_3d([x], centers, 2), fk.roi_align_3d(x, boxes, 2)):
        grad = torch.randn_like(out)
        (expected,) = torch.autograd.grad(out, x, grad, retain_graph=True)
        (actual,) = torch.autograd.grad(out, x, spread(grad, axis))
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("axis", range(3))
def test_pasted_logits_that_lie_spread(axis: int) -> None:
    roi, labels = torch.randn(2, 2, 2).half(), torch.zeros(1, 4, 4, 4, dtype=torch.uint8)
    center = torch.tensor([[0, 2, 2, 2]])
    actual = fk.paste_rois_3d(labels, [spread(roi, axis)], center, [1])
    assert torch.equal(actual, fk.paste_rois_3d(labels, [roi], center, [1]))


def test_rois_far_inside_a_huge_map() -> None:
    """By one voxel that is all of 2^33, whose places need 64 bits in whole numbers too."""
    x = torch.randn(1, 2, 1, 1, 1).expand(1, 2, 2048, 2048, 2048)
    center = torch.tensor([[0, 2046, 2046, 2046]])
    box = torch.tensor([[0.0, 2040, 2040, 2040, 2044, 2044, 2044]])
    for out in (fk.roi_gather_3d([x], center, 3), fk.roi_align_3d(x, box, 2)):
        torch.testing.assert_close(out, x[:, :, :1, :1, :1].expand_as(out), rtol=1e-6, atol=0)


@pytest.mark.nightly
def test_peak_behind_2_31_voxels() -> None:
    x = torch.zeros(1, 1, 1300, 1300, 1300, dtype=torch.float16)
    assert x.numel() > 2**31
    x[0, 0, -1, -2, -3] = 1
    peaks = fk.heatmap_argmax_3d(x)
    assert peaks.index.tolist() == [[[1299, 1298, 1297]]]
    assert peaks.value.item() == 1


@pytest.mark.nightly
def test_loss_of_more_than_2_31_logits() -> None:
    logits = torch.zeros(1, 2, 1025, 1024, 1024, dtype=torch.float16)
    assert logits.numel() > 2**31
    target = torch.zeros(1, 1025, 1024, 1024, dtype=torch.uint8)
    target[0, -1, -1, -1] = 1
    logits[0, 1, -1, -1, -1] = 8
    sums = fk.focal_dice_sums(logits, target)
    # A float32 holds one voxel of a thousand million no more.
    assert sums.target.tolist() == [[pytest.approx(logits[0, 0].numel() - 1, rel=1e-7), 1]]
    # All voxels but the last are even; that one is right.
    assert sums.intersection[0, 1].item() == pytest.approx(torch.tensor(8.0).sigmoid().item(), rel=1e-5)
    assert sums.prediction[0, 0].item() == pytest.approx(logits[0, 0].numel() / 2, rel=1e-5)
