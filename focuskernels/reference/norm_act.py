import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    num_groups: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str | None,
    negative_slope: float,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, then the activation, in the dtype of x."""
    if norm == "batch":
        # With half-precision weights PyTorch would round the product of mean and weight too.
        dtype = torch.promote_types(x.dtype, torch.float32) if running_mean is None else running_mean.dtype
        weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
        y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    else:
        # a group per channel is instance normalisation; F.instance_norm would copy through a view
        y = F.group_norm(x, x.shape[1] if norm == "instance" else num_groups, weight, bias, eps)
    y = y.to(x.dtype)
    # In place: the backward of a norm reads its input, never its output.
    if activation == "relu":
        return F.relu(y, inplace=True)
    if activation == "leaky_relu":
        # The backward in place takes the sign of the input from the output.
        return F.leaky_relu(y, negative_slope, inplace=negative_slope >= 0)
    return y
