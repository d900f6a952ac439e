"""Windows, fusion and ROIs, on a stand-in network whose answers are known."""

import pytest
import torch
from torch import Tensor, nn

from focuskernels import roi_gather_3d
from focusnet.inference import segment, window_starts
from focusnet.model import SNetOutput


class StandInSNet(nn.Module):
    strides = ((1, 2, 2),)

    def __init__(self) -> None:
        super().__init__()
        self.windows: list[tuple[int, ...]] = []

    def forward(self, image: Tensor) -> SNetOutput:
        self.windows.append(tuple(image.shape[2:]))
        logits = torch.cat([torch.full_like(image, 0.5), image, torch.full_like(image, -9.0)], dim=1)
        return SNetOutput(logits, image, image)


class StandIn(nn.Module):
    """Class 1 where the image exceeds 0.5; its heat map peaks where the image does; SOS: image above 5."""

    def __init__(self) -> None:
        super().__init__()
        self.snet, self.roi_sizes = StandInSNet(), [(4, 6, 6)]

    def locate(self, snet: SNetOutput) -> Tensor:
        return (snet.features / 10).clamp(0, 1)

    def segment_rois(self, organs, image, snet, heatmaps, centers) -> list[Tensor]:
        assert list(organs) == [0]
        return [(roi_gather_3d([image], centers, self.roi_sizes[0])[0] - 5) * 4]


def test_an_organ_longer_than_a_window_is_whole() -> None:
    network = StandIn()
    network.roi_sizes = [(16, 6, 6)]
    image = torch.zeros(24, 16, 16)
    image[6:18, 7:9, 7:9] = 8.0
    image[12, 8, 8] = 9.0
    labels = run(network, image).labels
    assert torch.equal(labels == 2, image > 5)
    assert network.snet.windows[-1] == (16, 16, 16)


def run(network, image, parts=("snet", "sol", "sos"), min_peak=0.2):
    return segment(network, image, [2], window=(8, 16, 16), overlap=0.5, min_peak=min_peak, parts=parts)


def image_with_organs(shape, corner):
    image = torch.zeros(shape)
    image[3:6, 4:9, 4:9] = 2.0
    z, y, x = corner
    image[z : z + 2, y : y + 3, x : x + 3] = 8.0
    image[z, y + 1, x + 1] = 9.0
    return image


@pytest.mark.parametrize("shape", [(8, 16, 16), (7, 15, 13), (19, 37, 29), (3, 40, 9)])
def test_windows_cover_any_volume(shape) -> None:
    network = StandIn()
    image = torch.zeros(shape)
    image[1:3, 2:5, 3:7] = 2.0
    result = run(network, image, parts=("snet",))
    assert torch.equal(result.labels, (image > 1).to(torch.uint8))
    assert result.peaks.shape == (0, 3)


@pytest.mark.parametrize("corner", [(10, 20, 20), (0, 0, 0), (17, 34, 26), (9, 0, 25)])
def test_small_organ_is_found_wherever_it_lies(corner) -> None:
    image = image_with_organs((19, 37, 29), corner)
    result = run(StandIn(), image)
    expected = (image > 1).to(torch.uint8)
    expected[image > 5] = 2
    assert torch.equal(result.labels, expected)
    z, y, x = corner
    assert result.peaks[0].tolist() == [z, y + 1, x + 1]
    assert result.confidence[2] > 0.99
    assert result.empty_rois == []


def test_low_peak_leaves_it_to_snet() -> None:
    image = image_with_organs((8, 16, 16), (1, 10, 10))
    result = run(StandIn(), image, min_peak=0.95)
    assert not (result.labels == 2).any()
    assert (result.labels[image > 5] == 1).all()


def test_a_branch_that_finds_nothing_leaves_it_to_snet() -> None:
    """The peak lies where there is no organ: what S-Net says there and elsewhere stays."""
    image = image_with_organs((8, 16, 16), (1, 10, 10)).clamp(max=4.5)
    result = run(StandIn(), image)
    assert result.empty_rois == [0]
    assert torch.equal(result.labels, (image > 1).to(torch.uint8))


def test_one_window_runs_once() -> None:
    network = StandIn()
    run(network, image_with_organs((8, 16, 16), (1, 10, 10)))
    assert network.snet.windows == [(8, 16, 16)]


def test_starts_reach_both_ends() -> None:
    starts = window_starts((20, 16, 33), (8, 16, 16), 0.5)
    assert {z for z, _, _ in starts} == {0, 4, 8, 12}
    assert {y for _, y, _ in starts} == {0}
    assert min(x for *_, x in starts) == 0 and max(x for *_, x in starts) == 17


def test_only_the_largest_part_of_an_organ_stays() -> None:
    image = torch.zeros(8, 16, 16)
    image[1:4, 2:6, 2:6] = 1.0
    image[6, 12:14, 12:14] = 1.0
    settings = {"window": (8, 16, 16), "overlap": 0.5, "min_peak": 0.2, "parts": ("snet",)}
    both = segment(StandIn(), image, [2], **settings).labels
    one = segment(StandIn(), image, [2], largest_component=True, **settings).labels
    assert both[6, 12, 12] == 1
    assert one[6, 12, 12] == 0
    assert torch.equal(one[:5], both[:5])
