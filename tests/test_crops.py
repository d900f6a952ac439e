import numpy as np
import pytest
import torch
from scipy.ndimage import center_of_mass

from focusnet.config import AugmentConfig, Config
from focusnet.data.augment import Warp, change_intensity, random_warp, thick_slices
from focusnet.data.crops import CropDataset, cut, load_case
from focusnet.errors import FocusNetError
from focusnet.prepare import prepare
from tests.tiny import ORGANS, tiny_config, write_data

STILL = {"rotation_deg": (0, 0, 0), "zoom": (0, 0, 0)}
QUIET = {"noise_hu": 0, "shift_hu": 0}
NOTHING = AugmentConfig(**STILL, **QUIET)
AFFINE = AugmentConfig(rotation_deg=(20, 10, 10), zoom=(0.2, 0.2, 0.2))
ELASTIC = AugmentConfig(**STILL, **QUIET, elastic_mm=4, elastic_grid_mm=30)
EVERYTHING = AugmentConfig(elastic_mm=4, elastic_grid_mm=24, contrast=0.2, blur_mm=2, slice_mm=9, mirror=True)
SPACING = (1.5, 1.0, 1.0)


def warp(augment: AugmentConfig, seed: int, size=(40, 64, 64), center=(30.5, 60.5, 60.5)) -> Warp:
    return random_warp(size, np.array(center), augment, SPACING, np.random.default_rng(seed))


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
    unmoved = random_warp((4, 6, 8), center, NOTHING, plan.spacing, np.random.default_rng(0))
    hu, label = cut(image, labels, unmoved, fill=-1024)
    assert np.array_equal(hu.numpy(), image[5:9, 7:13, 8:16])
    assert np.array_equal(label.numpy(), labels[5:9, 7:13, 8:16])
    assert change_intensity(hu, NOTHING, plan.spacing, np.random.default_rng(0)) is hu
    assert np.array_equal(unmoved.to_crop(center[None]), [[1.5, 2.5, 3.5]])


def test_beyond_the_volume_is_air(prepared) -> None:
    plan, cache = prepared
    image, labels = load_case(cache, plan.cases[0])
    hu, label = cut(image, labels, Warp((6, 6, 6), np.array([0.5, 1.5, 1.5]), np.eye(3)), fill=-1024)
    assert (hu[:2] == -1024).all() and not label[:2].any()
    assert np.array_equal(hu[2:, 1:, 1:].numpy(), image[:4, :5, :5])
    far, _ = cut(image, labels, Warp((4, 4, 4), np.array([-50.0, 0, 0]), np.eye(3)), fill=-1024)
    assert (far == -1024).all()


