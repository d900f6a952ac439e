"""Put `focuskernels.nn.NormAct3d` into a network that somebody else built, be it MONAI's, nnU-Net's or one's own."""

from itertools import pairwise
from typing import TypeVar

from torch import nn

from ..nn import NormAct3d
from ..norm_act import Activation

Network = TypeVar("Network", bound=nn.Module)


def fuse_norm_act(network: Network) -> Network:
    """Replace every norm and the activation behind it by one `NormAct3d`, in place; returns the network.

    A pair counts where both stand in one `nn.Sequential` (MONAI's `Convolution` and nnU-Net's blocks are such) with
    nothing between them but `nn.Identity` and dropout of probability 0. Norms: `InstanceNorm3d`, `BatchNorm3d`,
    `GroupNorm`; activations: `ReLU`, `LeakyReLU`. Parameters are shared with the modules replaced, and the names in the
    state stay the same: weights load from before, and an optimiser made before goes on. Everything else is left alone.

    Args:
        network: Works on (N, C, D, H, W).

    Raises:
        ValueError: there is no such pair, so that nothing would change.
    """
    fused = 0
    for module in network.modules():
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            # named_children() would leave out a module that it met before
            children = [(name, step) for name, step in module._modules.items() if step is not None]
            steps = [(name, step) for name, step in children if not _does_nothing(step)]
            for (norm_name, norm), (activation_name, activation) in pairwise(steps):
                if type(activation) in (nn.ReLU, nn.LeakyReLU) and (replacement := _fused(norm, activation)):
                    setattr(module, norm_name, replacement)
                    setattr(module, activation_name, nn.Identity())
                    fused += 1
    if not fused:
        raise ValueError(
            f"{type(network).__name__} has no norm with a ReLU or leaky ReLU behind it in an nn.Sequential"
        )
    return network


def _does_nothing(step: nn.Module) -> bool:
    dropout = isinstance(step, (nn.Dropout, nn.Dropout3d)) and step.p == 0
    return dropout or type(step) is nn.Identity


def _fused(norm: nn.Module, activation: nn.Module) -> NormAct3d | None:
    """The module that does what the two do, on the parameters and buffers of `norm`; None where there is none."""
    slope = activation.negative_slope if isinstance(activation, nn.LeakyReLU) else 0.01
    name: Activation = "leaky_relu" if isinstance(activation, nn.LeakyReLU) else "relu"
    if type(norm) is nn.GroupNorm:
        fused = NormAct3d(norm.num_channels, "group", norm.num_groups, name, negative_slope=slope, eps=norm.eps)
    elif type(norm) is nn.InstanceNorm3d and not norm.track_running_stats:
        fused = NormAct3d(norm.num_features, "instance", activation=name, negative_slope=slope, eps=norm.eps)
    elif type(norm) is nn.BatchNorm3d and norm.track_running_stats and norm.momentum is not None:
        fused = NormAct3d(
            norm.num_features, "batch", activation=name, negative_slope=slope, eps=norm.eps, momentum=norm.momentum
        )
    else:
        return None
    for key, parameter in norm.named_parameters():
        setattr(fused, key, parameter)
    for key, buffer in norm.named_buffers():
        setattr(fused, key, buffer)
    if norm.weight is None:  # affine=False
        fused.register_parameter("weight", None)
        fused.register_parameter("bias", None)
    return fused.train(norm.training)
