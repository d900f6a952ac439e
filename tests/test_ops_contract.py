"""What every op and public function owes to PyTorch, whichever backend serves it; new ones must be added to CALLS."""

import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import gradients, tensors_in
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import focuskernels as fk
from focuskernels.nn import DenseASPP3d


def roi_gather(x: Tensor) -> Tensor:
    centers = torch.tensor([[0.0, 1, 2, 3], [1, 0, 4, 5]])[: 2 * len(x)] + 0 * x.sum()
    return fk.roi_gather_3d([x, x[:, :2] + 0], centers, 2, (3, 2, 2))


def roi_align(x: Tensor) -> Tensor:
    rois = torch.tensor([[0.0, 0, 1, 2, 3, 4, 5], [1, 0, 0, 0, 9, 2, 1]])[: 2 * len(x)]
    return fk.roi_align_3d(x, rois, (1, 2, 3), 0.7)


def roi_gather_each(x: Tensor) -> list[Tensor]:
    centers = torch.tensor([[0.0, 1, 2, 3], [1, 0, 4, 5]])[: 2 * len(x)] + 0 * x.sum()
    return fk.roi_gather_each_3d(
        [x, x], centers, [2, (1, 2, 3)][: len(centers)], channels=[None, [0, 1][: len(centers)]]
    )


def paste_rois(x: Tensor) -> Tensor:
    labels = torch.zeros(x[:, 0].shape, dtype=torch.uint8)
    centers = torch.tensor([[0, 1, 2, 3], [1, 0, 4, 5]])[: 2 * len(x)]
    return fk.paste_rois_3d(labels, list(x[:2, 0]), centers, [1, 2][: len(x)])


def focal_dice(function: Callable[..., Any]) -> Callable[[Tensor], Any]:
    return lambda x: function(x, torch.arange(x[:, 0].numel()).view(x[:, 0].shape) % x.shape[1], gamma=2.0)


# Each calls one public function on x (N,4,4,5,6).
CALLS: dict[str, Callable[[Tensor], Any]] = {
    "dilated_conv3d": lambda x: fk.dilated_conv3d(
        x, torch.ones(3, 4, 3, 3, 3) + x.flatten()[:1].sum(), None, (1, 2, 2)
    ),
    "focal_dice_loss": focal_dice(fk.focal_dice_loss),
    "focal_dice_sums": focal_dice(fk.focal_dice_sums),
    "heatmap_argmax_3d": fk.heatmap_argmax_3d,
    "linear_argmax": lambda x: fk.linear_argmax(x, torch.ones(3, 4), None, probability=True),
    "linear_focal_dice_loss": lambda x: fk.linear_focal_dice_loss(
        x, torch.linspace(-1, 1, 12).view(3, 4), None, torch.ones(x[:, 0].shape, dtype=torch.uint8)
    ),
    "norm_act": lambda x: fk.norm_act(x, torch.ones(4), torch.zeros(4), norm="instance"),
    "norm_se_residual": lambda x: fk.norm_se_residual(
        x, x, None, None, torch.ones(1, 4), None, torch.ones(4, 1), None, num_groups=2, norm="group"
    ),
    "paste_rois_3d": paste_rois,
    "roi_align_3d": roi_align,
    "roi_gather_3d": roi_gather,
    "roi_gather_each_3d": roi_gather_each,
    "se_residual": lambda x: fk.se_residual(
        x, x, torch.ones(1, 4), torch.zeros(1), torch.ones(4, 1), torch.zeros(4), activation="relu"
    ),
}
DIFFERENTIABLE = [name for name in CALLS if name not in ("linear_argmax", "paste_rois_3d")]
# Ops that only a module calls.
MODULES: list[Callable[[Tensor], Any]] = [DenseASPP3d(4, 3, 5, [(1, 2, 2), 3], norm="instance")]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last_3d": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "sliced": lambda x: x.repeat(1, 1, 1, 1, 2)[..., ::2],
    "empty": lambda x: x[:0],
}


