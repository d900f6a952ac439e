"""SOS-Net's input: decoder, image, encoder and each organ's own heat map, cut out around ten centres."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from focuskernels import roi_gather_3d, roi_gather_each_3d

from ..case import (
    Case,
    Cost,
    Function,
    Inputs,
    Missing,
    Mode,
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
Rois = list[Tensor] | Tensor
SIZES: dict[tuple[str, str], list[tuple[Triple, tuple[int, ...]]]] = {
    ("cpu", "quick"): [((6, 10, 10), (2, 3, 4)), ((6, 10, 10), (3, 3, 3))],
    ("cpu", "full"): [((48, 128, 128), (24, 26, 29, 32, 34, 37, 40, 42, 45, 48)), ((48, 128, 128), (32,) * 10)],
    ("cuda", "quick"): [((6, 10, 10), (3, 3, 3)), ((6, 10, 10), (2, 3, 4))],
    ("cuda", "full"): [
        ((48, 128, 128), (32,) * 10),
        ((48, 128, 128), (24, 26, 29, 32, 34, 37, 40, 42, 45, 48)),
        ((160, 256, 256), (32,) * 10),
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
    side, own = boxes.sides[0], _own_heatmaps(boxes)

    def make(generator: torch.Generator) -> Inputs:
        inputs = {
            name: random(generator, 1, c, *boxes.volume, dtype=dtype, layout=layout).requires_grad_()
            for name, c in {"decoder": DECODER, "encoder": ENCODER, "heatmaps": own}.items()
            if c
        }
        image = random(generator, 1, 1, *boxes.volume, dtype=dtype, layout=layout)
        return {**inputs, "image": image, "centers": boxes.centers(generator.device)}

    def run(decoder: Tensor, encoder: Tensor, image: Tensor, centers: Tensor, heatmaps: Tensor | None = None) -> Rois:
        if heatmaps is None:
            return roi_gather_3d([decoder, image, encoder], centers, side)
        channels = [None, None, None, range(own)]
        return roi_gather_each_3d([decoder, image, encoder, heatmaps], centers, boxes.sides, channels=channels)

    def one_by_one(crop: Callable[[Tensor, int, Tensor], Tensor]) -> Function:
        """Every source cropped around every ROI; the crops of a ROI side by side."""

        def run(
            decoder: Tensor, encoder: Tensor, image: Tensor, centers: Tensor, heatmaps: Tensor | None = None
        ) -> Rois:
            rois = []
            for k in range(len(boxes.sides)):
                sources = [decoder, image, encoder]
                sources += [] if heatmaps is None else [heatmaps[:, k : k + 1]]
                rois.append(torch.cat([crop(source, k, centers) for source in sources], dim=1))
            return torch.cat(rois) if heatmaps is None else rois

        return run

    def sliced(source: Tensor, k: int, centers: Tensor) -> Tensor:
        z, y, x = starts[k]
        length = boxes.sides[k]
        return source[..., z : z + length, y : y + length, x : x + length]

    def sampled(source: Tensor, k: int, centers: Tensor) -> Tensor:
        return F.grid_sample(source, _grid(centers[k], boxes.sides[k], boxes.volume, source.dtype), align_corners=False)

    starts, slicing = boxes.starts(), one_by_one(sliced)
    return Case(
        name=f"{len(boxes.sides)} ROIs of {f'{min(boxes.sides)} to {max(boxes.sides)}' if own else side}, "
        f"{'x'.join(map(str, boxes.volume))} {dtype_name(dtype)} {layout}",
        make=make,
        cost=_cost(boxes, dtype),
        oracle=slicing,
        providers=[
            ours(run),
            eager(slicing, "eager, slicing + cat"),
            compiled(slicing, "torch.compile, slicing + cat"),
            Provider("grid_sample + cat", "peer", _needs_float32(one_by_one(sampled), dtype)),
        ],
        shape={"volume": boxes.volume, "sides": boxes.sides, "voxels": math.prod(boxes.volume)},
        dtype=dtype,
        layout=layout,
        oracle_dtype=torch.float32,
        tolerance=1e-4 if dtype == torch.float32 else None,
    )


def _own_heatmaps(boxes: Boxes) -> int:
    """One per ROI; none where ROIs of one size are one tensor, in which they have no place."""
    return len(boxes.sides) if len(set(boxes.sides)) > 1 else 0


def _cost(boxes: Boxes, dtype: torch.dtype) -> dict[Mode, Cost]:
    own = _own_heatmaps(boxes)
    wanted = DECODER + ENCODER + bool(own)  # channels; the image asks for no gradient
    voxels = sum(length**3 for length in boxes.sides)
    output = (wanted + 1) * voxels * dtype.itemsize
    dense = size_of(DECODER + ENCODER + own, *boxes.volume, dtype=dtype)
    # every ROI voxel read (or every source, if that is less) and written
    return cost_by_mode(Cost(output + min(output, dense)), Cost(wanted * voxels * dtype.itemsize + dense))


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
