"""Modules over the functions of this package: they hold parameters, the functions compute.

Maps are floating point, of the parameters' dtype unless autocast is active. Every module is differentiable once.
Constructors and calls raise TypeError for wrong types, dtypes or devices and ValueError for numbers or shapes that do
not fit, as the functions do.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from . import focal_dice
from ._arguments import as_list, cast_for_autocast, integer, positive_scale, require_bool, require_float, triple
from .dense_aspp3d import dense_aspp3d
from .dilated_conv3d import dilated_conv3d
from .focal_dice import Mode, focal_dice_loss
from .norm_act import Activation, Norm, check_options, group_count, norm_act, recomputing
from .roi_align3d import check_box_order, roi_align_3d
from .roi_gather3d import check_padding, checked_scales, roi_gather_3d
from .se_residual import se_residual
from .up_cat_conv3d import check_inputs, up_cat_conv3d

__all__ = [
    "DenseASPP3d",
    "DilatedConv3d",
    "FocalDiceLoss",
    "NormAct3d",
    "ROIAlign3d",
    "ROIGather3d",
    "SEResBlock3d",
    "SEResidual3d",
    "UpSEResBlock3d",
    "convert_sync_norm",
]

Module = TypeVar("Module", bound=nn.Module)


def _require_positive(**values: int) -> None:
    for name, value in values.items():
        if integer(value, name) < 1:
            raise ValueError(f"{name} must be positive, got {value}")


def _require_channels(x: Tensor, channels: int) -> None:
    require_float(x, "x")
    if x.shape[1] != channels:
        raise ValueError(f"x has {x.shape[1]} channels, expected {channels}")


class NormAct3d(nn.Module):
    """Normalisation and activation of (N, C, D, H, W), by `norm_act`, whose docstring names the sources.

    With norm="batch" the state (weight, bias, running_mean, running_var, num_batches_tracked) and its updates are
    those of `torch.nn.BatchNorm3d`; the other norms hold weight and bias.

    Args:
        channels: C.
        norm: "batch", "instance" or "group".
        num_groups: of "group"; divides C. Default gcd(C, 8).
        activation: "relu", "leaky_relu" or None.
        negative_slope: of "leaky_relu".
        eps: added to the variance.
        momentum: share of the new statistics in the running ones.
        sync: of "batch", in training under `torch.distributed`: statistics over all processes, as
            `torch.nn.SyncBatchNorm`. May be set on a built module.

    Raises:
        TypeError, ValueError: as `norm_act`; float32 parameters serve half-precision maps too.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        channels: int,
        norm: Norm = "batch",
        num_groups: int | None = None,
        activation: Activation | None = "relu",
        *,
        negative_slope: float = 0.01,
        eps: float = 1e-5,
        momentum: float = 0.1,
        sync: bool = False,
    ) -> None:
        super().__init__()
        _require_positive(channels=channels)
        check_options(norm, activation, num_groups, momentum, eps, negative_slope)
        if sync and norm != "batch":
            raise ValueError(f"sync is for norm='batch', got norm={norm!r}")
        self.channels = channels
        self.norm: Norm = norm
        self.num_groups = group_count(channels, num_groups) if norm == "group" else None
        self.activation: Activation | None = activation
        self.negative_slope = negative_slope
        self.eps = eps
        self.momentum = momentum
        self.sync = sync
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        tracks = norm == "batch"
        self.register_buffer("running_mean", torch.zeros(channels) if tracks else None)
        self.register_buffer("running_var", torch.ones(channels) if tracks else None)
        self.register_buffer("num_batches_tracked", torch.tensor(0) if tracks else None)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> (N, C, D, H, W)."""
        statistics: dict[str, Any] = {"running_mean": self.running_mean, "running_var": self.running_var}
        y = norm_act(x, self.weight, self.bias, **statistics, **self.options())
        self.count_batch()
        return y

    def count_batch(self) -> None:
        """What every forward pass of a batch norm does in training, once its input is accepted."""
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)

    def options(self) -> dict[str, Any]:
        """Arguments of `norm_act` but for tensors."""
        shared = self.sync and self.training and dist.is_available() and dist.is_initialized()
        return {
            "norm": self.norm,
            "num_groups": self.num_groups,
            "training": self.training,
            "momentum": self.momentum,
            "eps": self.eps,
            "activation": self.activation,
            "negative_slope": self.negative_slope,
            "process_group": dist.group.WORLD if shared else None,
        }

    def extra_repr(self) -> str:
        """The arguments that matter to a reader of the model."""
        groups = f", num_groups={self.num_groups}" if self.norm == "group" else ""
        return f"{self.channels}, norm={self.norm}{groups}, activation={self.activation}, eps={self.eps}"


def convert_sync_norm(network: Module) -> Module:
    """Let every batch norm of ours in `network` take its statistics over all processes, in place; returns it.

    What `torch.nn.SyncBatchNorm.convert_sync_batchnorm` is for PyTorch's own batch norms, which it leaves alone here.
    """
    for module in network.modules():
        if isinstance(module, NormAct3d) and module.norm == "batch":
            module.sync = True
    return network


class DilatedConv3d(nn.Conv3d):
    """Stride-1 convolution that keeps the spatial size; parameters and initialisation of `torch.nn.Conv3d`.

    Args:
        in_channels, out_channels: channels before and after.
        kernel_size: odd, one number or (kd, kh, kw).
        dilation: one number or (dz, dy, dx).
        bias: whether to add a bias per output channel.

    Raises:
        TypeError, ValueError: as `dilated_conv3d`; autocast decides the dtype where it is active.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        dilation: int | Sequence[int] = 1,
        bias: bool = False,
    ) -> None:
        _require_positive(in_channels=in_channels, out_channels=out_channels)
        kernel = triple(kernel_size, "kernel_size")
        if any(size % 2 == 0 for size in kernel):
            raise ValueError(f"kernel sizes must be odd, got {kernel_size}")
        steps = triple(dilation, "dilation")
        super().__init__(in_channels, out_channels, kernel, padding="same", dilation=steps, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, I, D, H, W) -> (N, O, D, H, W)."""
        return dilated_conv3d(x, self.weight, self.bias, self.dilation)


class SEResidual3d(nn.Module):
    """`residual + x * gate(x)` with a squeeze-and-excitation gate per channel (Hu et al., CVPR 2018).

    Args:
        channels: C.
        reduction: the hidden layer has max(1, C // reduction) units.

    Raises:
        TypeError, ValueError: as `se_residual`; float32 layers serve half-precision maps too.
    """

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        _require_positive(channels=channels, reduction=reduction)
        hidden = max(1, channels // reduction)
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Two tensors (N, C, D, H, W) -> (N, C, D, H, W)."""
        return se_residual(x, residual, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


class SEResBlock3d(nn.Module):
    """Pre-activation residual block with squeeze-and-excitation (FocusNet, section 2.1).

    norm-ReLU-conv, norm-ReLU-dilated conv, SE; added to the input, or to norm-ReLU-1x1x1 of it where the number of
    channels changes. Saves for backward its input, the outputs of its convolutions and a few numbers per sample and
    channel; what the norms put out is computed again.

    Args:
        in_channels, out_channels: channels before and after.
        kernel_size: of both convolutions; odd, one number or (kd, kh, kw).
        dilation: of the second convolution; one number or (dz, dy, dx).
        reduction: of the squeeze-and-excitation.
        norm: "batch", "instance" or "group".

    Raises:
        TypeError, ValueError: as its parts, and for a map of another number of channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        dilation: int | Sequence[int] = 1,
        reduction: int = 4,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        self.norm1 = NormAct3d(in_channels, norm)
        self.conv1 = DilatedConv3d(in_channels, out_channels, kernel_size)
        self.norm2 = NormAct3d(out_channels, norm)
        self.conv2 = DilatedConv3d(out_channels, out_channels, kernel_size, dilation)
        self.se = SEResidual3d(out_channels, reduction)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Sequential(NormAct3d(in_channels, norm), DilatedConv3d(in_channels, out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, D, H, W) -> (N, out_channels, D, H, W)."""
        _require_channels(x, self.norm1.channels)
        h = _conv_of_norm(self.conv1, self.norm1, x)
        h = _conv_of_norm(self.conv2, self.norm2, h)
        if isinstance(self.shortcut, nn.Sequential):
            x = _conv_of_norm(self.shortcut[1], self.shortcut[0], x)
        return self.se(h, x)


class UpSEResBlock3d(SEResBlock3d):
    """`SEResBlock3d` of upsampled features beside those of a finer resolution: the entry of a U-Net's decoder level.

    The same parameters and values as upsampling, `torch.cat([upsampled, skip], dim=1)` and `SEResBlock3d`, whose
    `in_channels` counts both. But the wide map is computed some channels at a time, in backward again, so that neither
    it nor its norm is ever there (`up_cat_conv3d`). Group norm and `torch.compile` take the ordinary way.

    Raises:
        TypeError, ValueError: as `SEResBlock3d`, and for maps that are empty or of two batch sizes, dtypes or devices.
    """

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]
        """(N, A, d, h, w), (N, in_channels - A, D, H, W) -> (N, out_channels, D, H, W)."""
        check_inputs(x, skip, self.norm1.channels)
        if self.norm1.norm == "group" or isinstance(self.shortcut, nn.Identity) or torch.compiler.is_compiling():
            x = F.interpolate(x, size=skip.shape[2:], mode="trilinear", align_corners=False)
            return super().forward(torch.cat([x, skip], dim=1))
        layers: list[Any] = [(self.norm1, self.conv1), tuple(self.shortcut.children())]
        h, residual = up_cat_conv3d(x, skip, layers)
        for norm, _ in layers:
            norm.count_batch()
        return self.se(_conv_of_norm(self.conv2, self.norm2, h), residual)


def _conv_of_norm(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    y = norm(x)
    if torch.compiler.is_compiling():  # which decides itself what to compute again
        return conv(y)
    cast: Tensor = cast_for_autocast(y)[0]  # type: ignore[assignment]
    with recomputing(y, cast):
        return conv(cast)


class DenseASPP3d(nn.Module):
    """Densely connected atrous spatial pyramid (Yang et al., CVPR 2018; FocusNet, section 2.1).

    Branch i reads the input and the outputs of all branches before it: norm-ReLU-1x1x1(bottleneck),
    norm-ReLU-dilated 3x3x3(growth). The result concatenates the input and all branches, which write into it: nothing is
    concatenated. Saves for backward the result, the bottlenecks' outputs and a few numbers per sample and channel; what
    the norms put out is computed again. Hooks of the layers inside are not called.

    Args:
        in_channels: channels of the input.
        growth: channels each branch adds.
        bottleneck: channels inside a branch.
        dilations: one number or (dz, dy, dx) per branch.
        norm: "batch", "instance" or "group".

    Attributes:
        out_channels: in_channels + growth * len(dilations).

    Raises:
        TypeError, ValueError: as its parts, and for a map of another number of channels, or norms that differ in mode,
            `sync`, dtype or device.
    """

    def __init__(
        self,
        in_channels: int,
        growth: int = 32,
        bottleneck: int = 64,
        dilations: Sequence[int | Sequence[int]] = ((1, 3, 3), (1, 6, 6), (1, 12, 12), (1, 18, 18)),
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        _require_positive(in_channels=in_channels, growth=growth, bottleneck=bottleneck)
        dilations = as_list(dilations, "dilations", "one dilation per branch")
        if not dilations:
            raise ValueError("dilations must name at least one branch")
        channels = in_channels
        self.branches = nn.ModuleList()
        for dilation in dilations:
            self.branches.append(_branch(channels, growth, bottleneck, dilation, norm))
            channels += growth
        self.in_channels = in_channels
        self.out_channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, D, H, W) -> (N, out_channels, D, H, W), in the dtype and the layout of `x`."""
        _require_channels(x, self.in_channels)
        return dense_aspp3d(x, [list(branch.children()) for branch in self.branches])

    def extra_repr(self) -> str:
        """The numbers of channels."""
        return f"{self.in_channels}, out_channels={self.out_channels}"


def _branch(channels: int, growth: int, bottleneck: int, dilation: int | Sequence[int], norm: Norm) -> nn.Sequential:
    return nn.Sequential(
        NormAct3d(channels, norm),
        DilatedConv3d(channels, bottleneck, 1),
        NormAct3d(bottleneck, norm),
        DilatedConv3d(bottleneck, growth, 3, dilation),
    )


class ROIAlign3d(nn.Module):
    """`roi_align_3d` with fixed sizes (He et al. 2017); its docstring explains them and what is raised."""

    def __init__(
        self,
        output_size: int | Sequence[int],
        spatial_scale: float | Sequence[float] = 1.0,
        sampling_ratio: int = -1,
        aligned: bool = True,
        *,
        box_order: str = "zyxzyx",
    ) -> None:
        super().__init__()
        self.output_size = triple(output_size, "output_size")
        positive_scale(spatial_scale, "spatial_scale")
        require_bool(aligned, "aligned")
        check_box_order(box_order)
        self.spatial_scale = spatial_scale
        self.sampling_ratio = integer(sampling_ratio, "sampling_ratio")
        self.aligned = aligned
        self.box_order = box_order

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        """Input (N, C, D, H, W) and rois (K, 7), or (K_n, 6) per sample -> (K, C, d, h, w)."""
        return roi_align_3d(
            input,
            rois,
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            self.aligned,
            box_order=self.box_order,
        )

    def extra_repr(self) -> str:
        """The arguments."""
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}, box_order={self.box_order}"
        )


class ROIGather3d(nn.Module):
    """`roi_gather_3d` with fixed sizes.

    Args:
        roi_size: size of the box in reference voxels, one number or (d, h, w).
        output_size: samples per axis; default `roi_size`.
        spatial_scales: per source its voxels per reference voxel; default 1 for each.
        padding: "zeros" or "border".

    Raises:
        TypeError, ValueError: as `roi_gather_3d`.
    """

    def __init__(
        self,
        roi_size: int | Sequence[int],
        output_size: int | Sequence[int] | None = None,
        *,
        spatial_scales: Sequence[float | Sequence[float]] | None = None,
        padding: Literal["zeros", "border"] = "zeros",
    ) -> None:
        super().__init__()
        self.roi_size = triple(roi_size, "roi_size")
        self.output_size = self.roi_size if output_size is None else triple(output_size, "output_size")
        if spatial_scales is not None:
            checked_scales(spatial_scales)
        self.spatial_scales = spatial_scales
        check_padding(padding)
        self.padding: Literal["zeros", "border"] = padding

    def forward(self, sources: Sequence[Tensor], centers: Tensor) -> Tensor:
        """Sources (N, C_i, D_i, H_i, W_i) and centers (K, 4) -> (K, sum C_i, d, h, w)."""
        return roi_gather_3d(
            sources,
            centers,
            self.roi_size,
            self.output_size,
            spatial_scales=self.spatial_scales,
            padding=self.padding,
        )

    def extra_repr(self) -> str:
        """The arguments."""
        parts = [f"roi_size={self.roi_size}"]
        if self.output_size != self.roi_size:
            parts.append(f"output_size={self.output_size}")
        if self.spatial_scales is not None:
            parts.append(f"spatial_scales={self.spatial_scales}")
        return ", ".join([*parts, f"padding={self.padding}"])


class FocalDiceLoss(nn.Module):
    """`focal_dice_loss` with fixed parameters; its docstring explains them.

    `alpha` is a buffer, so that it moves with the module; it is left out of the state.

    Raises:
        TypeError, ValueError: as `focal_dice_loss`.
    """

    alpha: Tensor | None

    def __init__(
        self,
        *,
        activation: Mode = "softmax",
        gamma: float = 2.0,
        alpha: Tensor | Sequence[float] | None = None,
        focal_weight: float = 1.0,
        dice_weight: float = 1.0,
        ignore_index: int | None = None,
        include_background: bool = True,
        batch_dice: bool = False,
        smooth: float = 1e-5,
        class_reduction: Literal["sum", "mean"] = "sum",
        inplace_grad: bool = False,
    ) -> None:
        super().__init__()
        focal_dice.check_options(activation, gamma, ignore_index, smooth, class_reduction, focal_weight, dice_weight)
        self.activation: Mode = activation
        self.gamma = gamma
        self.focal_weight = focal_weight
        self.dice_weight = dice_weight
        self.ignore_index = ignore_index
        self.include_background = include_background
        self.batch_dice = batch_dice
        self.smooth = smooth
        self.class_reduction: Literal["sum", "mean"] = class_reduction
        self.inplace_grad = inplace_grad
        self.register_buffer("alpha", None if alpha is None else focal_dice.alpha_tensor(alpha), persistent=False)

    def forward(self, logits: Tensor, target: Tensor, class_mask: Tensor | None = None) -> Tensor:
        """Logits (N, C, *spatial) and target -> scalar; class_mask (N, C) bool."""
        return focal_dice_loss(
            logits,
            target,
            activation=self.activation,
            gamma=self.gamma,
            alpha=self.alpha,
            focal_weight=self.focal_weight,
            dice_weight=self.dice_weight,
            ignore_index=self.ignore_index,
            class_mask=class_mask,
            include_background=self.include_background,
            batch_dice=self.batch_dice,
            smooth=self.smooth,
            class_reduction=self.class_reduction,
            inplace_grad=self.inplace_grad,
        )

    def extra_repr(self) -> str:
        """The arguments that matter to a reader of the model."""
        alpha = None if self.alpha is None else f"{len(self.alpha)} values"
        return (
            f"{self.activation}, gamma={self.gamma}, alpha={alpha}, focal_weight={self.focal_weight}, "
            f"dice_weight={self.dice_weight}, ignore_index={self.ignore_index}, smooth={self.smooth}, "
            f"class_reduction={self.class_reduction}"
        )
