import torch
from torch import Tensor


def argmax(heatmaps: Tensor) -> tuple[Tensor, Tensor]:
    """Flat position (N,K) int64 in the (D,H,W) volume and value (N,K) of the first maximum of each (N,K,D,H,W) map."""
    flat = heatmaps.flatten(2)
    position = flat.argmax(dim=2, keepdim=True)
    return position.squeeze(2), flat.gather(2, position).squeeze(2)


def unravel(position: Tensor, shape: torch.Size) -> Tensor:
    """(z, y, x) of flat positions in a (D,H,W) volume, stacked in a new last dimension."""
    _, height, width = shape
    return torch.stack((position // (height * width), position // width % height, position % width), dim=-1)


def subvoxel_offset(heatmaps: Tensor, index: Tensor) -> Tensor:
    """Offset (N,K,3) of the vertex of the parabola through the logarithms of the peak and its neighbours, per axis."""
    flat = heatmaps.flatten(2)
    if flat.dtype in (torch.float16, torch.bfloat16):
        flat = flat.float()
    sizes = heatmaps.shape[2:]
    strides = (sizes[1] * sizes[2], sizes[2], 1)
    z, y, x = index.unbind(dim=-1)
    position = z * strides[0] + y * strides[1] + x
    offsets = []
    for axis in range(3):
        coordinate = index[..., axis]
        inside = (coordinate > 0) & (coordinate < sizes[axis] - 1)
        step = inside * strides[axis]
        around = torch.stack((position - step, position, position + step), dim=-1)
        offsets.append(_vertex(flat.gather(2, around), inside))
    return torch.stack(offsets, dim=-1)


def _vertex(values: Tensor, inside: Tensor) -> Tensor:
    # Replacing bad values before log and division, not after, keeps NaN out of the gradient.
    usable = inside & (values > 0).all(dim=-1) & torch.isfinite(values).all(dim=-1)
    before, peak, after = torch.where(usable.unsqueeze(-1), values, 1.0).log().unbind(dim=-1)
    curvature = before - 2 * peak + after
    curved = curvature < 0
    offset = 0.5 * (before - after) / torch.where(curved, curvature, 1.0)
    return torch.where(curved, offset, 0.0).clamp(-0.5, 0.5)
