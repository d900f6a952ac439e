"""Which Triton kernels are compiled without a GPU, and for what: those that serve FocusNet's shapes and dtypes.

Arguments are typed and aligned as Triton's just-in-time compiler finds them in the launches of `focuskernels.kernels`;
the sizes and steps of convolutions are left general.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from focuskernels.kernels import (
    channelwise,
    dense_aspp3d,
    dilated_conv3d,
    focal_dice,
    heatmap_argmax3d,
    linear_focal_dice,
    norm_tables,
    paste_rois3d,
    roi_align3d,
    roi_gather3d,
)
from focuskernels.kernels.dilated_conv3d_tiles import Tile, WeightTile, tiles, weight_tiles

Capability = tuple[int, int]
CLASSES = 19
VOLUME, DILATION = (60, 128, 128), (1, 6, 6)
BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Specialisation:
    """One kernel, compiled for one use.

    Attributes:
        stem: The module in `focuskernels.kernels`.
        kernel: The Triton function.
        name: Tells the uses of a kernel apart.
        types: Of arguments, in Triton's notation; what is not here is "i32".
        fixed: Values of constexpr arguments, and of integers that are 1, which Triton fixes too.
        options: Of the compiler.
        aligned: Integers that are multiples of 16; pointers always are.
        needed: Bytes that one pass of the hottest loop, or the program where it has none, must move: each element once.
    """

    stem: str
    kernel: Any
    name: str
    types: dict[str, str]
    fixed: dict[str, Any]
    options: dict[str, int]
    needed: int
    aligned: tuple[str, ...] = field(default=())


def specialisations(capability: Capability) -> Iterator[Specialisation]:
    """All that is compiled for a compute capability."""
    for dtype, channels_last in (("bf16", True), ("fp32", False)):
        yield from _channelwise(dtype, channels_last)
        yield from _focal_dice(dtype)
        yield from _linear(dtype, channels_last)
        yield from _roi_gather(dtype, channels_last)
        yield from _roi_align(dtype, channels_last)
        yield from _heatmap_argmax(dtype, channels_last)
        yield _paste_rois(dtype)
    yield from _norm_tables()
    yield from _convolutions(capability)
    yield from _dense_aspp()


def _channelwise(dtype: str, channels_last: bool) -> Iterator[Specialisation]:
    module, channels = channelwise, 32
    block_c, block_v = module.tile(channels, channels_last)
    types = dict.fromkeys(("x", "grad", "residual", "output", "out", "kept"), "*" + dtype)
    types |= dict.fromkeys(("table", "weights", "found"), "*fp32") | {"voxels": "i64", "slope": "fp32"}
    fixed = {"ACTIVATION": 2, "RESIDUAL": True, "OUTPUT": True, "KEEP": True, "TILES": module.TILES_PER_PROGRAM}
    fixed |= {"BLOCK_C": block_c, "BLOCK_V": block_v, "CHANNELS_LAST": channels_last}
    for kernel, maps in (
        (module.moments_kernel, 1),
        (module.affine_kernel, 3),
        (module.sums_kernel, 4),
        (module.backward_kernel, 3),
    ):
        yield Specialisation(
            stem="channelwise",
            kernel=kernel,
            name=f"{dtype}, {channels} channels {'last' if channels_last else 'first'}",
            types=types,
            fixed=fixed,
            options={"num_warps": module.WARPS},
            needed=maps * block_c * block_v * BYTES[dtype],
            aligned=("channels", "voxels"),
        )


def _norm_tables() -> Iterator[Specialisation]:
    """The few numbers of a norm, and the findings of the programs that take its moments."""
    block_c, block_p = channelwise.MERGED_CHANNELS, channelwise.MERGED_PROGRAMS
    sizes = {"voxels": "i64", "length": "i64", "eps": "fp32"}
    names = ("found", "out", "moments", "sums", "weight", "bias", "table", "rstd", "variance", "rows")
    yield Specialisation(
        stem="channelwise",
        kernel=channelwise.merge_kernel,
        name=f"{block_p} programs",
        types=dict.fromkeys(names, "*fp32") | sizes,
        fixed={"BLOCK_C": block_c, "BLOCK_P": block_p},
        options={"num_warps": channelwise.WARPS},
        needed=2 * block_c * block_p * 4,
        aligned=("channels", "length"),
    )
    for kernel, of_batch, of_group in ((norm_tables.table_kernel, 7, 9), (norm_tables.gradient_kernel, 7, 7)):
        for norm, numbers in ((0, of_batch), (2, of_group)):
            yield Specialisation(
                stem="norm_tables",
                kernel=kernel,
                name="batch" if norm == 0 else "group",
                types=dict.fromkeys(names, "*fp32") | sizes,
                fixed={"NORM": norm, "WEIGHT": True, "BIAS": True, "BLOCK": norm_tables.BLOCK_C},
                options={"num_warps": norm_tables.WARPS},
                needed=numbers * norm_tables.BLOCK_C * 4,
                aligned=("channels", "voxels", "width"),
            )


def _focal_dice(dtype: str) -> Iterator[Specialisation]:
    module, mode = focal_dice, focal_dice.SOFTMAX.value
    block_c, block_v, warps = module.tile(CLASSES, mode)
    types = {"logits": "*" + dtype, "grad": "*" + dtype, "sums": "*fp32", "grad_sums": "*fp32", "wrongs": "*i32"}
    types |= {"target": "*u8", "class_mask": "*u8", "gamma": "fp32", "ignore": "i64"}
    fixed = {"MODE": mode, "KIND": 2, "MULTI_HOT": False, "MASKED": True, "IGNORES": True, "stride_v": 1}
    fixed |= {"BLOCK_C": block_c, "BLOCK_V": block_v}
    for kernel, maps in ((module.forward_kernel, 1), (module.backward_kernel, 2)):
        yield Specialisation(
            stem="focal_dice",
            kernel=kernel,
            name=f"{dtype}, {CLASSES} classes",
            types=types,
            fixed=fixed,
            options={"num_warps": warps},
            needed=block_v * (maps * CLASSES * BYTES[dtype] + 1),
            aligned=("voxels", "stride_n", "stride_c"),
        )


def _linear(dtype: str, channels_last: bool) -> Iterator[Specialisation]:
    """Labels and the loss of FocusNet's last convolution, and the loss of the most classes and features."""
    yield _linear_argmax(dtype, channels_last)
    softmax, sigmoid = focal_dice.SOFTMAX.value, focal_dice.SIGMOID.value
    yield from _linear_loss(dtype, channels_last, CLASSES, 32, softmax)
    yield from _linear_loss(dtype, channels_last, CLASSES, 32, sigmoid)
    # the most there are
    for classes, channels in ((128, 32), (64, 64)) if dtype == "bf16" else ((16, 64),):
        yield from _linear_loss(dtype, channels_last, classes, channels, softmax)


