"""Triton kernels of the focal and dice sums and of their gradient (docs/focal_dice.md).

Bytes, S of logits and L of target: forward reads S + L, backward reads S + L and writes S. A program holds all classes
of a few voxels in registers; forward keeps one accumulator per element of its tile and reduces it over voxels once, at
its end. The programs' sums are added in a fixed order, so that results do not depend on scheduling.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

SOFTMAX = tl.constexpr(0)
SIGMOID = tl.constexpr(1)

ROWS = 6
#: Tiles of a program: many, so that few sums are stored; fewer for a small volume, so that there are programs enough.
TILES = (1, 64)
PROGRAMS = 1024


@triton.jit
def _power(u, gamma, KIND: tl.constexpr):
    """u^gamma and u^(gamma - 1); 0 where the latter is infinite, since what it multiplies is smaller still."""
    if KIND == 0:
        return u * 0 + 1, u * 0
    elif KIND == 1:
        return u, u * 0 + 1
    elif KIND == 2:
        return u * u, u
    else:
        some = u > 1.17549435e-38
        safe = tl.where(some, u, 1.0)
        whole = tl.where(some, tl.exp(gamma * tl.log(safe)), 0.0)
        return whole, whole / safe


@triton.jit
def _sigmoid(z):
    """sigmoid(z), 1 - sigmoid(z) and -log sigmoid(z)."""
    a = tl.exp(-tl.abs(z))
    total = 1 + a
    large = 1 / total
    small = a * large
    loss = tl.log(total) + (a - (total - 1)) * large + tl.where(z < 0, -z, 0.0)
    return tl.where(z < 0, small, large), tl.where(z < 0, large, small), loss


@triton.jit
def _softmax(x, own):
    """e^(x - max) without the true class, 1 / sum, and of the true class p, 1 - p and log p."""
    top = tl.max(x, axis=0)
    top = tl.where(top == float("-inf"), 0.0, top)  # no class at all: a voxel that does not count
    x_true = tl.sum(tl.where(own, x, 0.0), axis=0)
    e = tl.where(own, 0.0, tl.exp(x - top[None, :]))
    others = tl.sum(e, axis=0)
    distance = x_true - top
    e_true = tl.exp(distance)
    total = others + e_true
    inverse = 1 / total
    # What rounding took from the total: without it log p would be 0 as soon as 1 - p is below half an ulp of 1.
    lost = tl.where(e_true > others, others - (total - e_true), e_true - (total - others))
    log_p = distance - (tl.log(total) + lost * inverse)
    return e, inverse, e_true * inverse, others * inverse, log_p


@triton.jit
def _load_logits(logits, n, classes, voxels, stride_n, stride_c, stride_v, c, v, kept):
    """A tile in float32, -inf outside; 64-bit offsets."""
    offset = n * stride_n + c.to(tl.int64)[:, None] * stride_c + v[None, :] * stride_v
    inside = kept[:, None] & (v < voxels)[None, :]
    return tl.load(logits + offset, mask=inside, other=float("-inf")).to(tl.float32), offset, inside


@triton.jit
def _classes_kept(class_mask, n, classes, c, MASKED: tl.constexpr):
    kept = c < classes
    if MASKED:
        kept = kept & (tl.load(class_mask + n * classes + c, mask=kept, other=0) != 0)
    return kept


@triton.jit
def _load_labels(target, class_mask, n, classes, voxels, ignore, v, MASKED: tl.constexpr, IGNORES: tl.constexpr):
    """Class indices, -1 where the voxel does not count, and how many mean nothing."""
    inside = v < voxels
    label = tl.load(target + n * voxels + v, mask=inside, other=0).to(tl.int64)
    in_range = (label >= 0) & (label < classes)
    valid = inside & in_range
    wrong = inside & (in_range == 0)
    if IGNORES:
        valid = valid & (label != ignore)
        wrong = wrong & (label != ignore)
    if MASKED:
        valid = valid & (tl.load(class_mask + n * classes + label, mask=valid, other=0) != 0)
    return tl.where(valid, label, -1).to(tl.int32), wrong.to(tl.int32)


@triton.jit
def _load_channels(target, n, classes, voxels, ignore, c, v, inside, IGNORES: tl.constexpr):
    """Of a multi-hot target: membership, whether the element counts, how many mean nothing."""
    place = (n * classes + c.to(tl.int64))[:, None] * voxels + v[None, :]
    label = tl.load(target + place, mask=inside, other=0).to(tl.int64)
    counted = inside & (label <= 1) & (label >= 0)
    wrong = inside & ((label > 1) | (label < 0))
    if IGNORES:
        counted = counted & (label != ignore)
        wrong = wrong & (label != ignore)
    return counted & (label == 1), counted, wrong.to(tl.int32)


@triton.jit
def _load_target(
    target,
    class_mask,
    n,
    classes,
    voxels,
    ignore,
    c,
    v,
    inside,
    MULTI_HOT: tl.constexpr,
    MASKED: tl.constexpr,
    IGNORES: tl.constexpr,
):
    """Membership, whether the element counts, the index (of a multi-hot target -1), how many mean nothing."""
    if MULTI_HOT:
        own, counted, wrong = _load_channels(target, n, classes, voxels, ignore, c, v, inside, IGNORES)
        label = tl.full(v.shape, -1, tl.int32)
    else:
        label, wrong = _load_labels(target, class_mask, n, classes, voxels, ignore, v, MASKED, IGNORES)
        own = c[:, None] == label[None, :]
        counted = inside & (label >= 0)[None, :]
    return own, counted, label, tl.sum(wrong)


@triton.jit
def _add_tile(found, x, own, counted, gamma, MODE: tl.constexpr, KIND: tl.constexpr, MULTI_HOT: tl.constexpr):
    """Add a tile of logits to the sums of its elements; `prediction` leaves out the true class."""
    intersection, prediction, count, focal, focal_outside, counted_sum = found
    if not MULTI_HOT:
        x = tl.where(counted, x, float("-inf"))
    count += own.to(tl.float32)
    if MODE != SIGMOID:
        e, inverse, p_true, rest, log_p = _softmax(x, own)
        intersection += tl.where(own, p_true[None, :], 0.0)
        prediction += e * inverse[None, :]
        if MODE == SOFTMAX:
            whole, _less = _power(rest, gamma, KIND)
            focal += tl.where(own, (whole * -log_p)[None, :], 0.0)
    if MODE != SOFTMAX:
        p, rest, loss = _sigmoid(tl.where(own, x, -x))
        whole, _less = _power(rest, gamma, KIND)
        term = tl.where(counted, whole * loss, 0.0)
        focal += tl.where(own, term, 0.0)
        focal_outside += tl.where(own, 0.0, term)
        counted_sum += counted.to(tl.float32)
        if MODE == SIGMOID:
            intersection += tl.where(own, p, 0.0)
            prediction += tl.where(counted & (own == 0), rest, 0.0)
    return intersection, prediction, count, focal, focal_outside, counted_sum


@triton.jit
def _store_sums(base, classes, c, found, MODE: tl.constexpr):
    """The rows of the table from the sums of `_add_tile`."""
    intersection, prediction, count, focal, focal_outside, counted_sum = found
    inside_classes = c < classes
    inter = tl.sum(intersection, axis=1)
    targets = tl.sum(count, axis=1)
    tl.store(base + c, inter, mask=inside_classes)
    # The true class was left out above.
    tl.store(base + classes + c, inter + tl.sum(prediction, axis=1), mask=inside_classes)
    tl.store(base + 2 * classes + c, targets, mask=inside_classes)
    tl.store(base + 3 * classes + c, tl.sum(focal, axis=1), mask=inside_classes)
    if MODE == SOFTMAX:
        tl.store(base + 4 * classes + c, targets * 0, mask=inside_classes)
        tl.store(base + 5 * classes + c, targets, mask=inside_classes)
    else:
        tl.store(base + 4 * classes + c, tl.sum(focal_outside, axis=1), mask=inside_classes)
        tl.store(base + 5 * classes + c, tl.sum(counted_sum, axis=1), mask=inside_classes)


@triton.jit
def _gradient(
    x,
    own,
    counted,
    label,
    table,
    classes,
    c,
    gamma,
    MODE: tl.constexpr,
    KIND: tl.constexpr,
    MULTI_HOT: tl.constexpr,
):
    """The gradient of a tile of logits, given that of a sample's table."""
    if not MULTI_HOT:
        x = tl.where(counted, x, float("-inf"))
    inside_classes = c < classes
    g_prediction = tl.load(table + classes + c, mask=inside_classes, other=0.0)[:, None]
    result = tl.zeros(x.shape, tl.float32)
    if MODE != SIGMOID:
        e, inverse, p, rest, log_p = _softmax(x, own)
        valid = label >= 0
        g_true = tl.load(table + label, mask=valid, other=0.0)
        g_prediction_true = tl.load(table + classes + label, mask=valid, other=0.0)
        true = p * g_true
        if MODE == SOFTMAX:
            g_focal = tl.load(table + 3 * classes + label, mask=valid, other=0.0)
            whole, less = _power(rest, gamma, KIND)
            true += g_focal * (gamma * p * log_p * less - whole)
        q = e * inverse[None, :]
        around = tl.sum(q * g_prediction, axis=0)
        mean = around + p * g_prediction_true + true
        # p_t (g - mean) + true, rearranged so that nothing cancels as p_t tends to 1.
        at_true = rest * (p * g_prediction_true + true) - p * around
        result = tl.where(own, at_true[None, :], q * (g_prediction - mean[None, :]))
    if MODE != SOFTMAX:
        p, rest, loss = _sigmoid(tl.where(own, x, -x))
        whole, _less = _power(rest, gamma, KIND)
        slope = -whole * (gamma * p * loss + rest)
        g_focal = tl.load(table + 3 * classes + c, mask=inside_classes, other=0.0)[:, None]
        g_outside = tl.load(table + 4 * classes + c, mask=inside_classes, other=0.0)[:, None]
        result += tl.where(own, g_focal * slope, -g_outside * slope)
        if MODE == SIGMOID:
            g_inside = tl.load(table + c, mask=inside_classes, other=0.0)[:, None]
            result += p * rest * (g_prediction + tl.where(own, g_inside, 0.0))
    return tl.where(counted, result, 0.0)


