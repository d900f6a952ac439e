"""Metrics of two masks against hand calculations, brute force and other packages."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_erosion, gaussian_filter
from scipy.spatial.distance import cdist

from focusnet.metrics import (
    bounding_box,
    center_distance_mm,
    dice,
    hausdorff95,
    relative_volume_difference,
    volume_diagonal,
)

SPACING = (2.5, 0.9, 1.1)


def _blob(seed: int, shape: tuple[int, int, int] = (12, 20, 18), share: float = 0.1) -> np.ndarray:
    smooth = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5)
    return smooth > np.quantile(smooth, 1 - share)


def _cube(start: tuple[int, int, int], side: int = 4, shape: tuple[int, int, int] = (16, 16, 16)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(s, s + side) for s in start)] = True
    return mask


def _brute_force(truth: np.ndarray, prediction: np.ndarray, spacing: tuple[float, ...]) -> float:
    points = []
    for mask in (truth, prediction):
        padded = np.pad(mask, 1)
        inner = np.ones_like(mask)
        for axis in range(3):
            for step in (-1, 1):
                inner &= np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1]
        points.append(np.argwhere(mask & ~inner) * np.asarray(spacing))
    distances = cdist(*points)
    return max(np.percentile(distances.min(1), 95), np.percentile(distances.min(0), 95))


def test_dice_of_half_overlapping_cubes() -> None:
    assert dice(_cube((4, 4, 4)), _cube((4, 4, 6))) == pytest.approx(0.5)
    assert dice(_cube((4, 4, 4)), _cube((4, 4, 4))) == 1
    assert dice(_cube((4, 4, 4)), np.zeros((16, 16, 16), bool)) == 0


def test_dice_takes_label_values_as_masks() -> None:
    truth, prediction = _cube((4, 4, 4)).astype(np.uint8) * 255, _cube((4, 4, 6)).astype(np.uint8)
    assert dice(truth, prediction) == pytest.approx(0.5)


@pytest.mark.parametrize(("axis", "expected"), [(0, 5.0), (1, 1.8), (2, 2.2)])
def test_hausdorff_measures_a_shift_in_mm_along_its_axis(axis: int, expected: float) -> None:
    start = [4, 4, 4]
    start[axis] += 2
    assert hausdorff95(_cube((4, 4, 4)), _cube(tuple(start)), SPACING) == pytest.approx(expected)


def test_hausdorff_takes_the_larger_direction() -> None:
    small, large = _cube((6, 6, 6), side=2), _cube((6, 6, 6), side=2)
    large[6:8, 6:8, 6:14] = True  # the small one lies inside, so that one direction is 0
    assert hausdorff95(small, large, (1, 1, 1)) == hausdorff95(large, small, (1, 1, 1)) == pytest.approx(6.0)


def test_hausdorff_percentile_interpolates_linearly() -> None:
    truth, prediction = np.zeros((2, 1, 1, 21), bool)
    truth[0, 0, 0] = True
    prediction[0, 0, :] = True  # distances 0..20 of which the 95th percentile is 19
    assert hausdorff95(truth, prediction, (1, 1, 1)) == pytest.approx(19.0)
    prediction[0, 0, 20] = False  # distances 0..19: 0.95 * 19
    assert hausdorff95(truth, prediction, (1, 1, 1)) == pytest.approx(18.05)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 10_000), st.tuples(*[st.floats(0.5, 5)] * 3))
def test_hausdorff_equals_brute_force(first: int, second: int, spacing: tuple[float, float, float]) -> None:
    truth, prediction = _blob(first), _blob(second, share=0.05)
    assert hausdorff95(truth, prediction, spacing) == pytest.approx(_brute_force(truth, prediction, spacing))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.tuples(*[st.tuples(st.integers(1, 9), st.integers(1, 9))] * 3))
def test_the_volume_around_the_masks_changes_nothing(seed: int, margins: tuple[tuple[int, int], ...]) -> None:
    # they touch the border, where outside counts as background
    truth, prediction = _blob(seed), _blob(seed + 1)
    padded = [np.pad(mask, margins) for mask in (truth, prediction)]
    assert hausdorff95(*padded, SPACING) == hausdorff95(truth, prediction, SPACING)
    assert dice(*padded) == dice(truth, prediction)
    assert center_distance_mm(*padded, SPACING) == pytest.approx(center_distance_mm(truth, prediction, SPACING))


def test_a_missed_or_spurious_organ_costs_the_volume_diagonal() -> None:
    organ, empty = _cube((4, 4, 4)), np.zeros((16, 16, 16), bool)
    diagonal = 16 * math.sqrt(sum(side**2 for side in SPACING))
    assert volume_diagonal(organ.shape, SPACING) == pytest.approx(diagonal)
    assert hausdorff95(organ, empty, SPACING) == hausdorff95(empty, organ, SPACING) == pytest.approx(diagonal)
    assert relative_volume_difference(organ, empty) == -1


def test_nothing_against_nothing_has_no_value() -> None:
    empty = np.zeros((4, 4, 4), bool)
    values = dice(empty, empty), hausdorff95(empty, empty, SPACING), center_distance_mm(empty, empty, SPACING)
    assert all(math.isnan(value) for value in values)
    assert math.isnan(relative_volume_difference(empty, _cube((0, 0, 0), shape=(4, 4, 4))))


def test_center_distance_and_volume_difference() -> None:
    assert center_distance_mm(_cube((4, 4, 4)), _cube((5, 4, 7)), SPACING) == pytest.approx(math.hypot(2.5, 3.3))
    assert relative_volume_difference(_cube((4, 4, 4)), _cube((4, 4, 4), side=5)) == pytest.approx(125 / 64 - 1)


def test_bounding_box() -> None:
    assert bounding_box(_cube((3, 5, 7))) == (slice(3, 7), slice(5, 9), slice(7, 11))
    assert bounding_box(np.zeros((3, 4, 5), bool)) is None


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(4, 4, 4\) and \(4, 4, 5\)"):
        hausdorff95(np.ones((4, 4, 4)), np.ones((4, 4, 5)), SPACING)
    with pytest.raises(ValueError, match="needs 3"):
        hausdorff95(np.ones((4, 4, 4)), np.ones((4, 4, 4)), (1, 1))


@pytest.mark.parametrize("seed", range(4))
def test_hausdorff_equals_monai(seed: int) -> None:
    torch, monai = pytest.importorskip("torch"), pytest.importorskip("monai.metrics")
    masks = _blob(seed), _blob(seed + 50)
    batch = [torch.from_numpy(mask)[None, None] for mask in masks]
    theirs = monai.compute_hausdorff_distance(*batch, include_background=True, percentile=95, spacing=SPACING)
    assert hausdorff95(*masks, SPACING) == pytest.approx(theirs.item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:surface_distance")
@pytest.mark.parametrize("seed", range(4))
def test_hausdorff_is_within_a_voxel_of_surface_distance(seed: int) -> None:
    surface_distance = pytest.importorskip("surface_distance")
    masks = [np.pad(binary_erosion(_blob(s, share=0.3)), 2) for s in (seed, seed + 50)]
    distances = surface_distance.compute_surface_distances(*masks, spacing_mm=SPACING)
    theirs = surface_distance.compute_robust_hausdorff(distances, 95)
    # its surface runs between voxel centres and is weighted by area; ours is made of voxels of the mask
    assert hausdorff95(*masks, SPACING) == pytest.approx(theirs, abs=math.hypot(*SPACING))
