"""The examples run, at tiny sizes, and `fuse_norm_act` changes no number and no name."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from focuskernels.integrations import fuse_norm_act
from focuskernels.nn import NormAct3d

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    path = EXAMPLES / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def outputs(network: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and every parameter's gradient."""
    network.zero_grad()
    y = network(x)
    y = y if isinstance(y, Tensor) else y[0]
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]


def assert_fused_alike(network: nn.Module, x: Tensor, fused: int) -> None:
    """In float64: same outputs, gradients, state and parameters, with `fused` modules of ours."""
    network, x = network.double(), x.double()
    before, state = outputs(network, x), {key: value.clone() for key, value in network.state_dict().items()}
    parameters = {id(p) for p in network.parameters()}
    assert fuse_norm_act(network) is network
    assert sum(isinstance(module, NormAct3d) for module in network.modules()) == fused
    assert {id(p) for p in network.parameters()} == parameters
    assert list(network.state_dict()) == list(state)
    network.load_state_dict(state)
    for after, expected in zip(outputs(network, x), before, strict=True):
        torch.testing.assert_close(after, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "norm",
    [
        nn.InstanceNorm3d(6),
        nn.InstanceNorm3d(6, eps=1e-3, affine=True),
        nn.BatchNorm3d(6, momentum=0.3),
        nn.BatchNorm3d(6, affine=False),
        nn.GroupNorm(3, 6),
        nn.GroupNorm(2, 6, affine=False),
    ],
    ids=repr,
)
@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.LeakyReLU(0.2)], ids=repr)
def test_fuse_norm_act_changes_no_number(norm: nn.Module, activation: nn.Module, training: bool) -> None:
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    network = nn.Sequential(nn.Conv3d(2, 6, 3, padding=1), norm, nn.Dropout3d(0), activation, nn.Conv3d(6, 3, 1))
    assert_fused_alike(network.train(training), torch.randn(2, 2, 4, 5, 6), 1)


def test_fuse_norm_act_keeps_batch_statistics() -> None:
    theirs, ours = (nn.Sequential(nn.BatchNorm3d(3), nn.ReLU()) for _ in range(2))
    fuse_norm_act(ours)
    for _ in range(3):
        x = 5 + 2 * torch.randn(2, 3, 4, 5, 6)
        theirs(x), ours(x)
    for (key, expected), (other, value) in zip(theirs.state_dict().items(), ours.state_dict().items(), strict=True):
        assert key == other
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def test_fuse_norm_act_leaves_the_rest_alone() -> None:
    conv, dropout = nn.Conv3d(2, 2, 1), nn.Dropout3d(0.5)
    kept = nn.Sequential(
        nn.InstanceNorm3d(2), conv, nn.ReLU(),  # not neighbours
        nn.InstanceNorm3d(2), dropout, nn.ReLU(),  # dropout between
        nn.InstanceNorm3d(2), conv, nn.ReLU(), nn.InstanceNorm3d(2), dropout, nn.ReLU(),  # the same modules again
        nn.InstanceNorm3d(2), nn.PReLU(), nn.InstanceNorm3d(2, track_running_stats=True), nn.ReLU(),
        nn.BatchNorm3d(2, momentum=None), nn.ReLU(), nn.BatchNorm3d(2, track_running_stats=False), nn.ReLU(),
    )  # fmt: skip
    text = repr(kept)
    with pytest.raises(ValueError, match="Sequential has no norm"):
        fuse_norm_act(kept)
    assert repr(kept) == text


def test_fuse_norm_act_leaves_an_activation_that_others_use() -> None:
    shared = nn.LeakyReLU()
    network = nn.ModuleDict({"a": nn.Sequential(nn.InstanceNorm3d(2), shared), "b": nn.Sequential(shared)})
    fuse_norm_act(network)
    x = torch.randn(1, 2, 3, 4, 5)
    torch.testing.assert_close(network["b"](x), nn.functional.leaky_relu(x))


def test_fuse_norm_act_in_monai() -> None:
    nets = pytest.importorskip("monai.networks.nets")
    network = nets.UNet(3, 1, 3, channels=(4, 8), strides=(2,), norm=("instance", {"affine": True}), act="LEAKYRELU")
    assert_fused_alike(network, torch.randn(1, 1, 8, 8, 8), 2)


