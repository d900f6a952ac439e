"""Every public op on drawn shapes, dtypes, layouts and options against its reference in float64, forward and backward.

200 cases of each by default, 5,000 in `make nightly`. A bound, beside the rounding of a result to its dtype, is a small
number of roundings to the dtype of sums (`unit`) of the largest numbers that are added up.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from draw import (
    BATCHES,
    DTYPES,
    SIZES,
    SMALL,
    ByReference,
    assert_near,
    exactly,
    generators,
    laid_out,
    maps,
    normal,
    run,
    shapes,
    values,
)
from hypothesis import given, note
from hypothesis import strategies as st
from torch import Tensor

import focuskernels as fk
from focuskernels._lib import layout_of
from focuskernels.nn import DenseASPP3d
from focuskernels.reference.nn import PlainDenseASPP


def unit(dtype: torch.dtype) -> float:
    """The rounding of sums over maps of a dtype."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def triples(of: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.tuples(of, of, of)


# Regions of interest: sums with weights >= 0, so that those of absolute values bound the error. 32 roundings: a sample
# of a whole axis adds up about as many products.


def assert_weighted_sums(
    data: st.DataObject, function: Callable[..., Any], sources: Sequence[Tensor], units: Sequence[float]
) -> None:
    with torch.no_grad():
        like = function(*sources)
    upstream = [laid_out(data, normal(data, out.shape, out.dtype)) for out in like]
    needed = data.draw(st.lists(st.booleans(), min_size=len(sources), max_size=len(sources)))
    outputs, gradients = run(function, sources, upstream, needed)
    with ByReference():
        exact, exact_gradients = run(function, [exactly(s) for s in sources], [u.double() for u in upstream], needed)
        sums, owed = run(function, [exactly(s).abs() for s in sources], [u.double().abs() for u in upstream], needed)
    assert outputs[0].is_contiguous(memory_format=layout_of(sources[0]))
    for out, e, total in zip(outputs, exact, sums, strict=True):
        assert_near(out, e, 32 * max(units) * total, "output")
    wanted = [source for source, need in zip(sources, needed) if need]
    for source, g, e, total in zip(wanted, gradients, exact_gradients, owed):
        assert g.dtype == source.dtype
        # Two roundings where what comes through the alias of a source is added.
        assert_near(g, e, (32 * max(units) + torch.finfo(g.dtype).eps) * total, "gradient")


def coordinates(data: st.DataObject, count: int, size: int) -> Tensor:
    """Whole and broken numbers in and around [0, size), a few far away."""
    near = normal(data, (count,), torch.float64) * size * 0.6 + size / 2
    kind = data.draw(st.sampled_from(["whole", "half", "broken", "far"]))
    if kind == "whole":
        return near.round()
    if kind == "half":
        return near.mul(2).round() / 2
    return near * 1000 if kind == "far" else near


@given(st.data())
def test_roi_align_3d(data: st.DataObject) -> None:
    shape = (data.draw(BATCHES), data.draw(SIZES), *data.draw(triples(SIZES)))
    dtype = data.draw(st.sampled_from(DTYPES))
    count = data.draw(st.sampled_from([1, 2, 3, 0])) if shape[0] else 0
    ends = [torch.stack([coordinates(data, count, size) for _ in range(2)]).sort(dim=0).values for size in shape[2:]]
    samples = torch.randint(max(shape[0], 1), (count,), generator=data.draw(generators()))
    rois = torch.stack([samples.double(), *(e[0] for e in ends), *(e[1] for e in ends)], dim=1)
    rois = rois.to(data.draw(st.sampled_from([torch.float32, torch.float64, torch.int64])))
    options = {
        "output_size": data.draw(triples(SMALL)),
        "spatial_scale": data.draw(triples(st.sampled_from([1.0, 0.5, 0.25, 1.7]))),
        "sampling_ratio": data.draw(st.sampled_from([-1, 0, 1, 2, 5])),
        "aligned": data.draw(st.booleans()),
    }
    note(f"{rois.tolist()} {rois.dtype} {options}")
    assert_weighted_sums(
        data, lambda x: [fk.roi_align_3d(x, rois, **options)], [maps(data, shape, dtype)], [unit(dtype)]
    )


