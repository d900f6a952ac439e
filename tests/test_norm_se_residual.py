import pytest
import torch
from compare import assert_traceable
from torch import Tensor

from focuskernels import norm_act, norm_se_residual, se_residual

NORMS = ["batch", "instance", "group"]
pytestmark = pytest.mark.filterwarnings("ignore:the mean of an instance norm")


def sample(shape: tuple[int, ...] = (2, 8, 3, 5, 4), dtype: torch.dtype = torch.float64) -> list[Tensor]:
    c, hidden = shape[1], 3
    sizes = (shape, shape, (c,), (c,), (hidden, c), (hidden,), (c, hidden), (c,))
    tensors = [torch.randn(s, dtype=dtype) for s in sizes]
    tensors[0].mul_(3).add_(1)
    tensors[5].abs_().add_(1)  # so that the hidden units are awake
    return [t.requires_grad_() for t in tensors]


def apart(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *layers: Tensor, **keywords: object) -> Tensor:
    """The two functions one after the other."""
    activation, squeeze = keywords.pop("activation", "relu"), keywords.pop("squeeze", "norm")
    y = norm_act(x, weight, bias, activation=None, **keywords)
    sums = x.sum(dim=(2, 3, 4)) if squeeze == "input" else None
    return se_residual(y, residual, *layers, activation=activation, channel_sums=sums)


def assert_same(leaves: list[Tensor], **keywords: object) -> None:
    actual, expected = norm_se_residual(*leaves, **keywords), apart(*leaves, **keywords)
    torch.testing.assert_close(actual, expected)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((y * weights).sum(), leaves, allow_unused=True) for y in (actual, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("squeeze", ["norm", "input"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("norm", NORMS)
def test_is_norm_act_then_se_residual(norm: str, activation: str | None, squeeze: str) -> None:
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        leaves = sample()
        leaves[0] = leaves[0].detach().contiguous(memory_format=layout).requires_grad_()
        assert_same(
            leaves, norm=norm, num_groups=2 if norm == "group" else None, activation=activation, squeeze=squeeze
        )


@pytest.mark.parametrize("squeeze", ["norm", "input"])
@pytest.mark.parametrize("norm", NORMS)
def test_gradients(norm: str, squeeze: str) -> None:
    leaves = sample((2, 4, 2, 1, 3))
    keywords = {"norm": norm, "num_groups": 2 if norm == "group" else None, "squeeze": squeeze}
    assert torch.autograd.gradcheck(lambda *a: norm_se_residual(*a, **keywords), leaves, fast_mode=True)


def test_running_statistics() -> None:
    leaves = sample()
    states = [[torch.randn(8).double(), torch.rand(8).double() + 0.5] for _ in range(2)]
    for mine, other in zip(*states):
        other.copy_(mine)
    for training in (True, False):
        results = [
            function(*leaves, running_mean=mean, running_var=variance, training=training)
            for function, (mean, variance) in zip((norm_se_residual, apart), states)
        ]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*states)
    mean, variance = states[0]
    assert_same(leaves, running_mean=mean, running_var=variance, training=False)


def test_half_precision() -> None:
    leaves = sample(dtype=torch.float32)
    halves = [t.detach().bfloat16() for t in leaves[:2]]
    y = norm_se_residual(*halves, *leaves[2:])
    assert y.dtype == torch.bfloat16
    expected = apart(*(t.double() for t in halves), *(t.double() for t in leaves[2:]))
    torch.testing.assert_close(y.double(), expected, rtol=8e-3, atol=8e-3)


def test_instance_norm_makes_a_constant_gate() -> None:
    leaves = sample()
    with pytest.warns(UserWarning, match="squeeze='input'"):
        norm_se_residual(*leaves, norm="instance")


def test_empty_batch() -> None:
    leaves = sample((0, 8, 2, 3, 4))
    y = norm_se_residual(*leaves)
    gradients = torch.autograd.grad(y.sum(), leaves)
    assert y.shape == (0, 8, 2, 3, 4)
    assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(gradients, leaves))


def test_compiles() -> None:
    assert_traceable(norm_se_residual, *sample(dtype=torch.float32), rtol=1e-4, atol=1e-4)


def test_bad_input() -> None:
    leaves = sample()
    for error, match, keywords in [
        (ValueError, "squeeze must be", {"squeeze": "output"}),
        (ValueError, "activation must be None or 'relu'", {"activation": "leaky_relu"}),
        (ValueError, "norm must be one of", {"norm": "layer"}),
        (ValueError, "eps must be finite", {"eps": -1.0}),
        (ValueError, "without training needs running_mean", {"training": False}),
    ]:
        with pytest.raises(error, match=match):
            norm_se_residual(*leaves, **keywords)
    with pytest.raises(ValueError, match="differ in shape"):
        norm_se_residual(leaves[0], leaves[1][:1], *leaves[2:])
