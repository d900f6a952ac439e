"""What the property tests draw, and what they compare with: the reference, in float64."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from compare import tensors_in
from hypothesis import note
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from focuskernels import linear_focal_dice
from focuskernels.dense_aspp3d import _reference_backward, _reference_forward
from focuskernels.reference import (
    channelwise,
    dilated_conv3d,
    focal_dice,
    heatmap_argmax3d,
    norm_act,
    paste_rois3d,
    roi_align3d,
    roi_gather3d,
)

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
#: Around the lanes of a register and the blocks of the kernels; one and primes among them.
SIZES = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 11, 13, 16, 17])
SMALL = st.sampled_from([1, 2, 3, 4, 5, 7])
BATCHES = st.sampled_from([1, 2, 3, 0])
#: Beyond what one thread takes at a time, and what is written around the cache.
LARGE = st.sampled_from([(1, 41, 1601), (17, 61, 67), (3, 211, 109), (1, 1, 65537)])

REFERENCES = {
    "channel_moments": channelwise.moments,
    "channel_affine": channelwise.affine,
    "channel_affine_sums": channelwise.affine_sums,
    "channel_affine_backward": channelwise.affine_backward,
    "dense_aspp3d_fwd": _reference_forward,
    "dense_aspp3d_bwd": _reference_backward,
    "dilated_conv3d_fwd": dilated_conv3d.forward,
    "dilated_conv3d_grad_input": dilated_conv3d.grad_input,
    "dilated_conv3d_grad_weight": dilated_conv3d.grad_weight,
    "focal_dice_fwd": focal_dice.forward,
    "focal_dice_bwd": focal_dice.backward,
    "focal_dice_bwd_": focal_dice.backward_,
    "heatmap_argmax_3d_fwd": heatmap_argmax3d.argmax,
    "linear_argmax": linear_focal_dice.reference.argmax,
    "linear_focal_dice_fwd": linear_focal_dice._chunked_forward,
    "linear_focal_dice_bwd": linear_focal_dice._chunked_backward,
    "norm_gradient": norm_act.norm_gradient,
    "norm_table": norm_act.norm_table,
    "paste_rois_3d_fwd": paste_rois3d.forward,
    "roi_align_3d_fwd": roi_align3d.forward,
    "roi_align_3d_bwd": roi_align3d.backward,
    "roi_gather_3d_fwd": roi_gather3d.forward,
    "roi_gather_3d_bwd": roi_gather3d.backward,
    "roi_gather_3d_centers_bwd": roi_gather3d.centers_backward,
}


class ByReference(TorchDispatchMode):
    """Our ops, forward and backward, run their reference."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "focuskernels":
            return func(*args, **(kwargs or {}))
        name = func.name().split("::")[1]
        # Two are made of other ops; the rest is faster without.
        with self if name.startswith(("dense_aspp", "linear_focal")) else nullcontext():
            return REFERENCES[name](*args)


def shapes(channels: st.SearchStrategy[int] = SIZES) -> st.SearchStrategy[tuple[int, ...]]:
    """(N, C, D, H, W); one in forty is large."""
    spatial = st.one_of(*[st.tuples(SIZES, SIZES, SIZES)] * 39, LARGE)
    return st.tuples(BATCHES, channels, spatial).map(
        lambda s: (s[0], s[1], *s[2]) if s[2][-1] < 20 else (min(s[0], 1), min(s[1], 3), *s[2])
    )


def generators() -> st.SearchStrategy[torch.Generator]:
    return st.integers(0, 2**32 - 1).map(lambda seed: torch.Generator().manual_seed(seed))


def normal(data: st.DataObject, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tuple(shape), generator=data.draw(generators()), dtype=torch.float64).to(dtype)


def values(data: st.DataObject, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Normal or few different numbers, or one, around or far from 0."""
    x = normal(data, shape, torch.float64)
    kind = data.draw(st.sampled_from(["normal", "coarse", "constant", "far"]))
    if kind == "coarse":
        x = x.mul(2).round()
    elif kind == "constant":
        x = torch.full_like(x, 0.7)
    elif kind == "far":
        x = x + 20
    note(f"{kind} {tuple(shape)} {dtype}")
    return x.to(dtype)


def laid_out(data: st.DataObject, x: Tensor) -> Tensor:
    """`x` in a memory layout that callers have; NaN beside it. An expanded one repeats its first values."""
    layout = data.draw(st.sampled_from(["contiguous", "channels_last", "sliced", "part", "transposed", "expanded"]))
    note(layout)
    return LAYOUTS[layout](x)


def _part(x: Tensor) -> Tensor:
    wide = x.new_full([size + 3 for size in x.shape], torch.nan if x.is_floating_point() else 0)
    part = wide[tuple(slice(1, size + 1) for size in x.shape)]
    return part.copy_(x)


def _sliced(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan if x.is_floating_point() else 0)
    return wide[..., ::2].copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else x,
    "sliced": _sliced,
    "part": _part,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda x: x[..., :1].expand_as(x),
}


def maps(data: st.DataObject, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return laid_out(data, values(data, shape, dtype))


def exactly(x: Tensor) -> Tensor:
    """A leaf of the same values in float64, contiguous."""
    return x.detach().double().clone(memory_format=torch.contiguous_format)


def run(
    function: Callable[..., Any], leaves: Sequence[Tensor], upstream: Sequence[Tensor], needed: Sequence[bool]
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs, and the gradients of what is needed, of their products with `upstream`."""
    leaves = [leaf.detach().requires_grad_(need) for leaf, need in zip(leaves, needed)]
    outputs = tensors_in(function(*leaves))
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if not wanted:
        return outputs, []
    owed = [up.to(out.dtype) for up, out in zip(upstream, outputs, strict=True)]
    return outputs, list(torch.autograd.grad(outputs, wanted, owed))


def assert_near(actual: Tensor, expected: Tensor, bound: Tensor | float, what: str) -> None:
    """Within rounding of `expected` to the dtype of `actual`, and `bound` beside it."""
    rounding = torch.finfo(actual.dtype).eps
    tiny = torch.finfo(actual.dtype).smallest_normal * rounding
    allowed = rounding * expected.abs() + bound + tiny
    error = (actual.double() - expected.double()).abs()
    off = ~(error <= allowed)
    off &= ~(actual.isnan() & expected.isnan())
    # What the dtype cannot hold is infinite.
    off &= ~(actual.isinf() & (expected.abs() + allowed > torch.finfo(actual.dtype).max) & (actual * expected > 0))
    if bool(off.any()):
        worst = (error / allowed).nan_to_num(torch.inf).mul(off).argmax()
        a, e = actual.reshape(-1)[worst].item(), expected.reshape(-1)[worst].item()
        limit = allowed.broadcast_to(off.shape).reshape(-1)[worst].item()
        raise AssertionError(f"{what}: {int(off.sum())} of {off.numel()} differ, the worst {a} from {e} by > {limit}")
