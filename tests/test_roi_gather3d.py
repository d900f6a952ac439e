import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from compare import assert_layouts_agree, assert_traceable, gradients
from torch import Tensor

from focuskernels import roi_gather3d as module
from focuskernels import roi_gather_3d, roi_gather_each_3d
from focuskernels._lib import DTYPES
from focuskernels.reference import roi_gather3d as reference
from focuskernels.roi_gather3d import Padding

ONES = (1.0, 1.0, 1.0)


def by_loop(
    source: Tensor, center: list[float], roi: list[int], out: list[int], scale: tuple[float, ...], padding: str
) -> Tensor:
    """One ROI (C, d, h, w), voxel by voxel, from the formula of the docstring."""
    volume, sizes = source[int(center[0])], source.shape[2:]
    result = source.new_zeros(source.shape[1], *out)
    for place in itertools.product(*(range(s) for s in out)):
        corners = []
        for a in range(3):
            x = center[1 + a] - roi[a] // 2 + (place[a] + 0.5) * roi[a] / out[a] - 0.5
            x = (x + 0.5) * scale[a] - 0.5
            lower = math.floor(x)
            corners.append([(lower, 1 - (x - lower)), (lower + 1, x - lower)])
        for (z, wz), (y, wy), (x, wx) in itertools.product(*corners):
            index = [z, y, x]
            if padding == "border":
                index = [min(max(i, 0), n - 1) for i, n in zip(index, sizes)]
            elif not all(0 <= i < n for i, n in zip(index, sizes)):
                continue
            result[(slice(None), *place)] += wz * wy * wx * volume[(slice(None), *index)]
    return result


