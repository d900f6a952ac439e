import pytest
import torch
from compare import assert_layouts_agree, assert_traceable
from torch import Tensor

from focuskernels import HeatmapPeaks, heatmap_argmax_3d


def gaussian(shape: tuple[int, int, int], center: tuple[float, float, float], sigma: float = 1.5) -> Tensor:
    axes = [
        torch.exp(-((torch.arange(n, dtype=torch.float64) - c) ** 2) / (2 * sigma**2)) for n, c in zip(shape, center)
    ]
    return axes[0][:, None, None] * axes[1][:, None] * axes[2]


def first_maximum(volume: Tensor) -> tuple[list[int], float]:
    best, place = -float("inf"), [0, 0, 0]
    depth, height, width = volume.shape
    for z in range(depth):
        for y in range(height):
            for x in range(width):
                if float(volume[z, y, x]) > best:
                    best, place = float(volume[z, y, x]), [z, y, x]
    return place, best


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7, 3), (1, 1, 1, 1, 1), (3, 2, 1, 4, 9)])
def test_matches_a_loop(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    # few distinct values, so that ties are the rule
    heatmaps = torch.randint(-4, 4, shape).to(dtype)
    peaks = heatmap_argmax_3d(heatmaps)
    assert isinstance(peaks, HeatmapPeaks)
    assert (peaks.index.dtype, peaks.value.dtype, peaks.center.dtype) == (torch.int64, dtype, torch.float32)
    for n in range(shape[0]):
        for k in range(shape[1]):
            place, value = first_maximum(heatmaps[n, k])
            assert peaks.index[n, k].tolist() == place
            assert float(peaks.value[n, k]) == value
    assert torch.equal(peaks.center, peaks.index.float())


def test_nan_counts_as_the_largest() -> None:
    heatmaps = torch.zeros(1, 1, 2, 3, 4)
    heatmaps[0, 0, 0, 0, 1] = torch.inf
    heatmaps[0, 0, 1, 0, 2] = torch.nan
    heatmaps[0, 0, 1, 2, 0] = torch.nan
    peaks = heatmap_argmax_3d(heatmaps, subvoxel=True)
    assert peaks.index.tolist() == [[[1, 0, 2]]]
    assert peaks.value.isnan().all()
    assert peaks.center.tolist() == [[[1, 0, 2]]]


def test_all_minus_infinity_is_the_first_voxel() -> None:
    peaks = heatmap_argmax_3d(torch.full((1, 2, 2, 2, 2), -torch.inf), subvoxel=True)
    assert peaks.index.abs().sum() == 0
    assert peaks.center.abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_subvoxel_is_exact_for_a_gaussian(dtype: torch.dtype) -> None:
    centers = [(4.3, 5.4, 6.2), (3.0, 2.51, 7.49), (4.49, 8.0, 1.02)]
    heatmaps = torch.stack([gaussian((9, 11, 13), c) for c in centers])[None].to(dtype)
    peaks = heatmap_argmax_3d(heatmaps, subvoxel=True)
    torch.testing.assert_close(peaks.center[0], torch.tensor(centers), rtol=0, atol=1e-5)
    torch.testing.assert_close(peaks.index[0], torch.tensor(centers).round().long())


def test_subvoxel_keeps_the_index_at_borders_and_on_plateaus() -> None:
    border = gaussian((5, 6, 7), (0.0, 2.3, 6.4))
    plateau = torch.zeros(5, 6, 7, dtype=torch.float64)
    plateau[1:4, 1:5, 1:5] = 0.5
    peaks = heatmap_argmax_3d(torch.stack([border, plateau])[None], subvoxel=True)
    torch.testing.assert_close(peaks.center[0, 0], torch.tensor([0, 2.3, 6]), rtol=0, atol=1e-5)
    assert peaks.center[0, 1].tolist() == [1, 1, 1]


def test_subvoxel_shift_is_at_most_half_a_voxel() -> None:
    heatmaps = torch.rand(4, 5, 5, 6, 7) + 1e-3
    peaks = heatmap_argmax_3d(heatmaps, subvoxel=True)
    shift = peaks.center - peaks.index
    assert 0 < shift.abs().max() <= 0.5


def test_subvoxel_of_values_that_are_not_positive() -> None:
    for heatmaps in (
        torch.zeros(1, 1, 3, 3, 3),
        -torch.rand(1, 1, 3, 3, 3),
        torch.eye(3).expand(1, 1, 3, 3, 3),
    ):
        heatmaps = heatmaps.clone().requires_grad_()
        peaks = heatmap_argmax_3d(heatmaps, subvoxel=True)
        assert torch.equal(peaks.center, peaks.index.float())
        (gradient,) = torch.autograd.grad(peaks.center.sum() + peaks.value.sum(), heatmaps)
        assert gradient.isfinite().all()


def test_gradients() -> None:
    heatmaps = torch.stack([gaussian((5, 5, 5), (2.2, 1.9, 2.4)), torch.rand(5, 5, 5, dtype=torch.float64)])[None]
    heatmaps.requires_grad_()
    assert torch.autograd.gradcheck(lambda h: heatmap_argmax_3d(h).value, (heatmaps,))

    def center(h: Tensor) -> Tensor:
        return heatmap_argmax_3d(h, subvoxel=True).center

    (analytic,) = torch.autograd.grad(center(heatmaps)[0, 0, 0], heatmaps)
    # center is float32, too coarse for gradcheck: the derivative of the vertex by the upper neighbour, by hand
    below, peak, above = heatmaps.detach()[0, 0, 1:4, 2, 2].log()
    curvature = below - 2 * peak + above
    by_log = -0.5 / curvature - 0.5 * (below - above) / curvature**2
    torch.testing.assert_close(analytic[0, 0, 3, 2, 2], by_log / above.exp(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("subvoxel", [False, True])
def test_layouts(subvoxel: bool) -> None:
    assert_layouts_agree(lambda h: heatmap_argmax_3d(h, subvoxel=subvoxel), torch.rand(2, 3, 4, 5, 6))


@pytest.mark.parametrize("shape", [(0, 3, 2, 2, 2), (2, 0, 2, 2, 2)])
def test_no_maps(shape: tuple[int, ...]) -> None:
    heatmaps = torch.zeros(shape, requires_grad=True)
    peaks = heatmap_argmax_3d(heatmaps, subvoxel=True)
    assert peaks.index.shape == peaks.center.shape == (*shape[:2], 3)
    (gradient,) = torch.autograd.grad(peaks.value.sum(), heatmaps)
    assert gradient.shape == shape


@pytest.mark.parametrize("subvoxel", [False, True])
def test_compile_and_fake_tensors(subvoxel: bool) -> None:
    heatmaps = torch.rand(2, 3, 4, 5, 6, requires_grad=True)
    assert_traceable(lambda h: tuple(heatmap_argmax_3d(h, subvoxel=subvoxel)), heatmaps)


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="int64"):
        heatmap_argmax_3d(torch.zeros(1, 1, 2, 2, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="list"):
        heatmap_argmax_3d([1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(1, 2, 2, 2\)"):
        heatmap_argmax_3d(torch.zeros(1, 2, 2, 2))
    with pytest.raises(ValueError, match=r"\(1, 2, 0, 2, 2\)"):
        heatmap_argmax_3d(torch.zeros(1, 2, 0, 2, 2))
