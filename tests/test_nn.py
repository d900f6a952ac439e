import copy
from typing import Any

import numpy as np
import pytest
import torch
from compare import assert_traceable
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from focuskernels import focal_dice_loss, roi_gather_3d
from focuskernels.nn import (
    DenseASPP3d,
    DilatedConv3d,
    FocalDiceLoss,
    NormAct3d,
    ROIAlign3d,
    ROIGather3d,
    SEResBlock3d,
    SEResidual3d,
)
from focuskernels.reference.nn import to_reference


class PlainNorm(nn.BatchNorm3d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def plain_conv(inputs: int, outputs: int, kernel: tuple[int, ...], dilation: tuple[int, ...] = (1, 1, 1)) -> nn.Conv3d:
    return nn.Conv3d(inputs, outputs, kernel, padding="same", dilation=dilation, bias=False)


class PlainSE(nn.Module):
    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // reduction)
        self.fc2 = nn.Linear(channels // reduction, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(self.fc1(x.mean(dim=(2, 3, 4))).relu()).sigmoid()
        return x * gate[:, :, None, None, None]


class PlainBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> None:
        super().__init__()
        self.norm1, self.conv1 = PlainNorm(inputs), plain_conv(inputs, outputs, kernel)
        self.norm2, self.conv2 = PlainNorm(outputs), plain_conv(outputs, outputs, kernel, dilation)
        self.se = PlainSE(outputs, 4)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(PlainNorm(inputs), plain_conv(inputs, outputs, (1, 1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h))
        return self.se(h) + self.shortcut(x)


class PlainASPP(nn.Module):
    def __init__(self, inputs: int, growth: int, bottleneck: int, dilations: tuple[tuple[int, ...], ...]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                PlainNorm(inputs + i * growth),
                plain_conv(inputs + i * growth, bottleneck, (1, 1, 1)),
                PlainNorm(bottleneck),
                plain_conv(bottleneck, growth, (3, 3, 3), dilation),
            )
            for i, dilation in enumerate(dilations)
        )

    def forward(self, x: Tensor) -> Tensor:
        outputs = [x]
        for branch in self.branches:
            outputs.append(branch(torch.cat(outputs, dim=1)))
        return torch.cat(outputs, dim=1)


def assert_same_module(module: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """Same state, values, gradients and running statistics, in training and in evaluation."""
    module, plain = module.double(), plain.double()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    plain_state = plain.state_dict()
    assert {k: v.shape for k, v in module.state_dict().items()} == {k: v.shape for k, v in plain_state.items()}
    module.load_state_dict(plain_state)
    x = x.double().requires_grad_()
    for mode in (True, True, False):
        module.train(mode)
        plain.train(mode)
        actual, expected = module(x), plain(x)
        torch.testing.assert_close(actual, expected)
        weights = torch.randn_like(expected)
        pairs = zip(
            torch.autograd.grad((actual * weights).sum(), [x, *module.parameters()]),
            torch.autograd.grad((expected * weights).sum(), [x, *plain.parameters()]),
        )
        for a, e in pairs:
            torch.testing.assert_close(a, e)
    torch.testing.assert_close(module.state_dict(), plain.state_dict())


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 8), (4, 8)])
def test_se_res_block_is_the_papers(inputs: int, outputs: int) -> None:
    kernel, dilation = (1, 3, 3), (1, 2, 2)
    module = SEResBlock3d(inputs, outputs, kernel, dilation)
    assert_same_module(module, PlainBlock(inputs, outputs, kernel, dilation), torch.randn(2, inputs, 3, 5, 4))


def nodes_of(y: torch.Tensor) -> list[Any]:
    """The nodes of the graph that y is computed by."""
    found, waiting = [], [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.append(node)
            waiting += [parent for parent, _ in node.next_functions]
    return found


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_se_res_block_keeps_no_normalised_map(norm: str, autocast: bool) -> None:
    block, stored = SEResBlock3d(4, 8, norm=norm), []
    norms = [block.norm1, block.norm2, block.shortcut[0]]
    for module in norms:
        module.register_forward_hook(lambda _m, _x, y: stored.append(StorageWeakRef(y.untyped_storage())))
    x = torch.randn(2, 4, 3, 5, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = block(x)
    assert len(stored) == len(norms)
    assert all(reference.expired() for reference in stored)
    nodes = [node for node in nodes_of(y) if type(node).__name__ == "_DilatedConv3dBackward"]
    assert len(nodes) == 3
    for node in nodes:  # what is computed again lies elsewhere each time
        first, second = node.saved_tensors[0], node.saved_tensors[0]
        assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()
    leaves = [x, *block.parameters()]
    actual = torch.autograd.grad(y.float().square().sum(), leaves)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        h = block.conv2(block.norm2(block.conv1(block.norm1(x))))
        again = block.se(h, block.shortcut(x))
    assert torch.equal(y, again)
    assert all(torch.equal(a, e) for a, e in zip(actual, torch.autograd.grad(again.float().square().sum(), leaves)))


def test_se_res_block_under_checkpoint() -> None:
    block = SEResBlock3d(4, 8, norm="instance")
    x = torch.randn(2, 4, 3, 5, 4, requires_grad=True)
    leaves = [x, *block.parameters()]
    expected = torch.autograd.grad(block(x).square().sum(), leaves)
    actual = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).square().sum(), leaves)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected))


