"""DenseASPP around one buffer that holds the input and every branch's output, as opaque ops.

Branch i reads the first c channels of the buffer x, reduces them, h = conv(relu(norm1(x[:, :c]))) with a kernel of
1x1x1, and writes its growth, conv(relu(norm2(h))), behind them. Kept for backward: the buffer, which is the result, the
h, and the norms' tables and variances; what the norms put out is computed again. The statistics of a channel of the
buffer are taken once, when it is written, for all the branches that read it.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import channelwise
from ._arguments import cast_for_autocast
from ._lib import Kernel, define, forbid_double_backward, layout_of, triton_missing
from .dilated_conv3d import forward_op, grad_input_op, grad_weight_op
from .norm_act import check_norm, over_processes, update_running
from .reference.channelwise import RELU, table_dtype
from .reference.norm_act import Sets, gradient, statistics, table

POINT = (1, 1, 1)
SLAB = 1 << 20  #: elements


class Branch(NamedTuple):
    """Parameters of a branch: c channels of the buffer, b of the bottleneck, g of growth."""

    norm1_weight: Tensor  #: (c,)
    norm1_bias: Tensor  #: (c,)
    reduce: Tensor  #: (b, c, 1, 1, 1); its dtype is that of the products
    norm2_weight: Tensor  #: (b,)
    norm2_bias: Tensor  #: (b,)
    conv: Tensor  #: (g, b, kd, kh, kw)


class Norms(NamedTuple):
    """How the norms work; groups and eps have two entries per branch."""

    norm: str
    groups: Sequence[int]
    eps: Sequence[float]
    given: Sequence[Tensor]  #: mean and variance (C,) of every norm, one after the other; none to take those of the map
    total: Tensor | None  #: numbers per channel in all processes, where statistics are taken over them


class Normed(NamedTuple):
    """Of one norm."""

    table: Tensor  #: (N, 3, C), for `channelwise.affine`
    variance: Tensor  #: (N, C)


#: Sums of `channelwise.affine_sums` to rows for `channelwise.affine_backward`.
RowsOf = Callable[[Tensor], Tensor]


class Passes:
    """The passes over the maps; `buffer` is a whole one, of which the first `channels` count."""

    def reduce(self, buffer: Tensor, channels: int, table: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """The bottleneck h, and its moments where they come for free."""
        h = _empty(buffer, len(weight), weight.dtype)
        for slab in slabs(buffer, channels):
            y = channelwise.affine(_first(buffer[:, :, slab], channels), table, None, RELU, 0.0).to(weight.dtype)
            h[:, :, slab] = forward_op(y, weight, None, POINT)
        return h, None

    def reduce_backward(
        self, grad: Tensor, buffer: Tensor, channels: int, table: Tensor, weight: Tensor, rows_of: RowsOf, into: Tensor
    ) -> Tensor:
        """From the gradient of h, that of the weight; that of the buffer is added to `into`."""
        grad_weights, sums = [], []
        d = _empty(buffer, channels, buffer.dtype)
        for slab in slabs(buffer, channels):
            x, g = _first(buffer[:, :, slab], channels), _first(grad[:, :, slab], len(weight))
            y = channelwise.affine(x, table, None, RELU, 0.0).to(weight.dtype)
            grad_weights.append(grad_weight_op(g, y, weight, POINT, False)[0])
            part = grad_input_op(g, weight, POINT).to(x.dtype, memory_format=layout_of(x))
            sums.append(channelwise.affine_sums(part, x, table, None, RELU, 0.0, False)[0])
            d[:, :, slab] = part
        rows = rows_of(torch.stack(sums).sum(dim=0))
        for slab in slabs(buffer, channels):
            x, part = (_first(t[:, :, slab], channels) for t in (buffer, d))
            into[:, :channels, slab] += channelwise.affine_backward(part, x, table, rows, RELU, 0.0)
        return torch.stack(grad_weights).sum(dim=0)

    def grow(
        self, h: Tensor, table: Tensor, weight: Tensor, dilation: Sequence[int], buffer: Tensor, channels: int
    ) -> Tensor:
        """Write the growth behind the first `channels` and return its moments."""
        y = channelwise.affine(h, table, None, RELU, 0.0)
        return self._grow_by_vendor(y, weight, dilation, buffer[:, channels : channels + len(weight)])

    def grow_backward(
        self, grad: Tensor, h: Tensor, table: Tensor, weight: Tensor, dilation: Sequence[int], rows_of: RowsOf
    ) -> tuple[Tensor, Tensor]:
        """From the gradient of the growth, some channels of a map, those of h and of the weight."""
        grad = self._growth_gradient(grad, h, weight)
        y = channelwise.affine(h, table, None, RELU, 0.0)
        grad_weight = grad_weight_op(grad, y, weight, dilation, False)[0]
        d = grad_input_op(grad, weight, dilation).contiguous(memory_format=layout_of(h))
        rows = rows_of(channelwise.affine_sums(d, h, table, None, RELU, 0.0, False)[0])
        return channelwise.affine_backward(d, h, table, rows, RELU, 0.0), grad_weight

    def _grow_by_vendor(self, y: Tensor, weight: Tensor, dilation: Sequence[int], out: Tensor) -> Tensor:
        growth = forward_op(y, weight, None, dilation).to(out.dtype, memory_format=layout_of(y))
        out.copy_(growth)
        return channelwise.moments(growth)

    def _growth_gradient(self, grad: Tensor, h: Tensor, weight: Tensor) -> Tensor:
        """Dense, once for the two products that read it."""
        return grad.to(h.dtype, memory_format=layout_of(h))


def slabs(buffer: Tensor, channels: int) -> list[slice]:
    """Pieces of the depth of which so many channels stay in a cache of a CPU; one piece elsewhere."""
    if buffer.device.type != "cpu":
        return [slice(None)]
    depth, plane = buffer.shape[2], buffer.shape[0] * channels * buffer.shape[3:].numel()
    thickness = max(1, SLAB // max(1, plane))
    return [slice(start, min(start + thickness, depth)) for start in range(0, depth, thickness)]


def _first(buffer: Tensor, channels: int) -> Tensor:
    """Dense in the layout of the buffer."""
    return buffer[:, :channels].contiguous(memory_format=layout_of(buffer))


def forward(
    passes: Passes,
    x: Tensor,
    parameters: Sequence[Tensor],
    dilations: Sequence[int],
    norms: Norms,
    keep: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """The buffer, then of each branch h, or nothing without `keep`, and of each norm its table and variance."""
    branches = branches_of(parameters)
    channels = x.shape[1]
    buffer = _empty(x, channels + sum(len(branch.conv) for branch in branches), x.dtype)
    buffer[:, :channels] = x
    moments = [] if norms.given else [channelwise.moments(x)]
    reduced, normed = [], []
    for i, branch in enumerate(branches):
        known = torch.cat(moments, dim=2) if moments else None
        first = _normed(norms, 2 * i, known, x, branch.norm1_weight, branch.norm1_bias)
        h, known = passes.reduce(buffer, channels, first.table, branch.reduce)
        if norms.given:
            known = None
        elif known is None:
            known = channelwise.moments(h)
        second = _normed(norms, 2 * i + 1, known, h, branch.norm2_weight, branch.norm2_bias)
        found = passes.grow(h, second.table, branch.conv, dilations[3 * i : 3 * i + 3], buffer, channels)
        if moments:
            moments.append(found)
        channels += len(branch.conv)
        normed += [first, second]
        if keep:
            reduced.append(h)
    return buffer, reduced, [each.table for each in normed], [each.variance for each in normed]


def backward(
    passes: Passes,
    grad: Tensor,
    buffer: Tensor,
    reduced: Sequence[Tensor],
    tables: Sequence[Tensor],
    variances: Sequence[Tensor],
    parameters: Sequence[Tensor],
    dilations: Sequence[int],
    norms: Norms,
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of x and of the parameters."""
    branches = branches_of(parameters)
    into = grad.clone(memory_format=layout_of(buffer))
    end = buffer.shape[1]
    gradients: list[Tensor] = []
    for i in reversed(range(len(branches))):
        branch, h = branches[i], reduced[i]
        channels = end - len(branch.conv)
        first, second = (
            _Gradient(norms, 2 * i + j, Normed(tables[2 * i + j], variances[2 * i + j]), like)
            for j, like in enumerate((buffer, h))
        )
        grad_h, grad_conv = passes.grow_backward(
            into[:, channels:end], h, second.table, branch.conv, dilations[3 * i : 3 * i + 3], second
        )
        grad_reduce = passes.reduce_backward(grad_h, buffer, channels, first.table, branch.reduce, first, into)
        gradients = [first.weight, first.bias, grad_reduce, second.weight, second.bias, grad_conv, *gradients]
        end = channels
    return _first(into, end).clone(memory_format=layout_of(buffer)), [
        g.to(p.dtype) for g, p in zip(gradients, parameters)
    ]


