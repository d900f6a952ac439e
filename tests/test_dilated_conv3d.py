import pytest
import torch
import torch.nn.functional as F
from compare import assert_layouts_agree, assert_traceable
from torch import Tensor

from focuskernels import dilated_conv3d


def by_shifts(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: tuple[int, int, int]) -> Tensor:
    """Each tap of the kernel times the volume shifted by it; zeros come in."""
    result = x.new_zeros(x.shape[0], weight.shape[0], *x.shape[2:])
    half = [d * (k // 2) for d, k in zip(dilation, weight.shape[2:])]
    padded = F.pad(x, [half[2]] * 2 + [half[1]] * 2 + [half[0]] * 2)
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            for k in range(weight.shape[4]):
                start = [tap * step for tap, step in zip((i, j, k), dilation)]
                window = padded[(..., *(slice(s, s + n) for s, n in zip(start, x.shape[2:])))]
                result += torch.einsum("ncdhw,oc->nodhw", window, weight[:, :, i, j, k])
    return result if bias is None else result + bias[:, None, None, None]


CASES = [
    ((2, 3, 5, 7, 6), (4, 3, 3, 3, 3), (1, 1, 1)),
    ((1, 2, 5, 9, 7), (3, 2, 3, 3, 3), (1, 3, 2)),
    ((2, 3, 1, 1, 1), (2, 3, 3, 3, 3), (1, 6, 12)),
    ((1, 1, 4, 1, 9), (1, 1, 1, 3, 5), (2, 2, 2)),
    ((2, 4, 3, 4, 5), (3, 4, 1, 1, 1), (1, 1, 1)),
    ((1, 2, 4, 5, 6), (2, 2, 3, 3, 3), (5, 18, 40)),
]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("shape", "kernel", "dilation"), CASES)
def test_matches_shifts(
    shape: tuple[int, ...], kernel: tuple[int, ...], dilation: tuple[int, int, int], with_bias: bool
) -> None:
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(kernel, dtype=torch.float64)
    bias = torch.randn(kernel[0], dtype=torch.float64) if with_bias else None
    expected = by_shifts(x, weight, bias, dilation)
    torch.testing.assert_close(dilated_conv3d(x, weight, bias, dilation), expected)
    single = dilated_conv3d(x.float(), weight.float(), None if bias is None else bias.float(), dilation)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-5)


def test_dilation_beyond_the_volume_leaves_the_middle_tap() -> None:
    x, weight = torch.randn(1, 2, 4, 5, 6), torch.randn(3, 2, 3, 3, 3)
    middle = torch.einsum("ncdhw,oc->nodhw", x, weight[:, :, 1, 1, 1])
    torch.testing.assert_close(dilated_conv3d(x, weight, dilation=100), middle)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(s).to(dtype) for s in [(2, 8, 4, 5, 6), (4, 8, 3, 3, 3), (4,)])
    actual = dilated_conv3d(x, weight, bias, (1, 3, 3))
    expected = by_shifts(x.double(), weight.double(), bias.double(), (1, 3, 3))
    assert actual.dtype == dtype
    torch.testing.assert_close(
        actual.double(), expected, rtol=0, atol=float(4 * torch.finfo(dtype).eps * expected.std())
    )


