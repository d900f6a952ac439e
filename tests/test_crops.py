import numpy as np
import pytest
import torch

from focusnet.config import AugmentConfig
from focusnet.data.crops import CropDataset, cut, load_case
from focusnet.errors import FocusNetError
from focusnet.prepare import prepare
from tests.tiny import ORGANS, tiny_config, write_data

NOTHING = AugmentConfig(rotation_deg=(0, 0, 0), zoom=(0, 0, 0), noise_hu=0, shift_hu=0)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("crops")
    config = tiny_config()
    return prepare(write_data(root / "data"), root / "cache", config.data), root / "cache"


def dataset(prepared, augment=NOTHING, **train):
    plan, cache = prepared
    config = tiny_config(augment=augment, **train)
    return CropDataset(plan, cache, plan.cases, config, length=6, focus=plan.organ_names)


def blob_center(labels: torch.Tensor, value: int) -> torch.Tensor:
    return (labels == value).nonzero().float().mean(dim=0)


def test_an_unaugmented_crop_is_an_exact_copy(prepared) -> None:
    plan, cache = prepared
    image, labels = load_case(cache, plan.cases[0])
    center = np.array([6.5, 9.5, 11.5])
    hu, label = cut(image, labels, center, np.eye(3), (4, 6, 8), fill=-1024)
    assert np.array_equal(hu.numpy(), image[5:9, 7:13, 8:16])
    assert np.array_equal(label.numpy(), labels[5:9, 7:13, 8:16])


def test_beyond_the_volume_is_air(prepared) -> None:
    plan, cache = prepared
    image, labels = load_case(cache, plan.cases[0])
    hu, label = cut(image, labels, np.array([0.5, 1.5, 1.5]), np.eye(3), (6, 6, 6), fill=-1024)
    assert (hu[:2] == -1024).all() and not label[:2].any()
    assert np.array_equal(hu[2:, 1:, 1:].numpy(), image[:4, :5, :5])
    far, _ = cut(image, labels, np.array([-50.0, 0, 0]), np.eye(3), (4, 4, 4), fill=-1024)
    assert (far == -1024).all()


@pytest.mark.parametrize(
    "augment",
    [NOTHING, AugmentConfig(rotation_deg=(20, 10, 10), zoom=(0.2, 0.2, 0.2)), AugmentConfig(mirror=True)],
    ids=["plain", "affine", "mirrored"],
)
def test_centers_follow_the_organs(prepared, augment) -> None:
    plan, _ = prepared
    data, checked = dataset(prepared, augment, crop=(20, 30, 32)), 0
    for index in range(12):
        crop = data[index]
        assert crop.labels.dtype == torch.uint8 and crop.image.shape == (1, 20, 30, 32)
        for organ, name in enumerate(plan.small_organs):
            value = plan.organ_names.index(name) + 1
            if crop.contoured[value]:
                distance = (blob_center(crop.labels, value) - crop.centers[organ]).abs().max()
                assert distance < 0.75
                checked += 1
            else:
                assert crop.centers[organ].isnan().all() and not (crop.labels == value).any()
    assert checked > 12


def test_labels_are_counted_as_the_plan_counts(tmp_path) -> None:
    config = tiny_config(augment=NOTHING, crop=(20, 30, 32))
    config.data.organs = ["Eye_R", "Brainstem"]
    config.data.small_organs = []
    plan = prepare(write_data(tmp_path / "data", 1), tmp_path / "cache", config.data)
    crop = CropDataset(plan, tmp_path / "cache", plan.cases, config, length=1, focus=[])[0]
    assert crop.labels.unique().tolist() == [0, 1, 2]
    assert crop.image[0][crop.labels == 1].mean() == pytest.approx(0.5, abs=0.01)  # 400 HU
    assert crop.image[0][crop.labels == 2].mean() == pytest.approx(0.3, abs=0.01)


def test_mirroring_swaps_left_and_right(prepared) -> None:
    plan, _ = prepared
    data = dataset(prepared, AugmentConfig((0, 0, 0), (0, 0, 0), 0, 0, mirror=True), crop=(20, 30, 32))
    left, right = (plan.organ_names.index(name) + 1 for name in ("Eye_L", "Eye_R"))
    for index in range(12):
        labels = data[index].labels
        if (labels == left).any() and (labels == right).any():
            # LPS: the patient's left has the larger x
            assert blob_center(labels, left)[2] > blob_center(labels, right)[2]


def test_mirroring_without_the_partner_is_refused(prepared) -> None:
    plan, cache = prepared
    import dataclasses

    alone = dataclasses.replace(plan, organs=[organ for organ in plan.organs if organ.name != "Eye_R"])
    config = tiny_config(augment=AugmentConfig(mirror=True))
    with pytest.raises(FocusNetError, match="Eye_R"):
        CropDataset(alone, cache, alone.cases, config, length=1, focus=[])


def test_items_depend_on_seed_and_index_alone(prepared) -> None:
    first, again = (
        dataset(prepared, AugmentConfig(mirror=True)),
        dataset(prepared, AugmentConfig(mirror=True)),
    )
    again[3]
    for a, b in zip(first[7], again[7], strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    other = dataset(prepared, AugmentConfig(mirror=True), seed=1)
    assert not torch.equal(first[7].image, other[7].image)


def test_every_case_is_seen_once_per_round(prepared) -> None:
    data = dataset(prepared)
    count = len(data.cases)
    seen = [data._case(*divmod(i, data.length)).name for i in range(3 * count)]
    for start in range(0, 3 * count, count):
        assert len(set(seen[start : start + count])) == count


def test_plan_knows_the_organs(prepared) -> None:
    plan, _ = prepared
    assert set(plan.organ_names) == set(ORGANS)
    assert plan.small_organs == ["Eye_L", "Eye_R"]