def centers_of(*rows: tuple[float, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(rows, dtype=dtype).view(-1, 4)


def test_integer_centers_are_slices() -> None:
    source = torch.randn(2, 3, 9, 10, 11)
    for size in ((3, 4, 5), (1, 1, 1), (2, 6, 7)):
        centers = torch.tensor([[0, 4, 5, 5], [1, 5, 4, 6], [0, 4, 5, 5]])
        actual = roi_gather_3d([source], centers, size)
        for k, (n, *center) in enumerate(centers.tolist()):
            starts = [c - s // 2 for c, s in zip(center, size)]
            assert torch.equal(actual[k], source[(n, slice(None), *(slice(b, b + s) for b, s in zip(starts, size)))])


@pytest.mark.parametrize("center", [(0, 0, 0), (5, 6, 7), (-1, 3, 8), (-9, 3, 3), (3, 40, 3), (2, 3, 10**6)])
def test_integer_centers_beyond_the_border_are_padded_slices(center: tuple[int, int, int]) -> None:
    source = torch.randn(1, 2, 5, 6, 7)
    far = [min(max(c, -20), 30) for c in center]  # as far outside, on the padded volume
    modes: list[tuple[Padding, str]] = [("zeros", "constant"), ("border", "replicate")]
    for padding, mode in modes:
        padded = F.pad(source, [50] * 6, mode=mode)
        z, y, x = (50 + c - 2 for c in far)
        actual = roi_gather_3d([source], torch.tensor([[0, *center]]), (4, 5, 4), padding=padding)
        assert torch.equal(actual[0], padded[0, :, z : z + 4, y : y + 5, x : x + 4])


LOOP_CASES = [
    ((4, 4, 4), (4, 4, 4), ONES),
    ((5, 3, 4), (4, 6, 3), ONES),
    ((4, 6, 5), (2, 3, 5), (0.5, 0.5, 0.5)),
    ((3, 4, 4), (5, 1, 4), (1.0, 0.5, 2.0)),
]


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize(("roi", "out", "scale"), LOOP_CASES)
def test_matches_a_loop(
    backend: str,
    roi: tuple[int, int, int],
    out: tuple[int, int, int],
    scale: tuple[float, float, float],
    padding: Padding,
) -> None:
    source = torch.randn(2, 2, 5, 1, 7, dtype=torch.float64)
    centers = centers_of((0, 2.3, 0.6, 3.25), (1, -1.5, 0, 6.9), (1, 4, 0, 3), (0, 50.5, 0, 2), (1, 3.9, -7.2, 1e12))
    expected = torch.stack([by_loop(source, c, list(roi), list(out), scale, padding) for c in centers.tolist()])
    actual = roi_gather_3d([source], centers, roi, out, spatial_scales=[scale], padding=padding)
    torch.testing.assert_close(actual, expected)
    single = roi_gather_3d([source.float()], centers, roi, out, spatial_scales=[scale], padding=padding)
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_matches_grid_sample(backend: str, scale: float, padding: Padding) -> None:
    source = torch.randn(1, 3, 6, 7, 8, dtype=torch.float64)
    center, roi, out = (2.7, 9.1, 4.4), (5, 4, 6), (7, 4, 3)
    axes = []
    for c, r, s, n in zip(center, roi, out, source.shape[2:]):
        reference = torch.tensor([c - r // 2 + (o + 0.5) * r / s - 0.5 for o in range(s)], dtype=torch.float64)
        axes.append((2 * ((reference + 0.5) * scale - 0.5) + 1) / n - 1)
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], dim=-1)[None]
    expected = F.grid_sample(source, grid, padding_mode=padding, align_corners=False)
    actual = roi_gather_3d([source], centers_of((0, *center)), roi, out, spatial_scales=[scale], padding=padding)
    torch.testing.assert_close(actual, expected)


def test_channels_of_the_sources_follow_each_other() -> None:
    full, half = torch.randn(2, 2, 8, 8, 8), torch.randn(2, 3, 4, 4, 4)
    centers = centers_of((1, 4, 3, 5), (0, 2.5, 3, 4))
    both = roi_gather_3d([full, half], centers, 4, spatial_scales=[1, 0.5])
    assert both.shape == (2, 5, 4, 4, 4)
    assert torch.equal(both[:, :2], roi_gather_3d([full], centers, 4))
    assert torch.equal(both[:, 2:], roi_gather_3d([half], centers, 4, spatial_scales=[torch.tensor(0.5)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(backend: str, dtype: torch.dtype) -> None:
    source = torch.randn(1, 4, 6, 6, 6).to(dtype).requires_grad_()
    exact = source.detach().double().requires_grad_()
    centers = centers_of((0, 2.3, 3.4, 2.6), (0, 2.1, 3, 3))
    actual, expected = (roi_gather_3d([s], centers, 4, (3, 5, 4)) for s in (source, exact))
    assert actual.dtype == dtype
    weights = torch.randn(actual.shape).to(dtype)
    (gradient,) = torch.autograd.grad(actual, source, weights)
    (expected_gradient,) = torch.autograd.grad(expected, exact, weights.double())
    for a, e in ((actual, expected), (gradient, expected_gradient)):
        torch.testing.assert_close(a.double(), e, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_mixed_dtypes_are_promoted() -> None:
    sources = [torch.randn(1, 1, 4, 4, 4).to(t) for t in (torch.bfloat16, torch.float64)]
    for rows in ([(0, 2, 2, 2)], []):
        assert roi_gather_3d(sources, centers_of(*rows), 2).dtype == torch.float64


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_gradients(backend: str, padding: Padding) -> None:
    sources = [torch.randn(2, 2, 4, 3, 5, dtype=torch.float64), torch.randn(2, 1, 2, 2, 3, dtype=torch.float64)]
    # overlapping, partly outside and wholly outside, away from the kinks of the interpolation
    centers = centers_of((1, 2.3, 1.4, 2.1), (1, 1.9, 1.2, 2.6), (0, 3.7, -0.6, 4.3), (0, 30.2, 1.3, 1.2))

    def run(first: Tensor, second: Tensor, places: Tensor) -> Tensor:
        full = torch.cat([centers[:, :1], places], dim=1)
        scales = [ONES, (0.5, 0.7, 0.6)]
        return roi_gather_3d([first, second], full, (3, 2, 3), (2, 2, 4), spatial_scales=scales, padding=padding)

    leaves = [t.clone().requires_grad_() for t in (*sources, centers[:, 1:])]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradcheck(lambda *s: run(*s, centers[:, 1:]), leaves[:2], fast_mode=True)
    assert torch.autograd.gradcheck(lambda c: run(*sources, c), leaves[2:], fast_mode=True)


def test_second_gradients_are_refused() -> None:
    source = torch.randn(1, 1, 3, 3, 3, requires_grad=True)
    y = roi_gather_3d([source], centers_of((0, 1, 1, 1)), 2)
    with pytest.raises(RuntimeError, match="roi_gather_3d has no second derivative"):
        torch.autograd.grad(y.sum(), source, create_graph=True)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("border", "kind"), [(False, torch.int64), (False, torch.float32), (True, torch.float64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_op_is_the_reference(
    dtype: torch.dtype, kind: torch.dtype, border: bool, channels_last: bool, ragged: bool
) -> None:
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    first = torch.randn(2, 3, 6, 7, 9).to(dtype).contiguous(memory_format=layout)
    # of another dtype, layout and scale than the first
    second = torch.randn(2, 2, 3, 4, 4, dtype=torch.promote_types(dtype, torch.float32)).transpose(3, 4)
    centers = centers_of(
        (0, 2.3, 1.2, 4.4), (1, 5, 5, 5), (0, 3, 3, 3), (1, -1, 40, 2), (7, 3, 3, 3), (0, 3, 4, 3), dtype=torch.float64
    ).to(kind)
    sizes = [4, 5, 3] if not ragged else [4, 5, 3, 1, 1, 1, 2, 4, 5, 3, 3, 3, 2, 2, 2, 6, 7, 8]
    channels = [2, 0, 1, 1, 0, 2, *[-1] * 6] if ragged else []
    boxes = (centers, sizes, sizes, [1.0, 1.0, 1.0, 0.5, 0.5, 0.75], channels)
    expected = reference.forward([first, second], *boxes, border)
    actual = module._forward([first, second], *boxes, border)
    rounding = 4 * torch.finfo(dtype).eps
    for a, e in zip(actual, expected, strict=True):
        assert (a.stride(), a.dtype) == (e.stride(), e.dtype)
        torch.testing.assert_close(a, e, rtol=rounding, atol=rounding)

    shapes, dtypes = [*first.shape, *second.shape], [DTYPES.index(t.dtype) for t in (first, second)]
    grads = [torch.randn(out.shape).to(out.dtype) for out in actual]
    firsts = [0, 1 if ragged else 3]
    for bases in ([], [torch.randn_like(first), torch.randn(second.shape, dtype=second.dtype)]):
        owed = (grads, bases, *boxes, shapes, firsts, dtypes, [int(channels_last), 0], border)
        for a, e in zip(module._backward(*owed), reference.backward(*owed), strict=True):
            assert (a.stride(), a.dtype) == (e.stride(), e.dtype)
            torch.testing.assert_close(a, e, rtol=rounding, atol=2 * rounding)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_each_is_one_by_one(layout: torch.memory_format) -> None:
    features, heatmaps = (torch.randn(2, c, 6, 7, 8).contiguous(memory_format=layout).requires_grad_() for c in (5, 3))
    image = torch.randn(2, 1, 6, 7, 8)
    centers = torch.tensor([[0, 2, 3, 4], [1, 3, 3, 3], [1, 0, 9, 3], [0, 3, 3, 4]])
    sizes, maps = [3, (2, 5, 4), 4, (3, 1, 2)], [0, 2, 1, 0]
    actual = roi_gather_each_3d([features, image, heatmaps], centers, sizes, channels=[None, None, maps])
    expected = [
        roi_gather_3d([features, image, heatmaps[:, m : m + 1]], centers[k : k + 1], sizes[k])
        for k, m in enumerate(maps)
    ]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    leaves = [features, heatmaps]
    torch.testing.assert_close(gradients(actual, leaves), gradients(expected, leaves))
    assert roi_gather_each_3d([features], centers[:0], []) == []


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_pass_through(layout: torch.memory_format) -> None:
    centers = centers_of((0, 2.3, 1.4, 2.1), (1, 3, 3, 3), (1, 2, 3, 3))
    leaves = [torch.randn(2, c, 5, 6, 7).contiguous(memory_format=layout).requires_grad_() for c in (3, 1)]
    image = torch.randn(2, 1, 5, 6, 7)

    def run(passthrough: bool) -> list[Tensor]:
        sources = [2 * leaves[0], image, leaves[1]]
        if passthrough:
            rois, sources = roi_gather_each_3d(sources, centers, [3, 2, 4], passthrough=True)
        else:
            rois = roi_gather_each_3d(sources, centers, [3, 2, 4])
        # gradients of each kind: dense, expanded, and one that another consumer gets as well
        return [*rois, sources[0].square() + sources[1], sources[2].sum(), sources[2] + leaves[1]]

    torch.testing.assert_close(run(True), run(False), rtol=0, atol=0)
    for some in ([0, 1, 2, 3, 4, 5], [0], [3, 4], [1, 4], [0, 1, 3, 5]):
        of_each = [gradients([run(passthrough)[i] for i in some], leaves) for passthrough in (True, False)]
        torch.testing.assert_close(*of_each)


def test_pass_through_leaves_the_incoming_gradient_alone() -> None:
    x = torch.ones(1, 1, 2, 2, 2, requires_grad=True)
    source = x * 1
    rois, (alias,) = roi_gather_3d([source], torch.zeros(1, 4), 2, passthrough=True)
    assert alias.data_ptr() == source.data_ptr()
    ones = torch.ones_like(alias)
    (gradient,) = torch.autograd.grad([alias, rois], x, [ones, torch.ones_like(rois)])
    assert torch.equal(ones, torch.ones_like(ones))
    assert gradient[0, 0, 0, 0, 0] == 2 and gradient.sum() == 9


def test_layout_of_the_first_source() -> None:
    source = torch.randn(1, 4, 5, 5, 5).contiguous(memory_format=torch.channels_last_3d)
    rois = roi_gather_3d([source, source.contiguous()], torch.tensor([[0, 2, 2, 2]]), 3)
    assert rois.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(rois[:, :4], rois[:, 4:])


def test_overlapping_rois_add_their_gradients() -> None:
    source = torch.zeros(1, 1, 5, 5, 5, requires_grad=True)
    centers = torch.tensor([[0, 2, 2, 2], [0, 2, 2, 2], [0, 2, 2, 3]])
    weights = torch.tensor([1.0, 10.0, 100.0])[:, None, None, None, None]
    (gradient,) = torch.autograd.grad((roi_gather_3d([source], centers, 3) * weights).sum(), source)
    assert gradient[0, 0, 2, 2].tolist() == [0, 11, 111, 111, 100]
    assert float(gradient.sum()) == 27 * 111


def test_is_deterministic() -> None:
    source = torch.randn(2, 3, 8, 8, 8, requires_grad=True)
    centers = centers_of((0, 3.3, 4.1, 4), (0, 4, 4, 4), (1, 0, 0, 9), (0, 3, 3.9, 5))
    runs = []
    for _ in range(2):
        y = roi_gather_3d([source], centers, 5, 6)
        runs.append((y, *torch.autograd.grad(y.square().sum(), source)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_voxels_outside_the_roi_do_not_leak_in(backend: str, value: float) -> None:
    source = torch.full((1, 1, 6, 6, 6), value)
    source[0, 0, 1:4, 1:4, 1:4] = 1e4
    expected = torch.full((1, 1, 3, 3, 3), 1e4)
    assert torch.equal(roi_gather_3d([source], centers_of((0, 2, 2, 2)), 3), expected)
    # interpolated along one axis only
    assert torch.equal(roi_gather_3d([source], centers_of((0, 2, 2.5, 2)), (3, 2, 3)), expected[:, :, :, :2])
    # at the border of the volume, samples beyond it
    assert roi_gather_3d([source], centers_of((0, 30, 2, 2)), 3).abs().sum() == 0


def test_no_rois_and_no_samples() -> None:
    for samples in (2, 0):
        source = torch.zeros(samples, 3, 4, 5, 6, requires_grad=True)
        centers = torch.zeros(0, 4)
        y = roi_gather_3d([source, source], centers, (2, 3, 4), (1, 2, 3))
        assert y.shape == (0, 6, 1, 2, 3)
        (gradient,) = torch.autograd.grad(y.sum(), source)
        assert torch.equal(gradient, torch.zeros_like(source))


def test_layouts() -> None:
    centers = centers_of((1, 2.3, 1.4, 2.1), (0, 3, 3, 3))
    assert_layouts_agree(lambda s: roi_gather_3d([s], centers, 3, 4), torch.randn(2, 3, 4, 5, 6))
    source = torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d).requires_grad_()
    (gradient,) = torch.autograd.grad(roi_gather_3d([source], centers, 3).sum(), source)
    assert gradient.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("passthrough", [False, True])
def test_compile_and_fake_tensors(passthrough: bool) -> None:
    source = torch.randn(2, 2, 3, 4, 5, requires_grad=True)
    centers = centers_of((0, 2.2, 3.4, 3.1), (1, -1, 3, 7), (1, 2, 3, 3), dtype=torch.float32).requires_grad_()

    def run(s: Tensor, c: Tensor) -> list[Tensor]:
        if not passthrough:
            return [roi_gather_3d([s * 1], c, (3, 4, 3), spatial_scales=[0.5])]
        rois, (alias,) = roi_gather_each_3d([s * 1], c, [3, 1, 2], channels=[[0, 1, 0]], passthrough=True)
        return [*rois, 2 * alias]

    assert_traceable(run, source, centers)


def test_compiled_code_knows_no_sample_out_of_range() -> None:
    source = torch.ones(2, 1, 3, 3, 3)
    compiled = torch.compile(lambda s, c: roi_gather_3d([s], c, 1), fullgraph=True, backend="eager")
    assert compiled(source, centers_of((-1, 1, 1, 1), (2, 1, 1, 1), (1, 1, 1, 1))).flatten().tolist() == [0, 0, 1]


def test_bad_input() -> None:
    x, centers = torch.zeros(2, 1, 4, 5, 6), torch.zeros(1, 4)
    for error, match, arguments in [
        (TypeError, r"sequence of tensors, got one tensor of shape \(2, 1, 4, 5, 6\)", (x, centers, 2)),
        (TypeError, r"sources\[0\] must be floating point, got torch.int64", ([x.long()], centers, 2)),
        (TypeError, "centers must be a tensor, got list", ([x], [[0, 1, 2, 3]], 2)),
        (TypeError, "integer or floating point, got torch.bool", ([x], centers.bool(), 2)),
        (TypeError, "roi_size must be an integer or three", ([x], centers, 2.5)),
        (ValueError, "sources is empty", ([], centers, 2)),
        (ValueError, r"sources\[1\] must have 5 dimensions, got shape \(1, 4, 5, 6\)", ([x, x[0]], centers, 2)),
        (ValueError, r"differ in batch size: \[\(2, 1, 4, 5, 6\), \(1, 1, 4, 5, 6\)\]", ([x, x[:1]], centers, 2)),
        (ValueError, r"sources\[0\] has no voxels: \(2, 1, 0, 5, 6\)", ([x[:, :, :0]], centers, 2)),
        (ValueError, r"got \(1, 3\)", ([x], centers[:, :3], 2)),
        (ValueError, "roi_size must be positive, got 0", ([x], centers, 0)),
        (ValueError, "output_size must be positive", ([x], centers, 2, (1, -1, 1))),
        (ValueError, "finite", ([x], centers + torch.nan, 2)),
        (ValueError, r"samples \[2.0\], expected integers in \[0, 2\)", ([x], centers + 2, 2)),
        (ValueError, r"samples \[0.5\]", ([x], centers + 0.5, 2)),
    ]:
        with pytest.raises(error, match=match):
            roi_gather_3d(*arguments)  # type: ignore[call-overload]
    for error, match, keywords in [
        (TypeError, "one scale per source, got 1.0", {"spatial_scales": 1.0}),
        (TypeError, r"one scale per source, got tensor\(1.\)", {"spatial_scales": torch.tensor(1.0)}),
        (TypeError, r"spatial_scales\[0\] must be one or three positive numbers, got None", {"spatial_scales": [None]}),
        (ValueError, "2 entries for 1 sources", {"spatial_scales": [1, 1]}),
        (ValueError, r"spatial_scales\[0\] must be one or three positive", {"spatial_scales": [0]}),
        (ValueError, "padding must be 'zeros' or 'border', got 'reflect'", {"padding": "reflect"}),
    ]:
        with pytest.raises(error, match=match):
            roi_gather_3d([x], centers, 2, **keywords)
    for error, match, keywords in [
        (TypeError, "sequence of tensors, got one tensor", {"sources": x}),
        (TypeError, "sources must hold tensors, got None", {"sources": None}),
        (TypeError, "roi_sizes must hold one size per ROI, got 4", {"roi_sizes": 4}),
        (TypeError, "channels must hold None or K channel numbers per source, got 3", {"channels": 3}),
        (TypeError, r"channels\[0\] must hold channel numbers, got 3", {"channels": [3]}),
        (TypeError, r"channels\[0\]\[0\] must be an integer, got 0.7", {"channels": [[0.7]]}),
        (ValueError, "1 centers need as many roi_sizes, got 2", {"roi_sizes": [2, 2]}),
        (ValueError, "channels has 2 entries for 1 sources", {"channels": [None, [0]]}),
        (ValueError, r"channels\[0\] names 2 channels for 1 ROIs", {"channels": [[0, 0]]}),
        (ValueError, r"channels\[0\] names \[1\], sources\[0\] has 1 channels", {"channels": [[1]]}),
    ]:
        with pytest.raises(error, match=match):
            roi_gather_each_3d(**{"sources": [x], "centers": centers, "roi_sizes": [2], **keywords})
