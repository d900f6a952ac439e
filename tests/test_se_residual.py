import pytest
import torch
from compare import assert_layouts_agree, assert_traceable
from torch import Tensor

from focuskernels import se_residual


def by_loop(x: Tensor, residual: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    result = residual.clone()
    for n in range(len(x)):
        hidden = w1 @ torch.stack([channel.mean() for channel in x[n]])
        gate = w2 @ (hidden if b1 is None else hidden + b1).clamp(min=0)
        gate = 1 / (1 + torch.exp(-(gate if b2 is None else gate + b2)))
        for c in range(x.shape[1]):
            result[n, c] += gate[c] * x[n, c]
    return result


def sample(
    shape: tuple[int, ...] = (2, 8, 3, 5, 4), hidden: int = 2, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    c = shape[1]
    tensors = [torch.randn(s, dtype=dtype) for s in (shape, shape, (hidden, c), (hidden,), (c, hidden), (c,))]
    tensors[3].abs_().add_(1)  # so that the hidden units are awake
    return tensors


@pytest.mark.parametrize(("shape", "hidden"), [((2, 8, 3, 5, 4), 2), ((1, 1, 1, 1, 1), 1), ((3, 4, 1, 7, 1), 5)])
def test_matches_a_loop(shape: tuple[int, ...], hidden: int) -> None:
    arguments = sample(shape, hidden)
    expected = by_loop(*arguments)
    torch.testing.assert_close(se_residual(*arguments), expected)
    torch.testing.assert_close(se_residual(*arguments, activation="relu"), expected.relu())
    single = se_residual(*(t.float() for t in arguments))
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-5)


def test_without_biases() -> None:
    x, residual, w1, _, w2, _ = sample()
    torch.testing.assert_close(se_residual(x, residual, w1, None, w2, None), by_loop(x, residual, w1, None, w2, None))


def test_channel_sums_replace_the_mean_and_take_its_gradient() -> None:
    arguments = sample()
    x = arguments[0].requires_grad_()
    sums = x.detach().sum(dim=(2, 3, 4)).requires_grad_()
    whole, split = se_residual(*arguments), se_residual(*arguments, channel_sums=sums)
    torch.testing.assert_close(split, whole)
    (expected,) = torch.autograd.grad(whole.square().sum(), x)
    direct, through_sums = torch.autograd.grad(split.square().sum(), (x, sums))
    torch.testing.assert_close(direct + through_sums[:, :, None, None, None], expected)
    assert through_sums.abs().max() > 0
    assert not torch.allclose(se_residual(*arguments, channel_sums=2 * sums), whole)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradients(activation: str | None) -> None:
    leaves = [t.requires_grad_() for t in sample((2, 3, 2, 1, 3), 2)]
    assert torch.autograd.gradcheck(lambda *a: se_residual(*a, activation=activation), leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_float32_layers(dtype: torch.dtype) -> None:
    x, residual, *layers = sample(dtype=torch.float32)
    x, residual = x.to(dtype), residual.to(dtype)
    y = se_residual(x, residual, *layers)
    assert y.dtype == dtype
    expected = by_loop(x.double(), residual.double(), *(t.double() for t in layers))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=eps, atol=2 * eps)


def test_sums_of_float16_do_not_overflow() -> None:
    x = torch.full((1, 4, 8, 8, 8), 1000.0, dtype=torch.float16)
    layers = [torch.eye(4) / 1000, None, torch.eye(4), None]
    y = se_residual(x, torch.zeros_like(x), *layers)
    torch.testing.assert_close(y.float(), x.float() * torch.tensor(1.0).sigmoid(), rtol=1e-3, atol=0)


def test_extreme_values() -> None:
    x, residual, *layers = sample(dtype=torch.float32)
    assert se_residual(1e4 * x, residual, *layers).isfinite().all()
    x[1, 2, 0, 0, 0] = torch.nan
    y = se_residual(x, residual, *layers)
    assert y[1].isnan().all()  # every gate of that sample reads every channel
    assert y[0].isfinite().all()


def test_layouts() -> None:
    x, residual, *layers = sample(dtype=torch.float32)
    assert_layouts_agree(lambda t: se_residual(t, residual, *layers), x, rtol=1e-4, atol=1e-4)
    assert_layouts_agree(lambda t: se_residual(x, t, *layers, activation="relu"), residual, rtol=1e-4, atol=1e-4)


def test_empty_batch() -> None:
    leaves = [t.requires_grad_() for t in sample((0, 8, 2, 3, 4))]
    y = se_residual(*leaves)
    assert y.shape == (0, 8, 2, 3, 4)
    gradients = torch.autograd.grad(y.sum(), leaves)
    assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(gradients, leaves))


