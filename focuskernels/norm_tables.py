"""What stands between the passes of a norm, as opaque ops: a few numbers per sample and channel.

From the moments of a map to the table of `channelwise.affine`; from the sums of its gradient to the rows of
`channelwise.affine_backward` and the gradients of weight and bias. `reference/norm_act.py` defines both.
"""

from typing import Any

import torch
from torch import Tensor

from ._lib import csrc_kernel, define, triton_kernel
from .reference import norm_act as reference
from .reference.norm_act import Gradient, Sets

_PUBLIC = ("norm_act", "norm_se_residual")
_SETS = "int norm, int groups, SymInt voxels"


def normalising(
    moments: Tensor, weight: Tensor | None, bias: Tensor | None, sets: Sets, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Table (N, 3, C), inverse standard deviation and biased variance (N, C) from the moments (N, 2, C)."""
    if sets.reduce is not None:
        mean, variance = reference.statistics(moments, sets)
        rstd = (variance + eps).rsqrt()
        return reference.table(mean, rstd, weight, bias), rstd, variance
    weight, bias = (None if t is None else t.to(moments.dtype) for t in (weight, bias))
    result: tuple[Tensor, Tensor, Tensor] = table(moments, weight, bias, *_numbers(sets), eps)
    return result


def gradient_of(sums: Tensor, table: Tensor, rstd: Tensor, sets: Sets | None) -> Gradient:
    """As `reference.norm_act.gradient`."""
    if sets is None or sets.reduce is not None:
        return reference.gradient(sums, table, rstd, sets)
    return Gradient(*gradient(sums, table, rstd, *_numbers(sets)))


def _numbers(sets: Sets) -> tuple[int, int, int]:
    return reference.NORMS.index(sets.norm), sets.groups, sets.voxels


def _fake_table(moments: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    table = moments.new_empty((moments.shape[0], 3, moments.shape[2]))
    return table, torch.empty_like(moments[:, 0]), torch.empty_like(moments[:, 0])


def _fake_gradient(sums: Tensor, table: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    weight = sums.new_empty(sums.shape[2])
    return torch.empty_like(table), weight, torch.empty_like(weight)


def _not_in_triton(numbers: Tensor, *args: Any) -> str | None:
    norm, groups = args[2:4]
    if numbers.dtype != torch.float32:
        return f"{numbers.dtype} is not supported"
    from .kernels.norm_tables import MOST

    return f"groups of over {MOST} channels" if norm == 2 and numbers.shape[2] // groups > MOST else None


table = define(
    f"norm_table(Tensor moments, Tensor? weight, Tensor? bias, {_SETS}, float eps)"
    " -> (Tensor table, Tensor rstd, Tensor variance)",
    op=_PUBLIC,
    reference=reference.norm_table,
    fake=_fake_table,
    cpu=[csrc_kernel("norm_table")],
    cuda=[triton_kernel("norm_tables", "table", _not_in_triton)],
)
gradient = define(
    f"norm_gradient(Tensor sums, Tensor table, Tensor rstd, {_SETS}) -> (Tensor rows, Tensor weight, Tensor bias)",
    op=_PUBLIC,
    reference=reference.norm_gradient,
    fake=_fake_gradient,
    cpu=[csrc_kernel("norm_gradient")],
    cuda=[triton_kernel("norm_tables", "gradient", _not_in_triton)],
)
