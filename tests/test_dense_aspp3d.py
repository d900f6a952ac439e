"""DenseASPP3d against the chain of its layers: values, gradients, state, what is kept, what is traced."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_traceable, gradients
from processes import in_two_processes, needs_gloo
from torch import Tensor

from focuskernels import dense_aspp3d
from focuskernels._lib import layout_of
from focuskernels.nn import DenseASPP3d, NormAct3d, convert_sync_norm
from focuskernels.reference.nn import PlainDenseASPP

DILATIONS = ((1, 2, 3), (2, 1, 40), 3)


def pair(channels: int, growth: int = 4, bottleneck: int = 8, **options: Any) -> tuple[DenseASPP3d, PlainDenseASPP]:
    module = DenseASPP3d(channels, growth, bottleneck, DILATIONS, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    chain = copy.deepcopy(module)
    chain.__class__ = PlainDenseASPP
    return module, chain


def assert_chain(module: DenseASPP3d, chain: PlainDenseASPP, x: Tensor) -> None:
    results = []
    for each in (module, chain):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = each(leaf)
        results.append((y, gradients(y, [leaf, *each.parameters()])))
    (actual, actual_gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(actual, expected)
    assert layout_of(actual) == layout_of(x)
    torch.testing.assert_close(actual_gradients, expected_gradients)
    torch.testing.assert_close(module.state_dict(), chain.state_dict())


@pytest.mark.parametrize("slab", [dense_aspp3d.SLAB, 250])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
@pytest.mark.parametrize("batch", [1, 2])
def test_is_the_chain_of_its_layers(
    norm: Any, batch: int, training: bool, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense_aspp3d, "SLAB", slab)  # 250: several slabs
    module, chain = (m.double().train(training) for m in pair(6, norm=norm))
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        x = torch.randn(batch, 6, 3, 5, 4, dtype=torch.float64).to(memory_format=layout)
        for _ in range(2):
            assert_chain(module, chain, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_under_autocast(dtype: torch.dtype) -> None:
    module, chain = pair(6, norm="instance")
    x = torch.randn(2, 6, 3, 5, 4).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == chain(x).dtype == dtype
        torch.testing.assert_close(module(x), chain(x), rtol=2e-2, atol=2e-2)
    y, expected = (run_gradients(m, x) for m in (module, chain))
    for actual, wanted in zip(y, expected):
        assert actual.dtype == wanted.dtype
        assert float((actual.double() - wanted.double()).norm()) <= 0.05 * float(wanted.double().norm()) + 1e-3


def run_gradients(module: DenseASPP3d, x: Tensor) -> list[Any]:
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(leaf)
    return gradients(y, [leaf, *module.parameters()])


def test_keeps_the_result_and_the_bottlenecks_only() -> None:
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    module, x = DenseASPP3d(8, 4, 8, DILATIONS), torch.randn(1, 8, 6, 16, 16, requires_grad=True)
    known = {p.untyped_storage().data_ptr() for p in module.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(x)
    voxels = x[0, 0].numel()
    total = sum(size for pointer, size in kept.items() if pointer not in known)
    maps = 4 * voxels * (module.out_channels + 3 * 8)
    assert y.untyped_storage().data_ptr() in kept
    assert maps <= total <= 1.05 * maps


def test_nothing_is_kept_without_gradients() -> None:
    module, x = DenseASPP3d(8, 4, 8, DILATIONS), torch.randn(1, 8, 3, 4, 5)
    with torch.no_grad():
        assert module(x).grad_fn is None
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    assert module(x).grad_fn is None


def test_second_derivative_is_refused() -> None:
    x = torch.randn(1, 4, 2, 3, 4, requires_grad=True)
    y = DenseASPP3d(4, 4, 4, [1])(x)
    with pytest.raises(RuntimeError, match="nn.DenseASPP3d has no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_bad_input() -> None:
    module = DenseASPP3d(4, 4, 4, [1])
    for error, match, x in [
        (TypeError, "x must be floating point", torch.zeros(1, 4, 2, 3, 4, dtype=torch.int64)),
        (ValueError, "x has 3 channels, expected 4", torch.randn(1, 3, 2, 3, 4)),
        (TypeError, "x is torch.float64", torch.randn(1, 4, 2, 3, 4).double()),
        (ValueError, "one value only", torch.randn(1, 4, 1, 1, 1)),
    ]:
        with pytest.raises(error, match=match):
            module(x)


def test_layers_that_differ_are_refused() -> None:
    x = torch.randn(1, 4, 2, 3, 4)
    cases: list[tuple[type[Exception], str, Callable[[Any], Any]]] = [
        (ValueError, "branches.1.0 has training=False .*0.0 has training=True", lambda b: b[1][0].eval()),
        (ValueError, "branches.0.2 has .*sync=True, .*0.0 has .*sync=False", lambda b: convert_sync_norm(b[0][2])),
        (TypeError, "branches.1.2 is torch.float64 on cpu, branches.0.0 is torch.float32", lambda b: b[1][2].double()),
        (TypeError, "x is torch.float32 .* branches.1.3.weight is torch.float64", lambda b: b[1][3].double()),
        (TypeError, "x is torch.float32 on cpu, branches.0.1.weight is .* on meta", lambda b: b[0][1].to("meta")),
    ]
    for error, match, change in cases:
        module = DenseASPP3d(4, 4, 4, [1, 2])
        change(module.branches)
        with pytest.raises(error, match=match):
            module(x)
    frozen = DenseASPP3d(4, 4, 4, [1, 2], norm="instance")
    frozen.branches[1][0].eval()  # changes nothing in such a norm
    torch.testing.assert_close(frozen(x), frozen.train()(x))


def test_one_value_in_a_group_of_the_bottleneck_is_refused() -> None:
    module = DenseASPP3d(3, 4, 1, [1], norm="group")
    with pytest.raises(ValueError, match=r"'group' has one value only .* \(2, 1, 1, 1, 1\)"):
        module(torch.randn(2, 3, 1, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_compiles_as_one_graph(training: bool) -> None:
    module = DenseASPP3d(4, 4, 4, DILATIONS, norm="instance").train(training)
    assert_traceable(module, torch.randn(2, 4, 2, 3, 4, requires_grad=True), rtol=1e-4, atol=1e-4)


def synchronised(rank: int, folder: Path) -> None:
    """One of two processes; compares its part with the chain over both parts."""
    torch.manual_seed(0)
    module, chain = (m.double() for m in pair(4))
    for layer in module.modules():
        if isinstance(layer, NormAct3d):
            layer.sync = True
    whole = torch.randn(3, 4, 2, 3, 4, dtype=torch.float64)
    mine = slice(0, 1) if rank == 0 else slice(1, 3)
    x, part = whole.clone().requires_grad_(), whole[mine].clone().requires_grad_()
    expected, actual = chain(x), module(part)
    torch.testing.assert_close(actual, expected[mine])
    torch.testing.assert_close(module.state_dict(), chain.state_dict())
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    actual.backward(upstream[mine])
    torch.testing.assert_close(part.grad, x.grad[mine])
    (folder / str(rank)).touch()


@pytest.mark.slow
@needs_gloo
def test_statistics_over_processes(tmp_path: Path) -> None:
    in_two_processes(synchronised, tmp_path, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"0", "1"}
