"""Everything that can be set: one dataclass, readable from YAML, overridable by options, stored in the checkpoint.

Tuples of three are (z, y, x). Defaults are the paper's (MICCAI 2019) or, where it is silent, the authors' later code's.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, Literal

from .errors import FocusNetError

Network = Literal["snet", "unet", "deeplab"]
Norm = Literal["batch", "instance", "group"]
Backend = Literal["fused", "reference"]
Triple = tuple[int, int, int]
#: Side of a training crop in voxels.
LEAST_CROP = 8


@dataclass
class DataConfig:
    """How CTs and label maps are prepared.

    Attributes:
        spacing: Voxel size in mm to which everything is resampled.
        hu_range: Intensities are clipped to this range of HU, then scaled to (HU + 100) / 1000.
        organs: TG-263 names of the organs to segment; null takes every organ found in the training data.
        small_organs: Organs that get a heat map and a branch of their own; null applies `small_voxels`.
        small_voxels: An organ whose mean size in voxels of the original grids is below this is small.
        roi_scale: Side of an organ's ROI as a multiple of its mean extent, per axis.
        roi_size: One fixed ROI size in voxels for all small organs; null derives it from `roi_scale`.
        body_margin_mm: Margin kept around the body when the volume is cropped to it.
    """

    spacing: tuple[float, float, float] = (2.5, 1.0, 1.0)
    hu_range: tuple[float, float] = (-1024.0, 3071.0)
    organs: list[str] | None = None
    small_organs: list[str] | None = None
    small_voxels: int = 1000
    roi_scale: float = 3.0
    roi_size: Triple | None = None
    body_margin_mm: float = 10.0


@dataclass
class ModelConfig:
    """The layout of S-Net, SOL-Net and SOS-Net.

    Attributes:
        network: What segments all organs: "snet", or in its place "unet" or "deeplab", to compare with.
        widths: Channels of the SE-residual blocks of each resolution, finest first.
        downsampling: Stride of the max-pooling in front of every resolution but the finest.
        stem_kernel: Kernel of the first convolution and of the first SE-residual block.
        dilated_blocks: Number of SE-residual blocks with in-plane dilation 2 before DenseASPP.
        aspp_dilations: One dilation per DenseASPP branch; an empty list leaves DenseASPP out.
        aspp_growth: Channels each branch adds.
        aspp_bottleneck: Channels of each branch's 1x1x1 convolution.
        se_reduction: Squeeze-excite's hidden layer has channels / se_reduction units.
        norm: Normalisation of every block.
        sos_input: "features" pools decoder and encoder features, image and heat map; "raw" pools the image only.
        sos_width: Channels of the blocks of an SOS branch.
        backend: "fused" computes the layers with focuskernels, "reference" with stock PyTorch, to check the former; the
            weights are the same.
    """

    network: Network = "snet"
    widths: list[list[int]] = field(default_factory=lambda: [[32], [48, 64]])
    downsampling: list[Triple] = field(default_factory=lambda: [(1, 2, 2)])
    stem_kernel: Triple = (1, 3, 3)
    dilated_blocks: int = 2
    aspp_dilations: list[Triple] = field(default_factory=lambda: [(1, 3, 3), (1, 6, 6), (1, 12, 12), (1, 18, 18)])
    aspp_growth: int = 32
    aspp_bottleneck: int = 64
    se_reduction: int = 4
    norm: Norm = "batch"
    sos_input: Literal["features", "raw"] = "features"
    sos_width: int = 32
    backend: Backend = "fused"

    def check_resolutions(self) -> None:
        """Refuse numbers of `widths` and strides that do not fit.

        Raises:
            FocusNetError: they do not; names both.
        """
        if len(self.widths) != len(self.downsampling) + 1:
            raise FocusNetError(
                f"model.widths lists {len(self.widths)} resolutions, expected one more than the "
                f"{len(self.downsampling)} strides of model.downsampling"
            )


@dataclass
class LossConfig:
    """Weights of the losses.

    Attributes:
        gamma: Focusing exponent of the focal loss (equation 1).
        alpha: Focal weight of the background and of every organ, in the paper "inverse to the average size"; null takes
            0.5 and sqrt(mean volume of all organs / volume of the organ), clipped to 0.25..8 (docs/model.md says why).
            A list of one value: the same for all.
        dice_weight: Weight of the dice loss, a sum over classes (equation 2), beside the focal loss.
        smooth: Added to numerator and denominator of every dice ratio, in voxels. With 0, the paper's value, an organ
            that a crop does not hold has no dice gradient; anything larger rewards a network for never predicting it.
        heatmap_sigma_mm: Standard deviation of the Gaussian heat maps.
        heatmap_error: "squared", as in the paper, or "cross_entropy": its gradient does not vanish where a map is near
            zero, so that the map of an organ that is hard to find does not stay there.
        heatmap_weight: Weight of the heat maps' error when all parts train together.
        sos_weight: Weight of the small organs' branches when all parts train together.
    """

    gamma: float = 2.0
    alpha: list[float] | None = None
    dice_weight: float = 1.0
    smooth: float = 0.0
    heatmap_sigma_mm: float = 5.0
    heatmap_error: Literal["squared", "cross_entropy"] = "squared"
    heatmap_weight: float = 2.0
    sos_weight: float = 1.0


@dataclass
class StageConfig:
    """One stage of training.

    Attributes:
        epochs: Number of epochs; 0 skips the stage.
        optimizer: "sgd" has momentum 0.9.
        lr: Peak learning rate.
        weight_decay: L2 penalty.
        warmup: Epochs over which the learning rate rises exponentially to `lr`.
        schedule: "step" multiplies the rate by `decay` after each of `milestones`; "cosine" lets it fall to zero.
        milestones: Fractions of `epochs`.
        decay: Factor of the "step" schedule.
    """

    epochs: int = 300
    optimizer: Literal["sgd", "adam"] = "adam"
    lr: float = 4e-4
    weight_decay: float = 5e-4
    warmup: int = 0
    schedule: Literal["step", "cosine"] = "step"
    milestones: list[float] = field(default_factory=lambda: [1 / 3, 2 / 3])
    decay: float = 0.25


@dataclass
class AugmentConfig:
    """Random changes of a training crop, each drawn up to a largest value; 0 leaves it out.

    Attributes:
        rotation_deg: Largest rotation about the z, y and x axis.
        zoom: Largest relative change of size along z, y and x.
        elastic_mm: Largest displacement of a control point of a smooth deformation, along each axis.
        elastic_grid_mm: Distance of these control points.
        contrast: Largest relative change of HU above 0, as between tube voltages; water and air stay what they are.
        blur_mm: Largest standard deviation of a blur in plane, as of a softer reconstruction kernel, in a quarter of
            the crops.
        slice_mm: Largest thickness of slices, as if the CT had been taken so, in a quarter of the crops.
        noise_hu: Largest standard deviation of added noise.
        shift_hu: Largest shift of all intensities.
        mirror: Mirror left and right in half of the crops, swapping the labels of paired organs.
    """

    rotation_deg: tuple[float, float, float] = (10.0, 5.0, 5.0)
    zoom: tuple[float, float, float] = (0.1, 0.2, 0.2)
    elastic_mm: float = 0.0
    elastic_grid_mm: float = 48.0
    contrast: float = 0.0
    blur_mm: float = 0.0
    slice_mm: float = 0.0
    noise_hu: float = 10.0
    shift_hu: float = 20.0
    mirror: bool = False


def _snet_stage() -> StageConfig:
    return StageConfig(epochs=600, optimizer="sgd", lr=0.1, weight_decay=5e-4, warmup=5, decay=0.1)


def _sos_stage() -> StageConfig:
    return StageConfig(epochs=300, lr=2e-4, weight_decay=1e-4, milestones=[])


def _joint_stage() -> StageConfig:
    return StageConfig(epochs=100, lr=1e-4, weight_decay=1e-4, milestones=[2 / 3])


@dataclass
class TrainConfig:
    """Training: S-Net, then SOL-Net, then SOS-Net, each with what came before fixed, then all of it end to end.

    Attributes:
        crop: Size in voxels of training crops and of prediction windows.
        batch_size: Crops per step; several processes share them.
        steps_per_epoch: Steps per epoch; 0 shows every training case once.
        organ_crops: Share of crops that are centred near a randomly chosen organ.
        validation: Share of the cases held out to choose the checkpoint; at least one.
        validation_cases: Names of the held-out cases; null draws them.
        validate_every: Epochs between validations; the last epoch of a stage is always validated.
        seed: Seed of everything random.
        workers: Processes that load data, of each training process; 0 loads in that.
        amp: Compute in bfloat16 where that is safe.
        ema: Decay per step, such as 0.999, of a running average of the weights, which validation, prediction and the
            next stage then use; 0 leaves it out.
    """

    crop: Triple = (40, 192, 192)
    batch_size: int = 1
    steps_per_epoch: int = 0
    organ_crops: float = 0.5
    validation: float = 0.15
    validation_cases: list[str] | None = None
    validate_every: int = 10
    seed: int = 0
    workers: int = 2
    amp: bool = False
    ema: float = 0.0
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    snet: StageConfig = field(default_factory=_snet_stage)
    sol: StageConfig = field(default_factory=StageConfig)
    sos: StageConfig = field(default_factory=_sos_stage)
    joint: StageConfig = field(default_factory=_joint_stage)


@dataclass
class PredictConfig:
    """Prediction.

    Attributes:
        overlap: Share by which neighbouring windows overlap along each axis.
        min_peak: A small organ whose heat map stays below this, or whose branch finds nothing, keeps S-Net's own
            segmentation.
        largest_component: Keep the largest connected part alone of every organ that S-Net segments.
    """

    overlap: float = 0.5
    min_peak: float = 0.2
    largest_component: bool = True


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, (int, float)):
        yield value


def _each(holds: Callable[[float], bool]) -> Callable[[Any], bool]:
    """A condition on every number in a setting."""
    return lambda value: all(math.isfinite(n) and holds(n) for n in _numbers(value))


# what is expected, whether a value is that, and the settings of which it is expected
_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "above 0",
        _each(lambda n: n > 0),
        "data.spacing data.roi_scale loss.heatmap_sigma_mm train.*.lr train.*.decay",
    ),
    (
        "at least 0",
        _each(lambda n: n >= 0),
        "data.small_voxels data.body_margin_mm model.dilated_blocks loss.gamma loss.alpha loss.smooth loss.*_weight "
        "train.steps_per_epoch train.seed train.workers train.augment.*_hu train.augment.*_mm train.*.epochs "
        "train.*.warmup train.*.weight_decay",
    ),
    (
        "at least 1",
        _each(lambda n: n >= 1),
        "model.widths model.downsampling model.aspp_* model.se_reduction model.sos_width train.batch_size "
        "train.validate_every train.augment.elastic_grid_mm",
    ),
    ("at least 2", _each(lambda n: n >= 2), "data.roi_size"),
    (f"at least {LEAST_CROP}", _each(lambda n: n >= LEAST_CROP), "train.crop"),
    ("odd and positive", _each(lambda n: n > 0 and n % 2 == 1), "model.stem_kernel"),
    ("from 0 to 180", _each(lambda n: 0 <= n <= 180), "train.augment.rotation_deg"),
    ("from 0 to 1", _each(lambda n: 0 <= n <= 1), "train.organ_crops train.*.milestones predict.min_peak"),
    (
        "at least 0 and below 1",
        _each(lambda n: 0 <= n < 1),
        "train.validation train.ema train.augment.zoom train.augment.contrast predict.overlap",
    ),
    ("below 2^63", _each(lambda n: n < 2**63), "train.seed"),
    ("finite", _each(math.isfinite), "data.hu_range"),
    ("in ascending order", lambda v: all(a < b for a, b in pairwise(v)), "data.hu_range train.*.milestones"),
    ("at most 4 strides", lambda v: len(v) <= 4, "model.downsampling"),
    ("at least one block at every resolution", all, "model.widths"),
    ("null or a list that is not empty", lambda v: v != [], "data.organs loss.alpha train.validation_cases"),
)


@dataclass
class Config:
    """The whole configuration."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    predict: PredictConfig = field(default_factory=PredictConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers and numbers, as a checkpoint or a YAML file holds them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """The inverse of `to_dict`; checks names, types and values.

        Raises:
            FocusNetError: an unknown setting, a wrong type or value.
        """
        from jsonargparse import ArgumentError, ArgumentParser

        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls, "config")
        try:
            config: Config = parser.instantiate(parser.parse_object({"config": values})).config
        except ArgumentError as error:
            raise FocusNetError(f"wrong configuration: {' '.join(str(error).split())}") from error
        config.check()
        return config

    def check(self) -> None:
        """Check what types cannot tell.

        Raises:
            FocusNetError: a value out of range, or settings that contradict each other; names setting and value.
        """
        settings = settings_of(self)
        for expected, holds, patterns in _RULES:
            for name, value in settings.items():
                if any(fnmatchcase(name, pattern) for pattern in patterns.split()) and not holds(value):
                    raise FocusNetError(f"{name} is {value}, expected {expected}")
        self.model.check_resolutions()
        augment, crop = self.train.augment, self.train.crop
        # then displacements of neighbours differ by less than their distance: nothing folds, and all can be undone
        if augment.elastic_mm > augment.elastic_grid_mm / 6:
            raise FocusNetError(
                f"train.augment.elastic_mm is {augment.elastic_mm}, expected at most a sixth of "
                f"train.augment.elastic_grid_mm, {augment.elastic_grid_mm}"
            )
        # the norms need more than one voxel at the lowest resolution
        lowest = tuple(2 * stride for stride in total_stride(self.model.downsampling))
        if any(side < least for side, least in zip(crop, lowest)):
            raise FocusNetError(
                f"train.crop is {crop}, expected at least {lowest}, twice the total stride of model.downsampling"
            )


def total_stride(strides: list[Triple]) -> Triple:
    """Voxels per voxel of the lowest resolution."""
    z, y, x = (math.prod(along) for along in zip((1, 1, 1), *strides, strict=True))
    return z, y, x


def settings_of(section: Any, prefix: str = "") -> dict[str, Any]:
    """Every setting by its name on the command line."""
    found: dict[str, Any] = {}
    for one in dataclasses.fields(section):
        name, value = prefix + one.name, getattr(section, one.name)
        found |= settings_of(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return found
