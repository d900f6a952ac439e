"""Regions of interest cut out of several feature volumes and concatenated: SOS-Net's input."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args, overload

import torch
from torch import Tensor

from ._arguments import as_list, integer, positive_scale, require_float, triple, values_are_readable
from ._lib import (
    COPIES_FROM_HOST,
    DTYPES,
    MOST_PROGRAMS,
    csrc_kernel,
    define,
    forbid_double_backward,
    is_channels_last,
    layout,
    triton_kernel,
)
from .reference import roi_gather3d as reference

Padding: TypeAlias = Literal["zeros", "border"]


@overload
def roi_gather_3d(
    sources: Sequence[Tensor],
    centers: Tensor,
    roi_size: int | Sequence[int],
    output_size: int | Sequence[int] | None = ...,
    *,
    spatial_scales: Sequence[float | Sequence[float]] | None = ...,
    padding: Padding = ...,
    passthrough: Literal[False] = ...,
) -> Tensor: ...


@overload
def roi_gather_3d(
    sources: Sequence[Tensor],
    centers: Tensor,
    roi_size: int | Sequence[int],
    output_size: int | Sequence[int] | None = ...,
    *,
    spatial_scales: Sequence[float | Sequence[float]] | None = ...,
    padding: Padding = ...,
    passthrough: Literal[True],
) -> tuple[Tensor, list[Tensor]]: ...


def roi_gather_3d(
    sources: Sequence[Tensor],
    centers: Tensor,
    roi_size: int | Sequence[int],
    output_size: int | Sequence[int] | None = None,
    *,
    spatial_scales: Sequence[float | Sequence[float]] | None = None,
    padding: Padding = "zeros",
    passthrough: bool = False,
) -> Tensor | tuple[Tensor, list[Tensor]]:
    """Sample a box around each centre from every source and concatenate the channels.

    Along an axis with a ROI of R voxels and S output samples, sample o lies at `c - R // 2 + (o + 0.5) * R / S - 0.5`
    on the reference grid and at `(x + 0.5) * s - 0.5` in a source of scale s, read trilinearly (the half-pixel
    convention of `grid_sample` with align_corners=False). An integer centre with S = R and s = 1 is an exact copy
    that starts at `c - R // 2`.

    Args:
        sources: one or more (N, C_i, D_i, H_i, W_i), floating point, same N and device. Mixed dtypes are promoted.
        centers: (K, 4) = (sample, z, y, x), integer or floating point, in voxels of the reference grid; K may be 0.
            Floating-point centres that require grad receive one (half-precision ones should not be used: they cannot
            hold large coordinates).
        roi_size: size of the box in reference voxels, one number or (d, h, w).
        output_size: samples per axis, one number or (d, h, w). Default `roi_size`.
        spatial_scales: per source its voxels per reference voxel, one number or (z, y, x); 0.5 for features after one
            downsampling. Default 1 for each.
        padding: what is read outside a source: 0, or the nearest voxel.
        passthrough: also return the sources, for whatever else reads them. Backward then adds what the ROIs owe to
            the gradient that comes back through these, in one pass over it, where otherwise a gradient of zeros would
            be filled and added. Under `torch.compile` they are the sources themselves.

    Returns:
        (K, sum C_i, d, h, w), in the layout of the first source; differentiable in `sources` and `centers`. With
        `passthrough`, that and the list of sources. Every run gives the same bits, in backward too.

    Raises:
        TypeError: wrong types, dtypes or devices.
        ValueError: shapes that do not fit, sizes or scales that are not positive, an unknown padding; and, for
            `centers` on the CPU outside `torch.compile`, a coordinate that is not finite or a sample number out of
            range. Where values are not looked at, a sample number out of range gives zeros and a NaN coordinate NaN.
    """
    roi = triple(roi_size, "roi_size")
    out = roi if output_size is None else triple(output_size, "output_size")
    sources = _list_of_sources(sources)
    scales = _flat_scales(spatial_scales, len(sources))
    check_centers(centers, sources[0].shape[0], sources[0].device)
    check_padding(padding)
    (rois,), aliases = _gather(sources, centers, _Options(list(roi), list(out), scales, [], padding), passthrough)
    return (rois, aliases) if passthrough else rois


@overload
def roi_gather_each_3d(
    sources: Sequence[Tensor],
    centers: Tensor,
    roi_sizes: Sequence[int | Sequence[int]],
    *,
    channels: Sequence[Sequence[int] | None] | None = ...,
    spatial_scales: Sequence[float | Sequence[float]] | None = ...,
    padding: Padding = ...,
    passthrough: Literal[False] = ...,
) -> list[Tensor]: ...


@overload
def roi_gather_each_3d(
    sources: Sequence[Tensor],
    centers: Tensor,
    roi_sizes: Sequence[int | Sequence[int]],
    *,
    channels: Sequence[Sequence[int] | None] | None = ...,
    spatial_scales: Sequence[float | Sequence[float]] | None = ...,
    padding: Padding = ...,
    passthrough: Literal[True],
) -> tuple[list[Tensor], list[Tensor]]: ...


def roi_gather_each_3d(
    sources: Sequence[Tensor],
    centers: Tensor,
    roi_sizes: Sequence[int | Sequence[int]],
    *,
    channels: Sequence[Sequence[int] | None] | None = None,
    spatial_scales: Sequence[float | Sequence[float]] | None = None,
    padding: Padding = "zeros",
    passthrough: bool = False,
) -> list[Tensor] | tuple[list[Tensor], list[Tensor]]:
    """`roi_gather_3d` with a size for each ROI, in one pass: the gradients of the sources are written once for all.

    Args:
        sources, centers, spatial_scales, padding, passthrough: as there.
        roi_sizes: K sizes, each one number or (d, h, w); a ROI has as many samples.
        channels: per source None where ROIs read all channels, or K numbers: the one channel that each ROI reads, as
            of a stack of heat maps with one map per organ.

    Returns:
        K tensors (1, sum C_i, d_k, h_k, w_k), where C_i is 1 for a source of which one channel is read; with
        `passthrough`, that and the list of sources.

    Raises:
        TypeError, ValueError: as `roi_gather_3d`; and for numbers of sizes or channels that do not fit.
    """
    sources = _list_of_sources(sources)
    check_centers(centers, sources[0].shape[0], sources[0].device)
    check_padding(padding)
    sizes = [
        n
        for k, size in enumerate(as_list(roi_sizes, "roi_sizes", "one size per ROI"))
        for n in triple(size, f"roi_sizes[{k}]")
    ]
    if len(sizes) != 3 * len(centers):
        raise ValueError(f"{len(centers)} centers need as many roi_sizes, got {len(sizes) // 3}")
    scales = _flat_scales(spatial_scales, len(sources))
    options = _Options(sizes, sizes, scales, _channels(channels, sources, len(centers)), padding)
    rois, aliases = _gather(sources, centers, options, passthrough)
    return (rois, aliases) if passthrough else rois


def check_padding(padding: str) -> None:
    """Refuse an unknown padding."""
    if padding not in get_args(Padding):
        raise ValueError(f"padding must be 'zeros' or 'border', got {padding!r}")


def _channels(channels: Sequence[Sequence[int] | None] | None, sources: Sequence[Tensor], rois: int) -> list[int]:
    """K numbers per source, -1 for all; nothing where every ROI reads all channels of every source."""
    per_source = [] if channels is None else as_list(channels, "channels", "None or K channel numbers per source")
    if all(some is None for some in per_source):
        return []
    if len(per_source) != len(sources):
        raise ValueError(f"channels has {len(per_source)} entries for {len(sources)} sources")
    result = []
    for i, (some, source) in enumerate(zip(per_source, sources, strict=True)):
        name = f"channels[{i}]"
        chosen = [-1] * rois if some is None else as_list(some, name, "channel numbers")
        numbers = [integer(c, f"{name}[{k}]") for k, c in enumerate(chosen)]
        if len(numbers) != rois:
            raise ValueError(f"{name} names {len(numbers)} channels for {rois} ROIs")
        if some is not None and not all(0 <= c < source.shape[1] for c in numbers):
            raise ValueError(f"{name} names {numbers}, sources[{i}] has {source.shape[1]} channels")
        result += numbers
    return result


def _list_of_sources(sources: Sequence[Tensor]) -> list[Tensor]:
    if isinstance(sources, Tensor):
        raise TypeError(f"sources must be a sequence of tensors, got one tensor of shape {tuple(sources.shape)}")
    sources = as_list(sources, "sources", "tensors")
    if not sources:
        raise ValueError("sources is empty, expected at least one (N, C, D, H, W) tensor")
    for i, source in enumerate(sources):
        require_float(source, f"sources[{i}]")
        if 0 in source.shape[2:]:
            raise ValueError(f"sources[{i}] has no voxels: {tuple(source.shape)}")
        if source.shape[0] != sources[0].shape[0]:
            raise ValueError(f"sources differ in batch size: {[tuple(s.shape) for s in sources]}")
        if source.device != sources[0].device:
            raise TypeError(f"sources lie on different devices: {[str(s.device) for s in sources]}")
    return sources


def _flat_scales(spatial_scales: Sequence[float | Sequence[float]] | None, count: int) -> list[float]:
    """Three numbers per source."""
    if spatial_scales is None:
        return [1.0] * (3 * count)
    scales = checked_scales(spatial_scales)
    if len(scales) != count:
        raise ValueError(f"spatial_scales has {len(scales)} entries for {count} sources")
    return [number for scale in scales for number in scale]


def checked_scales(spatial_scales: Sequence[float | Sequence[float]]) -> list[tuple[float, float, float]]:
    """One scale per source, as three numbers each."""
    scales = as_list(spatial_scales, "spatial_scales", "one scale per source")
    return [positive_scale(scale, f"spatial_scales[{i}]") for i, scale in enumerate(scales)]


def check_centers(centers: Tensor, samples: int, device: torch.device) -> None:
    """Refuse `centers` that are not (K, 4) numbers with sample numbers in range."""
    if not isinstance(centers, Tensor):
        raise TypeError(f"centers must be a tensor, got {type(centers).__name__}")
    if centers.dtype == torch.bool or centers.is_complex():
        raise TypeError(f"centers must be integer or floating point, got {centers.dtype}")
    if centers.device != device:
        raise TypeError(f"centers lie on {centers.device}, the volumes on {device}")
    if centers.dim() != 2 or centers.shape[1] != 4:
        raise ValueError(f"centers must be (K, 4) = (sample, z, y, x), got {tuple(centers.shape)}")
    if not values_are_readable(centers):
        return
    if not bool(torch.isfinite(centers).all()):
        raise ValueError(f"centers must be finite, got {centers.tolist()}")
    batch = centers[:, 0]
    if not bool(((batch >= 0) & (batch < samples) & (batch == batch.trunc())).all()):
        raise ValueError(f"centers name samples {batch.tolist()}, expected integers in [0, {samples})")


class _Options(NamedTuple):
    """Lists as in `reference.Boxes`."""

    roi_size: list[int]
    output_size: list[int]
    scales: list[float]
    channels: list[int]
    padding: str

    @property
    def border(self) -> bool:
        return self.padding == "border"


def _gather(
    sources: list[Tensor], centers: Tensor, options: _Options, passthrough: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs, and the sources or their aliases."""
    if not options.output_size:
        return [], sources
    # torch.compile refuses an autograd.Function that gets a tensor twice.
    sources = [s.view_as(s) if any(s is other for other in sources[:i]) else s for i, s in enumerate(sources)]
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (centers, *sources)):
        # Tracing forward alone, torch.compile would take `ctx` for left out where there are two sources.
        return _run(sources, centers, options), sources
    if not passthrough or torch.compiler.is_compiling():
        return list(_Gather.apply(centers, options, *sources)), sources
    results = _PassThrough.apply(centers, options, *sources)
    return list(results[: -len(sources)]), list(results[-len(sources) :])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, centers: Tensor, options: _Options, *sources: Tensor) -> tuple[Tensor, ...]:
        _remember(ctx, centers, options, sources)
        return tuple(_run(sources, centers, options))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        forbid_double_backward("roi_gather_3d")
        return _gradients(ctx, grads, [])


