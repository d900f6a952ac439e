"""The gate of a squeeze-and-excitation (Hu et al., CVPR 2018), on means (N, C), forward and backward."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Layers(NamedTuple):
    """The two fully connected layers: (R, C), (R,) or None, (C, R), (C,) or None."""

    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None


class GateGradient(NamedTuple):
    """Gradients of what the gate was computed from."""

    squeezed: Tensor
    layers: Layers


def gate(squeezed: Tensor, layers: Layers) -> tuple[Tensor, Tensor]:
    """sigmoid(fc2(hidden)), hidden = relu(fc1(squeezed)); both in the dtype of `squeezed`."""
    hidden = _linear(squeezed, layers.fc1_weight, layers.fc1_bias).relu()
    return _linear(hidden, layers.fc2_weight, layers.fc2_bias).sigmoid(), hidden


def gate_backward(grad: Tensor, gate: Tensor, hidden: Tensor, squeezed: Tensor, layers: Layers) -> GateGradient:
    """From the gradient of the gate; those of the layers in their dtypes."""
    logits = grad * gate * (1 - gate)
    before = (logits @ layers.fc2_weight.to(grad.dtype)) * (hidden > 0)
    return GateGradient(
        before @ layers.fc1_weight.to(grad.dtype),
        Layers(
            (before.T @ squeezed).to(layers.fc1_weight.dtype),
            None if layers.fc1_bias is None else before.sum(dim=0).to(layers.fc1_bias.dtype),
            (logits.T @ hidden).to(layers.fc2_weight.dtype),
            None if layers.fc2_bias is None else logits.sum(dim=0).to(layers.fc2_bias.dtype),
        ),
    )


def table(gate: Tensor) -> Tensor:
    """(N, 3, C) for `channelwise.affine`: x times the gate."""
    zero = torch.zeros_like(gate)
    return torch.stack([zero, gate, zero], dim=1)


def shifted_table(gate: Tensor, shift: Tensor) -> Tensor:
    """(N, 3, C) for `channelwise.affine`: x times the gate, plus a number per sample and channel."""
    return torch.stack([torch.zeros_like(gate), gate, shift], dim=1)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