@pytest.mark.parametrize(("depth", "kernel"), [(1, 3), (2, 3), (2, 5), (4, 5)])
def test_gradients_of_thin_maps_in_bfloat16(depth: int, kernel: int) -> None:
    """oneDNN alone returns what memory held before, on processors with AVX-512's bfloat16."""
    x, weight = torch.randn(1, 16, depth, 6, 7), torch.randn(32, 16, kernel, 3, 3)
    leaves = [t.bfloat16().requires_grad_() for t in (x, weight)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    remains = [torch.full((size,), 1e35) for size in (1000, 10000, 100000)]
    del remains
    grad = torch.randn(1, 32, depth, 6, 7).bfloat16()
    found = torch.autograd.grad(dilated_conv3d(*leaves), leaves, grad)
    padding = (kernel // 2, 1, 1)
    expected = torch.autograd.grad(F.conv3d(*exact, padding=padding), exact, grad.double())
    for ours, right in zip(found, expected):
        torch.testing.assert_close(ours.double(), right, rtol=2**-8, atol=2**-8 * right.abs().max().item())


def test_gradients() -> None:
    x, weight, bias = (
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(2, 2, 2, 4, 3), (2, 2, 3, 3, 3), (2,)]
    )
    for dilation in ((1, 1, 1), (1, 2, 4)):
        assert torch.autograd.gradcheck(lambda *a, d=dilation: dilated_conv3d(*a, d), (x, weight, bias))


def test_layouts_of_input_and_weight() -> None:
    x, weight = torch.randn(2, 3, 4, 5, 6), torch.randn(4, 3, 3, 3, 3)
    assert_layouts_agree(lambda t: dilated_conv3d(t, weight, dilation=(1, 2, 3)), x, rtol=1e-4, atol=1e-4)
    assert_layouts_agree(lambda t: dilated_conv3d(x, t, dilation=(1, 2, 3)), weight, rtol=1e-4, atol=1e-4)


def test_empty_batch() -> None:
    x = torch.zeros(0, 3, 4, 5, 6, requires_grad=True)
    weight = torch.randn(2, 3, 3, 3, 3, requires_grad=True)
    y = dilated_conv3d(x, weight, dilation=2)
    assert y.shape == (0, 2, 4, 5, 6)
    gradients = torch.autograd.grad(y.sum(), (x, weight))
    assert gradients[0].shape == x.shape
    assert torch.equal(gradients[1], torch.zeros_like(weight))


def test_is_deterministic() -> None:
    x, weight = torch.randn(2, 8, 6, 7, 9, requires_grad=True), torch.randn(8, 8, 3, 3, 3, requires_grad=True)
    runs = []
    for _ in range(2):
        y = dilated_conv3d(x, weight, dilation=(1, 3, 3))
        runs.append((y, *torch.autograd.grad(y.square().sum(), (x, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_nan_stays_within_reach_of_the_kernel() -> None:
    x = torch.full((1, 1, 5, 5, 5), 1e4)
    x[0, 0, 0, 0, 0] = torch.nan
    y = dilated_conv3d(x, torch.ones(1, 1, 3, 3, 3), dilation=2)[0, 0]
    reached = y.isnan().nonzero().tolist()
    assert reached == [[z, u, v] for z in (0, 2) for u in (0, 2) for v in (0, 2)]


def test_autocast_as_torch_does() -> None:
    x, weight, bias = torch.randn(1, 2, 3, 4, 5), torch.randn(2, 2, 3, 3, 3), torch.randn(2)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = dilated_conv3d(x, weight, bias), F.conv3d(x, weight, bias, padding=1)
        double = dilated_conv3d(x.double(), weight.double())
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected)
    assert double.dtype == torch.float64


def test_compile_and_fake_tensors() -> None:
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in [(2, 3, 4, 5, 6), (4, 3, 3, 3, 3), (4,)])
    assert_traceable(lambda *a: dilated_conv3d(*a, (1, 2, 3)), x, weight, bias, rtol=1e-4, atol=1e-4)


def test_bad_input() -> None:
    x, weight = torch.zeros(1, 3, 4, 5, 6), torch.zeros(2, 3, 3, 3, 3)
    for error, match, arguments in [
        (TypeError, "x must be a tensor, got list", ([1.0], weight)),
        (TypeError, "weight must be floating point, got torch.int64", (x, weight.long())),
        (TypeError, "float32 on cpu, weight is torch.float64", (x, weight.double())),
        (TypeError, "bias is torch.float64", (x, weight, torch.zeros(2).double())),
        (TypeError, "bias must be a tensor", (x, weight, [0.0, 0.0])),
        (TypeError, "dilation must be an integer", (x, weight, None, 1.5)),
        (TypeError, "dilation must be an integer", (x, weight, None, (1, 2))),
        (ValueError, "dilation must be positive, got 0", (x, weight, None, 0)),
        (ValueError, r"x must have 5 dimensions, got shape \(3, 4, 5, 6\)", (x[0], weight)),
        (ValueError, r"takes 2 channels, x has 3: \(2, 2, 3, 3, 3\), \(1, 3, 4, 5, 6\)", (x, weight[:, :2])),
        (ValueError, r"odd, got weight of shape \(2, 3, 3, 2, 3\)", (x, weight[:, :, :, :2])),
        (ValueError, r"bias must be \(2,\), got \(3,\)", (x, weight, torch.zeros(3))),
        (ValueError, r"no voxels: \(1, 3, 0, 5, 6\)", (x[:, :, :0], weight)),
        (ValueError, r"weight has no channels: \(2, 0, 3, 3, 3\)", (x[:, :0], weight[:, :0])),
        (ValueError, r"weight has no channels: \(0, 3, 3, 3, 3\)", (x, weight[:0])),
    ]:
        with pytest.raises(error, match=match):
            dilated_conv3d(*arguments)  # type: ignore[arg-type]


def test_output_has_channels_innermost_where_an_operand_has() -> None:
    wide = torch.randn(1, 8, 3, 4, 5).to(memory_format=torch.channels_last_3d)
    weight = torch.randn(4, 6, 3, 3, 3)
    expected = F.conv3d(wide[:, :6].contiguous(), weight, padding=2, dilation=2)
    for x, w in [
        (wide[:, :6], weight),
        (wide[:, :6].contiguous(), weight.to(memory_format=torch.channels_last_3d)),
    ]:
        y = dilated_conv3d(x, w, dilation=2)
        assert y.is_contiguous(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert dilated_conv3d(wide[:, :6].contiguous(), weight).is_contiguous()


def test_only_gradients_asked_for() -> None:
    x, weight, bias = torch.randn(1, 2, 3, 4, 5), torch.randn(3, 2, 3, 3, 3), torch.randn(3)
    for needs in [(True, False, False), (False, True, False), (False, False, True), (True, True, True)]:
        leaves = [t.clone().requires_grad_(n) for t, n in zip((x, weight, bias), needs)]
        plain = [t.clone().requires_grad_(n) for t, n in zip((x, weight, bias), needs)]
        dilated_conv3d(*leaves).square().sum().backward()
        F.conv3d(*plain, padding=1).square().sum().backward()
        for actual, expected in zip(leaves, plain):
            torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-4)


def test_second_derivative_is_refused() -> None:
    x = torch.randn(1, 2, 3, 4, 5, requires_grad=True)
    y = dilated_conv3d(x, torch.randn(3, 2, 3, 3, 3))
    with pytest.raises(RuntimeError, match="dilated_conv3d has no second derivative"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(
    ("shape", "kernel", "dilation"),
    [((4, 7, 6, 5), 3, (1, 2, 3)), ((3, 1, 9, 4), (1, 3, 3), (1, 1, 1)), ((2, 4, 1, 1), 3, (6, 6, 6))],
)
def test_small_maps_are_not_unfolded(
    layout: torch.memory_format, shape: tuple[int, ...], kernel: int | tuple[int, int, int], dilation: tuple[int, ...]
) -> None:
    """Of one sample of a small map, PyTorch's own choice is a loop that unfolds it tap by tap."""
    conv = torch.nn.Conv3d(shape[0], 5, kernel, padding="same", dilation=dilation)
    x = torch.randn(1, *shape).contiguous(memory_format=layout)
    weight, bias = conv.weight.detach().contiguous(memory_format=layout), conv.bias
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
    with torch.profiler.profile() as profile:
        y = dilated_conv3d(*inputs, dilation)
        grads = torch.autograd.grad(y, inputs, torch.ones_like(y))
    assert not [event.key for event in profile.key_averages() if "slow_conv" in event.key]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = by_shifts(*exact, dilation)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for actual, wanted in zip(grads, torch.autograd.grad(expected, exact, torch.ones_like(expected)), strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-4)