def sources_and_centers(data: st.DataObject) -> tuple[list[Tensor], Tensor, list[tuple[float, ...]]]:
    batch, grid = data.draw(BATCHES), data.draw(triples(SIZES))
    sources, scales = [], []
    for _ in range(data.draw(st.integers(1, 2))):
        scale = data.draw(triples(st.sampled_from([1.0, 0.5, 1.3])))
        size = [max(1, int(g * s)) for g, s in zip(grid, scale)]
        dtype = data.draw(st.sampled_from(DTYPES))
        sources.append(maps(data, (batch, data.draw(SIZES), *size), dtype))
        scales.append(scale)
    count = data.draw(st.sampled_from([1, 2, 3, 0])) if batch else 0
    samples = torch.randint(max(batch, 1), (count,), generator=data.draw(generators()))
    centers = torch.stack([samples.double(), *(coordinates(data, count, size) for size in grid)], dim=1)
    centers = centers.to(data.draw(st.sampled_from([torch.float64, torch.float32, torch.int64, torch.int32])))
    centers = laid_out(data, centers) if count and data.draw(st.booleans()) else centers
    if not bool((centers[:, 0] < max(batch, 1)).all() & (centers[:, 0] >= 0).all()):  # an expanded one
        centers = centers[:0]
    note(f"{centers.tolist()} {scales}")
    return sources, centers, scales


def units_of(sources: Sequence[Tensor]) -> list[float]:
    # Sums are kept in the dtype of the result.
    dtype = sources[0].dtype
    for source in sources[1:]:
        dtype = torch.promote_types(dtype, source.dtype)
    return [unit(dtype)]


@given(st.data())
def test_roi_gather_3d(data: st.DataObject) -> None:
    sources, centers, scales = sources_and_centers(data)
    options: dict[str, Any] = {
        "spatial_scales": scales,
        "padding": data.draw(st.sampled_from(["zeros", "border"])),
        "passthrough": data.draw(st.booleans()),
    }
    size = data.draw(triples(SIZES))
    out = data.draw(st.one_of(st.none(), triples(SMALL)))
    note(f"{size} {out} {options}")

    def call(*xs: Tensor) -> list[Tensor]:
        result = fk.roi_gather_3d(xs, centers, size, out, **options)
        # Differentiable copies, since an output that is an input has no gradient of its own.
        return [result[0], *(alias + 0 for alias in result[1])] if options["passthrough"] else [result]

    assert_weighted_sums(data, call, sources, units_of(sources))


@given(st.data())
def test_roi_gather_each_3d(data: st.DataObject) -> None:
    sources, centers, scales = sources_and_centers(data)
    sizes = [data.draw(triples(SMALL)) for _ in centers]
    channels = [
        data.draw(st.one_of(st.none(), st.tuples(*[st.integers(0, s.shape[1] - 1)] * len(centers)))) for s in sources
    ]
    options: dict[str, Any] = {
        "channels": data.draw(st.sampled_from([None, channels])),
        "spatial_scales": scales,
        "padding": data.draw(st.sampled_from(["zeros", "border"])),
    }
    note(f"{sizes} {options}")
    if len(centers) == 0:
        assert fk.roi_gather_each_3d(sources, centers, sizes, **options) == []
        return
    assert_weighted_sums(
        data, lambda *xs: fk.roi_gather_each_3d(xs, centers, sizes, **options), sources, units_of(sources)
    )


@given(st.data())
def test_gradient_of_centers(data: st.DataObject) -> None:
    """It has no compiled kernel; the sources' dtypes and layouts must not matter."""
    sources, centers, scales = sources_and_centers(data)
    centers = centers.double()
    size = data.draw(triples(SMALL))
    padding = data.draw(st.sampled_from(["zeros", "border"]))

    def call(c: Tensor, *xs: Tensor) -> list[Tensor]:
        return [fk.roi_gather_3d(xs, c, size, spatial_scales=scales, padding=padding)]

    like = call(centers, *sources)[0]
    upstream = [laid_out(data, normal(data, like.shape, like.dtype))]
    needed = [True] + [False] * len(sources)
    _, (actual,) = run(call, [centers, *sources], upstream, needed)
    with ByReference():
        _, (expected,) = run(call, [centers, *map(exactly, sources)], [upstream[0].double()], needed)
    # Slopes are differences of values, rounded to the dtype of the output; scales are up to 1.3.
    largest = max([float(s.abs().max()) for s in sources if s.numel()], default=0.0)
    assert_near(
        actual, expected, 32 * max(units_of(sources)) * largest * float(upstream[0].double().abs().sum()), "gradient"
    )


# Comparisons only: the very numbers of the reference in the same dtype.


