"""Normalised convolutions of upsampled features beside others, which are never there all at once: a decoder's entry."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._arguments import require_float
from ._lib import forbid_double_backward, layout_of
from .dilated_conv3d import forward_op, grad_input_op, grad_weight_op
from .norm_act import norm_act
from .reference.dilated_conv3d import output_layout

if TYPE_CHECKING:
    from .nn import DilatedConv3d, NormAct3d

#: About so many bytes of the wide map are there at a time, and `LEAST` channels at least: convolutions of few are slow.
PIECE_BYTES = 2**28
LEAST = 32


def up_cat_conv3d(x: Tensor, skip: Tensor, layers: "Sequence[tuple[NormAct3d, DilatedConv3d]]") -> list[Tensor]:
    """Convolve norm-activation of `torch.cat([upsampled x, skip], dim=1)`, for several pairs of norm and convolution.

    Upsampling, concatenation and normalisation are per channel, and a convolution is a sum over channels. So they run
    for some channels after the other, and backward runs them again, but for the convolutions: what is kept is `x` and
    `skip`. Of the wide map some channels are there at a time, instead of all, three times over. Each layer pays with
    a pass over its output per piece.

    Args:
        x: (N, A, d, h, w), floating point; upsampled as by `F.interpolate(mode="trilinear", align_corners=False)`.
        skip: (N, B, D, H, W), in the dtype of `x`.
        layers: modules, each norm over A + B channels, "batch" or "instance"; convolutions without bias. Training
            norms move their running statistics once.

    Returns:
        One (N, O, D, H, W) per pair, in the dtype of `skip`, or autocast's; sums over pieces are in float32 (float64
        for float64). Differentiable once.

    Raises:
        TypeError: dtypes or devices that differ.
        ValueError: shapes that do not fit; no channels or voxels; a group norm, whose groups may span both inputs; a
            bias.
    """
    for norm, conv in layers:
        check_inputs(x, skip, norm.channels)
        if norm.norm == "group" or conv.bias is not None:
            raise ValueError(f"expected batch or instance norm and no bias, got {norm} and {conv}")
    parameters = [p for norm, conv in layers for p in (norm.weight, norm.bias, conv.weight)]
    return list(_UpCatConv.apply(x, skip, [_Layer.of(*pair) for pair in layers], *parameters))


def check_inputs(x: Tensor, skip: Tensor, channels: int) -> None:
    """Refuse an empty map, and two of different dtypes, devices or batch sizes, or not of so many channels together."""
    for name, tensor in {"x": x, "skip": skip}.items():
        require_float(tensor, name)
        if 0 in tensor.shape[1:]:
            raise ValueError(f"{name} has no channels or voxels: {tuple(tensor.shape)}")
    if x.dtype != skip.dtype or x.device != skip.device:
        raise TypeError(f"x is {x.dtype} on {x.device}, skip is {skip.dtype} on {skip.device}")
    if x.shape[0] != skip.shape[0] or x.shape[1] + skip.shape[1] != channels:
        wanted = f"one batch size and, together, {channels} channels"
        raise ValueError(f"x is {tuple(x.shape)} and skip {tuple(skip.shape)}, expected {wanted}")


class _Layer(NamedTuple):
    """What a pair computes with beside its parameters; `options` of `norm_act`."""

    options: dict[str, Any]
    running: tuple[Tensor, Tensor] | None
    dilation: Sequence[int]

    @classmethod
    def of(cls, norm: "NormAct3d", conv: "DilatedConv3d") -> "_Layer":
        running = None
        if norm.running_mean is not None and norm.running_var is not None:
            running = norm.running_mean, norm.running_var
        return cls(norm.options(), running, conv.dilation)

    def normalise(self, u: Tensor, weight: Tensor, bias: Tensor, channels: slice, again: bool) -> Tensor:
        """norm-activation of some channels; `again`, training norms leave the running statistics alone."""
        mean, var = (None, None) if self.running is None else (running[channels] for running in self.running)
        if again and self.options["training"]:
            mean = var = None
        return norm_act(u, weight, bias, running_mean=mean, running_var=var, **self.options)


class _UpCatConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, skip: Tensor, layers: Sequence[_Layer], *parameters: Tensor) -> tuple[Tensor, ...]:
        device = skip.device.type
        casts = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if casts and skip.dtype != torch.float64 else skip.dtype
        ctx.save_for_backward(x, skip, *parameters)
        ctx.layers, ctx.dtype = layers, dtype
        sums: list[Tensor] = []
        with torch.autocast(device, enabled=False) if casts else nullcontext():
            for channels, piece in _pieces(x, skip):
                u = _at_size_of(skip, piece)
                for i, (layer, (gamma, beta, weight)) in enumerate(zip(layers, _triples(parameters), strict=True)):
                    y = layer.normalise(u, gamma[channels], beta[channels], channels, again=False).to(dtype)
                    z = forward_op(y, weight[:, channels].to(dtype), None, layer.dilation)
                    if len(sums) == i:
                        sums.append(z.to(torch.promote_types(dtype, torch.float32)))
                    else:
                        sums[i].add_(z)
        return tuple(total.to(dtype) for total in sums)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        forbid_double_backward("up_cat_conv3d")
        x, skip, *parameters = ctx.saved_tensors
        triples = list(_triples(parameters))
        grads = tuple(
            grad.contiguous(memory_format=output_layout(grad, weight)) for grad, (*_, weight) in zip(grads, triples)
        )
        owed = [torch.empty_like(p) for p in parameters]
        grad_x, grad_skip = torch.empty_like(x), None
        for channels, piece in _pieces(x, skip):
            with torch.enable_grad():
                piece = piece.detach().requires_grad_()
                u = _at_size_of(skip, piece)
            leaf, grad_u = u.detach().requires_grad_(), None
            for layer, grad, values, into in zip(ctx.layers, grads, triples, _triples(owed), strict=True):
                of_leaf, *found = _layer_backward(ctx, layer, grad, leaf, values, channels)
                for total, part in zip(into, found, strict=True):
                    (total if total.dim() == 1 else total.transpose(0, 1))[channels] = part
                grad_u = of_leaf if grad_u is None else grad_u.add_(of_leaf)
            if channels.start == x.shape[1]:
                grad_skip = grad_u
            else:
                (grad_x[:, channels],) = torch.autograd.grad(u, piece, grad_u)
        return grad_x, grad_skip, None, *owed


def _layer_backward(
    ctx: Any, layer: _Layer, grad: Tensor, u: Tensor, values: Sequence[Tensor], channels: slice
) -> tuple[Tensor, ...]:
    """Gradients of some channels: of the map, the norm's weight and bias, and the convolution's weight (I, O, ...)."""
    gamma, beta = (value[channels].detach().requires_grad_() for value in values[:2])
    weight = values[2][:, channels].to(ctx.dtype)
    with torch.enable_grad():
        y = layer.normalise(u, gamma, beta, channels, again=True)
    of_weight, _ = grad_weight_op(grad, y.detach().to(ctx.dtype), weight, layer.dilation, False)
    of_y = grad_input_op(grad, weight, layer.dilation).to(y.dtype)
    return *torch.autograd.grad(y, [u, gamma, beta], of_y), of_weight.transpose(0, 1)


def _pieces(x: Tensor, skip: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Channels of the concatenation, and the part of `x` or `skip` that they come from."""
    channel_bytes = skip[:, 0].numel() * skip.element_size()
    step = max(LEAST, PIECE_BYTES // max(channel_bytes, 1) // LEAST * LEAST)
    for first in range(0, x.shape[1], step):
        channels = slice(first, min(first + step, x.shape[1]))
        yield channels, x[:, channels].contiguous(memory_format=layout_of(x))
    yield slice(x.shape[1], x.shape[1] + skip.shape[1]), skip


def _at_size_of(skip: Tensor, piece: Tensor) -> Tensor:
    if piece.shape[2:] == skip.shape[2:]:
        return piece
    u = F.interpolate(piece, size=skip.shape[2:], mode="trilinear", align_corners=False)
    return u.contiguous(memory_format=layout_of(skip))


def _triples(values: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    yield from zip(values[::3], values[1::3], values[2::3], strict=True)
