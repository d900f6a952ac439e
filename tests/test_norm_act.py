import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from compare import assert_layouts_agree, assert_traceable
from processes import in_two_processes, needs_gloo
from torch import Tensor, nn

from focuskernels import norm_act
from focuskernels.nn import NormAct3d
from focuskernels.reference import nn as stock

NORMS = ["batch", "instance", "group"]


def options(norm: str, groups: int) -> dict[str, Any]:
    return {"norm": norm, "num_groups": groups if norm == "group" else None}


def by_hand(x: Tensor, weight: Tensor, bias: Tensor, norm: str, groups: int, eps: float = 1e-5) -> Tensor:
    n, c = x.shape[:2]
    if norm == "group":
        grouped = x.reshape(n, groups, -1)
        variance, mean = torch.var_mean(grouped, dim=2, correction=0, keepdim=True)
        y = ((grouped - mean) / (variance + eps).sqrt()).view_as(x)
    else:
        axes = (0, 2, 3, 4) if norm == "batch" else (2, 3, 4)
        variance, mean = torch.var_mean(x, dim=axes, correction=0, keepdim=True)
        y = (x - mean) / (variance + eps).sqrt()
    return y * weight.view(1, c, 1, 1, 1) + bias.view(1, c, 1, 1, 1)


def sample(shape: tuple[int, ...] = (2, 6, 3, 5, 4), dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    weight, bias = torch.randn(2, shape[1], dtype=dtype)
    return torch.randn(shape, dtype=dtype) * 3 + 1, weight, bias


@pytest.mark.parametrize("shape", [(2, 6, 3, 5, 4), (1, 6, 1, 1, 7), (3, 6, 1, 2, 1)])
@pytest.mark.parametrize("norm", NORMS)
def test_matches_the_formula(norm: str, shape: tuple[int, ...]) -> None:
    x, weight, bias = sample(shape)
    normed = by_hand(x, weight, bias, norm, 3)
    for activation, expected in [(None, normed), ("relu", normed.relu()), ("leaky_relu", F.leaky_relu(normed, 0.2))]:
        keywords = {**options(norm, 3), "activation": activation, "negative_slope": 0.2}
        torch.testing.assert_close(norm_act(x, weight, bias, **keywords), expected)
        single = norm_act(x.float(), weight.float(), bias.float(), **keywords)
        torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-5)


def test_without_weight_and_bias() -> None:
    x = sample()[0]
    for norm in NORMS:
        expected = by_hand(x, torch.ones(6), torch.zeros(6), norm, 2)
        torch.testing.assert_close(norm_act(x, None, None, **options(norm, 2), activation=None), expected)


@pytest.mark.parametrize("norm", NORMS)
def test_stock_norms_have_the_same_defaults(norm: Any) -> None:
    x = torch.randn(2, 12, 3, 4, 5, dtype=torch.float64)
    weight, bias = torch.randn(2, 12, dtype=torch.float64)
    torch.testing.assert_close(stock.norm_act(x, weight, bias, norm), norm_act(x, weight, bias, norm=norm))


def test_default_groups_are_the_greatest_common_divisor_with_8() -> None:
    x, weight, bias = sample((2, 12, 2, 2, 2))
    torch.testing.assert_close(
        norm_act(x, weight, bias, norm="group", activation=None), by_hand(x, weight, bias, "group", 4)
    )


def test_matches_torch_modules() -> None:
    x = sample(dtype=torch.float32)[0]
    instance, group = nn.InstanceNorm3d(6, affine=True), nn.GroupNorm(3, 6)
    weight, bias = instance.weight, instance.bias
    torch.testing.assert_close(norm_act(x, weight, bias, norm="instance"), instance(x).relu())
    torch.testing.assert_close(norm_act(x, weight, bias, norm="group", num_groups=3), group(x).relu())


def test_running_statistics_are_those_of_batch_norm() -> None:
    module = nn.BatchNorm3d(6, momentum=0.3)
    mean, variance = module.running_mean.clone(), module.running_var.clone()
    options = {"running_mean": mean, "running_var": variance, "momentum": 0.3}
    for _ in range(3):
        x = sample(dtype=torch.float32)[0]
        torch.testing.assert_close(norm_act(x, module.weight, module.bias, **options), module(x).relu())
    torch.testing.assert_close(mean, module.running_mean)
    torch.testing.assert_close(variance, module.running_var)
    module.eval()
    before = mean.clone()
    actual = norm_act(x, module.weight, module.bias, training=False, **options)
    torch.testing.assert_close(actual, module(x).relu())
    assert torch.equal(mean, before)
    # one voxel is enough where the statistics are given
    assert norm_act(x[:1, :, :1, :1, :1], None, None, training=False, **options).shape == (1, 6, 1, 1, 1)


