"""Batch, instance or group normalisation followed by an activation."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from . import channelwise, norm_tables
from ._arguments import integer, require_float, require_number
from ._lib import forbid_double_backward
from .reference import norm_act as reference
from .reference.norm_act import Sets

Norm: TypeAlias = Literal["batch", "instance", "group"]
Activation: TypeAlias = Literal["relu", "leaky_relu"]


def norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    norm: Norm = "batch",
    num_groups: int | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: Activation | None = "relu",
    negative_slope: float = 0.01,
    process_group: "dist.ProcessGroup | None" = None,
) -> Tensor:
    """Normalise `x`, scale and shift each channel, apply the activation.

    Args:
        x: (N, C, D, H, W), floating point.
        weight, bias: (C,) or None; the dtype of `x`, or float32 for half-precision `x`.
        norm: statistics over the batch and all voxels ("batch": Ioffe and Szegedy 2015), over the voxels of one
            sample and channel ("instance"), or of one sample and group of channels ("group": Wu and He 2018).
        num_groups: for "group" only; divides C. Default gcd(C, 8).
        running_mean, running_var: (C,), for "batch" only. With `training` they are updated in place as
            `torch.nn.BatchNorm3d` does (unbiased variance); without it they are the statistics used.
        training: for "batch": use the statistics of `x`. The other norms always do.
        momentum: share of the new statistics in the running ones, >= 0.
        eps: >= 0, added to the variance.
        activation: "relu", "leaky_relu" or None.
        negative_slope: of "leaky_relu".
        process_group: for "batch" in training: take the statistics over the batches of all its processes, as
            `torch.nn.SyncBatchNorm` does. Each must take part, in forward and in backward.

    Returns:
        (N, C, D, H, W) in the dtype of `x`.

    Raises:
        TypeError: wrong types, dtypes or devices.
        ValueError: an unknown name, shapes or numbers that do not fit, missing or unexpected running statistics or
            groups, and no or one value only to take statistics from.
    """
    check_options(norm, activation, num_groups, momentum, eps, negative_slope)
    if process_group is not None and norm != "batch":
        raise ValueError(f"process_group belongs to batch norm, got it with norm={norm!r}")
    sets = check_norm(x, weight, bias, norm, num_groups, running_mean, running_var, training, process_group)
    given = norm == "batch" and not training
    y, mean, variance = _NormAct.apply(
        channelwise.dense(x),
        weight,
        bias,
        running_mean if given else None,
        running_var if given else None,
        sets,
        eps,
        channelwise.ACTIVATIONS[activation],
        negative_slope,
    )
    if running_mean is not None and running_var is not None and training:
        update_running(running_mean, running_var, mean, variance, momentum, sets.numbers(mean))
    return y


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        sets: Sets,
        eps: float,
        activation: int,
        slope: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if running_mean is None or running_var is None:
            moments, sets = _moments(x, sets)
            table, rstd, variance = norm_tables.normalising(moments, weight, bias, sets, eps)
        else:
            table, rstd, variance = given_statistics(x, running_mean, running_var, weight, bias, eps)
        mean = table[:, 0]
        if x.shape[0] == 0:
            rstd, table = rstd[:0], table[:0]
        ctx.save_for_backward(x, table, rstd)
        ctx.sets = None if running_mean is not None else sets
        ctx.options = (activation, slope)
        ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias)]
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)  # no zeros for the statistics
        return channelwise.affine(x, table, None, activation, slope), mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        forbid_double_backward("norm_act")
        x, table, rstd = ctx.saved_tensors
        grad = channelwise.dense(torch.zeros_like(x) if grads[0] is None else grads[0], x)
        sums, _ = channelwise.affine_sums(grad, x, table, None, *ctx.options, False)
        rows, weight, bias = norm_tables.gradient_of(sums, table, rstd, ctx.sets)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = channelwise.affine_backward(grad, x, table, rows, *ctx.options)
        parameters = (None if d is None else g.to(d) for g, d in zip((weight, bias), ctx.dtypes))
        return dx, *parameters, *(None,) * 6


@contextmanager
def recomputing(y: Tensor, cast: Tensor) -> Iterator[None]:
    """Whatever saves `cast` for backward within this context saves the way to compute it instead.

    `cast` is `y`, fresh from `norm_act`, or that in another dtype.

    That costs a pass in backward and keeps nothing but `x`, which the norm has saved anyway. Not for `torch.compile`.
    """
    node: Any = y.grad_fn
    # Activation checkpointing and the like have a say already, and let nobody read what is saved twice.
    if node is None or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        yield
        return
    identity, dtype = _identity(cast), cast.dtype

    def pack(saved: Tensor) -> Any:
        return node if _identity(saved) == identity else saved

    def unpack(packed: Any) -> Tensor:
        if packed is not node:
            return packed
        x, table, _rstd = packed.saved_tensors
        return channelwise.affine(x, table, None, *packed.options).to(dtype)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _identity(t: Tensor) -> tuple[Any, ...]:
    return t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype


def _moments(x: Tensor, sets: Sets) -> tuple[Tensor, Sets]:
    """(N, 2, C); one empty sample where other processes hold all of them."""
    moments = channelwise.moments(x)
    if sets.reduce is not None and x.shape[0] == 0:
        return moments.new_zeros(1, *moments.shape[1:]), sets._replace(voxels=0)
    return moments, sets


def given_statistics(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Table (N, 3, C), inverse standard deviation and variance (N, C) of given statistics (C,)."""
    dtype, shape = channelwise.table_dtype(x), x.shape[:2]
    mean, variance = running_mean.to(dtype).expand(shape), running_var.to(dtype).expand(shape)
    rstd = (variance + eps).rsqrt()
    return reference.table(mean, rstd, weight, bias), rstd, variance