@pytest.mark.parametrize(
    "augment",
    [NOTHING, AFFINE, AugmentConfig(mirror=True), EVERYTHING],
    ids=["plain", "affine", "mirrored", "everything"],
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


def balls(radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Labels (61, 121, 121) of balls, radius in mm, and their centres (z, y, x)."""
    labels = np.zeros((61, 121, 121), np.uint8)
    steps = np.meshgrid(np.arange(18, 44, 8), np.arange(38, 84, 15), np.arange(38, 84, 15), indexing="ij")
    centers = np.stack(steps, axis=-1).reshape(-1, 3)
    box = np.indices((7, 11, 11)).transpose(1, 2, 3, 0) - (3, 5, 5)
    ball = ((box * SPACING) ** 2).sum(axis=-1) <= radius**2
    for value, (z, y, x) in enumerate(centers, start=1):
        labels[z - 3 : z + 4, y - 5 : y + 6, x - 5 : x + 6][ball] = value
    return labels, centers


@pytest.mark.parametrize("augment", [AFFINE, ELASTIC, EVERYTHING], ids=["affine", "elastic", "everything"])
def test_balls_follow_their_centers_and_none_is_lost(augment) -> None:
    labels, centers = balls(5.5)
    image = (balls(4.0)[0] > 0) * np.float32(1000)  # a lens is as large
    checked, before = 0, np.bincount(labels.ravel())[1]
    for seed in range(3):
        one = warp(augment, seed)
        hu, found = (tensor.numpy() for tensor in cut(image, labels, one, fill=0))
        places = one.to_crop(centers)
        whole = ((places > 7) & (places < np.array(one.size) - 8)).all(axis=1)
        values = np.flatnonzero(whole) + 1
        assert np.abs(center_of_mass(hu, found, values) - places[whole]).max() < 0.1
        # nearest neighbours alone are off by up to half a voxel
        off = np.abs(center_of_mass(found > 0, found, values) - places[whole])
        assert off.max() < 0.6 and off.mean() < 0.2
        assert np.bincount(found.ravel(), minlength=len(centers) + 1)[values].min() > before / 2
        checked += len(values)
    assert checked > 80


def test_the_strongest_deformation_does_not_fold_and_is_undone() -> None:
    one = warp(AugmentConfig(**STILL, elastic_mm=5, elastic_grid_mm=30), 0)
    signs = np.indices(one.control.shape[:3]).sum(axis=0)[..., None] % 2 * 2 - 1
    for control in (one.control, np.abs(one.control).max(axis=(0, 1, 2)) * signs):
        strong = Warp(one.size, one.center, np.diag([0.9, 1.2, 1.1]), control, one.pitch)
        voxels = strong.voxels().numpy()
        steps = np.stack([np.diff(voxels, axis=axis)[:39, :63, :63] for axis in range(3)], axis=-1)
        assert np.linalg.det(steps).min() > 0.2
        index = np.indices(strong.size).transpose(1, 2, 3, 0)
        some = np.s_[::3, ::5, ::5]
        found = strong.to_crop(voxels[some].reshape(-1, 3).astype(float))
        assert np.abs(found - index[some].reshape(-1, 3)).max() < 0.01


def test_rotation_zoom_and_deformation_are_one_resampling() -> None:
    shape = (61, 121, 121)
    ramp = (np.indices(shape) * np.array([5, 3, 2])[:, None, None, None]).sum(axis=0).astype(np.int16)
    one = warp(EVERYTHING, 1)
    hu, _ = cut(ramp, np.zeros(shape, np.uint8), one, fill=0)
    voxels = one.voxels()
    inside = ((voxels >= 0) & (voxels <= torch.tensor(shape) - 1)).all(dim=-1)
    torch.testing.assert_close(hu[inside], (voxels @ torch.tensor([5.0, 3.0, 2.0]))[inside], rtol=0, atol=0.01)
    assert inside.float().mean() > 0.9


def test_deformations_that_could_fold_are_refused() -> None:
    config = Config()
    config.train.augment.elastic_mm = 8.1
    with pytest.raises(FocusNetError, match=r"elastic_mm is 8.1, expected at most a sixth of .*elastic_grid_mm, 48.0"):
        config.check()


def test_contrast_leaves_water_and_air() -> None:
    hu = torch.tensor([[[-1000.0, -50.0, 0.0, 50.0, 1000.0]]])
    found = change_intensity(hu, AugmentConfig(**QUIET, contrast=0.2), SPACING, np.random.default_rng(0))
    factor = found[0, 0, 4].item() / 1000
    assert 0.8 < factor < 1.2 and factor != 1
    torch.testing.assert_close(found, torch.where(hu > 0, hu * factor, hu))


def test_a_quarter_of_the_crops_is_blurred_in_plane() -> None:
    hu = torch.zeros(3, 9, 9)
    hu[1, 4, 4] = 1000
    crops = [
        change_intensity(hu, AugmentConfig(**QUIET, blur_mm=1.5), SPACING, np.random.default_rng(i)) for i in range(200)
    ]
    blurred = [crop for crop in crops if crop is not hu]
    assert 30 < len(blurred) < 70
    for crop in blurred:
        assert crop.sum().item() == pytest.approx(1000, rel=1e-3) and not crop[0].any() and not crop[2].any()
        torch.testing.assert_close(crop[1], crop[1].T)
    assert min(crop.max() for crop in blurred) < 200


def test_thick_slices() -> None:
    found = thick_slices(count=4, spacing=1, thickness=2, first=-1.5)  # centres 0, 0.5, 2.5, 3
    np.testing.assert_allclose(found[:2], [[2 / 3, 1 / 3, 0, 0], [0.375, 0.375, 0.125, 0.125]])
    np.testing.assert_allclose(found[2:], found[1::-1, ::-1])
    np.testing.assert_allclose(thick_slices(5, 2.5, 2.5, first=0), np.eye(5), atol=1e-12)
    hu = torch.arange(40.0).reshape(40, 1, 1).expand(40, 2, 2) * 10
    augment = AugmentConfig(**QUIET, slice_mm=6)
    crops = [change_intensity(hu, augment, SPACING, np.random.default_rng(i)) for i in range(40)]
    changed = [crop for crop in crops if crop is not hu]
    assert 3 < len(changed) < 20
    for crop in changed:  # a ramp stays one but for its ends
        torch.testing.assert_close(crop[4:-4], hu[4:-4], rtol=0, atol=5)


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
    first, again = dataset(prepared, EVERYTHING), dataset(prepared, EVERYTHING)
    again[3]
    for a, b in zip(first[7], again[7], strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    other = dataset(prepared, EVERYTHING, seed=1)
    assert not torch.equal(first[7].image, other[7].image)


def test_every_case_is_seen_once_per_round(prepared) -> None:
    data = dataset(prepared)
    count = len(data.cases)
    seen = [data.case(i).name for i in range(3 * count)]
    for start in range(0, 3 * count, count):
        assert len(set(seen[start : start + count])) == count


def test_plan_knows_the_organs(prepared) -> None:
    plan, _ = prepared
    assert set(plan.organ_names) == set(ORGANS)
    assert plan.small_organs == ["Eye_L", "Eye_R"]
