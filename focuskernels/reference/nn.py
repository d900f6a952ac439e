"""The layers of `focuskernels.nn` in stock PyTorch, differentiated by autograd: a second definition of them.

They do as an experienced user would: activations in place, no copies. `to_reference` swaps the layers of a network for
them; parameters, buffers and their names stay, so that weights move both ways.
"""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import DenseASPP3d, DilatedConv3d, NormAct3d, SEResBlock3d, SEResidual3d, UpSEResBlock3d
from ..norm_act import group_count

Module = TypeVar("Module", bound=nn.Module)


class PlainNormAct(NormAct3d):
    """Stock norm, then the activation."""

    def forward(self, x: Tensor) -> Tensor:
        """See `NormAct3d`."""
        if self.options()["process_group"] is not None:
            raise ValueError("sync=True: the reference of NormAct3d takes statistics over one process alone")
        self.count_batch()
        return norm_act(
            x,
            self.weight,
            self.bias,
            self.norm,
            self.num_groups,
            self.activation,
            self.negative_slope,
            running_mean=self.running_mean,
            running_var=self.running_var,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
        )


class PlainConv(DilatedConv3d):
    """`torch.nn.functional.conv3d`."""

    def forward(self, x: Tensor) -> Tensor:
        """See `DilatedConv3d`."""
        return nn.Conv3d.forward(self, x)


class PlainSEResidual(SEResidual3d):
    """Mean, two linear layers, product, sum."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """See `SEResidual3d`."""
        fc1, fc2 = self.fc1, self.fc2
        return se_residual(x, residual, fc1.weight, fc1.bias, fc2.weight, fc2.bias)


class PlainSEResBlock(SEResBlock3d):
    """One stock module after the other."""

    def forward(self, x: Tensor) -> Tensor:
        """See `SEResBlock3d`."""
        return self.se(self.conv2(self.norm2(self.conv1(self.norm1(x)))), self.shortcut(x))


class PlainUpSEResBlock(PlainSEResBlock, UpSEResBlock3d):
    """Upsampling, concatenation, then the plain block."""

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]
        """See `UpSEResBlock3d`."""
        x = F.interpolate(x, size=skip.shape[2:], mode="trilinear", align_corners=False)
        return super().forward(torch.cat([x, skip], dim=1))


class PlainDenseASPP(DenseASPP3d):
    """Concatenates before every branch."""

    def forward(self, x: Tensor) -> Tensor:
        """See `DenseASPP3d`."""
        for branch in self.branches:
            x = torch.cat([x, branch(x)], dim=1)
        return x


_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    NormAct3d: PlainNormAct,
    DilatedConv3d: PlainConv,
    SEResidual3d: PlainSEResidual,
    SEResBlock3d: PlainSEResBlock,
    UpSEResBlock3d: PlainUpSEResBlock,
    DenseASPP3d: PlainDenseASPP,
}


def to_reference(network: Module) -> Module:
    """Turn every layer of `focuskernels.nn` in `network` into stock PyTorch, in place; returns it.

    Parameters, buffers, their names and values stay. Statistics over several processes (`sync`) are refused.
    """
    for module in network.modules():
        # A plain module differs from ours by its methods alone, and has the same attributes.
        module.__class__ = _PLAIN.get(type(module), type(module))
    return network


def norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: str = "batch",
    num_groups: int | None = None,
    activation: str | None = "relu",
    negative_slope: float = 0.01,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`focuskernels.norm_act` by the stock norm, then the activation in place."""
    if norm == "batch":
        y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    elif norm == "instance":
        y = F.instance_norm(x, weight=weight, bias=bias, eps=eps)
    else:
        y = F.group_norm(x, group_count(x.shape[1], num_groups), weight, bias, eps)
    if activation == "relu":
        return F.relu(y, inplace=True)
    return F.leaky_relu(y, negative_slope, inplace=True) if activation == "leaky_relu" else y


def se_residual(
    x: Tensor,
    residual: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    activation: str | None = None,
) -> Tensor:
    """`residual + x * sigmoid(fc2(relu(fc1(mean of x))))`."""
    hidden = F.relu(F.linear(x.mean(dim=(2, 3, 4)), fc1_weight, fc1_bias))
    gate = F.linear(hidden, fc2_weight, fc2_bias).sigmoid()
    y = x * gate[:, :, None, None, None] + residual
    return F.relu(y, inplace=True) if activation == "relu" else y
