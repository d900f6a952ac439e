import pytest
import torch

from focuskernels import roi_gather_3d
from focusnet.config import ModelConfig
from focusnet.errors import FocusNetError
from focusnet.model import MAIN_NETWORKS, FocusNet, SNet

#: Largest difference between two ways of computing, as a share of the norm of each output and gradient. In float32 a
#: few voxels fall on the other side of a ReLU's kink, or of a tie in max-pooling: 1.4e-3 was the most in nine trials,
#: 3e-6 without such a voxel.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-2}

SMALL = {"aspp_growth": 4, "aspp_bottleneck": 8, "sos_width": 4, "dilated_blocks": 1}


def small_config(**changes) -> ModelConfig:
    return ModelConfig(**{"widths": [[4], [8, 8]], **SMALL, **changes})


@pytest.mark.parametrize(
    ("widths", "downsampling"),
    [
        ([[4], [8, 8]], [(1, 2, 2)]),
        ([[4], [8, 8]], [(2, 2, 2)]),
        ([[4], [8, 8], [8, 8]], [(1, 2, 2), (2, 2, 2)]),
        ([[4], [8], [8], [8]], [(1, 2, 2), (2, 2, 2), (2, 2, 2)]),
        ([[4], [8], [8], [8], [8]], [(1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2)]),
    ],
)
def test_snet_keeps_the_size_with_one_to_four_downsamplings(widths, downsampling) -> None:
    network = SNet(small_config(widths=widths, downsampling=downsampling), classes=3)
    for shape in [(8, 16, 16), (5, 13, 17)]:
        output = network(torch.randn(2, 1, *shape))
        assert output.logits.shape == (2, 3, *shape)
        assert output.features.shape == output.stem.shape == (2, 4, *shape)


def test_the_papers_layout() -> None:
    network = FocusNet(ModelConfig(), organs=9, roi_sizes=[(8, 16, 16)] * 3)
    convolutions = [m for m in network.snet.modules() if isinstance(m, torch.nn.Conv3d)]
    dilations = [c.dilation for c in convolutions if c.dilation != (1, 1, 1)]
    # two blocks with in-plane dilation 2, then the four branches of DenseASPP
    assert dilations == [(1, 2, 2)] * 2 + [(1, 3, 3), (1, 6, 6), (1, 12, 12), (1, 18, 18)]
    assert network.snet.context[-1].out_channels == 64 + 4 * 32
    assert network.snet.head.out_channels == 10
    first = network.sos[0].blocks[0]
    assert first.conv1.in_channels == 32 + 32 + 1 + 1


def test_bad_layout_is_named() -> None:
    with pytest.raises(FocusNetError, match="model.widths lists 1"):
        SNet(small_config(widths=[[4]]), classes=2)


