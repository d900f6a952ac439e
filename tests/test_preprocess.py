"""Body crop, resampling to the prepared grid, and back."""

from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import torch

from focusnet.config import DataConfig
from focusnet.data.images import Grid, Volume, read_image, read_labels
from focusnet.data.preprocess import body_box, normalize, prepare_image, reorient, restore_labels
from tests.real_data import REAL, needs_real_data

SHAPE = (30, 60, 70)
SPACING = (3.0, 2.0, 2.0)
BODY = (slice(0, 30), slice(12, 40), slice(15, 55))


def head(background: int = -1024) -> np.ndarray:
    array = np.full(SHAPE, background, np.int16)
    array[BODY] = 20
    array[10:20, 20:30, 25:45] = -1000  # an airway
    return array


def volume(array: np.ndarray) -> Volume:
    return Volume(array, Grid(SHAPE, SPACING, (-70.0, -60.0, 10.0)))


def bounds(box: tuple[slice, ...]) -> list[tuple[int, int]]:
    return [(side.start, side.stop) for side in box]


@pytest.mark.parametrize("background", [-1024, -1000, -3024])
def test_the_body_box_is_tight_with_its_margin(background: int) -> None:
    found = bounds(body_box(volume(head(background)), margin_mm=10.0))
    for (start, stop), side, spacing, size in zip(found, BODY, SPACING, SHAPE, strict=True):
        margin = 10 / spacing
        assert max(0, side.start - margin - 3) <= start <= max(0, side.start - margin + 1)
        assert min(size, side.stop + margin - 1) <= stop <= min(size, side.stop + margin + 3)


def test_couch_and_wires_are_cut_off() -> None:
    array = head()
    without = body_box(volume(array), 4.0)
    array[:, 44:48, 2:68] = 100  # a couch behind the body
    array[:, 40:44, 30:34] = 50  # that touches it
    array[5, 0:12, 3] = 3000
    assert body_box(volume(array), 4.0)[2] == without[2]
    assert body_box(volume(array), 4.0)[0] == without[0]


def test_an_empty_volume_is_kept_whole() -> None:
    for array in (np.full(SHAPE, -1024, np.int16), np.full(SHAPE, -3024.0, np.float32)):
        assert bounds(body_box(volume(array))) == [(0, size) for size in SHAPE]
    assert prepare_image(volume(np.full(SHAPE, -1024, np.int16)), DataConfig()).array.max() == -1024


def test_thin_parts_of_a_masked_ct_are_kept_along_z() -> None:
    array = np.full(SHAPE, -1000, np.int16)
    array[10:, 12:40, 15:55] = 20
    array[:10, 25:29, 30:34] = 30  # only the cord was kept below the neck
    assert body_box(volume(array), 0.0)[0] == slice(0, 30)


def test_hu_stay_in_range_and_are_not_smeared_by_padding() -> None:
    array = head(-3024)
    array[15, 35, 40] = 30_000
    prepared = prepare_image(volume(array), DataConfig(hu_range=(-1024, 3071)))
    assert prepared.array.dtype == np.int16
    assert prepared.array.min() >= -1024
    assert prepared.array.max() <= 3071
    assert prepared.grid.spacing == (2.5, 1.0, 1.0)
    for extreme in ((-1e9, 1e9), (-200.5, 300.5)):
        values = prepare_image(volume(array), DataConfig(hu_range=extreme)).array
        assert values.min() >= extreme[0]
        assert values.max() <= extreme[1]


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("signs", list(product((1, -1), repeat=3)))
def test_every_storage_order_gives_the_same_patient(order: tuple[int, ...], signs: tuple[int, ...]) -> None:
    tilt = 0.2
    turn = np.array([[np.cos(tilt), -np.sin(tilt), 0], [np.sin(tilt), np.cos(tilt), 0], [0, 0, 1]])
    upright = Volume(
        np.arange(24, dtype=np.int16).reshape(2, 3, 4),
        Grid((2, 3, 4), (3.0, 2.0, 1.0), (1, 2, 3), tuple(turn.ravel())),
    )
    # store the same voxels with permuted and flipped axes
    array = upright.array.transpose(order)
    array = array[tuple(slice(None, None, sign) for sign in signs)]
    first = [0.0, 0.0, 0.0]
    for axis, sign in zip(order, signs, strict=True):
        first[axis] = 0 if sign > 0 else upright.grid.shape[axis] - 1
    columns = np.stack([turn[:, 2 - axis] * sign for axis, sign in zip(order, signs, strict=True)][::-1], axis=1)
    shape, spacing = ([values[axis] for axis in order] for values in (upright.grid.shape, upright.grid.spacing))
    stored = Volume(array, Grid(tuple(shape), tuple(spacing), tuple(upright.grid.point(first)), tuple(columns.ravel())))
    found = reorient(stored)
    np.testing.assert_array_equal(found.array, upright.array)
    assert not found.grid.difference(upright.grid, 1e-9)


def test_labels_come_back_on_exactly_the_input_grid() -> None:
    original = Grid(SHAPE, SPACING, (-70.0, -60.0, 10.0), (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0))
    stored = Volume(head(), original)
    prepared = prepare_image(stored, DataConfig(spacing=(1.5, 1.0, 1.0)))
    restored = restore_labels((prepared.array > -300).astype(np.uint8), prepared.grid, original)
    assert restored.shape == SHAPE
    assert restored.dtype == np.uint8
    truth = stored.array > -300
    assert 2 * (restored & truth).sum() / (restored.sum() + truth.sum()) > 0.97
    assert (
        restore_labels(np.ones((4, 4, 4), np.uint8), Grid((4, 4, 4), origin=(500.0, 0.0, 0.0)), original) == 0
    ).all()


def test_normalisation_is_the_same_for_arrays_and_tensors() -> None:
    hu = np.array([-3000, -1024, -100, 900, 3071, 5000], np.int16)
    expected = np.array([-0.924, -0.924, 0.0, 1.0, 3.171, 3.171], np.float32)
    array, tensor = normalize(hu, DataConfig()), normalize(torch.from_numpy(hu), DataConfig())
    assert array.dtype == np.float32
    assert tensor.dtype == torch.float32
    np.testing.assert_allclose(array, expected, rtol=1e-6)
    np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-6)


@needs_real_data
@pytest.mark.parametrize("name", ["pt_4", "pt_151", "pt_170"])
def test_organs_of_real_cts_survive_the_crop(name: str) -> None:
    folder: Path = REAL / "openkbp" / "train" / name
    ct = read_image(folder / "img.nrrd")
    box = body_box(ct)
    for path in sorted((folder / "structures").glob("*.nrrd")):
        mask = read_labels(path).array > 0
        assert mask[box].sum() > 0.97 * mask.sum(), path.name
