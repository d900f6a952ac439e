"""SOS-Net's input: decoder, image, encoder and each organ's own heat map, cut out around ten centres."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from focuskernels import roi_gather_each_3d

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

#: Channels of decoder and encoder; the image and each organ's heat map have one.
DECODER, ENCODER = 32, 16
Triple = tuple[int, int, int]
SIZES: dict[tuple[str, str], list[tuple[Triple, tuple[int, ...]]]] = {
    ("cpu", "quick"): [((6, 10, 10), (2, 3, 4))],
    ("cpu", "full"): [((48, 128, 128), (24, 26, 29, 32, 34, 37, 40, 42, 45, 48))],
    ("cuda", "quick"): [((6, 10, 10), (2, 3, 4))],
    ("cuda", "full"): [
        ((48, 128, 128), (24, 26, 29, 32, 34, 37, 40, 42, 45, 48)),
        ((160, 256, 256), (24, 26, 29, 32, 34, 37, 40, 42, 45, 48)),
    ],
}
FORMATS: dict[str, list[tuple[torch.dtype, str]]] = {
    "cpu": [(torch.float32, "contiguous")],
    "cuda": [(torch.float32, "contiguous"), (torch.bfloat16, "channels_last_3d")],
}


@dataclass(frozen=True)
class Boxes:
    """Cubes of `sides` voxels around whole voxels of a volume, all inside it. The same for every input set: compiled
    slicing has them as constants."""

    volume: Triple
    sides: tuple[int, ...]

    def starts(self) -> list[list[int]]:
        """First voxel (z, y, x) of each."""
        generator = torch.Generator().manual_seed(len(self.sides))
        return [
            [int(torch.randint(size - side + 1, (), generator=generator)) for size in self.volume]
            for side in self.sides
        ]

    def centers(self, device: torch.device) -> Tensor:
        """(K, 4) for `roi_gather_3d`."""
        rows = [[0, *(s + side // 2 for s in start)] for start, side in zip(self.starts(), self.sides)]
        return torch.tensor(rows, device=device)


def cases(device: str, size: str) -> Sequence[Case]:
    """Case list of `OP`."""
    return [
        _case(Boxes(volume, sides), dtype, layout)
        for volume, sides in SIZES[device, size]
        for dtype, layout in FORMATS[device]
    ]


def _case(boxes: Boxes, dtype: torch.dtype, layout: str) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        channels = {"decoder": DECODER, "encoder": ENCODER, "heatmaps": len(boxes.sides)}
        inputs = {
            name: random(generator, 1, c, *boxes.volume, dtype=dtype, layout=layout).requires_grad_()
            for name, c in channels.items()
        }
        image = random(generator, 1, 1, *boxes.volume, dtype=dtype, layout=layout)
        return {**inputs, "image": image, "centers": boxes.centers(generator.device)}

    def run(decoder: Tensor, encoder: Tensor, heatmaps: Tensor, image: Tensor, centers: Tensor) -> list[Tensor]:
        channels = [None, None, None, range(len(boxes.sides))]
        return roi_gather_each_3d([decoder, image, encoder, heatmaps], centers, boxes.sides, channels=channels)

    def slicing(decoder: Tensor, encoder: Tensor, heatmaps: Tensor, image: Tensor, centers: Tensor) -> list[Tensor]:
        rois = []
        for k, ((z, y, x), side) in enumerate(zip(starts, boxes.sides)):
            where = (..., slice(z, z + side), slice(y, y + side), slice(x, x + side))
            sources = (decoder, image, encoder, heatmaps[:, k : k + 1])
            rois.append(torch.cat([source[where] for source in sources], dim=1))
        return rois

    def grid_sample(decoder: Tensor, encoder: Tensor, heatmaps: Tensor, image: Tensor, centers: Tensor) -> list[Tensor]:
        rois = []
        for k, side in enumerate(boxes.sides):
            grid = _grid(centers[k], side, boxes.volume, decoder.dtype)
            sources = (decoder, image, encoder, heatmaps[:, k : k + 1])
            rois.append(torch.cat([F.grid_sample(source, grid, align_corners=False) for source in sources], dim=1))
        return rois

    starts = boxes.starts()
    channels = DECODER + ENCODER + 2
    output = channels * sum(side**3 for side in boxes.sides) * dtype.itemsize
    dense = size_of(DECODER + ENCODER + len(boxes.sides), *boxes.volume, dtype=dtype)
    wanted = output * (channels - 1) // channels  # the image asks for no gradient
    return Case(
        name=f"{len(boxes.sides)} ROIs of {min(boxes.sides)} to {max(boxes.sides)}, "
        f"{'x'.join(map(str, boxes.volume))} {dtype_name(dtype)} {layout}",
        make=make,
        # forward: every ROI voxel read (or every source, if that is less) and written; backward: read, dense gradients
        cost=cost_by_mode(Cost(output + min(output, dense)), Cost(wanted + dense)),
        oracle=slicing,
        providers=[
            ours(run),
            eager(slicing, "eager, slicing + cat"),
            compiled(slicing, "torch.compile, slicing + cat"),
            Provider("grid_sample + cat", "peer", _needs_float32(grid_sample, dtype)),
        ],
        shape={"volume": boxes.volume, "sides": boxes.sides, "voxels": math.prod(boxes.volume)},
        dtype=dtype,
        layout=layout,
        oracle_dtype=torch.float32,
        tolerance=1e-4,
    )


def _needs_float32(function: Function, dtype: torch.dtype) -> Callable[[], Function]:
    def build() -> Function:
        if dtype != torch.float32:
            raise Missing(f"its normalised coordinates are too coarse in {dtype_name(dtype)}")
        return function

    return build


def _grid(center: Tensor, side: int, volume: Triple, dtype: torch.dtype) -> Tensor:
    """(1, side, side, side, 3) for grid_sample, whose order is (x, y, z)."""
    axes = [
        (2 * (center[1 + a] - side // 2 + torch.arange(side, device=center.device)).to(dtype) + 1) / size - 1
        for a, size in enumerate(volume)
    ]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([x, y, z], dim=-1)[None]


OP = Op("roi_gather_3d", ("roi_gather_3d", "roi_gather_each_3d"), ("roi_gather3d", "roi_sampling"), cases)
