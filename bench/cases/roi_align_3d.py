"""ROI-align: forward reads what the boxes' samples touch and writes the bins; backward reads the bins' gradient and
writes a dense one."""

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from focuskernels import roi_align_3d
from focuskernels._lib import DTYPES, is_channels_last
from focuskernels.reference import roi_align3d as reference

from ..case import (
    Case,
    Cost,
    Function,
    Inputs,
    Missing,
    Op,
    Provider,
    compiled,
    cost_by_mode,
    dtype_name,
    eager,
    ours,
    random,
    size_of,
)

Triple = tuple[int, int, int]
#: Samples per bin and axis.
RATIO = 2


class Size(NamedTuple):
    """One case. A volume of depth 1 is torchvision's 2D op."""

    channels: int
    volume: Triple
    rois: int
    bins: Triple
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"


CL, BF16 = "channels_last_3d", torch.bfloat16
SIZES = {
    ("cpu", "quick"): [Size(4, (6, 8, 9), 3, (2, 2, 2)), Size(4, (1, 8, 9), 3, (1, 2, 2))],
    ("cpu", "full"): [
        Size(32, (48, 128, 128), 64, (7, 7, 7)),
        Size(32, (48, 128, 128), 64, (7, 7, 7), layout=CL),
        Size(64, (1, 256, 256), 128, (1, 7, 7)),
    ],
    ("cuda", "quick"): [Size(4, (6, 8, 9), 3, (2, 2, 2)), Size(4, (1, 8, 9), 3, (1, 2, 2))],
    ("cuda", "full"): [
        Size(64, (48, 128, 128), 256, (7, 7, 7)),
        Size(64, (48, 128, 128), 256, (7, 7, 7), BF16, CL),
        Size(128, (1, 256, 256), 512, (1, 7, 7)),
    ],
}


def cases(device: str, size: str) -> Sequence[Case]:
    """Case list of `OP`."""
    return [_case(s, device) for s in SIZES[device, size]]


def _case(s: Size, device: str) -> Case:
    boxes = boxes_of(s)

    def make(generator: torch.Generator) -> Inputs:
        x = random(generator, 1, s.channels, *s.volume, dtype=s.dtype, layout=s.layout)
        return {"x": x.requires_grad_(), "rois": boxes.to(generator.device)}

    def run(x: Tensor, rois: Tensor) -> Tensor:
        return roi_align_3d(x, rois, s.bins, sampling_ratio=RATIO)

    plain = sampled(s.bins)
    providers = [
        ours(run),
        eager(plain, "grid_sample + avg_pool3d"),
        compiled(plain, "torch.compile, grid_sample + avg_pool3d"),
    ]
    if device == "cpu":  # on a GPU it is what serves the op
        providers.append(eager(_separable(s.bins), "reference: taps per axis", "peer"))
    else:
        providers.append(Provider("medicaldetectiontoolkit", "peer", _toolkit(s.bins)))
    if s.volume[0] == 1:
        providers.append(Provider("torchvision.ops.roi_align", "peer", _torchvision(s.bins)))
    voxels = touched(s, boxes)
    result = size_of(s.rois, s.channels, *s.bins, dtype=s.dtype)
    dense = size_of(s.channels, *s.volume, dtype=s.dtype)
    read = min(dense, s.channels * voxels * s.dtype.itemsize)
    return Case(
        name=f"{s.rois} ROIs of {'x'.join(map(str, s.bins))} bins, {s.channels} channels, "
        f"{'x'.join(map(str, s.volume))} {dtype_name(s.dtype)} {s.layout}",
        make=make,
        cost=cost_by_mode(Cost(read + result), Cost(result + dense)),
        oracle=plain,
        providers=providers,
        shape={"volume": s.volume, "voxels": math.prod(s.volume), "rois": s.rois, "bins": s.bins},
        dtype=s.dtype,
        layout=s.layout,
        # positions are rounded in the boxes' dtype
        tolerance=1e-4 if s.dtype == torch.float32 else None,
    )


def boxes_of(s: Size) -> Tensor:
    """(K, 7) = (sample, z1, y1, x1, z2, y2, x2): boxes of 8 to 40 voxels a side, some of which stick out."""
    generator = torch.Generator().manual_seed(s.rois)
    columns = [torch.zeros(s.rois)]
    sides = []
    for size in s.volume:
        longest = min(40, size)
        side = min(8, longest) + torch.rand(s.rois, generator=generator) * (longest - min(8, longest))
        margin = 0 if size == 1 else 2
        columns.append(torch.rand(s.rois, generator=generator) * (size - side + 2 * margin) - margin)
        sides.append(columns[-1] + side)
    return torch.stack([*columns, *sides], dim=1)