def _linear_argmax(dtype: str, channels_last: bool) -> Specialisation:
    module, channels = linear_focal_dice, 32
    block_c, block_v, warps = module.argmax_tile(CLASSES)
    types = dict.fromkeys(("features", "weight", "bias"), "*" + dtype) | {"labels": "*u8", "probabilities": "*fp32"}
    fixed = {"BIAS": True, "PROBABILITY": False, "BLOCK_C": block_c, "BLOCK_K": module.BLOCK_K, "BLOCK_V": block_v}
    fixed |= {"stride_k" if channels_last else "stride_v": 1}
    return Specialisation(
        stem="linear_focal_dice",
        kernel=module.argmax_kernel,
        name=f"{dtype}, {channels} channels {'last' if channels_last else 'first'}, {CLASSES} classes",
        types=types,
        fixed=fixed,
        options={"num_warps": warps},
        needed=block_v * module.BLOCK_K * BYTES[dtype],
        aligned=("channels", "voxels", "stride_n", "stride_v" if channels_last else "stride_k"),
    )


def _linear_loss(dtype: str, channels_last: bool, classes: int, channels: int, mode: int) -> Iterator[Specialisation]:
    """Forward and backward of `linear_focal_dice_loss`."""
    module, sigmoid = linear_focal_dice, mode == focal_dice.SIGMOID.value
    block_c, block_v, warps = module.tile(classes, mode, torch.float32 if dtype == "fp32" else torch.bfloat16)
    types = dict.fromkeys(("features", "weight", "bias", "grad"), "*" + dtype)
    types |= dict.fromkeys(("sums", "grad_sums", "grad_weight", "grad_bias"), "*fp32") | {"wrongs": "*i32"}
    types |= {"target": "*u8", "class_mask": "*u8", "gamma": "fp32", "ignore": "i64"}
    fixed = {"MODE": mode, "KIND": 2, "MULTI_HOT": sigmoid, "MASKED": True, "IGNORES": True, "BIAS": True}
    fixed |= {"BLOCK_C": block_c, "BLOCK_V": block_v, "BLOCK_K": module.block_k(channels), "FEATURES": True}
    fixed |= {"PRECISION": module.PRECISION}
    fixed |= {"stride_k" if channels_last else "stride_v": 1}
    kind = "independent channels" if sigmoid else "classes"
    labels = classes if sigmoid else 1
    for kernel, maps in ((module.forward_kernel, 1), (module.backward_kernel, 2)):
        yield Specialisation(
            stem="linear_focal_dice",
            kernel=kernel,
            name=f"{dtype}, {channels} channels {'last' if channels_last else 'first'}, {classes} {kind}",
            types=types,
            fixed=fixed,
            options={"num_warps": warps},
            needed=block_v * (maps * channels * BYTES[dtype] + labels),
            aligned=("channels", "voxels", "stride_n", "stride_v" if channels_last else "stride_k", "tiles"),
        )


