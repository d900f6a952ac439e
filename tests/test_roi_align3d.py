import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from compare import assert_layouts_agree, assert_traceable
from torch import Tensor

from focuskernels import roi_align3d as module
from focuskernels import roi_align_3d
from focuskernels._lib import DTYPES
from focuskernels.nn import ROIAlign3d
from focuskernels.reference import roi_align3d as reference

Pair = tuple[int, int]


def interpolate_2d(image: Tensor, y: float, x: float) -> Tensor:
    """One sample (C,) of an image (C, H, W), step by step as torchvision publishes it."""
    height, width = image.shape[1:]
    if y < -1 or y > height or x < -1 or x > width:
        return image.new_zeros(len(image))
    y, x = max(y, 0.0), max(x, 0.0)
    low_y, low_x = int(y), int(x)
    if low_y >= height - 1:
        high_y = low_y = height - 1
        y = float(low_y)
    else:
        high_y = low_y + 1
    if low_x >= width - 1:
        high_x = low_x = width - 1
        x = float(low_x)
    else:
        high_x = low_x + 1
    ly, lx = y - low_y, x - low_x
    hy, hx = 1 - ly, 1 - lx
    return (
        hy * hx * image[:, low_y, low_x]
        + hy * lx * image[:, low_y, high_x]
        + ly * hx * image[:, high_y, low_x]
        + ly * lx * image[:, high_y, high_x]
    )


def roi_align_2d(
    image: Tensor, rois: Sequence[Sequence[float]], out: Pair, scale: float, ratio: int, aligned: bool
) -> Tensor:
    """torchvision.ops.roi_align of (N, C, H, W) with rows (sample, x1, y1, x2, y2), sample by sample."""
    result = image.new_zeros(len(rois), image.shape[1], *out)
    offset = 0.5 if aligned else 0.0
    for k, (n, x1, y1, x2, y2) in enumerate(rois):
        start_x, start_y = x1 * scale - offset, y1 * scale - offset
        width, height = x2 * scale - offset - start_x, y2 * scale - offset - start_y
        if not aligned:
            width, height = max(width, 1.0), max(height, 1.0)
        bin_y, bin_x = height / out[0], width / out[1]
        grid_y = ratio if ratio > 0 else math.ceil(bin_y)
        grid_x = ratio if ratio > 0 else math.ceil(bin_x)
        for p, q in itertools.product(range(out[0]), range(out[1])):
            for iy, ix in itertools.product(range(grid_y), range(grid_x)):
                y = start_y + p * bin_y + (iy + 0.5) * bin_y / grid_y
                x = start_x + q * bin_x + (ix + 0.5) * bin_x / grid_x
                result[k, :, p, q] += interpolate_2d(image[int(n)], y, x)
        result[k] /= max(grid_y * grid_x, 1)
    return result


ROWS_2D = [
    (0, 1.3, 0.6, 5.9, 4.2),
    (1, -3.0, -2.0, 4.0, 3.5),  # partly outside
    (1, 2.0, 2.0, 2.3, 2.4),  # smaller than a voxel
    (0, 4.5, 3.5, 90.0, 80.0),  # far beyond the border
    (0, 30.0, 1.0, 40.0, 3.0),  # outside
    (1, 3.0, 1.0, 3.0, 4.0),  # of no width
    (0, 0.0, 0.0, 7.0, 6.0),  # all
]


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [-1, 0, 1, 3])
@pytest.mark.parametrize(("out", "scale"), [((2, 3), 1.0), ((4, 1), 0.5), ((3, 5), 1.7)])
def test_a_volume_one_voxel_deep_is_torchvision(
    backend: str, out: Pair, scale: float, ratio: int, aligned: bool
) -> None:
    image = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    expected = roi_align_2d(image, ROWS_2D, out, scale, ratio, aligned)
    rois = torch.tensor([(n, 0, y1, x1, 1, y2, x2) for n, x1, y1, x2, y2 in ROWS_2D], dtype=torch.float64)
    actual = roi_align_3d(image[:, :, None], rois, (1, *out), (1, scale, scale), ratio, aligned)
    torch.testing.assert_close(actual[:, :, 0], expected)
    single = roi_align_3d(image[:, :, None].float(), rois.float(), (1, *out), (1, scale, scale), ratio, aligned)
    torch.testing.assert_close(single[:, :, 0].double(), expected, rtol=1e-4, atol=1e-4)