@pytest.mark.parametrize("sos_input", ["features", "raw"])
def test_gradients_reach_every_part_end_to_end(sos_input: str) -> None:
    torch.manual_seed(0)
    network = FocusNet(small_config(sos_input=sos_input), organs=4, roi_sizes=[(4, 6, 6), (3, 5, 7)])
    output = network(torch.randn(2, 1, 8, 16, 16))
    assert [tuple(logits.shape) for logits in output.roi_logits] == [(2, 1, 4, 6, 6), (2, 1, 3, 5, 7)]
    sum(logits.square().sum() for logits in output.roi_logits).backward()
    reached = {name.split(".")[0] for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    # the raw crop alone carries no gradient to what found it
    assert reached == ({"snet", "sol", "sos"} if sos_input == "features" else {"sos"})


def test_roi_logits_belong_to_the_peak() -> None:
    torch.manual_seed(0)
    network = FocusNet(small_config(), organs=2, roi_sizes=[(4, 6, 6)]).eval()
    image = torch.randn(1, 1, 8, 16, 16)
    output = network(image)
    peak = output.peaks[0, 0]
    assert output.heatmaps[0, 0][tuple(peak)] == output.heatmaps[0, 0].max()
    centers = torch.cat([torch.zeros(1, dtype=peak.dtype), peak])[None]
    (again,) = network.segment_rois([0], image, output.snet, output.heatmaps, centers)
    torch.testing.assert_close(again[None], output.roi_logits[0])


def test_rois_in_any_order_and_number() -> None:
    torch.manual_seed(0)
    network = FocusNet(small_config(), organs=4, roi_sizes=[(4, 6, 6), (3, 5, 7)]).eval()
    image = torch.randn(2, 1, 8, 16, 16)
    snet = network.snet(image)
    heatmaps = network.locate(snet).sigmoid()
    centers = torch.tensor([[1, 4, 5, 6], [0, 2, 9, 9], [0, 3, 3, 3]])
    together = network.segment_rois([1, 0, 1], image, snet, heatmaps, centers)
    for organ, center, found in zip([1, 0, 1], centers, together, strict=True):
        sources = [snet.features, snet.stem, image, heatmaps[:, organ : organ + 1]]
        alone = network.sos[organ](roi_gather_3d(sources, center[None], network.roi_sizes[organ]))
        torch.testing.assert_close(found, alone[0])
    assert network.segment_rois([], image, snet, heatmaps, centers[:0]) == []


def test_without_small_organs_it_is_snet() -> None:
    network = FocusNet(small_config(), organs=2, roi_sizes=[])
    output = network(torch.randn(1, 1, 4, 8, 8))
    assert output.heatmaps.shape == (1, 0, 4, 8, 8) and output.roi_logits == []


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_both_backends_agree(norm: str, dtype: torch.dtype) -> None:
    networks = [
        FocusNet(small_config(norm=norm, backend=backend), organs=4, roi_sizes=[(4, 6, 6), (3, 5, 7)]).to(dtype)
        for backend in ("fused", "reference")
    ]
    networks[1].load_state_dict(networks[0].state_dict())
    image = torch.randn(2, 1, 8, 16, 16, dtype=dtype)
    results, peaks = [], []
    for network in networks:
        output = network(image)
        outputs = [*output.snet, output.heatmaps, *output.roi_logits]
        sum(t.square().mean() for t in outputs).backward()
        results.append([*outputs, *(p.grad for p in network.parameters())])
        peaks.append(output.peaks)
    assert torch.equal(*peaks)
    for fused, reference in zip(*results, strict=True):
        assert (fused - reference).norm() <= BOUNDS[dtype] * reference.norm()


@pytest.mark.parametrize("training", [True, False])
def test_maps_stay_in_autocast_dtype_and_channels_last(training: bool) -> None:
    network = SNet(small_config(), 4).to(memory_format=torch.channels_last_3d).train(training)
    seen = {}
    for name, module in network.named_modules():
        if name and not isinstance(module, (torch.nn.Sequential, torch.nn.ModuleList)):
            module.register_forward_hook(lambda m, i, out, name=name: seen.update({name: out}))
    with torch.autocast("cpu", torch.bfloat16):
        output = network(torch.randn(2, 1, 4, 12, 12))
    maps = {name: value for name, value in {**seen, **output._asdict()}.items() if value.dim() == 5}
    assert {"encoder.0.0", "decoder.0", "decoder.0.conv2", "features", "stem", "logits"} <= set(maps)
    for name, value in maps.items():
        assert value.dtype == torch.bfloat16, name
        assert value.is_contiguous(memory_format=torch.channels_last_3d), name


@pytest.mark.parametrize("network", ["unet", "deeplab"])
@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_networks_in_the_place_of_snet(network: str, norm: str) -> None:
    torch.manual_seed(0)
    widths = [[4, 8], [8, 8], [8, 16]]
    config = small_config(network=network, norm=norm, widths=widths, downsampling=[(1, 2, 2), (2, 2, 2)])
    model = FocusNet(config, organs=2, roi_sizes=[(4, 6, 6)])
    for shape in [(8, 16, 16), (5, 13, 17)]:
        output = model(torch.randn(1, 1, *shape))
        assert output.snet.logits.shape == (1, 3, *shape) and output.heatmaps.shape == (1, 1, *shape)
    (output.snet.logits.square().mean() + output.roi_logits[0].square().mean()).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert not without - {name for name in without if name.startswith("sol.")}, without


@pytest.mark.parametrize("network", ["unet", "deeplab"])
def test_networks_in_the_place_of_snet_by_stock_pytorch(network: str) -> None:
    torch.manual_seed(0)
    widths = [[4, 8], [8, 8]]
    fused = MAIN_NETWORKS[network](small_config(network=network, widths=widths), 3).double()
    plain = MAIN_NETWORKS[network](small_config(network=network, widths=widths, backend="reference"), 3).double()
    plain.load_state_dict(fused.state_dict())
    image = torch.randn(1, 1, 6, 12, 12, dtype=torch.float64)
    for one, other in zip(fused(image), plain(image), strict=True):
        assert (one - other).norm() <= BOUNDS[torch.float64] * other.norm()