class _PassThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, centers: Tensor, options: _Options, *sources: Tensor) -> tuple[Tensor, ...]:
        _remember(ctx, centers, options, sources)
        outputs = _run(sources, centers, options)
        ctx.outputs = [(out.shape, out.dtype) for out in outputs]
        ctx.set_materialize_grads(False)
        return (*outputs, *sources)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        forbid_double_backward("roi_gather_3d")
        others = grads[len(ctx.outputs) :]
        owed = grads[: len(ctx.outputs)]
        if all(grad is None for grad in owed):
            return None, None, *others
        centers = ctx.saved_tensors[0]
        whole = [
            centers.new_zeros(shape, dtype=dtype) if grad is None else grad
            for grad, (shape, dtype) in zip(owed, ctx.outputs, strict=True)
        ]
        wanted = [other for other, source in zip(others, ctx.sources, strict=True) if source is not None]
        bases = [base for base in wanted if base is not None]
        if len(bases) == len(wanted):
            return _gradients(ctx, whole, bases)
        of_centers, none, *own = _gradients(ctx, whole, [])
        return of_centers, none, *(_sum(a, b) for a, b in zip(others, own, strict=True))


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


class _Source(NamedTuple):
    """What backward needs to know of a source."""

    shape: torch.Size
    first_channel: int
    dtype: int
    channels_last: bool