class _Gradient:
    """A norm in backward: called with its sums it returns the rows, and knows then its parameters' gradients."""

    weight: Tensor
    bias: Tensor

    def __init__(self, norms: Norms, index: int, normed: Normed, like: Tensor) -> None:
        self.table = normed.table
        self._rstd = (normed.variance + norms.eps[index]).rsqrt()
        self._sets = None if norms.given else _sets(norms, index, like)

    def __call__(self, sums: Tensor) -> Tensor:
        rows, self.weight, self.bias = gradient(sums, self.table, self._rstd, self._sets)
        return rows


def _normed(norms: Norms, index: int, moments: Tensor | None, like: Tensor, weight: Tensor, bias: Tensor) -> Normed:
    if moments is None:
        dtype, shape = table_dtype(like), (like.shape[0], len(weight))
        mean, variance = (t.to(dtype).expand(shape) for t in norms.given[2 * index : 2 * index + 2])
    else:
        mean, variance = statistics(moments, _sets(norms, index, like))
    # Each result of an op has memory of its own.
    variance = variance.clone(memory_format=torch.contiguous_format)
    return Normed(table(mean, (variance + norms.eps[index]).rsqrt(), weight, bias), variance)


def _sets(norms: Norms, index: int, like: Tensor) -> Sets:
    reduce = None if norms.total is None else over_processes
    return Sets(norms.norm, norms.groups[index], like.shape[2:].numel(), norms.total, reduce)