def _roi_gather(dtype: str, channels_last: bool) -> Iterator[Specialisation]:
    """ROIs of one size, and those of SOS-Net."""
    for table in (False, True):
        yield from _roi_gather_from(dtype, channels_last, table)


def _roi_gather_from(dtype: str, channels_last: bool, table: bool) -> Iterator[Specialisation]:
    module = roi_gather3d
    ones = ("source_c", "result_c", "grad_c") if channels_last else ("source_x", "result_v", "grad_v")
    fixed = {"BORDER": False, "BLOCK_C": module.BLOCK_C, "BLOCK_V": module.BLOCK_V, "ADD": True, "TABLE": table}
    fixed |= dict.fromkeys((*ones, "samples"), 1)
    types = dict.fromkeys(("source", "result", "grad", "total"), "*" + dtype) | {"centers": "*fp32"}
    types |= {"geometry": "*fp64", "table": "*i64"}
    tile = module.BLOCK_C * module.BLOCK_V * BYTES[dtype]
    # Forward reads a voxel for every one it writes; of backward, what one candidate is owed.
    # With 48x128x128 voxels, 32 channels and ROIs of 32^3 all sizes and strides are multiples of 16, but for the number
    # of ROIs and the distance of voxels where the sources' channels lie side by side.
    for kernel, maps, odd in ((module.forward_kernel, 2, "result_v"), (module.backward_kernel, 1, "grad_v")):
        yield Specialisation(
            stem="roi_gather3d",
            kernel=kernel,
            name=f"{dtype}, channels {'last' if channels_last else 'first'}{', many sizes' if table else ''}",
            types=types,
            fixed=fixed,
            options={"num_warps": module.WARPS},
            needed=maps * tile,
            aligned=tuple(n for n in kernel.arg_names if n not in types and n not in ("rois", odd)),
        )


def _roi_align(dtype: str, channels_last: bool) -> Iterator[Specialisation]:
    """As many samples as the boxes ask for, and, channels last, a fixed number."""
    module, channels = roi_align3d, 32
    block_c, block_v = module.tile(channels, channels_last)
    ones = ("source_c", "result_c", "grad_c") if channels_last else ("source_x", "result_v", "grad_x")
    fixed = {"ALIGNED": True, "SPARSE": channels_last, "BLOCK_C": block_c, "BLOCK_V": block_v}
    fixed |= {name: getattr(module, name) for name in ("BLOCK_K", "BLOCK_O", "BLOCK_J")}
    fixed |= dict.fromkeys((*ones, "samples"), 1)
    types = dict.fromkeys(("source", "result", "grad"), "*" + dtype) | {"rois": "*fp32", "weights": "*fp32"}
    types |= {"places": "*i32", "heads": "*i32"} | dict.fromkeys(("scale_z", "scale_y", "scale_x"), "i64")
    name = f"{dtype}, {channels} channels {'last' if channels_last else 'first'}"
    tile = block_c * block_v * BYTES[dtype]
    sizes = ("channels", "depth", "height", "width")
    for kernel, maps in ((module.forward_kernel, 1), (module.backward_kernel, 1)):
        steps = tuple(n for n in kernel.arg_names if n.startswith(("source_", "result_", "grad_")))
        yield Specialisation(
            stem="roi_align3d",
            kernel=kernel,
            name=name,
            # Of backward `rois` is their number.
            types={n: t for n, t in types.items() if n != "rois"},
            fixed=fixed,
            options={"num_warps": module.WARPS},
            needed=maps * tile,
            aligned=(*sizes, *steps),
        )
    for is_forward in (True, False):
        yield Specialisation(
            stem="roi_align3d",
            kernel=module.table_kernel,
            name=f"{'forward' if is_forward else 'backward'}, {'fixed' if channels_last else 'adaptive'} samples",
            types=types,
            fixed=fixed | {"FORWARD": is_forward},
            options={"num_warps": module.TABLE_WARPS, "enable_fp_fusion": False},
            needed=module.BLOCK_O * module.BLOCK_J * 4,
            aligned=sizes,
        )