def _remember(ctx: Any, centers: Tensor, options: _Options, sources: Sequence[Tensor]) -> None:
    # The gradient of the centres alone needs the sources' values.
    ctx.save_for_backward(centers, *(sources if ctx.needs_input_grad[0] else ()))
    ctx.options = options
    ctx.sources = []
    boxes = _boxes(centers, options)
    first = 0
    for i, (source, wanted) in enumerate(zip(sources, ctx.needs_input_grad[2:], strict=True)):
        dtype = DTYPES.index(source.dtype)
        about = _Source(source.shape, first, dtype, is_channels_last(source))
        ctx.sources.append(about if wanted else None)
        first += boxes.width(i, source.shape[1])


def _boxes(centers: Tensor, options: _Options) -> reference.Boxes:
    return reference.Boxes(centers, *options[:4], options.border)


def _run(sources: Sequence[Tensor], centers: Tensor, options: _Options) -> list[Tensor]:
    return _forward(sources, *_boxes(centers, options))


def _gradients(ctx: Any, grads: Sequence[Tensor], bases: list[Tensor]) -> tuple[Tensor | None, ...]:
    centers, *sources = ctx.saved_tensors
    options: _Options = ctx.options
    rois = centers.shape[0]
    numbers = [i for i, source in enumerate(ctx.sources) if source is not None]
    result: list[Tensor | None] = [None] * (2 + len(ctx.sources))
    if ctx.needs_input_grad[0]:
        result[0] = _centers_backward(grads, sources, *_boxes(centers, options))
    if numbers:
        wanted = [ctx.sources[i] for i in numbers]
        gradients = _backward(
            grads,
            [_like(base, source) for base, source in zip(bases, wanted)],
            centers,
            options.roi_size,
            options.output_size,
            [scale for i in numbers for scale in options.scales[3 * i : 3 * i + 3]],
            [channel for i in numbers for channel in options.channels[rois * i : rois * (i + 1)]],
            [size for source in wanted for size in source.shape],
            [source.first_channel for source in wanted],
            [source.dtype for source in wanted],
            [int(source.channels_last) for source in wanted],
            options.border,
        )
        for i, gradient in zip(numbers, gradients, strict=True):
            result[2 + i] = gradient
    return tuple(result)


