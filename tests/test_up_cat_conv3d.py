"""A decoder's entry in pieces against upsampling, concatenation and stock modules."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from focuskernels import up_cat_conv3d
from focuskernels.nn import DilatedConv3d, NormAct3d, UpSEResBlock3d
from focuskernels.reference.nn import to_reference

LOW, SKIP, OUT = 7, 4, 5


@pytest.fixture(params=["one piece", "pieces of two channels"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "one piece":
        monkeypatch.setattr(up_cat_conv3d, "LEAST", 2)
        monkeypatch.setattr(up_cat_conv3d, "PIECE_BYTES", 0)


def blocks(norm: str, dtype: torch.dtype, kernel: int | tuple[int, int, int] = 3) -> tuple[UpSEResBlock3d, Any]:
    block = UpSEResBlock3d(LOW + SKIP, OUT, kernel, (1, 2, 2), norm=norm).to(dtype)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.uniform_(-1, 1)
    return block, to_reference(copy.deepcopy(block))


def maps(dtype: torch.dtype, channels_last: bool, low: tuple[int, int, int] = (3, 4, 3)) -> tuple[Tensor, Tensor]:
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    x, skip = torch.randn(2, LOW, *low, dtype=dtype), torch.randn(2, SKIP, 5, 8, 7, dtype=dtype)
    return x.contiguous(memory_format=layout), skip.contiguous(memory_format=layout)


def everything(block: UpSEResBlock3d, x: Tensor, skip: Tensor) -> dict[str, Tensor]:
    """Output, gradients and statistics of a step."""
    x, skip = x.clone().requires_grad_(), skip.clone().requires_grad_()
    y = block(x, skip)
    wanted = {"x": x, "skip": skip, **dict(block.named_parameters())}
    grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    grads = torch.autograd.grad(y, list(wanted.values()), grad)
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True)), **dict(block.named_buffers())}


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    ("dtype", "bound"),
    # float32 rounds sums of another order
    [(torch.float64, 1e-12), (torch.float32, 1e-5)],
)
@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_is_the_block_after_concatenation(
    norm: str, dtype: torch.dtype, bound: float, channels_last: bool, training: bool
) -> None:
    block, reference = blocks(norm, dtype)
    inputs = maps(dtype, channels_last)
    actual = everything(block.train(training), *inputs)
    expected = everything(reference.train(training), *inputs)
    for name, value in expected.items():
        error = (actual[name].double() - value.double()).norm()
        assert error <= bound * value.double().norm() + 1e-12, name


@pytest.mark.usefixtures("pieces")
def test_kernels_and_sizes_that_need_no_upsampling() -> None:
    block, reference = blocks("batch", torch.float64, (1, 3, 3))
    inputs = maps(torch.float64, True, low=(5, 8, 7))
    actual, expected = everything(block, *inputs), everything(reference, *inputs)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=name)


def test_weights_and_statistics_are_those_of_the_plain_block() -> None:
    block, reference = blocks("batch", torch.float32)
    assert list(block.state_dict()) == list(reference.state_dict())
    block(*maps(torch.float32, True))
    assert int(block.norm1.num_batches_tracked) == 1


@pytest.mark.parametrize("skip_dtype", [torch.float32, torch.float64])
def test_a_map_that_is_refused_is_not_counted(skip_dtype: torch.dtype) -> None:
    block, _ = blocks("batch", torch.float32)
    x, skip = maps(torch.float64, True)
    with pytest.raises(TypeError, match="x is torch.float64"):
        block(x, skip.to(skip_dtype))
    assert not any(norm.num_batches_tracked for norm in (block.norm1, block.norm2, block.shortcut[0]))


def test_keeps_nothing_wide() -> None:
    """Of the layers that read the wide map: the inputs, parameters and outputs alone."""
    block, _ = blocks("batch", torch.float32)
    x, skip = (t.requires_grad_() for t in maps(torch.float32, True))
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(x, skip)
    assert max(tensor.shape[1] for tensor in kept if tensor.dim() == 5 and tensor.shape[2:] == skip.shape[2:]) <= OUT


def test_autocast_convolves_in_its_dtype() -> None:
    block, reference = blocks("batch", torch.float32)
    x, skip = maps(torch.float32, True)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x.bfloat16(), skip.bfloat16())
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last_3d)
    # a hundred products of numbers that are rounded to 8 bits
    torch.testing.assert_close(y.float(), reference(x, skip), rtol=0.05, atol=0.15)


@pytest.mark.usefixtures("pieces")
def test_is_deterministic() -> None:
    block, _ = blocks("instance", torch.float32)
    inputs = maps(torch.float32, True)
    first, second = everything(block, *inputs), everything(block, *inputs)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_compiles() -> None:
    block, _ = blocks("batch", torch.float32)
    inputs = maps(torch.float32, True)
    torch.testing.assert_close(torch.compile(copy.deepcopy(block), fullgraph=True)(*inputs), block(*inputs))


def test_bad_input() -> None:
    x, skip = maps(torch.float32, False)
    pair = NormAct3d(LOW + SKIP), DilatedConv3d(LOW + SKIP, OUT)
    with pytest.raises(TypeError, match=r"x is torch.float64 on cpu, skip is torch.float32"):
        up_cat_conv3d.up_cat_conv3d(x.double(), skip, [pair])
    with pytest.raises(ValueError, match="group"):
        up_cat_conv3d.up_cat_conv3d(x, skip, [(NormAct3d(LOW + SKIP, "group"), pair[1])])
    with pytest.raises(ValueError, match="bias"):
        up_cat_conv3d.up_cat_conv3d(x, skip, [(pair[0], DilatedConv3d(LOW + SKIP, OUT, bias=True))])
    with pytest.raises(ValueError, match=r"\(1, 7, .*\(2, 4, .*one batch size"):
        up_cat_conv3d.up_cat_conv3d(x[:1], skip, [pair])
    with pytest.raises(ValueError, match="11 channels"):
        up_cat_conv3d.up_cat_conv3d(x[:, :3], skip, [pair])
    for norm in ("batch", "group"):
        block, _ = blocks(norm, torch.float32)
        for low, high, match in [
            (x[:1], skip, "one batch size"),
            (x[:, :3], skip, "11 channels"),
            (torch.zeros(2, LOW + SKIP, 3, 4, 3), skip[:, :0], r"skip has no channels or voxels: \(2, 0, 5, 8, 7\)"),
            (x[:, :0], skip, "x has no channels or voxels"),
            (x, skip[:, :, :0], "skip has no channels or voxels"),
        ]:
            with pytest.raises(ValueError, match=match):
                block(low, high)
        with pytest.raises(TypeError, match="x is torch.float64 on cpu, skip is torch.float32 on cpu"):
            block(x.double(), skip)
    block, _ = blocks("batch", torch.float32)
    y = block(x.requires_grad_(), skip)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
