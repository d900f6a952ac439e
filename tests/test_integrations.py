"""Our losses with the peers' signatures beside the peers' own: values and gradients."""

import importlib.metadata
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from focuskernels.integrations import monai as ours
from focuskernels.integrations import nnunet

MONAI, NNUNET = "1.6.1", "2.8.1"


def exactly(distribution: str, version: str) -> None:
    """Skip unless this very version is there: the numbers compared are its own."""
    try:
        found = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{distribution} {version} is not installed")
    if found != version:
        pytest.skip(f"{distribution} {found} is installed, {version} is compared with")


def assert_same(actual: Callable[..., Tensor], expected: Callable[..., Tensor], logits: Tensor, target: Tensor) -> None:
    mine, theirs = (logits.clone().requires_grad_() for _ in range(2))
    value, truth = actual(mine, target), expected(theirs, target)
    torch.testing.assert_close(value, truth.to(value.dtype), rtol=2e-5, atol=1e-6)
    (grad,), (grad_truth,) = torch.autograd.grad(value, mine), torch.autograd.grad(truth, theirs)
    assert float((grad - grad_truth).norm()) <= 2e-5 * float(grad_truth.norm()) + 1e-12


def case(classes: int = 4, absent: bool = False) -> tuple[Tensor, Tensor]:
    logits = 2 * torch.randn(3, classes, 5, 6, 7)
    return logits, torch.randint(0, classes - absent, (3, 1, 5, 6, 7))


SHARED = [
    {},
    {"include_background": False},
    {"batch": True, "smooth_nr": 0.5, "smooth_dr": 0.25},
    {"reduction": "sum"},
    {"reduction": "sum", "include_background": False, "batch": True},
]
FOCAL = [
    *SHARED,
    {"gamma": 0.5, "lambda_focal": 3.0},
    {"weight": 0.7},
    {"weight": [0.1, 0.2, 3.0, 1.0]},
    {"weight": [0.2, 3.0, 1.0], "include_background": False, "gamma": 1.0},
]
DICE_FOCAL = [
    *FOCAL,
    {"jaccard": True},
    {"alpha": 0.3, "lambda_dice": 0.5},
    {"alpha": [0.1, 0.2, 3.0, 1.0]},
    {"alpha": [0.2, 3.0, 1.0], "include_background": False, "reduction": "sum"},
]
GENERALIZED = [*FOCAL, {"w_type": "simple"}, {"w_type": "uniform", "lambda_gdl": 2.0}]
CE = [
    *SHARED,
    {"jaccard": True, "lambda_ce": 0.3},
    {"weight": torch.tensor([0.1, 0.2, 3.0, 1.0])},
    {"weight": torch.tensor([0.1, 0.2, 3.0, 1.0]), "include_background": False, "reduction": "sum"},
]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("DiceFocalLoss", options) for options in DICE_FOCAL),
        *(("GeneralizedDiceFocalLoss", options) for options in GENERALIZED),
        *(("DiceCELoss", options) for options in CE),
    ],
)
def test_monai_with_indices(name: str, options: dict[str, Any]) -> None:
    exactly("monai", MONAI)
    losses = pytest.importorskip("monai.losses")
    activations = ["softmax"] if name == "DiceCELoss" else ["softmax", "sigmoid"]
    for activation, absent in itertools.product(activations, (False, True)):
        arguments = {activation: True, "to_onehot_y": True, **options}
        logits, target = case(absent=absent)
        assert_same(getattr(ours, name)(**arguments), getattr(losses, name)(**arguments), logits, target)
        assert_same(getattr(ours, name)(**arguments), getattr(losses, name)(**arguments), logits, target.float())


@pytest.mark.parametrize("name", ["DiceFocalLoss", "GeneralizedDiceFocalLoss", "DiceCELoss"])
def test_monai_with_one_hot_and_single_channels(name: str) -> None:
    exactly("monai", MONAI)
    losses = pytest.importorskip("monai.losses")
    logits, target = case()
    one_hot = torch.nn.functional.one_hot(target[:, 0], 4).movedim(-1, 1).float()
    overlapping = (torch.rand(logits.shape) > 0.5).float()
    mine, theirs = (getattr(module, name) for module in (ours, losses))
    assert_same(mine(softmax=True), theirs(softmax=True), logits, one_hot)
    assert_same(mine(sigmoid=True), theirs(sigmoid=True), logits[:, :1], overlapping[:, :1])
    if name != "DiceCELoss":
        assert_same(mine(sigmoid=True), theirs(sigmoid=True), logits, overlapping)