def branches_of(parameters: Sequence[Tensor]) -> list[Branch]:
    """From all parameters in order."""
    size = len(Branch._fields)
    return [Branch(*parameters[i : i + size]) for i in range(0, len(parameters), size)]


def _empty(like: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(
        (like.shape[0], channels, *like.shape[2:]),
        dtype=dtype,
        device=like.device,
        memory_format=layout_of(like),
    )


def dense_aspp3d(x: Tensor, branches: Sequence[Sequence[Any]]) -> Tensor:
    """`nn.DenseASPP3d`: each branch consists of a norm, a convolution, a norm and a convolution of `nn`.

    Running statistics are updated as `norm_act` does. The products are in the dtype of autocast where it is active.
    """
    norms = [layer for branch in branches for layer in (branch[0], branch[2])]
    convs = [layer for branch in branches for layer in (branch[1], branch[3])]
    sets = _check(x, norms, convs)
    # Autocast changes the weights alone: norms, and so the buffer, stay in the dtype of x.
    weights: list[Any] = [cast_for_autocast(conv.weight)[0] for conv in convs]
    parameters = [t for norm, weight in zip(norms, weights) for t in (norm.weight, norm.bias, weight)]
    takes = norms[0].norm != "batch" or norms[0].training
    given = [] if takes else [t for norm in norms for t in (norm.running_mean, norm.running_var)]
    groups, eps = [norm.num_groups or 1 for norm in norms], [norm.eps for norm in norms]
    dilations = [step for branch in branches for step in branch[3].dilation]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters))
    how = Norms(norms[0].norm, groups, eps, given, sets.total)
    y, *statistics = DenseASPP.apply(channelwise.dense(x), dilations, how, keep, *parameters)
    if norms[0].norm == "batch" and takes:
        for norm, table, variance in zip(norms, statistics, statistics[len(norms) :]):
            norm.num_batches_tracked.add_(1)
            mean = table[:, 0]
            update_running(norm.running_mean, norm.running_var, mean, variance, norm.momentum, sets.numbers(mean))
    return y


def _check(x: Tensor, norms: Sequence[Any], convs: Sequence[Any]) -> Sets:
    norm = norms[0]
    for i, conv in enumerate(convs):
        _check_weight(x, conv.weight, f"branches.{i // 2}.{i % 2 * 2 + 1}.weight")
    for i, other in enumerate(norms):
        _check_alike(other, norm, f"branches.{i // 2}.{i % 2 * 2}")
    running = (norm.running_mean, norm.running_var)
    group = norm.options()["process_group"]
    sets = check_norm(x, norm.weight, norm.bias, norm.norm, norm.num_groups, *running, norm.training, group)
    # a group of a bottleneck may have fewer values than one of x
    for other in norms[1:] if norm.norm == "group" else ():
        like = x[:, :1].expand(-1, len(other.weight), -1, -1, -1)
        check_norm(like, other.weight, other.bias, other.norm, other.num_groups, None, None, other.training)
    return sets


def _check_weight(x: Tensor, weight: Tensor, name: str) -> None:
    casts = torch.is_autocast_enabled(x.device.type)
    if weight.device != x.device or (weight.dtype != x.dtype and not casts):
        raise TypeError(f"x is {x.dtype} on {x.device}, {name} is {weight.dtype} on {weight.device}")


def _check_alike(norm: Any, first: Any, name: str) -> None:
    """Refuse a norm that works in another way than the first one, whose way all take."""
    ours, its = norm.weight, first.weight
    if ours.dtype != its.dtype or ours.device != its.device:
        raise TypeError(f"{name} is {ours.dtype} on {ours.device}, branches.0.0 is {its.dtype} on {its.device}")
    if norm.norm == "batch" and (norm.training, norm.sync) != (first.training, first.sync):
        way, expected = (f"training={each.training} and sync={each.sync}" for each in (norm, first))
        raise ValueError(f"{name} has {way}, branches.0.0 has {expected}")


