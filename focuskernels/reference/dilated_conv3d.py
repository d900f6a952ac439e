import torch.nn.functional as F
from torch import Tensor

from .._arguments import Triple


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: Triple) -> Tensor:
    """Stride-1 cross-correlation with zeros around the volume; the spatial size stays."""
    padding = tuple(step * (size - 1) // 2 for step, size in zip(dilation, weight.shape[2:], strict=True))
    return F.conv3d(x, weight, bias, padding=padding, dilation=dilation)
