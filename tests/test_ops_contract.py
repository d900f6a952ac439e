"""What every op and public function owes to PyTorch, whichever backend serves it; new ones must be added to CALLS."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import tensors_in
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import focuskernels as fk
from focuskernels.info import operations
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
    "dilated_conv3d": lambda x: fk.dilated_conv3d(x, torch.ones(3, 4, 3, 3, 3) + x.sum(), None, (1, 2, 2)),
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
    assert sorted(CALLS) == operations()


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


@pytest.mark.parametrize("name", CALLS)
def test_compiles_as_one_graph(name: str) -> None:
    torch._dynamo.reset()
    x = sample()
    expected = tuple(tensors_in(CALLS[name](x)))
    compiled = torch.compile(lambda x: tuple(tensors_in(CALLS[name](x))), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