def touched(s: Size, boxes: Tensor) -> int:
    """Voxels that the samples of a box interpolate, over all boxes; voxels that boxes share count again."""
    extents = (boxes[:, 4:] - boxes[:, 1:4]).tolist()
    reach = [[min(2 * RATIO * b, int(e) + 2, n) for e, b, n in zip(box, s.bins, s.volume)] for box in extents]
    return sum(math.prod(box) for box in reach)


def sampled(bins: Triple) -> Function:
    """The definition by stock functions, for one sample per batch: every sample by `grid_sample`, then their means."""

    def run(x: Tensor, rois: Tensor) -> Tensor:
        channels, *volume = x.shape[1:]
        inside, places = [], []
        for a, (size, count) in enumerate(zip(volume, bins)):
            low, high = rois[:, 1 + a, None] - 0.5, rois[:, 4 + a, None] - 0.5
            steps = torch.arange(count * RATIO, device=x.device, dtype=rois.dtype) + 0.5
            position = low + steps * ((high - low) / count / RATIO)
            inside.append((position >= -1) & (position <= size))
            places.append((2 * position.clamp(0, size - 1) + 1) / size - 1)
        (z, y, x_), (iz, iy, ix) = places, inside
        shape = (len(rois), *(count * RATIO for count in bins))
        axes = (x_[:, None, None, :], y[:, None, :, None], z[:, :, None, None])
        grid = torch.stack([axis.expand(shape) for axis in axes], dim=-1)
        keep = iz[:, :, None, None] & iy[:, None, :, None] & ix[:, None, None, :]
        found = F.grid_sample(x.to(rois.dtype), grid.flatten(0, 1)[None], padding_mode="border", align_corners=False)
        found = found[0].view(channels, *shape).transpose(0, 1) * keep[:, None]
        return F.avg_pool3d(found, RATIO).to(x.dtype)

    return run


class _Separable(torch.autograd.Function):
    """`focuskernels.reference.roi_align3d`, the fallback where there is no kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rois: Tensor, bins: Triple) -> Tensor:
        ctx.save_for_backward(rois)
        ctx.like = (list(x.shape), DTYPES.index(x.dtype), is_channels_last(x))
        return reference.forward(x, rois, bins, [1.0] * 3, RATIO, True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rois,) = ctx.saved_tensors
        return reference.backward(grads[0], rois, [1.0] * 3, RATIO, True, *ctx.like), None, None


def _separable(bins: Triple) -> Function:
    def run(x: Tensor, rois: Tensor) -> Tensor:
        return _Separable.apply(x, rois, bins)

    return run


def _torchvision(bins: Triple) -> Callable[[], Function]:
    """Its axes are (y, x), its boxes (x1, y1, x2, y2)."""

    def build() -> Function:
        try:
            roi_align = importlib.import_module("torchvision.ops").roi_align
        except (ImportError, RuntimeError) as error:  # the latter where it was built for another torch
            raise Missing(f"torchvision cannot be imported ({error})") from error

        def run(x: Tensor, rois: Tensor) -> Tensor:
            boxes = rois[:, [0, 3, 2, 6, 5]].to(x.dtype)
            return roi_align(x[:, :, 0], boxes, bins[1:], sampling_ratio=RATIO, aligned=True)[:, :, None]

        return run

    return build


def _toolkit(bins: Triple) -> Callable[[], Function]:
    """medicaldetectiontoolkit's CUDA extension: boxes (z1, y1, z2, y2, x1, x2), not shifted by half a voxel."""

    def build() -> Function:
        try:
            extension = importlib.import_module("roi_al_extension_3d")
        except ImportError as error:
            raise Missing(
                "roi_al_extension_3d is built from medicaldetectiontoolkit's sources, and is not here"
            ) from error

        def run(x: Tensor, rois: Tensor) -> Tensor:
            boxes = rois[:, [0, 1, 2, 4, 5, 3, 6]] - 0.5
            boxes[:, 0] = rois[:, 0]
            return extension.roi_align(x, boxes, 1.0, *bins, RATIO)

        return run

    return build


OP = Op("roi_align_3d", ("roi_align_3d",), ("roi_align3d", "roi_sampling"), cases)