def _heatmap_argmax(dtype: str, channels_last: bool) -> Iterator[Specialisation]:
    module, maps = heatmap_argmax3d, 9
    block_k, block_v = module.tile(maps, maps if channels_last else 1)
    types = {"heatmaps": "*" + dtype, "value": "*" + dtype, "values": "*fp32", "places": "*i64", "position": "*i64"}
    types |= {"voxels": "i64", "stride_n": "i64"}
    fixed = {"PASSES": module.PASSES, "BLOCK": module.BLOCK, "BLOCK_K": block_k, "BLOCK_V": block_v}
    name = f"{dtype}, {maps} maps {'last' if channels_last else 'first'}"
    for kernel, needed in (
        (module.chunks_kernel, block_v * (maps if channels_last else 1) * BYTES[dtype]),
        (module.maps_kernel, module.BLOCK * 12),
    ):
        last = kernel is module.maps_kernel
        yield Specialisation(
            stem="heatmap_argmax3d",
            kernel=kernel,
            name=name,
            types=types | (dict.fromkeys(("stride_k", "stride_v"), "i64") if last else {}),
            fixed=fixed | ({} if last else {"stride_k" if channels_last else "stride_v": 1}),
            options={"num_warps": module.WARPS},
            needed=needed,
            aligned=("voxels", "stride_n") if channels_last else ("voxels", "stride_n", "stride_k"),
        )


def _paste_rois(dtype: str) -> Specialisation:
    module = paste_rois3d
    types = {"labels": "*u8", "result": "*u8", "centers": "*fp64", "classes": "*i64", "table": "*i64"}
    types |= {"like": "*" + dtype, "limit": "fp32"} | dict.fromkeys([f"stride_{a}" for a in "nzyx"], "i64")
    return Specialisation(
        stem="paste_rois3d",
        kernel=module.paste_kernel,
        name=dtype,
        types=types,
        fixed={"DENSE": True, "BLOCK_K": 16, "BLOCK_V": module.BLOCK_V},
        options={"num_warps": module.WARPS},
        needed=module.BLOCK_V * BYTES[dtype],
        aligned=("depth", "height", "width", "stride_n", "stride_z", "stride_y"),
    )


def _convolutions(capability: Capability) -> Iterator[Specialisation]:
    """The residual blocks' with every candidate; DenseASPP's growth as it is written into the buffer, with sums."""
    for tile in tiles(capability, 64, 64, (3, 3, 3), 1, VOLUME, DILATION):
        yield _conv(64, 64, 3, tile, epilogue=False)
    growth = tiles(capability, 64, 32, (3, 3, 3), 1, VOLUME, DILATION)[0]
    yield _conv(64, 32, 3, growth.roomy(), epilogue=True)
    for inputs, planes in ((64, 3), (128, 1)):
        # Candidates that differ in the number of shares alone are one kernel.
        first = weight_tiles(capability, inputs, 64, (planes, 3, 3), 1, VOLUME)[0]._replace(shares=1)
        yield _weight(inputs, 64, planes, first)
    yield Specialisation(
        stem="dilated_conv3d",
        kernel=dilated_conv3d.reduce_kernel,
        name="64 outputs",
        types={"partial": "*fp32", "weight": "*bf16"},
        fixed={"COUT": 64, "BLOCK": 512},
        options={"num_warps": 4},
        needed=512 * 4,
        aligned=("size",),
    )