@torch.no_grad()
def update_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, variance: Tensor, momentum: float, count: int | Tensor
) -> None:
    """Move the running statistics (C,) towards those of a batch (N, C) of `count` values per channel, in place."""
    if mean.shape[0] == 0:
        return
    running_mean.lerp_(mean[0].to(running_mean.dtype), momentum)
    running_var.lerp_((variance[0] * (count / (count - 1))).to(running_var.dtype), momentum)


def check_options(
    norm: str, activation: str | None, num_groups: int | None, momentum: float, eps: float, negative_slope: float = 0.01
) -> None:
    """Refuse unknown norms and activations, groups of another norm, and numbers out of range."""
    if norm not in get_args(Norm):
        raise ValueError(f"norm must be one of {get_args(Norm)}, got {norm!r}")
    if activation is not None and activation not in get_args(Activation):
        raise ValueError(f"activation must be None or one of {get_args(Activation)}, got {activation!r}")
    if num_groups is not None and norm != "group":
        raise ValueError(f"num_groups belongs to group norm, got it with norm={norm!r}")
    require_number(momentum, "momentum", least=0)
    require_number(eps, "eps", least=0)
    require_number(negative_slope, "negative_slope")


def group_count(channels: int, num_groups: int | None) -> int:
    """`num_groups` if it divides `channels`; gcd(channels, 8) if it is None."""
    if num_groups is None:
        # not math.gcd, which cannot be traced
        return next(count for count in (8, 4, 2, 1) if channels % count == 0)
    num_groups = integer(num_groups, "num_groups")
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups must divide the {channels} channels, got {num_groups}")
    return num_groups


def check_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    num_groups: int | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    process_group: "dist.ProcessGroup | None" = None,
) -> Sets:
    """What shares statistics; refuses tensors that do not fit."""
    _check_tensors(x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    _check_running(norm, running_mean, running_var, training)
    if norm == "group" and x.shape[1] == 0:
        raise ValueError(f"x has no channels to group: {tuple(x.shape)}")
    groups = group_count(x.shape[1], num_groups)
    if process_group is not None and training:
        return _across_processes(x, groups, process_group)
    sets = Sets(norm, groups, x.shape[2:].numel())
    takes = x.shape[0] and (norm != "batch" or training)
    if takes and 0 in x.shape[2:]:
        raise ValueError(f"x has no voxels to take statistics from: {tuple(x.shape)}")
    if takes and sets.numbers(x.movedim(1, -1)) == 1:
        raise ValueError(f"norm={norm!r} has one value only to take statistics from: x is {tuple(x.shape)}")
    return sets


def _across_processes(x: Tensor, groups: int, process_group: "dist.ProcessGroup") -> Sets:
    reduce = partial(over_processes, group=process_group)
    voxels = x.shape[2:].numel()
    local = torch.tensor(x.shape[0] * voxels, dtype=torch.float64, device=x.device)
    return Sets("batch", groups, voxels, reduce(local).clamp_(min=1), reduce)


def over_processes(total: Tensor, group: "dist.ProcessGroup | None" = None) -> Tensor:
    """The sum over the processes of the group, by default all; `total` may be overwritten."""
    total = total.contiguous()
    dist.all_reduce(total, group=group)
    return total


def _check_tensors(x: Tensor, **per_channel: Tensor | None) -> None:
    require_float(x, "x")
    for name, tensor in per_channel.items():
        if tensor is None:
            continue
        require_float(tensor, name, dim=1)
        if tensor.shape != x.shape[1:2]:
            raise ValueError(
                f"{name} must be ({x.shape[1]},) for x of shape {tuple(x.shape)}, got {tuple(tensor.shape)}"
            )
        half = x.dtype in (torch.float16, torch.bfloat16)
        if tensor.device != x.device or tensor.dtype not in ((x.dtype, torch.float32) if half else (x.dtype,)):
            raise TypeError(f"x is {x.dtype} on {x.device}, {name} is {tensor.dtype} on {tensor.device}")


def _check_running(norm: str, running_mean: Tensor | None, running_var: Tensor | None, training: bool) -> None:
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var go together")
    if norm != "batch" and running_mean is not None:
        raise ValueError(f"running statistics belong to batch norm, got them with norm={norm!r}")
    if norm == "batch" and not training and running_mean is None:
        raise ValueError("batch norm without training needs running_mean and running_var")