def _like(base: Tensor, source: _Source) -> Tensor:
    return base.to(DTYPES[source.dtype]).contiguous(memory_format=layout(source.channels_last))


def _fake_forward(sources: Sequence[Tensor], *boxes: Any) -> list[Tensor]:
    return reference.empty_outputs(sources, reference.Boxes(*boxes))


def _fake_backward(grads: Sequence[Tensor], bases: Sequence[Tensor], centers: Tensor, *arguments: Any) -> list[Tensor]:
    *_, shapes, _first_channels, dtypes, channels_last, _border = arguments
    return reference.empty_gradients(centers, shapes, dtypes, channels_last)


def _fake_centers_backward(grads: Sequence[Tensor], sources: Sequence[Tensor], centers: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(centers)


def _forward_not_in_triton(sources: Sequence[Tensor], centers: Tensor, *_: Any) -> str | None:
    for source in sources:
        if source.dtype == torch.float64:
            return "no kernel for torch.float64"
        if source.shape[2:].numel() >= 2**31:
            return f"{source.shape[2:].numel()} voxels, at most 2^31 - 1 are supported"
    return f"{len(centers)} ROIs, at most {MOST_PROGRAMS} are supported" if len(centers) > MOST_PROGRAMS else None


def _backward_not_in_triton(grads: Sequence[Tensor], *arguments: Any) -> str | None:
    *_, shapes, _first_channels, dtypes, _channels_last, _border = arguments
    if torch.float64 in (grads[0].dtype, *(DTYPES[dtype] for dtype in dtypes)):
        return "no kernel for torch.float64"
    for i in range(len(dtypes)):
        samples, _, depth, height, width = shapes[5 * i : 5 * i + 5]
        if depth * height * width >= 2**31 or samples > MOST_PROGRAMS:
            return f"a source of {shapes[5 * i : 5 * i + 5]} is too large"
    return None


_OPS = ("roi_gather_3d", "roi_gather_each_3d")
_BOXES = "Tensor centers, SymInt[] roi_size, SymInt[] output_size, float[] scales, int[] channels"
_forward = define(
    f"roi_gather_3d_fwd(Tensor[] sources, {_BOXES}, bool border) -> Tensor[]",
    op=_OPS,
    reference=reference.forward,
    fake=_fake_forward,
    cpu=[csrc_kernel("roi_gather_3d_forward")],
    cuda=[triton_kernel("roi_gather3d", "forward", _forward_not_in_triton)],
    tags=COPIES_FROM_HOST,
)
_backward = define(
    f"roi_gather_3d_bwd(Tensor[] grads, Tensor[] bases, {_BOXES}, SymInt[] shapes, SymInt[] first_channels,"
    " int[] dtypes, int[] channels_last, bool border) -> Tensor[]",
    op=_OPS,
    reference=reference.backward,
    fake=_fake_backward,
    cpu=[csrc_kernel("roi_gather_3d_backward")],
    cuda=[triton_kernel("roi_gather3d", "backward", _backward_not_in_triton)],
    tags=COPIES_FROM_HOST,
)
_centers_backward = define(
    f"roi_gather_3d_centers_bwd(Tensor[] grads, Tensor[] sources, {_BOXES}, bool border) -> Tensor",
    op=_OPS,
    reference=reference.centers_backward,
    fake=_fake_centers_backward,
)