def _conv(inputs: int, outputs: int, planes: int, tile: Tile, epilogue: bool) -> Specialisation:
    types = {"x": "*bf16", "weight": "*bf16", "y": "*bf16", "bias": "*bf16", "sums": "*fp32"}
    if tile.tma:
        types["x"] = f"tensordesc<bf16[1,1,{tile.bh},{tile.bw},{tile.bk}]>"
        types["weight"] = f"tensordesc<bf16[{tile.bn},{tile.bk}]>"
    name = f"{inputs}->{outputs}, {planes} planes, {tile.bh}x{tile.bw} voxels by {tile.bn} by {tile.bk}"
    return Specialisation(
        stem="dilated_conv3d",
        kernel=dilated_conv3d.conv_kernel,
        name=name + _notes(tile, pair=tile.pair, epilogue=epilogue),
        types=types,
        fixed=dilated_conv3d.conv_constants(inputs, outputs, planes, tile, epilogue, epilogue, epilogue),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
        needed=(tile.bh * tile.bw + tile.bn) * tile.bk * 2,
        aligned=_conv_strides(dilated_conv3d.conv_kernel),
    )


def _weight(inputs: int, outputs: int, planes: int, tile: WeightTile) -> Specialisation:
    types = {"x": "*bf16", "grad": "*bf16", "partial": "*fp32"}
    if tile.tma:
        types["x"] = f"tensordesc<bf16[1,1,1,{tile.bw},{tile.bc}]>"
        types["grad"] = f"tensordesc<bf16[1,1,1,{tile.bw},{tile.bn}]>"
    return Specialisation(
        stem="dilated_conv3d",
        kernel=dilated_conv3d.weight_kernel,
        name=f"{inputs}->{outputs}, {planes} planes, {tile.bw} voxels, {tile.bc} by {tile.bn}" + _notes(tile),
        types=types,
        fixed=dilated_conv3d.weight_constants(inputs, outputs, planes, tile),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
        needed=tile.bw * (tile.bc + tile.bn) * 2,
        aligned=_conv_strides(dilated_conv3d.weight_kernel),
    )


def _notes(tile: Tile | WeightTile, **flags: bool) -> str:
    words = [f"{tile.warps} warps", f"{tile.stages} stages", "TMA" if tile.tma else "pointers"]
    return ", " + ", ".join([*words, *(name for name, is_set in flags.items() if is_set)])


def _conv_strides(kernel: Any) -> tuple[str, ...]:
    """As maps of at least 16 channels have them."""
    return tuple(name for name in kernel.arg_names if name.startswith("s") and len(name) == 3)


def _dense_aspp() -> Iterator[Specialisation]:
    module, bottleneck = dense_aspp3d, 64
    types = dict.fromkeys(("table", "weights", "found", "partial"), "*fp32") | {"voxels": "i64", "stride": "i64"}
    types |= dict.fromkeys(("x", "grad", "h", "into", "weight"), "*bf16")
    # Of 64 channels a block is all of them, of 160 a fifth.
    for kernel, channels, widest in (
        (module.reduce_kernel, 64, 64),
        (module.reduce_kernel, 160, 64),
        (module.sums_kernel, 160, module.SUMS_WIDEST),
        (module.backward_kernel, 64, 64),
    ):
        constants = module.constants(channels, bottleneck, module.VOXELS, widest)
        yield Specialisation(
            stem="dense_aspp3d",
            kernel=kernel,
            name=f"{channels} channels, {bottleneck} of the bottleneck",
            types=types,
            fixed={**constants, "TILES": module.TILES_PER_PROGRAM},
            options={"num_warps": module.WARPS},
            needed=_dense_aspp_bytes(kernel, constants),
            aligned=("stride",),
        )


def _dense_aspp_bytes(kernel: Any, constants: dict[str, int]) -> int:
    voxels, block, bottleneck = constants["BLOCK_V"], constants["BLOCK_C"], constants["BOTTLENECK"]
    x, h, weight = voxels * block, voxels * bottleneck, block * bottleneck
    if kernel is dense_aspp3d.sums_kernel:
        return 2 * (x + h)
    if kernel is dense_aspp3d.backward_kernel:
        return 2 * (3 * x + h + weight)
    whole = constants["CHANNELS"] == block  # no loop: the program writes h too
    return 2 * (x + weight + (h if whole else 0))