class Recorder(TorchDispatchMode):
    """The calls of our ops, as autograd and the Python layer make them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "focuskernels":
            self.calls.append((func, tree_map_only(Tensor, Tensor.detach, args)))  # our ops are called below autograd
        return func(*args, **(kwargs or {}))


def sample(layout: str = "contiguous") -> Tensor:
    return LAYOUTS[layout](torch.rand(2, 4, 4, 5, 6)).requires_grad_()


def recorded(layout: str) -> list[tuple[Any, tuple[Any, ...]]]:
    with Recorder() as recorder:
        for call in [*CALLS.values(), *MODULES]:
            leaf = sample(layout)
            for out in tensors_in(call(leaf)):
                if out.requires_grad:
                    torch.autograd.grad(out.sum(), leaf, retain_graph=True)
    return recorder.calls


def own_ops() -> set[str]:
    return {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("focuskernels::")}


def test_every_public_function_is_called_here() -> None:
    assert sorted(CALLS) == sorted(name for name in fk.__all__ if inspect.isfunction(getattr(fk, name)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str) -> None:
    seen = set()
    for op, args in recorded(layout):
        if op.name() not in seen:
            seen.add(op.name())
            torch.library.opcheck(op, args)
    # A backward in place is only an option of the loss, with its own test.
    assert {name for name in own_ops() if not name.endswith("_")} == seen


def test_schemas_neither_alias_nor_mutate() -> None:
    assert own_ops()
    for name in own_ops():
        schema = getattr(torch.ops.focuskernels, name.split("::")[1]).default._schema
        assert all(r.alias_info is None for r in schema.returns), schema
        if not name.endswith("_"):  # PyTorch's mark of an op that works in place
            assert not schema.is_mutable, schema


def test_what_copies_from_the_host_stays_out_of_cuda_graphs() -> None:
    """A graph would copy the addresses of the call that it was made from."""
    tagged = {
        n for n in own_ops() if torch.Tag.cudagraph_unsafe in getattr(torch.ops.focuskernels, n[14:]).default.tags
    }
    launchers = Path(fk.__file__).parent.glob("kernels/*.py")
    copying = {path.stem for path in launchers if "torch.tensor(" in path.read_text(encoding="utf-8")}
    assert copying == {"paste_rois3d", "roi_gather3d"}
    assert tagged == {
        f"focuskernels::{name}" for name in ("paste_rois_3d_fwd", "roi_gather_3d_fwd", "roi_gather_3d_bwd")
    }


class Call(torch.nn.Module):
    """One public function, as what traces and exports takes it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors_in(CALLS[self.name](x)))


def values_and_gradients(call: Callable[[Tensor], Any], x: Tensor) -> list[Tensor | None]:
    leaf = x.detach().requires_grad_()
    out = tensors_in(call(leaf))
    return [*out, *(gradients(out, [leaf]) if any(t.requires_grad for t in out) else [])]


@pytest.mark.parametrize("name", CALLS)
def test_compiles_as_one_graph(name: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Call(name), fullgraph=True, backend="aot_eager")
    x = sample()
    torch.testing.assert_close(values_and_gradients(compiled, x), values_and_gradients(Call(name), x))


@pytest.mark.parametrize("name", CALLS)
def test_compiles_for_any_size(name: str) -> None:
    """Gradients of dynamic shapes are compared in the tests of each op."""
    torch._dynamo.reset()
    compiled = torch.compile(Call(name), fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 4, 4, 5, 6), (2, 4, 5, 5, 7)):
        x = torch.rand(shape)
        torch.testing.assert_close(compiled(x), Call(name)(x))


