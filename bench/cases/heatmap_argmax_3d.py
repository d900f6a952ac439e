"""Peaks of a stack of heat maps: one read of the maps, nothing to compute but comparisons."""

from collections.abc import Sequence

import torch
from torch import Tensor

from focuskernels import heatmap_argmax_3d

from ..case import Case, Cost, Inputs, Op, compiled, dtype_name, eager, ours, random, size_of

SHAPES = {
    ("cpu", "quick"): [(2, 3, 6, 8, 9)],
    ("cpu", "full"): [(1, 9, 48, 128, 128), (1, 9, 64, 192, 192)],
    ("cuda", "quick"): [(2, 3, 6, 8, 9)],
    ("cuda", "full"): [(1, 9, 160, 512, 512), (1, 9, 48, 192, 192)],
}
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.bfloat16, torch.float32)}


def cases(device: str, size: str) -> Sequence[Case]:
    """Case list of `OP`."""
    return [_case(shape, dtype) for shape in SHAPES[device, size] for dtype in DTYPES[device]]


def _case(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        heatmaps = random(generator, *shape, dtype=dtype)
        flat = heatmaps.flatten(2)
        # one clear peak per map: rounding to bfloat16 leaves ties, which some resolve otherwise
        where = torch.randint(flat.shape[2], (*shape[:2], 1), generator=generator, device=generator.device)
        flat.scatter_(2, where, 100.0)
        return {"heatmaps": heatmaps}

    return Case(
        name=f"{'x'.join(map(str, shape))} {dtype_name(dtype)}",
        make=make,
        cost={"fwd": Cost(size_of(*shape, dtype=dtype))},
        oracle=plain,
        providers=[ours(_ours), eager(plain), compiled(plain), eager(_by_max, "torch.max", "peer")],
        shape={"shape": shape},
        dtype=dtype,
        oracle_dtype=torch.float32,
    )


def _ours(heatmaps: Tensor) -> tuple[Tensor, Tensor]:
    peaks = heatmap_argmax_3d(heatmaps)
    return peaks.index, peaks.value


def plain(heatmaps: Tensor) -> tuple[Tensor, Tensor]:
    """argmax over the flattened volume, then the value there."""
    flat = heatmaps.flatten(2)
    position = flat.argmax(dim=2)
    return _unravel(position, heatmaps), flat.gather(2, position[..., None])[..., 0]


def _by_max(heatmaps: Tensor) -> tuple[Tensor, Tensor]:
    value, position = heatmaps.flatten(2).max(dim=2)
    return _unravel(position, heatmaps), value


def _unravel(position: Tensor, heatmaps: Tensor) -> Tensor:
    return torch.stack(torch.unravel_index(position, heatmaps.shape[2:]), dim=-1)


OP = Op("heatmap_argmax_3d", ("heatmap_argmax_3d",), ("heatmap_argmax3d",), cases)
