"""Dilated 3D convolution that keeps the spatial size."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import onednn
from ._arguments import cast_for_autocast, require_float, triple
from ._lib import Kernel, define, forbid_double_backward, layout_of, triton_kernel_or
from .reference import dilated_conv3d as reference


def dilated_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int | Sequence[int] = 1) -> Tensor:
    """Convolve with stride 1 and zero padding `dilation * (kernel - 1) / 2`, so that the spatial size stays.

    Args:
        x: (N, I, D, H, W), floating point. Cast to the autocast dtype where autocast is active, like `F.conv3d`.
        weight: (O, I, kd, kh, kw), odd kernel sizes, the dtype and device of `x`.
        bias: (O,) or None.
        dilation: one step for all axes or (dz, dy, dx). It may exceed the volume.

    Returns:
        (N, O, D, H, W), the dtype of `x` (or autocast's); in channels_last_3d if `x` or `weight` has channels
        innermost. Differentiable once.

    On CUDA, 3x3x3 and 1x3x3 kernels over bf16 or fp16 maps in channels_last_3d, which may be some channels of a wider
    map, run in Triton; all else runs in the vendor's library. `why_not` gives the reason, docs/dilated_conv3d.md the
    rules.

    Raises:
        TypeError: wrong types, dtypes or devices.
        ValueError: shapes that do not fit, no voxels or channels, an even kernel size, a dilation below 1.
    """
    dilation = triple(dilation, "dilation")
    _check_shapes(x, weight, bias)
    x, weight, bias = cast_for_autocast(x, weight, bias)  # type: ignore[assignment]
    _check_types(x, weight, bias)
    return _DilatedConv3d.apply(x, weight, bias, dilation)


class _DilatedConv3d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dilation: Sequence[int]) -> Tensor:
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:3]) else None, weight)
        ctx.dilation = dilation
        ctx.has_bias = bias is not None
        return forward_op(x, weight, bias, dilation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        forbid_double_backward("dilated_conv3d")
        x, weight = ctx.saved_tensors
        grad = grads[0]
        grad = grad.contiguous(memory_format=reference.output_layout(grad, weight))
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_input_op(grad, weight, ctx.dilation)
        if any(ctx.needs_input_grad[1:3]):
            grad_weight, grad_bias = grad_weight_op(grad, x, weight, ctx.dilation, ctx.has_bias)
        return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None


def _check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    require_float(x, "x")
    require_float(weight, "weight")
    if 0 in x.shape[2:]:
        raise ValueError(f"x has no voxels: {tuple(x.shape)}")
    if weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight takes {weight.shape[1]} channels, x has {x.shape[1]}: {tuple(weight.shape)}, {tuple(x.shape)}"
        )
    if 0 in weight.shape[:2]:
        raise ValueError(f"weight has no channels: {tuple(weight.shape)}")
    if any(size % 2 == 0 for size in weight.shape[2:]):
        raise ValueError(f"kernel sizes must be odd, got weight of shape {tuple(weight.shape)}")
    if bias is not None:
        require_float(bias, "bias", dim=1)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")


def _check_types(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dtype != weight.dtype or x.device != weight.device:
        raise TypeError(f"x is {x.dtype} on {x.device}, weight is {weight.dtype} on {weight.device}")
    if bias is not None and (bias.dtype != x.dtype or bias.device != x.device):
        raise TypeError(f"x is {x.dtype} on {x.device}, bias is {bias.dtype} on {bias.device}")


#: Below this many multiplications and additions a launch of ours saves nothing.
SMALLEST = 2e9
#: Kernels hold offsets inside a plane in 32 bits.
LARGEST_PLANE = 2**31


def why_not(x: Tensor, weight: Tensor, *others: Tensor) -> str | None:
    """Why the vendor's library, not Triton, convolves the map `x` with `weight`; None if Triton does.

    Of the weight the shape counts. `others` are further maps that are read, such as a gradient.
    """
    outputs, inputs, *kernel = weight.shape
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"{x.dtype} is left to the vendor's library"
    if torch.version.hip is not None:
        return "the kernels are written for NVIDIA"
    if kernel not in ([3, 3, 3], [1, 3, 3]):
        return f"kernel {'x'.join(map(str, kernel))}, ours are 3x3x3 and 1x3x3"
    if inputs % 16 or outputs % 16 or min(inputs, outputs) < 32:
        return f"{inputs} to {outputs} channels, ours are multiples of 16, from 32 on"
    if x.shape[3] * x.shape[4] * outputs >= LARGEST_PLANE:
        return "a plane of the result has more than 2^31 elements"
    for each in (x, *others):
        reason = _unsuitable_strides(each)
        if reason is not None:
            return reason
    operations = 2 * x[:, 0].numel() * weight.numel()
    if operations < SMALLEST:
        return f"{operations / 1e9:.2g} GFLOP, ours start at {SMALLEST / 1e9:.2g}"
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "the GPU is older than sm_80"
    return None


def _unsuitable_strides(x: Tensor) -> str | None:
    if x.stride(1) != 1 or x.is_contiguous():
        return "the map is not in channels_last_3d"
    spatial = [stride for i, (size, stride) in enumerate(zip(x.shape, x.stride())) if size > 1 and i != 1]
    if any(stride <= 0 or stride % 8 for stride in spatial) or x.data_ptr() % 16:
        return "voxels of the map do not start at multiples of 16 bytes"
    if max(x.shape[3] * x.stride(3), x.shape[4] * x.stride(4)) >= LARGEST_PLANE:
        return "a plane of the map spans more than 2^31 elements"
    return None


def _triton_or_vendor(name: str, vendor: Callable[..., Any], maps: Callable[..., tuple[Tensor, ...]]) -> Kernel:
    """`maps` picks the arguments of `why_not`."""
    label = "Triton, or cuDNN where docs/dilated_conv3d.md says so"
    return triton_kernel_or("dilated_conv3d", name, vendor, lambda *args: why_not(*maps(*args)), label)


def _vendor(run: Callable[..., Any]) -> Kernel:
    return Kernel("oneDNN", run, lambda: None)


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: Sequence[int]) -> Tensor:
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    return x.new_empty(shape).contiguous(memory_format=reference.output_layout(x, weight))


def _fake_grad_input(grad: Tensor, weight: Tensor, dilation: Sequence[int]) -> Tensor:
    shape = (grad.shape[0], weight.shape[1], *grad.shape[2:])
    return grad.new_empty(shape).contiguous(memory_format=reference.output_layout(grad, weight))


def _fake_grad_weight(
    grad: Tensor, x: Tensor, weight: Tensor, dilation: Sequence[int], bias: bool
) -> tuple[Tensor, Tensor]:
    grad_weight = weight.new_empty(weight.shape).contiguous(memory_format=layout_of(weight))
    return grad_weight, grad.new_empty(weight.shape[0] if bias else 0)


forward_op = define(
    "dilated_conv3d_fwd(Tensor x, Tensor weight, Tensor? bias, SymInt[] dilation) -> Tensor",
    op="dilated_conv3d",
    reference=reference.forward,
    fake=_fake_forward,
    cpu=[_vendor(onednn.forward)],
    cuda=[_triton_or_vendor("forward", reference.forward, lambda x, weight, *_: (x, weight))],
)
grad_input_op = define(
    "dilated_conv3d_grad_input(Tensor grad, Tensor weight, SymInt[] dilation) -> Tensor",
    op="dilated_conv3d",
    reference=reference.grad_input,
    fake=_fake_grad_input,
    cpu=[_vendor(onednn.grad_input)],
    cuda=[_triton_or_vendor("grad_input", reference.grad_input, lambda g, weight, *_: (g, weight.transpose(0, 1)))],
)
grad_weight_op = define(
    "dilated_conv3d_grad_weight(Tensor grad, Tensor x, Tensor weight, SymInt[] dilation, bool bias)"
    " -> (Tensor weight, Tensor bias)",
    op="dilated_conv3d",
    reference=reference.grad_weight,
    fake=_fake_grad_weight,
    cpu=[_vendor(onednn.grad_weight)],
    cuda=[_triton_or_vendor("grad_weight", reference.grad_weight, lambda g, x, weight, *_: (x, weight, g))],
)