def test_add_to_your_net() -> None:
    module = example("add_to_your_net")
    assert_fused_alike(module.PlainUNet(3, width=4), torch.randn(1, 1, 6, 8, 10), 4)
    losses = module.train(steps=12, size=16)
    assert losses[-1] < 0.8 * losses[0]


def test_monai_sliding_window() -> None:
    pytest.importorskip("monai")
    module = example("monai_sliding_window")
    logits, dice = module.main(steps=1, crop=(8, 16, 16), spacing=(12.0, 9.0, 9.0))
    assert logits.shape[:2] == (1, module.CLASSES)
    assert dice.shape == (len(module.ORGANS),)
    assert bool(logits.isfinite().all())


def test_monai_network_is_snet() -> None:
    """The sliding window with windows of the volume's size is S-Net on the volume."""
    pytest.importorskip("monai")
    from monai.inferers import SlidingWindowInferer

    from focusnet.model import SNet

    module = example("monai_sliding_window")
    network, snet = module.Segmenter(module.SMALL, 3).eval(), SNet(module.SMALL, 3).eval()
    snet.load_state_dict(network.state_dict())
    image = torch.randn(1, 1, 8, 16, 16)
    with torch.no_grad():
        expected = snet(image).logits
        torch.testing.assert_close(network(image), expected)
        torch.testing.assert_close(SlidingWindowInferer((8, 16, 16))(image, network), expected)


UNET: dict[str, Any] = {
    "n_stages": 3,
    "features_per_stage": [4, 8, 8],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    "n_conv_per_stage": [2, 2, 2],
    "n_conv_per_stage_decoder": [1, 1],
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
IMPORTED = ["conv_op", "norm_op", "dropout_op", "nonlin"]


def nnunet_configuration(**settings: Any) -> SimpleNamespace:
    architecture = "dynamic_network_architectures.architectures.unet."
    return SimpleNamespace(
        network_arch_class_name=architecture + "PlainConvUNet",
        network_arch_init_kwargs=UNET,
        network_arch_init_kwargs_req_import=IMPORTED,
        **settings,
    )


def test_nnunet_network() -> None:
    pytest.importorskip("nnunetv2", reason="nnunetv2 is not installed")
    trainer = example("nnunet/focus_trainer").FocusTrainer
    configuration = nnunet_configuration()
    torch.manual_seed(0)
    theirs = trainer.__mro__[1].build_network_architecture(None, configuration, 1, 3, True).double()
    ours = trainer.build_network_architecture(None, configuration, 1, 3, True).double()
    assert sum(isinstance(module, NormAct3d) for module in ours.modules()) == 8
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 1, 8, 16, 16, dtype=torch.float64)
    for after, expected in zip(outputs(ours, x), outputs(theirs, x), strict=True):
        torch.testing.assert_close(after, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("deep_supervision", [True, False])
def test_nnunet_loss(deep_supervision: bool) -> None:
    pytest.importorskip("nnunetv2", reason="nnunetv2 is not installed")
    trainer = example("nnunet/focus_trainer").FocusTrainer
    this = trainer.__new__(trainer)  # the constructor wants preprocessed data
    vars(this).update(
        label_manager=SimpleNamespace(has_regions=False, ignore_label=None),
        configuration_manager=SimpleNamespace(batch_dice=True, pool_op_kernel_sizes=[[1, 1, 1], [1, 2, 2], [2, 2, 2]]),
        is_ddp=False,
        device=torch.device("cpu"),
        enable_deep_supervision=deep_supervision,
    )
    ours, theirs = this._build_loss(), trainer.__mro__[1]._build_loss(this)
    sizes = [(8, 8, 8), (8, 4, 4)] if deep_supervision else [(8, 8, 8)]
    logits = [torch.randn(2, 3, *size) for size in sizes]
    labels = [torch.randint(0, 3, (2, 1, *size)) for size in sizes]
    arguments = (logits, labels) if deep_supervision else (logits[0], labels[0])
    torch.testing.assert_close(ours(*arguments), theirs(*arguments), rtol=1e-5, atol=1e-6)


def test_nnunet_finds_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    find = pytest.importorskip("nnunetv2.utilities.find_objects", reason="nnunetv2 is not installed")
    monkeypatch.setenv("nnUNet_extTrainer", str(EXAMPLES / "nnunet"))
    trainer = find.recursive_find_trainer_class_by_name("FocusTrainer")
    assert trainer.__name__ == "FocusTrainer"