@given(st.data())
def test_heatmap_argmax_3d(data: st.DataObject) -> None:
    shape = data.draw(shapes(st.sampled_from([1, 2, 3, 0])))
    dtype = data.draw(st.sampled_from(DTYPES))
    x = values(data, shape, dtype)
    special = data.draw(st.lists(st.sampled_from([torch.nan, torch.inf, -torch.inf, -0.0, 0.0]), max_size=3))
    for value in special:
        if x.numel():
            x.view(-1)[data.draw(st.integers(0, x.numel() - 1))] = value
    note(f"{special}")
    x = laid_out(data, x)
    subvoxel = data.draw(st.booleans())
    results = []
    for mode in (torch.no_grad, ByReference):
        leaf = x.detach().requires_grad_()
        with mode(), torch.enable_grad():
            peaks = fk.heatmap_argmax_3d(leaf, subvoxel=subvoxel)
            total = peaks.value.sum() + peaks.center.to(x.dtype).mul(0.5).sum()
            results.append([*peaks, *torch.autograd.grad(total, leaf)])
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


@given(st.data())
def test_paste_rois_3d(data: st.DataObject) -> None:
    batch, size = data.draw(BATCHES), data.draw(triples(st.one_of(SIZES, st.just(0))))
    labels = torch.randint(0, 256, (batch, *size), generator=data.draw(generators()), dtype=torch.uint8)
    count = data.draw(st.integers(0, 5)) if batch else 0
    logits = [
        maps(data, data.draw(triples(st.one_of(SMALL, st.just(0)))), data.draw(st.sampled_from(DTYPES)))
        for _ in range(count)
    ]
    for roi in logits:
        if roi.numel() and data.draw(st.booleans()):
            roi[-1, -1, -1] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    samples = torch.randint(max(batch, 1), (count,), generator=data.draw(generators()))
    centers = torch.stack([samples.double(), *(coordinates(data, count, s).round() for s in size)], dim=1)
    centers = centers.to(data.draw(st.sampled_from([torch.float64, torch.float32, torch.int64])))
    classes = data.draw(st.lists(st.integers(0, 255), min_size=count, max_size=count))
    threshold = data.draw(st.sampled_from([0.5, 0.0, 1.0, 0.2, 0.999]))
    labels = laid_out(data, labels) if 0 not in labels.shape else labels
    note(f"{centers.tolist()} {classes} {threshold}")
    actual = fk.paste_rois_3d(labels, logits, centers, classes, threshold=threshold)
    with ByReference():
        expected = fk.paste_rois_3d(labels, logits, centers, classes, threshold=threshold)
    assert torch.equal(actual, expected)


# Losses.


def loss_inputs(
    data: st.DataObject, activation: str, channels: int, shape: Sequence[int]
) -> tuple[Tensor, dict[str, Any]]:
    """Target, and options of `focal_dice_sums`; labels out of range only where they are ignored."""
    batch = shape[0]
    generator = data.draw(generators())
    ignore = data.draw(st.sampled_from([None, None, 0, 1, 255, -1]))
    if activation == "sigmoid":
        target = torch.randint(0, 2, (batch, channels, *shape[2:]), generator=generator, dtype=torch.uint8)
        kind = data.draw(st.sampled_from([torch.uint8, torch.bool]))
    else:
        kinds = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
        kind = data.draw(st.sampled_from(kinds if channels <= 128 else kinds[2:]))
        target = torch.randint(0, channels, (batch, *shape[2:]), generator=generator)
    holds = kind != torch.bool and ignore is not None and (ignore >= 0 if kind == torch.uint8 else ignore < 128)
    if holds:
        target = target.masked_fill(torch.rand(target.shape, generator=generator) < 0.2, ignore)
    target = target.to(kind)
    if target.numel() and data.draw(st.booleans()):
        target = laid_out(data, target)
    mask = None
    if data.draw(st.booleans()):
        mask = torch.rand((batch, channels), generator=generator) < 0.7
        mask[:, 0] = True
    options = {"activation": activation, "ignore_index": ignore, "class_mask": mask}
    options["gamma"] = data.draw(st.sampled_from([2.0, 0.0, 1.0, 0.5, 3.7]))
    if data.draw(st.booleans()):
        options["alpha"] = torch.rand(channels, generator=generator).tolist()
    note(f"{target.dtype} {options}")
    return target, options


def loss_shape(data: st.DataObject) -> tuple[int, ...]:
    spatial = data.draw(st.lists(SIZES, min_size=1, max_size=3))
    if data.draw(st.integers(0, 19)) == 0:
        spatial = [data.draw(st.sampled_from([4097, 8200]))]  # more than one thread takes at a time
    return (data.draw(BATCHES), 0, *spatial)


