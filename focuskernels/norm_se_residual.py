"""Normalisation, squeeze-and-excitation and sum in one: the tail of a post-norm SE-residual block."""

import warnings
from typing import Any, Literal

import torch
from torch import Tensor

from . import channelwise, norm_tables
from ._lib import forbid_double_backward
from .norm_act import Norm, check_norm, check_options, given_statistics, update_running
from .reference import se_residual as se_reference
from .reference.norm_act import Sets
from .reference.se_residual import Layers
from .se_residual import check_branches, check_layers, same_kind


def norm_se_residual(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    norm: Norm = "batch",
    num_groups: int | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    squeeze: Literal["norm", "input"] = "norm",
    activation: Literal["relu"] | None = "relu",
) -> Tensor:
    """`residual + y * sigmoid(fc2(relu(fc1(mean(y)))))` with y the normalised `x`, then the activation.

    The same as `norm_act` without activation followed by `se_residual`, but y is never written: its mean follows from
    the statistics of `x`.

    Args:
        x, residual: (N, C, D, H, W), floating point; one dtype, unless autocast is active.
        weight, bias, norm, num_groups, running_mean, running_var, training, momentum, eps: as in `norm_act`.
        fc1_weight, fc1_bias, fc2_weight, fc2_bias: as in `se_residual`.
        squeeze: what the gate sees: the mean of the "norm"'s output, or of its "input" `x`. Behind an instance norm the
            former is `bias` whatever `x` is, which is warned of.
        activation: "relu" or None.

    Returns:
        (N, C, D, H, W).

    Raises:
        TypeError, ValueError: as `norm_act` and `se_residual`; an unknown `squeeze`.
    """
    layers = Layers(fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    check_branches(x, residual)
    check_layers(x, layers)
    check_options(norm, None, num_groups, momentum, eps)
    sets = check_norm(x, weight, bias, norm, num_groups, running_mean, running_var, training)
    if activation not in (None, "relu"):
        raise ValueError(f"activation must be None or 'relu', got {activation!r}")
    if squeeze not in ("norm", "input"):
        raise ValueError(f"squeeze must be 'norm' or 'input', got {squeeze!r}")
    if norm == "instance" and squeeze == "norm":
        warnings.warn(
            "the mean of an instance norm's output is its bias, so the gate does not depend on x; squeeze='input' does",
            stacklevel=2,
        )
    x, residual = same_kind(x, residual)
    given = norm == "batch" and not training
    # The gate's few numbers are not worth rounding to autocast's dtype.
    with torch.autocast(x.device.type, enabled=False):
        y, mean, variance = _NormSEResidual.apply(
            x,
            residual,
            weight,
            bias,
            *layers,
            running_mean if given else None,
            running_var if given else None,
            sets,
            eps,
            squeeze == "norm",
            channelwise.ACTIVATIONS[activation],
        )
    if running_mean is not None and running_var is not None and training:
        update_running(running_mean, running_var, mean, variance, momentum, sets.numbers(mean))
    return y


class _NormSEResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        fc1_weight: Tensor,
        fc1_bias: Tensor | None,
        fc2_weight: Tensor,
        fc2_bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        sets: Sets,
        eps: float,
        squeeze_norm: bool,
        activation: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        layers = Layers(fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        moments = channelwise.moments(x)
        if running_mean is None or running_var is None:
            table, rstd, variance = norm_tables.normalising(moments, weight, bias, sets, eps)
        else:
            table, rstd, variance = given_statistics(x, running_mean, running_var, weight, bias, eps)
        center, scale, shift = table.unbind(dim=1)
        offset = moments[:, 0] - center
        squeezed = offset * scale + shift if squeeze_norm else moments[:, 0].clone()
        gate, hidden = se_reference.gate(squeezed, layers)
        gated = torch.stack([center, scale * gate, shift * gate], dim=1)
        y = channelwise.affine(x, gated, residual, activation, 0.0)
        # The output tells where the activation let through; without one it is not needed.
        ctx.save_for_backward(x, y if activation else None, table, rstd, offset, gate, hidden, squeezed, *layers)
        ctx.sets = None if running_mean is not None else sets
        ctx.options = (activation, squeeze_norm)
        ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias)]
        ctx.mark_non_differentiable(center, variance)
        ctx.set_materialize_grads(False)  # no zeros for the statistics
        return y, center, variance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        forbid_double_backward("norm_se_residual")
        x, y, table, rstd, offset, gate, hidden, squeezed, *weights = ctx.saved_tensors
        activation, squeeze_norm = ctx.options
        grad = channelwise.dense(torch.zeros_like(x) if grads[0] is None else grads[0], x)
        keep = y is not None
        sums, kept = channelwise.affine_sums(grad, x, table, y, activation, 0.0, keep)
        grad = kept if keep else grad
        _, scale, shift = table.unbind(dim=1)
        through_gate = se_reference.gate_backward(
            scale * sums[:, 1] + shift * sums[:, 0], gate, hidden, squeezed, Layers(*weights)
        )
        # Of the norm's output: gate * grad, and its mean's part, the same at every voxel.
        sums = sums * gate[:, None]
        per_voxel = through_gate.squeezed / x.shape[2:].numel()
        if squeeze_norm:
            sums = sums + torch.stack([through_gate.squeezed, through_gate.squeezed * offset], dim=1)
            per_voxel = per_voxel * scale
        rows, weight, bias = norm_tables.gradient_of(sums, table, rstd, ctx.sets)
        rows = torch.stack([rows[:, 0] * gate, rows[:, 1], rows[:, 2] + per_voxel], dim=1)
        dx = channelwise.affine_backward(grad, x, table, rows, 0, 0.0) if ctx.needs_input_grad[0] else None
        parameters = (None if d is None else g.to(d) for g, d in zip((weight, bias), ctx.dtypes))
        return dx, grad, *parameters, *through_gate.layers, *(None,) * 6