def roi_align_mdt(volume: Tensor, boxes: Sequence[Sequence[float]], out: Sequence[int], ratio: int) -> Tensor:
    """medicaldetectiontoolkit's op on (N, C, Y, X, Z) with rows (sample, y1, x1, y2, x2, z1, z2): no half-voxel shift,
    a box is at least one voxel wide, samples as torchvision's with a third axis."""
    result = volume.new_zeros(len(boxes), volume.shape[1], *out)
    for k, (n, y1, x1, y2, x2, z1, z2) in enumerate(boxes):
        taps = []
        for low, high, bins, size in zip((y1, x1, z1), (y2, x2, z2), out, volume.shape[2:]):
            extent = max(high - low, 1.0)
            bin_size = extent / bins
            grid = ratio if ratio > 0 else math.ceil(bin_size)
            axis = []
            for p in range(bins):
                weights = [0.0] * size
                for i in range(grid):
                    v = low + p * bin_size + (i + 0.5) * bin_size / grid
                    if v < -1 or v > size:
                        continue
                    v = min(max(v, 0.0), size - 1.0)
                    lower = min(int(v), size - 1)
                    weights[lower] += (1 - (v - lower)) / grid
                    weights[min(lower + 1, size - 1)] += (v - lower) / grid
                axis.append(weights)
            taps.append(torch.tensor(axis, dtype=volume.dtype))
        result[k] = torch.einsum("cyxz,ay,bx,dz->cabd", volume[int(n)], *taps)
    return result


@pytest.mark.parametrize("ratio", [-1, 2])
def test_order_of_the_detection_toolkits(ratio: int) -> None:
    volume = torch.randn(2, 2, 6, 7, 5, dtype=torch.float64)
    rows = [(0, 0.6, 1.3, 4.2, 5.9, 1.0, 3.7), (1, -2, -3, 3.5, 4, 2, 2.2), (1, 3, 3, 50, 5, 0, 4)]
    expected = roi_align_mdt(volume, rows, (2, 3, 4), ratio)
    boxes = torch.tensor(rows, dtype=torch.float64)
    before = boxes.clone()
    as_theirs = roi_align_3d(volume, boxes, (2, 3, 4), 1.0, ratio, False, box_order="zyzyxx")
    torch.testing.assert_close(as_theirs, expected)
    permuted = roi_align_3d(volume.permute(0, 1, 4, 2, 3), boxes, (4, 2, 3), 1.0, ratio, False, box_order="yxyxzz")
    torch.testing.assert_close(permuted, expected.permute(0, 1, 4, 2, 3))
    assert torch.equal(boxes, before)


def test_order_of_monai() -> None:
    volume = torch.randn(1, 2, 5, 6, 7)
    zyx = torch.tensor([[0, 1, 2, 3, 4, 4.5, 6]])
    xyz = zyx[:, [0, 3, 2, 1, 6, 5, 4]]
    expected = roi_align_3d(volume, zyx, 3, (0.5, 1, 0.8))
    assert torch.equal(roi_align_3d(volume, xyz, 3, (0.5, 1, 0.8), box_order="xyzxyz"), expected)
    layer = ROIAlign3d(3, (0.5, 1, 0.8), box_order="xyzxyz")
    assert torch.equal(layer(volume, xyz), expected)
    assert "box_order=xyzxyz" in repr(layer)


def test_boxes_per_sample() -> None:
    volume = torch.randn(3, 2, 5, 6, 7)
    boxes = [
        torch.tensor([[0, 1, 2, 3, 4, 5.5]]),
        torch.zeros(0, 6),
        torch.tensor([[0, 0, 0, 2.0, 2, 2], [1, 1, 1, 4, 5, 6]]),
    ]
    rows = torch.cat([torch.cat([torch.full((len(b), 1), float(n)), b], dim=1) for n, b in enumerate(boxes)])
    assert torch.equal(roi_align_3d(volume, boxes, 2), roi_align_3d(volume, rows, 2))
    whole = [b.long() for b in boxes]
    assert torch.equal(roi_align_3d(volume, whole, 2), roi_align_3d(volume, [b.double() for b in whole], 2))