@pytest.mark.parametrize("name", CALLS)
def test_exports(name: str) -> None:
    x = sample().detach()
    program = torch.export.export(Call(name), (x,))
    torch.testing.assert_close(program.module()(x), Call(name)(x))
    graphs = [module for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    assert any("torch.ops.focuskernels." in graph.code for graph in graphs)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


def test_what_is_differentiable() -> None:
    assert [name for name in CALLS if any(t.requires_grad for t in Call(name)(sample()))] == DIFFERENTIABLE


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_first_and_second_derivatives(name: str) -> None:
    """The first is right; the second is, too, or is refused."""
    with default_dtype(torch.float64):
        x = torch.rand(2, 4, 2, 3, 3, requires_grad=True)
        assert torch.autograd.gradcheck(Call(name), x, fast_mode=True)
        if name == "heatmap_argmax_3d":
            assert torch.autograd.gradgradcheck(Call(name), x, fast_mode=True)
            return
        with pytest.raises(RuntimeError, match=r"focuskernels\.\w+ has no second derivative; drop create_graph=True"):
            torch.autograd.gradgradcheck(Call(name), x, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CALLS)
def test_autocast(name: str, dtype: torch.dtype) -> None:
    x = sample()
    expected = values_and_gradients(CALLS[name], x)
    with torch.autocast("cpu", dtype):
        out = tensors_in(CALLS[name](x))
    own = gradients(out, [x]) if any(t.requires_grad for t in out) else []
    eps = torch.finfo(dtype).eps
    for a, e in zip([*out, *own], expected, strict=True):
        # Features, weights, logits and convolutions are rounded to the dtype of autocast.
        size = float(e.detach().abs().max()) if e.is_floating_point() else 0.0
        torch.testing.assert_close(a.double(), e.double(), rtol=4 * eps, atol=4 * eps * size)
    assert [g.dtype for g in own] == [x.dtype] * len(own)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_function_transforms_are_refused(name: str) -> None:
    """PyTorch's own messages: our gradients do not say how they vectorise, and values are looked at."""
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: sum(t.sum() for t in Call(name)(x)))(sample().detach())
    with pytest.raises(RuntimeError, match=r"setup_context|data-dependent|batching rule"):
        torch.func.vmap(Call(name))(sample().detach()[None])


@pytest.fixture
def many_threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def large_sample(layout: str) -> Tensor:
    """More than one thread takes at a time: see kSerialElements, kStrip and kChunk in csrc."""
    return LAYOUTS[layout](torch.rand(2, 4, 23, 60, 64))


@pytest.mark.usefixtures("many_threads")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last_3d"])
@pytest.mark.parametrize("name", CALLS)
def test_number_of_threads_changes_no_bit(name: str, layout: str) -> None:
    x = large_sample(layout)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(values_and_gradients(CALLS[name], x))
    # oneDNN cuts a convolution up by the number of threads, and so adds up in another order.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if name == "dilated_conv3d" else {"rtol": 0, "atol": 0}
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], **tolerance)


@pytest.mark.usefixtures("many_threads")
def test_may_be_called_from_several_threads_at_once() -> None:
    torch.set_num_threads(2)
    jobs = [(name, layout, seed) for name in CALLS for layout in LAYOUTS for seed in range(2)]

    def run(job: tuple[str, str, int]) -> list[Tensor | None]:
        name, layout, seed = job
        generator = torch.Generator().manual_seed(seed)
        return values_and_gradients(CALLS[name], LAYOUTS[layout](torch.rand(2, 4, 7, 20, 33, generator=generator)))

    expected = [run(job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        torch.testing.assert_close(list(pool.map(run, jobs)), expected, rtol=0, atol=0)


def test_first_calls_from_several_threads_at_once() -> None:
    """Kernels are looked for and loaded by whichever comes first."""
    code = f"""
import sys, threading, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_ops_contract import CALLS, sample
torch.manual_seed(0)
x, barrier, done = sample().detach(), threading.Barrier(len(CALLS)), []
def first(call):
    barrier.wait()
    call(x)
    done.append(1)
threads = [threading.Thread(target=first, args=(call,)) for call in CALLS.values()]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(done) == len(CALLS)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