class DenseASPP(torch.autograd.Function):
    """(x, dilations, norms, keep, *parameters) -> the buffer, then every norm's table, then every variance."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dilations: Sequence[int], norms: Norms, keep: bool, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        buffer, reduced, tables, variances = _forward(x, parameters, dilations, *norms, keep)
        if keep:
            ctx.save_for_backward(norms.total, buffer, *reduced, *tables, *variances, *parameters, *norms.given)
        ctx.count = len(reduced)
        ctx.dilations = dilations
        ctx.norms = norms[:3]
        ctx.mark_non_differentiable(*tables, *variances)
        return buffer, *tables, *variances

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        forbid_double_backward("nn.DenseASPP3d")
        total, buffer, *saved = ctx.saved_tensors
        parts = []
        for size in (1, 2, 2, len(Branch._fields)):
            parts.append(saved[: size * ctx.count])
            saved = saved[size * ctx.count :]
        grad, gradients = _backward(grads[0], buffer, *parts, ctx.dilations, *ctx.norms, saved, total)
        return grad, None, None, None, *gradients


def _triton_passes() -> Passes:
    return importlib.import_module("focuskernels.kernels.dense_aspp3d").Passes()


def bodies(passes: Callable[[], Passes]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The bodies of both ops."""

    def run_forward(x: Tensor, parameters: Any, dilations: Any, *args: Any) -> Any:
        return forward(passes(), x, parameters, dilations, Norms(*args[:-1]), args[-1])

    def run_backward(
        grad: Tensor,
        buffer: Tensor,
        reduced: Any,
        tables: Any,
        variances: Any,
        parameters: Any,
        dilations: Any,
        *args: Any,
    ) -> Any:
        return backward(passes(), grad, buffer, reduced, tables, variances, parameters, dilations, Norms(*args))

    return run_forward, run_backward


def _fake_forward(
    x: Tensor, parameters: Sequence[Tensor], dilations: Sequence[int], norm: str,
    groups: Sequence[int], eps: Sequence[float], given: Sequence[Tensor], total: Tensor | None, keep: bool,
) -> Any:  # fmt: skip
    branches = branches_of(parameters)
    buffer = _empty(x, x.shape[1] + sum(len(branch.conv) for branch in branches), x.dtype)
    reduced = [_empty(x, len(branch.reduce), branch.reduce.dtype) for branch in branches]
    sizes = [
        (like.new_empty((), dtype=table_dtype(like)), x.shape[0], len(weight))
        for branch in branches
        for like, weight in ((x, branch.norm1_weight), (branch.reduce, branch.norm2_weight))
    ]
    tables = [like.new_empty((n, 3, c)) for like, n, c in sizes]
    return buffer, reduced if keep else [], tables, [like.new_empty((n, c)) for like, n, c in sizes]


def _fake_backward(grad: Tensor, buffer: Tensor, *args: Any) -> Any:
    parameters = args[3]
    channels = len(parameters[0])
    gradients = [p.new_empty(p.shape).contiguous(memory_format=layout_of(p)) for p in parameters]
    return _empty(buffer, channels, grad.dtype), gradients


_reference_forward, _reference_backward = bodies(Passes)
_triton_forward, _triton_backward = bodies(_triton_passes)

_IN_SLABS = "dilated_conv3d and norm_act, in slabs"
_OPTIONS = "SymInt[] dilations, str norm, SymInt[] groups, float[] eps, Tensor[] given, Tensor? total"

_forward = define(
    f"dense_aspp3d_fwd(Tensor x, Tensor[] parameters, {_OPTIONS}, bool keep)"
    " -> (Tensor out, Tensor[] reduced, Tensor[] tables, Tensor[] variances)",
    op="nn.DenseASPP3d",
    reference=_reference_forward,
    fake=_fake_forward,
    cpu=[Kernel(_IN_SLABS, _reference_forward, lambda: None)],
    cuda=[Kernel("Triton", _triton_forward, triton_missing)],
)
_backward = define(
    "dense_aspp3d_bwd(Tensor grad, Tensor out, Tensor[] reduced, Tensor[] tables, Tensor[] variances,"
    f" Tensor[] parameters, {_OPTIONS}) -> (Tensor grad, Tensor[] gradients)",
    op="nn.DenseASPP3d",
    reference=_reference_backward,
    fake=_fake_backward,
    cpu=[Kernel(_IN_SLABS, _reference_backward, lambda: None)],
    cuda=[Kernel("Triton", _triton_backward, triton_missing)],
)