def test_se_res_block_adds_its_input_unchanged() -> None:
    block = SEResBlock3d(4, 4)
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 3, 4, 5)
    assert torch.equal(block(x), x)


def test_dense_aspp_is_a_chain_of_concatenations() -> None:
    dilations = ((1, 3, 3), (1, 6, 6), (2, 1, 12))
    module = DenseASPP3d(6, growth=3, bottleneck=5, dilations=dilations)
    assert module.out_channels == 15
    assert_same_module(module, PlainASPP(6, 3, 5, dilations), torch.randn(2, 6, 3, 7, 8))


def test_dense_aspp_defaults_are_the_papers() -> None:
    module = DenseASPP3d(64)
    assert module.out_channels == 192
    assert [branch[3].dilation for branch in module.branches] == [(1, 3, 3), (1, 6, 6), (1, 12, 12), (1, 18, 18)]
    assert [tuple(branch[1].weight.shape[:2]) for branch in module.branches] == [(64, c) for c in (64, 96, 128, 160)]


def test_norm_act_is_batch_norm_with_relu() -> None:
    assert_same_module(NormAct3d(4), PlainNorm(4), torch.randn(2, 4, 3, 4, 5))
    assert int(NormAct3d(4).num_batches_tracked) == 0


def test_a_map_that_a_norm_refuses_is_not_counted() -> None:
    norm = NormAct3d(4)
    with pytest.raises(TypeError, match="x is torch.float64"):
        norm(torch.randn(2, 4, 3, 4, 5).double())
    assert int(norm.num_batches_tracked) == 0


@pytest.mark.parametrize("norm", ["instance", "group"])
def test_other_norms_hold_weight_and_bias_and_ignore_the_mode(norm: str) -> None:
    module, x = NormAct3d(12, norm, activation=None), torch.randn(2, 12, 3, 4, 5)
    assert set(module.state_dict()) == {"weight", "bias"}
    plain = nn.GroupNorm(12 if norm == "instance" else 4, 12)
    trained = module(x)
    torch.testing.assert_close(trained, plain(x))
    assert torch.equal(module.eval()(x), trained)


def test_dilated_conv_has_the_state_and_start_of_torchs() -> None:
    torch.manual_seed(1)
    module = DilatedConv3d(3, 4, (1, 3, 3), (1, 2, 5), bias=True)
    torch.manual_seed(1)
    plain = nn.Conv3d(3, 4, (1, 3, 3), padding=(0, 2, 5), dilation=(1, 2, 5))
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=0, atol=0)
    x = torch.randn(2, 3, 3, 4, 5)
    torch.testing.assert_close(module(x), plain(x))
    assert DilatedConv3d(3, 4).bias is None


def test_se_residual_adds_the_gated_branch() -> None:
    module, plain = SEResidual3d(8, 4), PlainSE(8, 4)
    module.load_state_dict(plain.state_dict())
    x, residual = torch.randn(2, 2, 8, 3, 4, 5)
    torch.testing.assert_close(module(x, residual), residual + plain(x))
    assert SEResidual3d(2, 4).fc1.out_features == 1


def test_roi_gather_passes_its_arguments_on() -> None:
    sources = [torch.randn(1, 2, 6, 6, 6), torch.randn(1, 1, 3, 3, 3)]
    centers = torch.tensor([[0, 2.5, 0, 4]])
    module = ROIGather3d(4, (3, 4, 5), spatial_scales=[1, 0.5], padding="border")
    expected = roi_gather_3d(sources, centers, 4, (3, 4, 5), spatial_scales=[1, 0.5], padding="border")
    assert torch.equal(module(sources, centers), expected)
    assert ROIGather3d(4)(sources[:1], centers).shape == (1, 2, 4, 4, 4)


def test_focal_dice_loss_passes_its_arguments_on() -> None:
    logits, target = torch.randn(2, 3, 4, 4, 4), torch.randint(0, 3, (2, 4, 4, 4))
    options = {
        "gamma": 1.5,
        "focal_weight": 0.5,
        "dice_weight": 2.0,
        "ignore_index": 2,
        "include_background": False,
        "batch_dice": True,
        "smooth": 0.1,
        "class_reduction": "mean",
    }
    module = FocalDiceLoss(alpha=[1.0, 2.0, 3.0], **options)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    expected = focal_dice_loss(logits, target, alpha=torch.tensor([1.0, 2, 3]), class_mask=mask, **options)
    assert torch.equal(module(logits, target, mask), expected)
    assert not module.state_dict()
    assert "alpha=3 values" in repr(module)
    assert module.double().alpha.dtype == torch.float64


