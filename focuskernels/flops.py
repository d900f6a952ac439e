"""FLOPs of the ops, for `torch.utils.flop_counter.FlopCounterMode`, and the allocations inside one of them.

Importing this module registers the formulas. As PyTorch's own, they count the products of convolutions, at two FLOPs
each, and nothing else; voxels beyond the volume's face count too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import dense_aspp3d
from .dense_aspp3d import RowsOf, branches_of

_ops = torch.ops.focuskernels


@register_flop_formula([_ops.dilated_conv3d_fwd, _ops.dilated_conv3d_grad_input], get_raw=True)
def _convolution(x: Tensor, weight: Tensor, *args: Any, out_val: Any = None) -> int:
    return 2 * x.shape[0] * x.shape[2:].numel() * weight.numel()


@register_flop_formula(_ops.dilated_conv3d_grad_weight, get_raw=True)
def _grad_weight(grad: Tensor, x: Tensor, weight: Tensor, *args: Any, out_val: Any = None) -> int:
    return _convolution(grad, weight)


@register_flop_formula(_ops.dense_aspp3d_fwd, get_raw=True)
def _dense_aspp(x: Tensor, parameters: Sequence[Tensor], *args: Any, out_val: Any = None) -> int:
    return sum(_convolution(x, b.reduce) + _convolution(x, b.conv) for b in branches_of(parameters))


@register_flop_formula(_ops.dense_aspp3d_bwd, get_raw=True)
def _dense_aspp_backward(grad: Tensor, out: Tensor, *args: Any, out_val: Any = None) -> int:
    return 2 * _dense_aspp(grad, args[3])


class _InOneKernel(dense_aspp3d.Passes):
    """Allocates what the Triton passes do, and computes nothing."""

    def reduce(self, buffer: Tensor, channels: int, table: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        h = dense_aspp3d._empty(buffer, len(weight), weight.dtype)
        return h, table.new_empty((len(h), 2, len(weight)))

    def reduce_backward(
        self, grad: Tensor, buffer: Tensor, channels: int, table: Tensor, weight: Tensor, rows_of: RowsOf, into: Tensor
    ) -> Tensor:
        rows_of(table.new_empty((len(table), 2, channels)))
        return torch.empty_like(weight)

    def _grow_by_vendor(self, y: Tensor, weight: Tensor, dilation: Sequence[int], out: Tensor) -> Tensor:
        return torch.empty((len(y), 2, len(weight)), dtype=torch.float32, device=y.device)

    def _growth_gradient(self, grad: Tensor, h: Tensor, weight: Tensor) -> Tensor:
        return grad


def bodies_of(device_type: str) -> dict[Any, Callable[..., Any]]:
    """What runs inside the ops that consist of others on that type of device, by `torch.ops` overload.

    For modes that count memory, which see only what an opaque op takes and returns.
    """
    passes = _InOneKernel if device_type == "cuda" else dense_aspp3d.Passes
    forward, backward = dense_aspp3d.bodies(passes)
    return {_ops.dense_aspp3d_fwd.default: forward, _ops.dense_aspp3d_bwd.default: backward}