@triton.jit
def forward_kernel(
    logits,
    target,
    class_mask,
    sums,
    wrongs,
    classes,
    voxels,
    stride_n,
    stride_c,
    stride_v,
    tiles,
    ignore: tl.int64,
    gamma: tl.float32,
    MODE: tl.constexpr,
    KIND: tl.constexpr,
    MULTI_HOT: tl.constexpr,
    MASKED: tl.constexpr,
    IGNORES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    kept = _classes_kept(class_mask, n, classes, c, MASKED)
    zero = tl.zeros((BLOCK_C, BLOCK_V), tl.float32)
    found = (zero, zero, zero, zero, zero, zero)
    wrong_sum = tl.zeros((1,), tl.int32)
    for tile in range(tiles):
        v = (program * tiles + tile) * BLOCK_V + tl.arange(0, BLOCK_V)
        x, _offset, inside = _load_logits(logits, n, classes, voxels, stride_n, stride_c, stride_v, c, v, kept)
        own, counted, _label, wrong = _load_target(
            target, class_mask, n, classes, voxels, ignore, c, v, inside, MULTI_HOT, MASKED, IGNORES
        )
        wrong_sum += wrong
        found = _add_tile(found, x, own, counted, gamma, MODE, KIND, MULTI_HOT)
    row = n * tl.num_programs(0) + program
    _store_sums(sums + row * 6 * classes, classes, c, found, MODE)
    tl.store(wrongs + row + tl.arange(0, 1), wrong_sum)


@triton.jit
def backward_kernel(
    logits,
    target,
    class_mask,
    grad_sums,
    grad,
    classes,
    voxels,
    stride_n,
    stride_c,
    stride_v,
    ignore: tl.int64,
    gamma: tl.float32,
    MODE: tl.constexpr,
    KIND: tl.constexpr,
    MULTI_HOT: tl.constexpr,
    MASKED: tl.constexpr,
    IGNORES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    v = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    kept = _classes_kept(class_mask, n, classes, c, MASKED)
    x, offset, inside = _load_logits(logits, n, classes, voxels, stride_n, stride_c, stride_v, c, v, kept)
    own, counted, label, _wrong = _load_target(
        target, class_mask, n, classes, voxels, ignore, c, v, inside, MULTI_HOT, MASKED, IGNORES
    )
    table = grad_sums + n * 6 * classes
    result = _gradient(x, own, counted, label, table, classes, c, gamma, MODE, KIND, MULTI_HOT)
    inside_classes = c < classes
    tl.store(grad + offset, result.to(grad.dtype.element_ty), mask=inside_classes[:, None] & (v < voxels)[None, :])


def tile(classes: int, mode: int) -> tuple[int, int, int]:
    """BLOCK_C, BLOCK_V and warps: 16 elements a lane, 8 with more accumulators, all of which must stay in registers."""
    block_c = max(2, triton.next_power_of_2(classes))
    block_v = min(1024, max(16, 2048 // block_c))
    lane = 16 if mode == SOFTMAX.value else 8
    return block_c, block_v, min(32, max(1, block_c * block_v // (32 * lane)))


def tiles_per_program(voxels: int, block_v: int, bounds: tuple[int, int]) -> int:
    """Of the shape alone, so that sums repeat bit for bit on any device."""
    fewest, most = bounds
    return min(most, max(fewest, triton.cdiv(voxels, block_v * PROGRAMS)))


def forward(
    logits: Tensor, target: Tensor, mode: int, gamma: float, ignore_index: int | None, class_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `reference.focal_dice.forward`."""
    batch, classes, voxels = logits.shape
    block_c, block_v, warps = tile(classes, mode)
    tiles = tiles_per_program(voxels, block_v, TILES)
    programs = triton.cdiv(voxels, block_v * tiles)
    sums = logits.new_empty((batch, programs, ROWS, classes), dtype=torch.float32)
    wrong = logits.new_empty((batch, programs), dtype=torch.int32)
    if programs and batch:
        with torch.cuda.device_of(logits):
            forward_kernel[(programs, batch)](
                *_pointers(logits, target, class_mask),
                sums,
                wrong,
                classes,
                voxels,
                *logits.stride(),
                tiles,
                0 if ignore_index is None else ignore_index,
                gamma,
                **_flags(target, mode, gamma, ignore_index, class_mask),
                BLOCK_C=block_c,
                BLOCK_V=block_v,
                num_warps=warps,
            )
    return sums.sum(dim=1, dtype=torch.float64).to(torch.float32), wrong.sum(dim=1)


def backward(
    logits: Tensor,
    target: Tensor,
    grad_sums: Tensor,
    mode: int,
    gamma: float,
    ignore_index: int | None,
    class_mask: Tensor | None,
) -> Tensor:
    """As `reference.focal_dice.backward`."""
    grad = torch.empty_like(logits)
    _launch_backward(grad, logits, target, grad_sums, mode, gamma, ignore_index, class_mask)
    return grad


def backward_(
    logits: Tensor,
    target: Tensor,
    grad_sums: Tensor,
    mode: int,
    gamma: float,
    ignore_index: int | None,
    class_mask: Tensor | None,
) -> None:
    """`backward`, written over the logits: a program has read its voxels before it writes them."""
    _launch_backward(logits, logits, target, grad_sums, mode, gamma, ignore_index, class_mask)


def _launch_backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    grad_sums: Tensor,
    mode: int,
    gamma: float,
    ignore_index: int | None,
    class_mask: Tensor | None,
) -> None:
    batch, classes, voxels = logits.shape
    block_c, block_v, warps = tile(classes, mode)
    if logits.numel() == 0:
        return
    with torch.cuda.device_of(logits):
        backward_kernel[(triton.cdiv(voxels, block_v), batch)](
            *_pointers(logits, target, class_mask),
            grad_sums,
            grad,
            classes,
            voxels,
            *logits.stride(),
            0 if ignore_index is None else ignore_index,
            gamma,
            **_flags(target, mode, gamma, ignore_index, class_mask),
            BLOCK_C=block_c,
            BLOCK_V=block_v,
            num_warps=warps,
        )


def _pointers(logits: Tensor, target: Tensor, class_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    mask = target if class_mask is None else class_mask.contiguous().view(torch.uint8)
    return logits, target, mask


def _flags(
    target: Tensor, mode: int, gamma: float, ignore_index: int | None, class_mask: Tensor | None
) -> dict[str, int | bool]:
    return {
        "MODE": mode,
        "KIND": int(gamma) if gamma in (0, 1, 2) else 3,
        "MULTI_HOT": target.dim() == 3,
        "MASKED": class_mask is not None,
        "IGNORES": ignore_index is not None,
    }