@pytest.mark.parametrize("norm", NORMS)
def test_input_is_not_changed(norm: str) -> None:
    x, weight, bias = sample()
    before = copy.deepcopy((x, weight, bias))
    norm_act(x, weight, bias, norm=norm)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, weight, bias)))


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("norm", NORMS)
def test_gradients(norm: str, activation: str | None) -> None:
    for batch in (1, 2):
        leaves = [t.requires_grad_() for t in sample((batch, 4, 2, 2, 3))]
        assert torch.autograd.gradcheck(
            lambda *a: norm_act(*a, **options(norm, 2), activation=activation),
            leaves,
            fast_mode=True,
        )


def test_gradients_with_given_statistics_and_a_negative_slope() -> None:
    leaves = [t.requires_grad_() for t in sample((2, 4, 2, 2, 3))]
    mean, variance = torch.randn(4).double(), torch.rand(4).double() + 0.5
    keywords = {"running_mean": mean, "running_var": variance, "training": False}
    assert torch.autograd.gradcheck(
        lambda *a: norm_act(*a, activation="leaky_relu", negative_slope=-0.5, **keywords), leaves, fast_mode=True
    )


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", NORMS)
def test_half_precision_rounds_at_the_end(norm: str, dtype: torch.dtype, wide: bool) -> None:
    x, weight, bias = sample((2, 8, 4, 5, 6))
    x = (x + 20).to(dtype)  # a mean far from 0: sums in half precision would be wrong
    weight, bias = (t.to(torch.float32 if wide else dtype) for t in (weight, bias))
    y = norm_act(x, weight, bias, **options(norm, 2))
    expected = by_hand(x.double(), weight.double(), bias.double(), norm, 2).relu()
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("norm", NORMS)
def test_large_mean_keeps_the_variance(norm: str) -> None:
    x, weight, bias = sample()
    x = (x + 1e4).float()
    y = norm_act(x, weight.float(), bias.float(), **options(norm, 3), activation=None)
    torch.testing.assert_close(y.double(), by_hand(x.double(), weight, bias, norm, 3), rtol=1e-3, atol=1e-2)


def test_constant_input_gives_the_bias() -> None:
    weight, bias = torch.ones(6), torch.arange(6.0) - 3
    for norm in NORMS:
        y = norm_act(torch.full((2, 6, 3, 3, 3), 7.0), weight, bias, norm=norm)
        torch.testing.assert_close(y, bias.relu().view(1, 6, 1, 1, 1).expand_as(y), rtol=0, atol=1e-3)