def test_inputs_are_kept_and_runs_agree() -> None:
    leaves = [t.requires_grad_() for t in sample((2, 8, 5, 6, 7), dtype=torch.float32)]
    before = [t.detach().clone() for t in leaves]
    runs = []
    for _ in range(2):
        y = se_residual(*leaves, activation="relu")
        runs.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    assert all(torch.equal(a, b) for a, b in zip(leaves, before))


def test_autocast_takes_mixed_branches() -> None:
    x, residual, *layers = sample(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = se_residual(x.bfloat16(), residual, *layers)
    expected = by_loop(x.double(), residual.double(), *(t.double() for t in layers))
    torch.testing.assert_close(y.double(), expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("with_sums", [False, True])
def test_compile_and_fake_tensors(with_sums: bool) -> None:
    leaves = [t.requires_grad_() for t in sample(dtype=torch.float32)]
    if with_sums:
        leaves.append(torch.randn(2, 8, requires_grad=True))
    assert_traceable(
        lambda *a: se_residual(*a[:6], activation="relu", channel_sums=a[6] if with_sums else None),
        *leaves,
        rtol=1e-4,
        atol=1e-4,
    )


def test_bad_input() -> None:
    x, residual, w1, b1, w2, b2 = sample(dtype=torch.float32)
    for error, match, arguments, keywords in [
        (TypeError, "x must be floating point", (x.long(), residual, w1, b1, w2, b2), {}),
        (TypeError, "residual is torch.float64", (x, residual.double(), w1, b1, w2, b2), {}),
        (TypeError, "fc2_weight is torch.float64", (x, residual, w1, b1, w2.double(), b2), {}),
        (TypeError, "fc2_weight must be a tensor, got NoneType", (x, residual, w1, b1, None, b2), {}),
        (TypeError, "fc1_bias must be a tensor, got list", (x, residual, w1, [0.0, 0.0], w2, b2), {}),
        (
            TypeError,
            "channel_sums must be floating",
            (x, residual, w1, b1, w2, b2),
            {"channel_sums": torch.ones(2, 8).int()},
        ),
        (ValueError, r"\(2, 8, 3, 5, 4\), \(2, 8, 3, 5, 3\)", (x, residual[..., :3], w1, b1, w2, b2), {}),
        (ValueError, r"fc1_weight must be \(2, 8\) .* got \(2, 7\)", (x, residual, w1[:, :7], b1, w2, b2), {}),
        (ValueError, r"fc2_weight must be \(8, 2\) .* got \(2, 8\)", (x, residual, w1, b1, w2.T, b2), {}),
        (
            ValueError,
            r"channel_sums must be \(2, 8\)",
            (x, residual, w1, b1, w2, b2),
            {"channel_sums": torch.ones(2, 7)},
        ),
        (ValueError, r"no voxels: \(2, 8, 0, 5, 4\)", (x[:, :, :0], residual[:, :, :0], w1, b1, w2, b2), {}),
        (ValueError, "activation must be None or 'relu'", (x, residual, w1, b1, w2, b2), {"activation": "gelu"}),
    ]:
        with pytest.raises(error, match=match):
            se_residual(*arguments, **keywords)  # type: ignore[arg-type]