def logits_of(data: st.DataObject, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    scale = data.draw(st.sampled_from([1.0, 0.0, 10.0, 1e4]))
    return laid_out(data, values(data, shape, torch.float64).mul(scale).clamp(-6e4, 6e4).to(dtype))


def error_of_terms(logits: Tensor, gamma: float) -> float:
    """Of the probability or focal term of a voxel: 16 roundings of a logit, or of a focal term as large."""
    largest = float(logits.abs().max()) if logits.numel() else 0.0
    return 16 * unit(logits.dtype) * (1 + largest) * (1 + gamma)


@given(st.data())
def test_focal_dice_sums(data: st.DataObject) -> None:
    activation = data.draw(st.sampled_from(["softmax", "sigmoid"]))
    channels = data.draw(st.sampled_from([2, 3, 5, 8, 9, 17, 33, 130] if activation == "softmax" else [1, 2, 3, 9]))
    shape = loss_shape(data)
    target, options = loss_inputs(data, activation, channels, shape)
    logits = logits_of(data, (shape[0], channels, *shape[2:]), data.draw(st.sampled_from(DTYPES)))

    def call(x: Tensor) -> list[Tensor]:
        sums = fk.focal_dice_sums(x, target, **options)
        with ByReference():
            counts = fk.focal_dice_sums(x.detach(), target, **options)
        assert torch.equal(sums.target, counts.target)
        assert torch.equal(sums.voxels, counts.voxels)
        return [sums.intersection, sums.prediction, sums.focal]

    upstream = [normal(data, out.shape, out.dtype) for out in call(logits)]
    with ByReference():
        exact, (gradient,) = run(call, [exactly(logits)], [u.double() for u in upstream], [True])
    actual, (actual_gradient,) = run(call, [logits], upstream, [True])
    term = error_of_terms(logits, options["gamma"])
    voxels = logits[0, 0].numel() if logits.numel() else 0
    # The alpha of `call` is rounded to float32; up to as many terms as there are voxels, of any sizes, in float64.
    for out, e, terms in zip(actual, exact, (voxels, voxels, voxels * channels)):
        assert_near(out, e, term * terms + unit(torch.float64) * terms * e.abs(), "sums")
    largest = sum(float(u.abs().max()) for u in upstream if u.numel())
    assert actual_gradient.dtype == logits.dtype
    # A power of 1 - p below 1 has any slope near p = 1, where it is multiplied by log p.
    assert_near(actual_gradient, gradient, 4 * term * largest, "gradient")


@given(st.data())
def test_focal_dice_loss(data: st.DataObject) -> None:
    activation = data.draw(st.sampled_from(["softmax", "sigmoid"]))
    channels = data.draw(st.sampled_from([2, 3, 7, 16]))
    shape = loss_shape(data)
    target, options = loss_inputs(data, activation, channels, shape)
    options["batch_dice"] = data.draw(st.booleans())
    options["include_background"] = data.draw(st.booleans())
    options["class_reduction"] = data.draw(st.sampled_from(["sum", "mean"]))
    options["smooth"] = data.draw(st.sampled_from([1e-5, 1.0]))
    logits = logits_of(data, (shape[0], channels, *shape[2:]), data.draw(st.sampled_from(DTYPES)))
    dense = logits.contiguous() if data.draw(st.booleans()) else logits

    def call(x: Tensor, inplace_grad: bool = False) -> Tensor:
        return fk.focal_dice_loss(x, target, **options, inplace_grad=inplace_grad)

    with ByReference():
        leaf = exactly(logits).requires_grad_()
        exact = call(leaf)
        (gradient,) = torch.autograd.grad(exact, leaf)
    term = error_of_terms(logits, options["gamma"])
    for inplace in (False, True):
        leaf = dense.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        loss = call(leaf, inplace)
        (actual,) = torch.autograd.grad(loss, leaf)
        # Of a class that is hardly there the ratio divides sums of its probabilities by `smooth`.
        # It is made of sums over voxels, in float64.
        summing = unit(torch.float64) * logits[:, 0].numel() * exact.detach().abs() if logits.numel() else 0.0
        bound = term * channels * (1 + 2 / options["smooth"] * (options["smooth"] < 1))
        assert_near(loss, exact, bound + summing, "loss")
        assert actual.isfinite().all()
        if options["smooth"] == 1:
            assert_near(actual, gradient, 8 * term * channels, "gradient")


@given(st.data())
def test_targets_out_of_range_are_refused(data: st.DataObject) -> None:
    classes, shape = data.draw(st.sampled_from([2, 5, 33])), (data.draw(st.integers(1, 3)), *data.draw(triples(SIZES)))
    kind = data.draw(st.sampled_from([torch.uint8, torch.int8, torch.int64]))
    target = torch.randint(0, classes, shape, generator=data.draw(generators())).to(kind)
    stray = data.draw(st.sampled_from([classes, 127, 2**40, -1, -(2**63)] if kind == torch.int64 else [classes, 127]))
    target.view(-1)[data.draw(st.integers(0, target.numel() - 1))] = stray
    logits = laid_out(data, normal(data, (shape[0], classes, *shape[1:])))
    with pytest.raises(ValueError, match=f"expected 0 to {classes - 1}"):
        fk.focal_dice_loss(logits, target)
    assert fk.focal_dice_loss(logits, target, ignore_index=stray).isfinite()


def linear_inputs(data: st.DataObject, outputs: int) -> list[Tensor]:
    inputs = data.draw(SIZES)
    shape = loss_shape(data)
    dtype = data.draw(st.sampled_from(DTYPES))
    features = laid_out(data, normal(data, (shape[0], inputs, *shape[2:]), dtype))
    weight = laid_out(data, normal(data, (outputs, inputs), dtype))
    bias = [normal(data, (outputs,), dtype)] if data.draw(st.booleans()) else []
    return [features, weight, *bias]


def error_of_logits(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> float:
    """Rounding of the logits to the dtype of the features, and of half-precision products on their way."""
    if not features.numel():
        return 0.0
    largest = float((features.double().abs().amax(dim=1).max()) * weight.double().abs().sum(dim=1).max())
    return torch.finfo(features.dtype).eps * (2 * largest + (0 if bias is None else float(bias.abs().max())))


@given(st.data())
def test_linear_argmax(data: st.DataObject) -> None:
    arguments = linear_inputs(data, data.draw(st.sampled_from([1, 2, 3, 19, 256])))
    features, weight, *bias = arguments
    result = fk.linear_argmax(*arguments, probability=True)
    logits = torch.einsum("nk...,ck->nc...", features.double(), weight.double())
    if bias:
        logits = logits + bias[0].double().view(-1, *[1] * (logits.dim() - 2))
    delta = error_of_logits(*arguments)
    taken = logits.gather(1, result.labels.long().unsqueeze(1)).squeeze(1)
    assert bool((taken >= logits.amax(dim=1) - 2 * delta).all())
    probability = logits.softmax(dim=1).gather(1, result.labels.long().unsqueeze(1)).squeeze(1)
    # p changes by at most p (1 - p) times the largest change of a difference of logits.
    assert_near(result.probability, probability, 2 * delta + 64 * unit(features.dtype), "probability")


@given(st.data())
def test_linear_focal_dice_loss(data: st.DataObject) -> None:
    activation = data.draw(st.sampled_from(["softmax", "sigmoid"]))
    classes = data.draw(st.sampled_from([2, 3, 8, 19]))
    arguments = linear_inputs(data, classes)
    features = arguments[0]
    target, options = loss_inputs(data, activation, classes, features.shape)
    needed = data.draw(st.lists(st.booleans(), min_size=len(arguments), max_size=len(arguments)))

    def call(f: Tensor, w: Tensor, b: Tensor | None = None) -> list[Tensor]:
        return [fk.linear_focal_dice_loss(f, w, b, target, smooth=1.0, **options)]

    (loss,), gradients = run(call, arguments, [torch.ones(())], needed)

    def by_parts(f: Tensor, w: Tensor, b: Tensor | None = None) -> list[Tensor]:
        logits = torch.einsum("nk...,ck->nc...", f, w)
        if b is not None:
            logits = logits + b.view(-1, *[1] * (logits.dim() - 2))
        return [fk.focal_dice_loss(logits, target, smooth=1.0, **options)]

    with ByReference():
        (exact,), exact_gradients = run(by_parts, [exactly(a) for a in arguments], [torch.ones(())], needed)
    # No derivative by a logit exceeds these: of the mean of focal terms 1 + gamma, of each dice term 2.
    slope = 1 + options["gamma"] + 2 * classes
    delta = error_of_logits(*arguments) + 64 * unit(features.dtype)
    assert_near(loss, exact, slope * delta, "loss")
    for g, e, a in zip(gradients, exact_gradients, [a for a, need in zip(arguments, needed) if need]):
        assert (g.dtype, g.shape) == (a.dtype, a.shape)
        # Each is a sum over voxels of products of slopes, off by about `slope` times `delta`, with features or weights.
        factor = max(1.0, *(float(t.abs().max()) for t in arguments if t.numel()))
        assert_near(g, e, 4 * slope * delta * factor * max(e.shape[0], classes), "gradient")


# Norms. Upstream gradients are 0 where rounding may turn the side of an activation.


def norm_options(data: st.DataObject, shape: Sequence[int]) -> dict[str, Any]:
    norm = data.draw(st.sampled_from(["batch", "instance", "group"]))
    options: dict[str, Any] = {"norm": norm, "eps": data.draw(st.sampled_from([1e-5, 1e-2]))}
    if norm == "group":
        options["num_groups"] = data.draw(st.sampled_from([g for g in range(1, shape[1] + 1) if shape[1] % g == 0]))
    return options


def takes_no_statistics(shape: Sequence[int], options: dict[str, Any]) -> bool:
    members = {"batch": shape[0], "instance": 1, "group": shape[1] // options.get("num_groups", 1)}[options["norm"]]
    return shape[0] > 0 and members * shape[2] * shape[3] * shape[4] == 1


def per_channel(data: st.DataObject, channels: int, dtype: torch.dtype) -> Tensor:
    half = dtype in (torch.float16, torch.bfloat16)
    return normal(data, (channels,), torch.float32 if half and data.draw(st.booleans()) else dtype)


def inverse_deviation(x: Tensor, options: dict[str, Any]) -> float:
    """The largest of those that a norm multiplies with."""
    if not x.numel():
        return 1.0
    if "running_var" in options:
        return float((options["running_var"] + options["eps"]).rsqrt().max())
    wide, axes = x.double(), (0, 2, 3, 4) if options["norm"] == "batch" else (2, 3, 4)
    if options["norm"] == "group":
        wide = wide.reshape(x.shape[0], options["num_groups"], -1, 1, 1)
    return float((wide.var(dim=axes, correction=0) + options["eps"]).rsqrt().max())


def steepness(x: Tensor, options: dict[str, Any]) -> float:
    """How much a norm magnifies the rounding of `x` and of its mean."""
    if not x.numel():
        return 1.0
    largest = float(x.abs().max()) + float(options.get("running_mean", torch.zeros(1)).abs().max())
    return 1 + largest * inverse_deviation(x, options)


@given(st.data())
def test_norm_act(data: st.DataObject) -> None:
    shape, dtype = data.draw(shapes()), data.draw(st.sampled_from(DTYPES))
    options = norm_options(data, shape)
    activation, slope = data.draw(st.sampled_from([(None, 0.0), ("relu", 0.0), ("leaky_relu", 0.2)]))
    arguments = [maps(data, shape, dtype)]
    if data.draw(st.booleans()):
        arguments += [per_channel(data, shape[1], dtype), per_channel(data, shape[1], dtype)]
    statistics = options["norm"] == "batch" and data.draw(st.booleans())
    if statistics:
        mean, variance = normal(data, shape[1:2]), normal(data, shape[1:2]).square() + 0.1
        options |= {"running_mean": mean, "running_var": variance, "training": False}
    note(f"{options} {activation}")

    def call(x: Tensor, w: Tensor | None = None, b: Tensor | None = None, activation: Any = activation) -> list[Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        own = {name: options[name].to(wide) for name in ("running_mean", "running_var") if name in options}
        return [fk.norm_act(x, w, b, activation=activation, negative_slope=slope, **(options | own))]

    if not statistics and takes_no_statistics(shape, options):
        with pytest.raises(ValueError, match="one value only"):
            call(*arguments)
        return
    rstd = inverse_deviation(arguments[0], options)
    scale = max([1.0, *(float(a.abs().max()) for a in arguments[1:])])
    # 16 roundings: of the mean, the deviation and the products.
    error = 16 * unit(dtype) * steepness(arguments[0], options) * scale
    with ByReference():
        before = call(*map(exactly, arguments), activation=None)[0]
    upstream = laid_out(data, normal(data, shape, dtype))
    if activation is not None:
        upstream = upstream.masked_fill(before.abs() < 4 * error, 0)
    needed = [True] * len(arguments)
    with ByReference():
        (exact,), expected = run(call, [exactly(a) for a in arguments], [upstream.double()], needed)
    (y,), actual = run(call, arguments, [upstream], needed)
    assert y.dtype == dtype
    assert_near(y, exact, error, "output")
    largest = float(upstream.abs().max()) if upstream.numel() else 0.0
    # The gradient of x is one of y times scale and 1 / deviation; those of the parameters are sums of as many numbers.
    for g, e, a, factor in zip(actual, expected, arguments, (rstd, y.numel(), y.numel())):
        assert g.dtype == a.dtype
        assert_near(g, e, 4 * error * largest * factor, "gradient")


def gate_layers(data: st.DataObject, channels: int, dtype: torch.dtype) -> list[Tensor]:
    hidden = data.draw(SMALL)
    return [normal(data, size, dtype) / 2 for size in ((hidden, channels), (hidden,), (channels, hidden), (channels,))]


@given(st.data())
def test_se_residual(data: st.DataObject) -> None:
    shape, dtype = data.draw(shapes()), data.draw(st.sampled_from(DTYPES))
    activation = data.draw(st.sampled_from([None, "relu"]))
    half = dtype in (torch.float16, torch.bfloat16)
    layers = gate_layers(data, shape[1], torch.float32 if half and data.draw(st.booleans()) else dtype)
    arguments = [maps(data, shape, dtype), maps(data, shape, dtype), *layers]

    def call(*a: Tensor, activation: Any = activation) -> list[Tensor]:
        return [fk.se_residual(*a, activation=activation)]

    assert_gated(data, call, arguments, 1.0, activation is not None)


@given(st.data())
def test_norm_se_residual(data: st.DataObject) -> None:
    shape, dtype = data.draw(shapes()), data.draw(st.sampled_from(DTYPES))
    options = norm_options(data, shape)
    activation = data.draw(st.sampled_from([None, "relu"]))
    squeeze = data.draw(st.sampled_from(["norm", "input"])) if options["norm"] != "instance" else "input"
    half = dtype in (torch.float16, torch.bfloat16)
    layers = gate_layers(data, shape[1], torch.float32 if half else dtype)
    parameters = [per_channel(data, shape[1], dtype) for _ in range(2)]
    arguments = [maps(data, shape, dtype), maps(data, shape, dtype), *parameters, *layers]
    note(f"{options} {squeeze} {activation}")

    def call(*a: Tensor, activation: Any = activation) -> list[Tensor]:
        return [fk.norm_se_residual(*a, squeeze=squeeze, activation=activation, **options)]

    if takes_no_statistics(shape, options):
        with pytest.raises(ValueError, match="one value only"):
            call(*arguments)
        return
    assert_gated(data, call, arguments, steepness(arguments[0], options), activation is not None)


def assert_gated(
    data: st.DataObject, call: Callable[..., Any], arguments: Sequence[Tensor], steep: float, activated: bool
) -> None:
    x, residual = arguments[:2]
    largest = max((float(t.abs().max()) for t in (x, residual) if t.numel()), default=0.0)
    weights = [float(t.abs().max()) for t in arguments[2:]]
    # Of the gate's logits, that is a sum over channels and hidden units, and of what it multiplies.
    factor = (1 + max(weights)) ** 3 * x.shape[1] * arguments[-2].shape[1]
    error = 16 * unit(x.dtype) * steep * (1 + largest) ** 2 * factor
    exact_arguments = [exactly(a) for a in arguments]
    needed = [True] * len(arguments)
    with ByReference():
        before = call(*exact_arguments, activation=None)[0]
        upstream = laid_out(data, normal(data, x.shape, x.dtype))
        near = before.abs() < 2 * error + 4 * torch.finfo(x.dtype).eps * before.abs()
        upstream = upstream.masked_fill(near | (before.abs() < 1e-3), 0) if activated else upstream
        (exact,), expected = run(call, exact_arguments, [upstream.double()], needed)
    (y,), actual = run(call, arguments, [upstream], needed)
    assert_near(y, exact, error, "output")
    for g, e, a in zip(actual, expected, arguments, strict=True):
        assert g.dtype == a.dtype
        numbers = max(1, x.numel())
        assert_near(
            g, e, 16 * error * (1 + steep) * numbers**0.5 * (1 + float(e.abs().max() if e.numel() else 0)), "gradient"
        )


# Convolutions.


def by_taps(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: Sequence[int]) -> Tensor:
    """The definition, tap by tap."""
    margins = [step * (size // 2) for step, size in zip(dilation, weight.shape[2:])]
    padded = F.pad(x, [m for margin in reversed(margins) for m in (margin, margin)])
    total = x.new_zeros((x.shape[0], weight.shape[0], *x.shape[2:]))
    if bias is not None:
        total = total + bias.view(-1, 1, 1, 1)
    for tap in torch.ones(weight.shape[2:]).nonzero().tolist():
        at = [slice(t * step, t * step + size) for t, step, size in zip(tap, dilation, x.shape[2:])]
        total = total + torch.einsum("nidhw,oi->nodhw", padded[(..., *at)], weight[(..., *tap)])
    return total


@given(st.data())
def test_dilated_conv3d(data: st.DataObject) -> None:
    """The vendor's library is the reference, so that the definition is the judge."""
    inputs, outputs = data.draw(SMALL), data.draw(SMALL)
    kernel = data.draw(triples(st.sampled_from([1, 3, 5])))
    dilation = data.draw(triples(st.sampled_from([1, 2, 3, 20])))
    x_shape = (data.draw(BATCHES), inputs, *data.draw(triples(SMALL)))
    dtype = data.draw(st.sampled_from(DTYPES))
    arguments = [
        laid_out(data, normal(data, x_shape, dtype)),
        laid_out(data, normal(data, (outputs, inputs, *kernel), dtype)),
    ]
    if data.draw(st.booleans()):
        arguments.append(normal(data, (outputs,), dtype))
    needed = data.draw(st.lists(st.booleans(), min_size=len(arguments), max_size=len(arguments)))
    upstream = laid_out(data, normal(data, (x_shape[0], outputs, *x_shape[2:]), dtype))
    note(f"{kernel} {dilation} {needed}")

    def call(x: Tensor, w: Tensor, b: Tensor | None = None) -> list[Tensor]:
        return [fk.dilated_conv3d(x, w, b, dilation)]

    def definition(x: Tensor, w: Tensor, b: Tensor | None = None) -> list[Tensor]:
        return [by_taps(x, w, b, dilation)]

    def absolute(x: Tensor, w: Tensor, b: Tensor | None = None) -> list[Tensor]:
        return definition(x.abs(), w.abs(), None if b is None else b.abs())

    (y,), gradients = run(call, arguments, [upstream], needed)
    (exact,), expected = run(definition, [exactly(a) for a in arguments], [upstream.double()], needed)
    (total,), owed = run(definition, [exactly(a).abs() for a in arguments], [upstream.double().abs()], needed)
    # The vendor may add up half-precision products in several parts, each rounded.
    roundings = 16 * unit(dtype) + (2 * torch.finfo(dtype).eps if dtype in (torch.float16, torch.bfloat16) else 0)
    assert_near(y, exact, roundings * total, "output")
    for g, e, t, a in zip(gradients, expected, owed, [a for a, need in zip(arguments, needed) if need]):
        assert (g.dtype, g.shape) == (a.dtype, a.shape)
        assert_near(g, e, roundings * t, "gradient")


@given(st.data())
def test_dense_aspp3d(data: st.DataObject) -> None:
    """In float64, where no rounding turns an activation, against its layers one by one by the reference."""
    channels = data.draw(SMALL)
    options: dict[str, Any] = {
        "growth": data.draw(SMALL),
        "bottleneck": data.draw(SMALL),
        "dilations": data.draw(st.lists(triples(st.sampled_from([1, 2, 9])), min_size=1, max_size=3)),
        "norm": data.draw(st.sampled_from(["batch", "instance", "group"])),
    }
    shape = (data.draw(BATCHES), channels, *data.draw(triples(SMALL)))
    seed = data.draw(st.integers(0, 2**32 - 1))
    training = data.draw(st.booleans())
    note(f"{shape} {options} {training}")
    modules = []
    for kind in (DenseASPP3d, PlainDenseASPP):
        torch.manual_seed(seed)
        module = kind(channels, **options).double().train(training)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        modules.append(module)
    x = laid_out(data, normal(data, shape, torch.float64))
    upstream = laid_out(data, normal(data, (shape[0], modules[0].out_channels, *shape[2:]), torch.float64))
    results = []
    for module, mode in zip(modules, (torch.enable_grad(), ByReference())):
        leaf = x.detach().requires_grad_()
        with mode:
            try:
                y = module(leaf)
            except ValueError as error:
                results.append(str(error))
                continue
            results.append([y, *torch.autograd.grad(y, [leaf, *module.parameters()], upstream)])
    if isinstance(results[1], str):
        assert results[0] == results[1]
        return
    # Three norms deep, each may magnify what it gets by 1 / sqrt(eps) = 316.
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(modules[0].state_dict(), modules[1].state_dict(), rtol=1e-9, atol=1e-9)
