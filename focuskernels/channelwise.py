"""The passes over memory that norm_act, se_residual and norm_se_residual consist of, as opaque ops.

All maps are (N, C, D, H, W), dense as NCDHW or channels_last_3d and laid out alike (`dense` makes them so); tables are
contiguous (N, rows, C). `reference/channelwise.py` defines what each op computes.
"""

from typing import Any

import torch
from torch import Tensor

from ._lib import MOST_PROGRAMS, csrc_kernel, define, layout_of, triton_kernel, unsupported, unsupported_by_triton
from .reference import channelwise as reference
from .reference.channelwise import ACTIVATIONS, table_dtype

__all__ = ["ACTIVATIONS", "affine", "affine_backward", "affine_sums", "dense", "moments", "table_dtype"]

_PUBLIC = ("norm_act", "se_residual", "norm_se_residual")


def dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """`x`, copied only if it is not dense in the layout of `like` (default its own)."""
    return x.contiguous(memory_format=layout_of(x if like is None else like))


def _not_in_triton(x: Tensor, *_: Any) -> str | None:
    # A grid's third axis is the batch, its second the channels, one by one where they come first.
    if max(x.shape[:2]) > MOST_PROGRAMS:
        return f"{tuple(x.shape)} has too many samples or channels"
    return unsupported_by_triton(x)


def _sums_like(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], 2, x.shape[1]), dtype=table_dtype(x))


def _fake_sums(
    grad: Tensor, x: Tensor, table: Tensor, out: Tensor | None, activation: int, slope: float, keep: bool
) -> tuple[Tensor, Tensor]:
    return _sums_like(x), torch.empty_like(x) if keep else grad.new_empty(0)


moments = define(
    "channel_moments(Tensor x) -> Tensor",
    op=_PUBLIC,
    reference=reference.moments,
    fake=_sums_like,
    cpu=[csrc_kernel("channel_moments", unsupported)],
    cuda=[triton_kernel("channelwise", "moments", _not_in_triton)],
)
affine = define(
    "channel_affine(Tensor x, Tensor table, Tensor? residual, int activation, float slope) -> Tensor",
    op=_PUBLIC,
    reference=reference.affine,
    fake=lambda x, *_: torch.empty_like(x),
    cpu=[csrc_kernel("channel_affine", unsupported)],
    cuda=[triton_kernel("channelwise", "affine", _not_in_triton)],
)
affine_sums = define(
    "channel_affine_sums(Tensor grad, Tensor x, Tensor table, Tensor? out, int activation, float slope, bool keep)"
    " -> (Tensor sums, Tensor before_activation)",
    op=_PUBLIC,
    reference=reference.affine_sums,
    fake=_fake_sums,
    cpu=[csrc_kernel("channel_affine_sums", unsupported)],
    cuda=[triton_kernel("channelwise", "affine_sums", _not_in_triton)],
)
affine_backward = define(
    "channel_affine_backward(Tensor grad, Tensor x, Tensor table, Tensor weights, int activation, float slope)"
    " -> Tensor",
    op=_PUBLIC,
    reference=reference.affine_backward,
    fake=lambda grad, x, *_: torch.empty_like(x),
    cpu=[csrc_kernel("channel_affine_backward", unsupported)],
    cuda=[triton_kernel("channelwise", "affine_backward", _not_in_triton)],
)