def test_a_bin_per_voxel_copies() -> None:
    volume = torch.randn(1, 2, 6, 7, 8)
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        source = volume.contiguous(memory_format=layout)
        actual = roi_align_3d(source, torch.tensor([[0, 1, 2, 3, 5, 5, 7]]), (4, 3, 4))
        assert actual.is_contiguous(memory_format=layout)
        assert torch.equal(actual[0], volume[0, :, 1:5, 2:5, 3:7])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("ratio", [-1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_op_is_the_reference(dtype: torch.dtype, ratio: int, channels_last: bool) -> None:
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    volume = torch.randn(2, 3, 6, 7, 9).to(dtype).contiguous(memory_format=layout)
    rois = torch.tensor(
        [
            (0, 1.3, 0.2, 3.1, 4.4, 6.6, 8.2),
            (1, -4, 2, 2, 3, 3, 3),
            (1, -1e9, -1e4, 2, 1e9, 1e4, 8),
            (1, 2, 2, 2, 2, 2, 2),
            (0, 1, 1, 1, 5, 6, 8),
            (-1, 1, 1, 1, 5, 6, 8),
            (2, 1, 1, 1, 5, 6, 8),
            (math.nan, 1, 1, 1, 5, 6, 8),
            (0, 3, 1, 1, 1, 6, 8),
            (0, 1, math.nan, 1, 5, 6, 8),
            (0, 1, 1, -math.inf, 5, 6, 8),
            (0, 1, 1, 1, 5, 6, math.inf),
        ]
    )
    for kind, aligned in itertools.product((torch.float32, torch.float64), (True, False)):
        options = ([1.0, 0.7, 1.0], ratio, aligned)
        expected = reference.forward(volume, rois.to(kind), [2, 3, 4], *options)
        actual = module._forward(volume, rois.to(kind), [2, 3, 4], *options)
        assert actual.stride() == expected.stride()
        assert not actual[5:8].any() and actual.isfinite().all()
        if aligned:
            assert not actual[8:].any()
        rounding = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(actual, expected, rtol=rounding, atol=rounding)
        grad = torch.randn(actual.shape).to(dtype)
        about = (list(volume.shape), DTYPES.index(dtype), channels_last)
        gradient = module._backward(grad, rois.to(kind), *options, *about)
        expected = reference.backward(grad, rois.to(kind), *options, *about)
        assert gradient.stride() == expected.stride()
        torch.testing.assert_close(gradient, expected, rtol=rounding, atol=2 * rounding)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [-1, 2])
def test_gradients(backend: str, ratio: int, aligned: bool) -> None:
    volume = torch.randn(2, 2, 4, 5, 3, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([(0, 0.3, 1.2, 0.1, 3.1, 4.6, 2.2), (1, -3, 2, 0, 2, 9, 1), (1, 0, 1, 0, 4, 5, 3)])
    assert torch.autograd.gradcheck(
        lambda v: roi_align_3d(v, rois, (2, 3, 1), 1.0, ratio, aligned), volume, fast_mode=True
    )
    with pytest.raises(RuntimeError, match="roi_align_3d has no second derivative"):
        torch.autograd.grad(roi_align_3d(volume, rois, 2).sum(), volume, create_graph=True)


def test_same_bits_for_overlapping_boxes() -> None:
    volume = torch.randn(1, 3, 12, 12, 12, requires_grad=True)
    rois = torch.cat([torch.zeros(20, 1), 6 * torch.rand(20, 3), 6 + 6 * torch.rand(20, 3)], dim=1)
    gradients = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        gradients.append(torch.autograd.grad(roi_align_3d(volume, rois, 4).square().sum(), volume)[0])
    torch.set_num_threads(1)
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


def test_layouts() -> None:
    rois = torch.tensor([(0, 0.3, 1.2, 0.1, 3.1, 4.6, 2.2), (1, 0, 1, 0, 4, 5, 6)])
    assert_layouts_agree(lambda v: roi_align_3d(v, rois, (2, 3, 2)), torch.randn(2, 3, 4, 5, 6))


def test_no_boxes() -> None:
    for samples, rois in [(2, torch.zeros(0, 7)), (2, [torch.zeros(0, 6)] * 2), (0, []), (0, torch.zeros(0, 7))]:
        volume = torch.zeros(samples, 3, 4, 5, 6, requires_grad=True)
        y = roi_align_3d(volume, rois, (1, 2, 3))
        assert y.shape == (0, 3, 1, 2, 3)
        assert torch.equal(torch.autograd.grad(y.sum(), volume)[0], torch.zeros_like(volume))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_voxels_that_no_sample_reads_do_not_leak_in(backend: str, value: float) -> None:
    volume = torch.full((1, 1, 6, 6, 6), value)
    volume[0, 0, 1:4, 1:4, 1:4] = 7
    assert torch.equal(
        roi_align_3d(volume, torch.tensor([[0, 1, 1, 1, 4, 4, 4.0]]), 3), torch.full((1, 1, 3, 3, 3), 7.0)
    )
    assert not roi_align_3d(volume, torch.tensor([[0, 20, 1, 1, 24, 4, 4.0]]), 3).any()


def test_compile_and_fake_tensors() -> None:
    volume = torch.randn(2, 2, 4, 5, 6, requires_grad=True)
    rois = torch.tensor([(0, 0.3, 1.2, 0.1, 3.1, 4.6, 2.2), (1, 0, 1, 0, 4, 5, 6)])
    assert_traceable(lambda v, r: roi_align_3d(v, r, (2, 3, 2), 0.8, box_order="xyzxyz"), volume, rois)


@pytest.mark.parametrize("scale", [torch.tensor(0.5), [torch.tensor(0.5)] * 3, torch.tensor([0.5, 0.5, 0.5])])
def test_scales_may_be_tensors(scale: Any) -> None:
    volume, rois = torch.randn(1, 2, 4, 5, 6), torch.tensor([[0, 1, 2, 3, 4, 6, 8.0]])
    assert torch.equal(roi_align_3d(volume, rois, 2, scale), roi_align_3d(volume, rois, 2, 0.5))


def test_bad_input() -> None:
    x, rois = torch.zeros(2, 1, 4, 5, 6), torch.tensor([[0, 0, 0, 0, 2, 2, 2.0]])
    learnt: Any = torch.tensor(0.5, requires_grad=True)
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (TypeError, "input must be floating point", lambda: roi_align_3d(x.long(), rois, 2)),
        (TypeError, "integer or floating point, got torch.bool", lambda: roi_align_3d(x, rois.bool(), 2)),
        (TypeError, r"rois\[0\] must be a tensor, got list", lambda: roi_align_3d(x, [[1], [2]], 2)),  # type: ignore
        (TypeError, "sampling_ratio must be an integer", lambda: roi_align_3d(x, rois, 2, 1.0, 0.5)),  # type: ignore
        (TypeError, "output_size must be an integer or three", lambda: roi_align_3d(x, rois, (2, 2))),
        (TypeError, "rois must hold one tensor of boxes per sample.* got None", lambda: roi_align_3d(x, None, 2)),  # type: ignore
        (TypeError, "spatial_scale must be one or three", lambda: roi_align_3d(x, rois, 2, None)),  # type: ignore
        (TypeError, "spatial_scale must be one or three", lambda: roi_align_3d(x, rois, 2, learnt)),
        (TypeError, "aligned must be a bool, got 'no'", lambda: roi_align_3d(x, rois, 2, aligned="no")),  # type: ignore
        (TypeError, "box_order must be a string", lambda: roi_align_3d(x, rois, 2, box_order=None)),  # type: ignore
        (ValueError, "input must have 5 dimensions", lambda: roi_align_3d(x[0], rois, 2)),
        (ValueError, "input has no voxels", lambda: roi_align_3d(x[:, :, :0], rois, 2)),
        (ValueError, "boxes of 1 samples", lambda: roi_align_3d(x, [rois[:, 1:]], 2)),
        (ValueError, re.escape("rois[1] must be (K, 6), got (1, 7)"), lambda: roi_align_3d(x, [rois[:, 1:], rois], 2)),
        (ValueError, re.escape("rois must be (K, 7), got (1, 6)"), lambda: roi_align_3d(x, rois[:, 1:], 2)),
        (ValueError, "output_size must be positive", lambda: roi_align_3d(x, rois, 0)),
        (ValueError, "spatial_scale must be one or three", lambda: roi_align_3d(x, rois, 2, -1.0)),
        (ValueError, "spatial_scale must be one or three", lambda: roi_align_3d(x, rois, 2, (1.0, 1.0))),
        (
            ValueError,
            "box_order must name each of z, y, x twice, got 'xyxy'",
            lambda: roi_align_3d(x, rois, 2, box_order="xyxy"),
        ),
        (ValueError, "must be finite", lambda: roi_align_3d(x, rois * math.nan, 2)),
        (ValueError, "must be finite", lambda: roi_align_3d(x, rois / 0, 2)),
        (ValueError, r"negative size, as .*: .*-2.0, -2.0, -2.0", lambda: roi_align_3d(x, -rois, 2)),
        (ValueError, r"samples \[2.0\], expected integers in \[0, 2\)", lambda: roi_align_3d(x, rois + 2, 2)),
    ]
    for error, match, call in cases:
        with pytest.raises(error, match=match):
            call()
