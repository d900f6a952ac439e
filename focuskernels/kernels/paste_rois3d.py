"""Triton kernel of paste_rois_3d (docs/roi.md).

Bytes: labels read and written once, and every logit inside the volume read once; no FLOPs but comparisons. A program
holds the labels of a tile and the best logits so far in registers, and walks through the ROIs that meet the tile in
their order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_V, WARPS = 2048, 4
#: ROIs that are tested against a tile at a time.
BLOCK_K = 128


@triton.jit
def _along(table, centers, k, axis: tl.constexpr, size, known):
    """First voxel of ROIs along an axis, and one past the last; whether their centres are numbers."""
    side = tl.load(table + 8 * k + 1 + axis, mask=known, other=0).to(tl.int32)
    center = tl.load(centers + 4 * k + 1 + axis, mask=known, other=0.0)
    # Far outside is outside; the limit keeps the conversion to integers exact.
    limited = tl.where(center < -side, (-side).to(tl.float64), center)
    limited = tl.where(center > side + size, (side + size).to(tl.float64), limited)
    start = tl.where(center == center, limited, 0.0).to(tl.int32) - side // 2
    return start, start + side, known & (center == center)


@triton.jit
def paste_kernel(
    labels,
    centers,
    classes,
    table,
    like,
    result,
    rois,
    limit: tl.float32,
    depth,
    height,
    width,
    stride_n: tl.int64,
    stride_z: tl.int64,
    stride_y: tl.int64,
    stride_x: tl.int64,
    DENSE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Rows of the table: a ROI's address, its three sizes and strides. `like` is any of them, for its type."""
    n = tl.program_id(1)
    voxels = depth * height * width
    start = tl.program_id(0) * BLOCK_V
    v = start + tl.arange(0, BLOCK_V)
    inside = v < voxels
    source = labels + n.to(tl.int64) * stride_n
    if DENSE:
        label = tl.load(source + v, mask=inside, other=0)
    else:
        place = (v // (height * width)).to(tl.int64) * stride_z + (v // width % height).to(tl.int64) * stride_y
        label = tl.load(source + place + (v % width).to(tl.int64) * stride_x, mask=inside, other=0)
    end = tl.minimum(start, voxels - BLOCK_V) + BLOCK_V - 1
    row, end_row = start // width, end // width
    z, end_z = row // height, end_row // height
    # The box around the tile: a row, rows of a plane, or planes.
    low_y, high_y = tl.where(z == end_z, row % height, 0), tl.where(z == end_z, end_row % height, height - 1)
    low_x, high_x = tl.where(row == end_row, start % width, 0), tl.where(row == end_row, end % width, width - 1)
    # Comparing logits instead of probabilities also ranks those whose sigmoid rounds to 1.
    best = tl.zeros((BLOCK_V,), tl.float32) + limit
    for block in range(0, rois, BLOCK_K):
        k = block + tl.arange(0, BLOCK_K)
        sample = tl.load(centers + 4 * k, mask=k < rois, other=-1.0)
        # A fraction is truncated; written so that NaN is no sample.
        known = (k < rois) & (tl.where((sample > -1) & (sample < 65536), sample, -1.0).to(tl.int32) == n)
        from_z, to_z, known = _along(table, centers, k, 0, depth, known)
        from_y, to_y, known = _along(table, centers, k, 1, height, known)
        from_x, to_x, known = _along(table, centers, k, 2, width, known)
        known &= (from_z <= end_z) & (to_z > z) & (from_y <= high_y) & (to_y > low_y)
        known &= (from_x <= high_x) & (to_x > low_x)
        chosen = tl.min(tl.where(known, k, rois))
        if chosen < rois:
            # The first of equals has the voxel: ROIs in their order.
            while chosen < rois:
                first_z, last_z, _ = _along(table, centers, chosen, 0, depth, chosen < rois)
                first_y, last_y, _ = _along(table, centers, chosen, 1, height, chosen < rois)
                first_x, last_x, _ = _along(table, centers, chosen, 2, width, chosen < rois)
                roi = table + 8 * chosen
                at_z, at_y, at_x = v // (height * width) - first_z, v // width % height - first_y, v % width - first_x
                here = inside & (at_z >= 0) & (at_z < last_z - first_z) & (at_y >= 0) & (at_y < last_y - first_y)
                here &= (at_x >= 0) & (at_x < last_x - first_x)
                place = at_z.to(tl.int64) * tl.load(roi + 4) + at_y.to(tl.int64) * tl.load(roi + 5)
                place += at_x.to(tl.int64) * tl.load(roi + 6)
                value = tl.load(tl.load(roi).to(like.dtype) + place, mask=here, other=0.0).to(tl.float32)
                # Never a NaN.
                wins = here & (value > best)
                best = tl.where(wins, value, best)
                label = tl.where(wins, tl.load(classes + chosen).to(tl.uint8), label)
                known = known & (k > chosen)
                chosen = tl.min(tl.where(known, k, rois))
    tl.store(result + n.to(tl.int64) * voxels + v, label, mask=inside)


def forward(labels: Tensor, logits: Sequence[Tensor], centers: Tensor, classes: Tensor, limit: float) -> Tensor:
    """As `reference.paste_rois3d.forward`."""
    if not logits or labels.numel() == 0:
        return labels.clone(memory_format=torch.contiguous_format)
    result = labels.new_empty(labels.shape)
    if len({roi.dtype for roi in logits}) > 1:
        logits = [roi.float() for roi in logits]
    rows = [(roi.data_ptr(), *roi.shape, *roi.stride(), 0) for roi in logits]
    with torch.cuda.device_of(labels):
        table = torch.tensor(rows, dtype=torch.int64).to(labels.device, non_blocking=True)
        paste_kernel[triton.cdiv(labels[0].numel(), BLOCK_V), labels.shape[0]](
            labels,
            centers,
            classes,
            table,
            logits[0],
            result,
            len(logits),
            limit,
            *labels.shape[1:],
            *labels.stride(),
            DENSE=labels.is_contiguous(),
            BLOCK_K=min(BLOCK_K, triton.next_power_of_2(len(logits))),
            BLOCK_V=BLOCK_V,
            num_warps=WARPS,
        )
    return result
