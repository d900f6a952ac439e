"""Normalisation as `channelwise.affine`: its table, and the table of its gradient, from sums per sample and channel.

A set is what shares a mean and a variance: a channel ("batch"), a channel of a sample ("instance") or a group of
channels of a sample ("group"). All tensors are (N, C) unless said otherwise, equal within a set.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

NORMS = ("batch", "instance", "group")


class Sets(NamedTuple):
    """What shares a mean and a variance."""

    norm: str
    groups: int  #: of "group"
    voxels: int  #: of one channel of one sample
    total: Tensor | None = None  #: numbers in one set over all processes; a scalar, at least 1
    reduce: Callable[[Tensor], Tensor] | None = None  #: adds up what the processes hold, of "batch"

    def numbers(self, like: Tensor) -> int | Tensor:
        """How many numbers of a map share statistics, for `like` (N, ..., C)."""
        if self.total is not None:
            return self.total
        if self.single(like):
            return max(1, self.voxels)
        members = like.shape[0] if self.norm == "batch" else like.shape[-1] // self.groups
        return max(1, members * self.voxels)

    def single(self, like: Tensor) -> bool:
        """Whether every (n, c) of `like` (N, ..., C) is a set of its own."""
        alone = {"batch": like.shape[0] == 1 and self.reduce is None, "group": self.groups == like.shape[-1]}
        return alone.get(self.norm, True)

    def sum(self, values: Tensor) -> Tensor:
        """Sum of (N, ..., C) over each set, at every member's place."""
        if self.single(values):
            return values
        if self.norm == "batch":
            total = values.sum(dim=0, keepdim=True)
            return (total if self.reduce is None else self.reduce(total)).expand_as(values)
        grouped = values.unflatten(-1, (self.groups, -1))
        return grouped.sum(dim=-1, keepdim=True).expand_as(grouped).flatten(-2)


def statistics(moments: Tensor, sets: Sets) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the sets from the moments (N, 2, C) of their members (Chan et al. 1983)."""
    mean, squares = moments.unbind(dim=1)
    count = sets.numbers(mean)
    if sets.single(mean):
        return mean, squares / count
    common = sets.sum(mean * (sets.voxels / count))
    return common, sets.sum(squares + sets.voxels * (mean - common).square()) / count


def table(mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """(N, 3, C) for `channelwise.affine`."""
    scale = rstd if weight is None else rstd * weight.to(rstd.dtype)
    shift = torch.zeros_like(mean) if bias is None else bias.to(mean.dtype).expand_as(mean)
    return torch.stack([mean, scale, shift], dim=1)


class Gradient(NamedTuple):
    """Of the input, as rows for `channelwise.affine_backward`, and of the parameters."""

    rows: Tensor  #: (N, 3, C)
    weight: Tensor  #: (C,)
    bias: Tensor  #: (C,)


def gradient(sums: Tensor, table: Tensor, rstd: Tensor, sets: Sets | None) -> Gradient:
    """From the sums of d and d (x - mean), (N, 2, C); `sets` is None where the statistics were given."""
    total, moment = sums.unbind(dim=1)
    scale = table[:, 1]
    if sets is None:
        zero = torch.zeros_like(scale)
        rows = torch.stack([scale, zero, zero], dim=1)
    else:
        rows = rows_of(total * scale, moment * scale, scale, rstd, sets)
    return Gradient(rows, (moment * rstd).sum(dim=0), total.sum(dim=0))


def norm_table(
    moments: Tensor, weight: Tensor | None, bias: Tensor | None, norm: int, groups: int, voxels: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`table` (N, 3, C), inverse standard deviation and biased variance (N, C) from the moments (N, 2, C) of maps."""
    mean, variance = statistics(moments, Sets(NORMS[norm], groups, voxels))
    rstd = (variance + eps).rsqrt()
    return table(mean, rstd, weight, bias), rstd.contiguous(), variance.contiguous()


def norm_gradient(
    sums: Tensor, table: Tensor, rstd: Tensor, norm: int, groups: int, voxels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`gradient` of the sets within one process."""
    return gradient(sums, table, rstd, Sets(NORMS[norm], groups, voxels))


def rows_of(total: Tensor, moment: Tensor, scale: Tensor, rstd: Tensor, sets: Sets) -> Tensor:
    """Rows for `channelwise.affine_backward`: scale d less its mean and its part along x, both over the set.

    `total` and `moment` are the sums of scale d and scale d (x - mean).
    """
    mean, along = (sets.sum(torch.stack([total, moment], dim=1)) / -sets.numbers(scale)).unbind(dim=1)
    return torch.stack([scale, along * rstd.square(), mean], dim=1)