def test_monai_what_is_not_served() -> None:
    for options in (
        {},
        {"sigmoid": True, "softmax": True},
        {"softmax": True, "squared_pred": True},
        {"other_act": torch.tanh},
        {"softmax": True, "reduction": "none"},
        {"softmax": True, "lambda_dice": -1.0},
    ):
        with pytest.raises(ValueError):
            ours.DiceFocalLoss(**options)
    logits, target = case()
    with pytest.raises(ValueError, match="label_smoothing"):
        ours.DiceCELoss(softmax=True, label_smoothing=0.1)
    with pytest.raises(ValueError, match="soft labels"):
        ours.DiceFocalLoss(sigmoid=True)(logits, torch.rand(logits.shape))
    with pytest.raises(ValueError, match="one-hot"):
        ours.DiceFocalLoss(softmax=True)(logits, torch.ones(logits.shape))
    with pytest.raises(ValueError, match="to_onehot_y"):
        ours.DiceFocalLoss(softmax=True)(logits, target)
    with pytest.raises(ValueError, match="number of channels"):
        ours.DiceFocalLoss(softmax=True)(logits, target.expand(-1, 2, -1, -1, -1))
    with pytest.raises(ValueError, match="softmax=True only"):
        ours.DiceCELoss(sigmoid=True, to_onehot_y=True)(logits, target)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, "same batch and spatial sizes, got shape|a label map", lambda x, t: (x, t[:1])),
        (ValueError, "same batch and spatial sizes, got shape|a label map", lambda x, t: (x, t[..., :3])),
        (ValueError, r"must be \(N, C, \*spatial\)", lambda x, t: (x[:, :, 0, 0, 0], t[:, :, 0, 0, 0])),
        (TypeError, "must be floating point, got torch.int64", lambda x, t: (x.long(), t)),
        (TypeError, "target on meta", lambda x, t: (x, t.to("meta"))),
    ],
)
def test_what_does_not_fit(error: type[Exception], match: str, change: Callable[..., Any]) -> None:
    monai = (ours.DiceFocalLoss, ours.DiceCELoss, ours.GeneralizedDiceFocalLoss)
    for loss in (*(kind(softmax=True, to_onehot_y=True) for kind in monai), nnunet.DC_and_CE_loss({}, {})):
        with pytest.raises(error, match=match):
            loss(*change(*case()))


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("do_bg", [False, True])
@pytest.mark.parametrize("ignore_label", [None, 3, 255])
def test_nnunet(ignore_label: int | None, do_bg: bool, batch_dice: bool) -> None:
    exactly("nnunetv2", NNUNET)
    losses = pytest.importorskip("nnunetv2.training.loss.compound_losses")
    dice = pytest.importorskip("nnunetv2.training.loss.dice")
    logits, target = case()
    if ignore_label == 255:
        target[torch.rand(target.shape) < 0.3] = 255
    for weight, smooth in itertools.product((None, torch.tensor([0.1, 2.0, 1.0, 0.5])), (1e-5, 1.0)):
        options = {"batch_dice": batch_dice, "do_bg": do_bg, "smooth": smooth, "ddp": False}
        mine = nnunet.DC_and_CE_loss(dict(options), {"weight": weight}, 0.7, 1.3, ignore_label)
        for dice_class in (dice.MemoryEfficientSoftDiceLoss, dice.SoftDiceLoss):
            theirs = losses.DC_and_CE_loss(dict(options), {"weight": weight}, 0.7, 1.3, ignore_label, dice_class)
            assert_same(mine, theirs, logits, target)


@pytest.mark.parametrize("weight", [None, torch.tensor([0.1, 2.0, 1.0, 0.5])])
def test_nnunet_by_formula(weight: Tensor | None) -> None:
    logits, target = case()
    loss = nnunet.DC_and_CE_loss({"smooth": 1e-5, "do_bg": False}, {"weight": weight})

    def formula(x: Tensor, y: Tensor) -> Tensor:
        p, hot = x.softmax(1)[:, 1:], torch.nn.functional.one_hot(y[:, 0], 4).movedim(-1, 1)[:, 1:]
        dice = (2 * (p * hot).sum((2, 3, 4)) + 1e-5) / (p.sum((2, 3, 4)) + hot.sum((2, 3, 4)) + 1e-5)
        return torch.nn.functional.cross_entropy(x, y[:, 0], weight) - dice.mean()

    assert_same(loss, formula, logits, target)


def test_nnunet_all_ignored_and_not_served() -> None:
    logits, target = case()
    loss = nnunet.DC_and_CE_loss({"smooth": 1e-5}, {}, ignore_label=9)
    x = logits.requires_grad_()
    value = loss(x, torch.full_like(target, 9))
    assert value.isfinite()
    assert float(torch.autograd.grad(value, x)[0].abs().max()) == 0
    with pytest.raises(ValueError, match="label_smoothing"):
        nnunet.DC_and_CE_loss({}, {"label_smoothing": 0.1})
    with pytest.raises(ValueError, match="k"):
        nnunet.DC_and_CE_loss({}, {"k": 10})
    with pytest.raises(ValueError, match=r"\(b, 1, ...\)"):
        loss(logits, target[:, 0])