def test_focal_dice_module_writes_the_gradient_over_the_logits() -> None:
    logits = torch.randn(1, 3, 4, 5, 6, requires_grad=True)
    hidden = logits * 2
    FocalDiceLoss(inplace_grad=True)(hidden, torch.randint(0, 3, (1, 4, 5, 6))).backward()
    assert torch.equal(hidden.detach() * 2, logits.grad)


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_networks_train_and_copy(norm: str) -> None:
    network = nn.Sequential(SEResBlock3d(1, 8, norm=norm), DenseASPP3d(8, 4, 4, [(1, 2, 2), 3], norm=norm))
    x = torch.randn(2, 1, 3, 4, 5)
    network(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert torch.equal(copy.deepcopy(network).eval()(x), network.eval()(x))


@pytest.mark.slow
def test_compile() -> None:
    block = SEResBlock3d(2, 4).eval()
    assert_traceable(block, torch.randn(2, 2, 3, 4, 5, requires_grad=True), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [np.int64(4), np.array([4, 4, 4]), [np.int32(4), 4, 4]])
def test_sizes_may_be_numpys(size: object) -> None:
    found = ROIGather3d(size).roi_size
    assert found == (4, 4, 4) and {type(side) for side in found} == {int}


def test_bad_arguments() -> None:
    for error, match, build in [
        (ValueError, "channels must be positive, got 0", lambda: NormAct3d(0)),
        (ValueError, "norm must be one of", lambda: SEResBlock3d(2, 2, norm="layer")),
        (ValueError, "num_groups must divide the 6 channels, got 4", lambda: NormAct3d(6, "group", 4)),
        (ValueError, r"odd, got \(3, 2, 3\)", lambda: DilatedConv3d(2, 2, (3, 2, 3))),
        (TypeError, "dilation must be an integer or three", lambda: DilatedConv3d(2, 2, 3, (1, 2))),
        (ValueError, "reduction must be positive", lambda: SEResidual3d(4, 0)),
        (TypeError, "channels must be an integer, got 2.0", lambda: NormAct3d(2.0)),
        (ValueError, "eps must be finite", lambda: NormAct3d(2, eps=-1.0)),
        (ValueError, "num_groups belongs to group norm", lambda: NormAct3d(6, "batch", 2)),
        (ValueError, "at least one branch", lambda: DenseASPP3d(4, dilations=[])),
        (TypeError, "dilations must hold one dilation per branch, got 3", lambda: DenseASPP3d(4, dilations=3)),
        (ValueError, "growth must be positive, got 0", lambda: DenseASPP3d(4, 0)),
        (ValueError, "spatial_scale must be one or three", lambda: ROIAlign3d(2, -1.0)),
        (TypeError, "sampling_ratio must be an integer", lambda: ROIAlign3d(2, sampling_ratio=0.5)),
        (TypeError, "aligned must be a bool, got 'no'", lambda: ROIAlign3d(2, aligned="no")),
        (ValueError, "box_order must name each", lambda: ROIAlign3d(2, box_order="xyxy")),
        (ValueError, r"spatial_scales\[1\] must be one or three", lambda: ROIGather3d(2, spatial_scales=[1, 0])),
        (ValueError, "roi_size must be positive", lambda: ROIGather3d(0)),
        (TypeError, "roi_size must be an integer or three", lambda: ROIGather3d(True)),
        (TypeError, "roi_size must be an integer or three", lambda: ROIGather3d((2.0, 2.0, 2.0))),
        (ValueError, "padding must be", lambda: ROIGather3d(2, padding="reflect")),
        (ValueError, r"alpha must be \(C,\), one number per class, got shape \(\)", lambda: FocalDiceLoss(alpha=0.25)),
        (ValueError, "alpha must be finite", lambda: FocalDiceLoss(alpha=[1.0, -1.0])),
        (ValueError, "x has 4 channels, expected 3", lambda: SEResBlock3d(3, 8)(torch.zeros(1, 4, 2, 2, 2))),
        (ValueError, "x has 4 channels, expected 3", lambda: DenseASPP3d(3)(torch.zeros(1, 4, 2, 2, 2))),
        (TypeError, "ignore_index must be an integer", lambda: FocalDiceLoss(ignore_index=1.5)),
    ]:
        with pytest.raises(error, match=match):
            build()


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", None])
@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_reference_has_the_same_state_values_and_gradients(norm: str, activation: str | None) -> None:
    def build() -> nn.Module:
        last = NormAct3d(17, norm, activation=activation, eps=1e-3, momentum=0.3)
        return nn.Sequential(SEResBlock3d(2, 8, norm=norm), DenseASPP3d(8, 3, 4, [(1, 2, 2), 2, 1], norm=norm), last)

    assert_same_module(build(), to_reference(build()), torch.randn(2, 2, 3, 4, 5))


def test_reference_has_no_layer_of_ours() -> None:
    network = to_reference(nn.Sequential(SEResBlock3d(2, 8), DenseASPP3d(8, 3, 4, [1])))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        network(torch.randn(1, 2, 3, 4, 5)).sum().backward()
    names = {event.key for event in profiler.key_averages()}
    assert "aten::batch_norm" in names and not any(name.startswith("focuskernels") for name in names)
    assert to_reference(network) is network