@pytest.mark.parametrize("norm", NORMS)
def test_layouts(norm: str) -> None:
    x, weight, bias = sample((2, 4, 3, 5, 6), torch.float32)
    # the "expanded" layout has few distinct values, hence the absolute tolerance
    assert_layouts_agree(lambda t: norm_act(t, weight, bias, **options(norm, 2)), x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("norm", NORMS)
def test_empty_batch(norm: str) -> None:
    x = torch.zeros(0, 4, 2, 3, 4, requires_grad=True)
    weight, bias = torch.ones(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    y = norm_act(x, weight, bias, norm=norm)
    assert y.shape == x.shape
    gradients = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert [g.shape for g in gradients] == [x.shape, weight.shape, bias.shape]
    assert float(gradients[1].abs().sum() + gradients[2].abs().sum()) == 0


@pytest.mark.parametrize("norm", NORMS)
def test_is_deterministic(norm: str) -> None:
    x, weight, bias = (t.requires_grad_() for t in sample((2, 8, 5, 6, 7), torch.float32))
    runs = []
    for _ in range(2):
        y = norm_act(x, weight, bias, norm=norm)
        runs.append((y, *torch.autograd.grad(y.square().sum(), (x, weight, bias))))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_compile_and_fake_tensors(norm: str) -> None:
    leaves = [t.requires_grad_() for t in sample((2, 4, 3, 5, 6), torch.float32)]
    assert_traceable(lambda *a: norm_act(*a, norm=norm), *leaves, rtol=1e-4, atol=1e-4)


def test_bad_input() -> None:
    x, one = torch.zeros(2, 6, 3, 3, 3), torch.ones(6)
    for error, match, arguments, keywords in [
        (TypeError, "x must be floating point", (x.long(), one, one), {}),
        (TypeError, "weight must be a tensor, got list", (x, [1.0], one), {}),
        (TypeError, "x is torch.float64 on cpu, weight is torch.float32", (x.double(), one, one), {}),
        (TypeError, "x is torch.float32 on cpu, bias is torch.bfloat16", (x, one, one.bfloat16()), {}),
        (ValueError, r"x must have 5 dimensions, got shape \(6, 3, 3, 3\)", (x[0], one, one), {}),
        (ValueError, r"weight must be \(6,\) for x of shape \(2, 6, 3, 3, 3\), got \(5,\)", (x, one[:5], one), {}),
        (ValueError, "norm must be one of", (x, one, one), {"norm": "layer"}),
        (ValueError, "activation must be None or one of", (x, one, one), {"activation": "gelu"}),
        (ValueError, "num_groups must divide the 6 channels, got 4", (x, one, one), {"norm": "group", "num_groups": 4}),
        (TypeError, "num_groups must be an integer, got 2.0", (x, one, one), {"norm": "group", "num_groups": 2.0}),
        (ValueError, "num_groups belongs to group norm, got it with norm='batch'", (x, one, one), {"num_groups": 2}),
        (ValueError, "eps must be finite and at least 0, got -1.0", (x, one, one), {"eps": -1.0}),
        (TypeError, "momentum must be a number, got None", (x, one, one), {"momentum": None}),
        (TypeError, "negative_slope must be a number, got '1'", (x, one, one), {"negative_slope": "1"}),
        (ValueError, "go together", (x, one, one), {"running_mean": one}),
        (
            ValueError,
            "belong to batch norm",
            (x, one, one),
            {"norm": "group", "running_mean": one, "running_var": one},
        ),
        (ValueError, "without training needs running_mean", (x, one, one), {"training": False}),
        (ValueError, r"no channels to group: \(2, 0, 3, 3, 3\)", (x[:, :0], None, None), {"norm": "group"}),
        (ValueError, r"x has no voxels to take statistics from: \(2, 6, 0, 3, 3\)", (x[:, :, :0], one, one), {}),
        (ValueError, r"one value only .* \(1, 6, 1, 1, 1\)", (x[:1, :, :1, :1, :1], one, one), {}),
        (ValueError, r"one value only .* \(2, 6, 1, 1, 1\)", (x[:, :, :1, :1, :1], one, one), {"norm": "instance"}),
    ]:
        with pytest.raises(error, match=match):
            norm_act(*arguments, **keywords)  # type: ignore[arg-type]


def synchronised(rank: int, folder: Path) -> None:
    """One of two processes; compares its part with batch norm over both parts."""
    torch.manual_seed(0)
    whole, weight, bias = sample((3, 4, 3, 5, 4))
    upstream = torch.randn_like(whole)
    mine = slice(0, 1) if rank == 0 else slice(1, 3)
    module = NormAct3d(4, sync=True).double()
    plain = nn.BatchNorm3d(4).double()
    for m in (module, plain):
        m.load_state_dict({**m.state_dict(), "weight": weight, "bias": bias})
    x, part = whole.clone().requires_grad_(), whole[mine].clone().requires_grad_()
    expected, actual = plain(x).relu(), module(part)
    torch.testing.assert_close(actual, expected[mine])
    torch.testing.assert_close(module.state_dict(), plain.state_dict())
    expected.backward(upstream)
    actual.backward(upstream[mine])
    torch.testing.assert_close(part.grad, x.grad[mine])
    for ours, theirs in ((module.weight, plain.weight), (module.bias, plain.bias)):
        dist.all_reduce(ours.grad)
        torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(module.eval()(part), plain.eval()(part).relu())
    (folder / str(rank)).touch()


@pytest.mark.slow
@needs_gloo
def test_statistics_over_processes(tmp_path: Path) -> None:
    in_two_processes(synchronised, tmp_path, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"0", "1"}


def test_process_group_is_for_batch_norm() -> None:
    with pytest.raises(ValueError, match="belongs to batch norm, got it with norm='group'"):
        norm_act(*sample(), norm="group", process_group=object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sync is for norm='batch'"):
        NormAct3d(4, "instance", sync=True)
