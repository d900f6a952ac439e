"""Memory and FLOPs of a step of training or of a prediction, before anything runs, and the largest crop that fits.

Each stage's own code runs on tensors without data (`FakeTensorMode`: the meta device knows no autocast), and a
dispatch mode counts what is alive. `torch.distributed._tools.MemTracker` does so too, but it is private, cannot
look inside an op, and at a peak in forward does not tell what backward will need from what is about to go.
"""

import copy
import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from focuskernels import heatmap_argmax_3d
from focuskernels.flops import bodies_of

from .checkpoint import Model, build_network
from .config import LEAST_CROP, Config, LossConfig, StageConfig, Triple, total_stride
from .data.crops import Crop
from .data.plan import OrganPlan, Plan
from .errors import FocusNetError
from .inference import Windows, padded_size, window_starts
from .losses import rois_loss
from .model import FocusNet, SNetOutput
from .stages import STAGES, make_optimizer, set_trained, stage_loss

PREDICT = "predict"
#: CUDA's caching allocator hands out multiples of this.
CUDA_BLOCK = 512
#: Name of what an op allocates and frees itself.
INSIDE = -1
#: How often a search for the largest crop asks for a peak.
MOST_RUNS = 6
#: Share of the memory that stays free for what is not predicted: the vendor's libraries, gaps between allocations.
SPARE = 0.1


@dataclass(frozen=True)
class Estimate:
    """One step of training, or the prediction of one CT.

    Attributes:
        weights: Bytes of weights, norm statistics, gradients of weights and state of the optimizer.
        saved: Bytes alive at the peak that are kept until backward, the batch itself included. In prediction, what is
            kept from window to window.
        workspace: Bytes alive at the peak that are not.
        forward: FLOPs of convolutions and matrix products.
        backward: FLOPs of their gradients.
    """

    weights: int
    saved: int
    workspace: int
    forward: int
    backward: int

    @property
    def peak(self) -> int:
        """Bytes."""
        return self.weights + self.saved + self.workspace


class MemoryLedger(TorchDispatchMode):
    """Keeps account of every storage that ops return while it is active, until it is freed; `peak` is what was alive
    when most was.

    Args:
        device_type: Whose allocations: those inside of ops that consist of others, and to which size they are rounded.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self._bodies = bodies_of(device_type)
        self._block = CUDA_BLOCK if device_type == "cuda" else 1
        self._counter = itertools.count()
        self._bytes = 0
        self._most = 0
        self._names: dict[int, int] = {}  # by address, which is used again
        self.alive: dict[int, int] = {}
        self.peak: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op and count its results."""
        body = self._bodies.get(func)
        if body is None:
            result = func(*args, **(kwargs or {}))
        else:
            with self:
                result = body(*args)
        self.add(tree_leaves(result))
        self._note_peak(_inside(func, args, self.device_type))
        return result

    def add(self, values: Iterable[Any]) -> set[int]:
        """Count the storages of the tensors among `values` that are new; returns the names of all of them."""
        names = set()
        for value in values:
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            address = storage._cdata
            if address not in self._names:
                name = self._names[address] = next(self._counter)
                self.alive[name] = -(-storage.nbytes() // self._block) * self._block
                self._bytes += self.alive[name]
                weakref.finalize(storage, self._free, address)
            names.add(self._names[address])
        self._note_peak()
        return names

    def _note_peak(self, inside: int = 0) -> None:
        if self._bytes + inside > self._most:
            self._most, self.peak = self._bytes + inside, {**self.alive, INSIDE: inside}

    def _free(self, address: int) -> None:
        self._bytes -= self.alive.pop(self._names.pop(address))


def _inside(op: Any, args: Any, device_type: str) -> int:
    """Bytes that an op takes for itself, where they are of a map's size. What cuDNN takes is not known beforehand."""
    if op is torch.ops.aten.upsample_trilinear3d_backward.default:
        grad: Tensor = args[0]
        # the gradient of one of concatenated maps is copied; CUDA wants it with channels first
        layout = torch.contiguous_format if device_type == "cuda" else torch.channels_last_3d
        return 0 if grad.is_contiguous(memory_format=layout) else grad.nbytes
    if op is torch.ops.focuskernels.dilated_conv3d_grad_weight.default and device_type == "cpu":
        _, x, weight, *_ = args
        return x.nbytes if weight.shape[2:].numel() > 1 else 0  # in oneDNN's own layout
    return 0


def train_estimate(config: Config, plan: Plan, stage: str, shape: Triple, device_type: str = "cpu") -> Estimate:
    """One step of a stage on crops of `shape`, all small organs inside; the optimizer has made steps before.

    Args:
        config: The configuration; `train.crop` is passed over.
        plan: The organs.
        stage: "snet", "sol", "sos" or "joint".
        shape: Of a crop.
        device_type: "cpu" or "cuda".
    """
    mode, model = _without_data(config, plan)
    parameters = set_trained(model.network, stage)
    settings: StageConfig = getattr(config.train, stage)
    ledger = MemoryLedger(device_type)
    with mode:
        crop, alpha = _crop(plan, config.train.batch_size, shape), torch.empty(len(plan.organs) + 1)
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        batch = ledger.add(crop)
        weights = ledger.add([*model.network.parameters(), *model.network.buffers(), *(p.grad for p in parameters)])
        with ledger, FlopCounterMode(display=False) as counter:
            with autocast(config):
                loss = stage_loss(model, stage, crop, alpha, _loss_of_every_organ)
            assert loss is not None
            forward, saved = counter.get_total_flops(), batch | set(ledger.alive)
            for parameter in parameters:  # as the step does, between forward and backward
                parameter.grad = None
            loss.backward()
            backward = counter.get_total_flops() - forward
        weights |= ledger.add(p.grad for p in parameters)
    return _estimate(ledger, weights, saved, _optimizer_bytes(parameters, settings), forward, backward)


def predict_estimate(config: Config, plan: Plan, shape: Triple, device_type: str = "cpu") -> Estimate:
    """One CT of `shape` on the network's grid, in windows of `train.crop`, with all small organs in one window."""
    mode, model = _without_data(config, plan)
    network = model.network.eval()
    ledger = MemoryLedger(device_type)
    with mode, torch.no_grad():  # not inference_mode, in which PyTorch would take some ops apart
        padded, size = padded_size(shape, config.train.crop, network.snet.strides)
        first, *others = window_starts(padded, size, config.predict.overlap)
        weights = ledger.add([*network.parameters(), *network.buffers()])
        with ledger, FlopCounterMode(display=False) as counter:
            volume = torch.empty(padded)
            windows = Windows(network, volume, size)
            # the second window computes while the first one's features are still there; the others do as it does
            averages = windows.average([first, *others[:1]], with_heatmaps=True)
            window = counter.get_total_flops() // (1 + len(others[:1]))
            kept = ledger.add([volume, *averages])
            labels = averages[0].max(dim=0)
            heatmap_argmax_3d(averages[1][None])
            kept |= ledger.add(labels)
            windows = windows.holding(network.roi_sizes)
            image, snet, heatmaps = windows.run(first)
            before = counter.get_total_flops()
            organs = range(len(network.roi_sizes))
            network.segment_rois(organs, image, snet, heatmaps, torch.zeros(len(organs), 4, dtype=torch.int64))
            rois = counter.get_total_flops() - before
    return _estimate(ledger, weights, kept, 0, window * (2 + len(others)) + rois, 0)


def assumed_plan(config: Config, organs: int, small: int, roi_size: Triple) -> Plan:
    """A plan with so many organs, the last of them small, for which no data are needed."""

    def organ(number: int) -> OrganPlan:
        is_small = number >= organs - small
        size = (config.data.roi_size or roi_size) if is_small else None
        return OrganPlan(f"organ {number + 1}", 0, 0.0, 0.0, 0.0, (0.0, 0.0, 0.0), is_small, size, 1.0)

    return Plan(config.data.spacing, 0.5, [organ(number) for number in range(organs)])


def autocast(config: Config) -> AbstractContextManager[object]:
    """Of the tensors without data, which are on the CPU whatever device is asked for: no other needs to be there."""
    return torch.autocast("cpu", torch.bfloat16, enabled=config.train.amp)


def _without_data(config: Config, plan: Plan) -> tuple[FakeTensorMode, Model]:
    mode = FakeTensorMode()
    network = build_network(config, plan)
    with FakeCopyMode(mode):
        network = copy.deepcopy(network)
    return mode, Model(network, config, plan, ("snet", "sol", "sos"))


def _crop(plan: Plan, batch: int, shape: Triple) -> Crop:
    return Crop(
        torch.empty(batch, 1, *shape),
        torch.empty(batch, *shape, dtype=torch.uint8),
        torch.empty(batch, len(plan.organs) + 1, dtype=torch.bool),
        torch.empty(batch, len(plan.small_organs), 3),
    )


def _loss_of_every_organ(
    network: FocusNet, crop: Crop, snet: SNetOutput, heatmaps: Tensor, plan: Plan, config: LossConfig, *_: object
) -> Tensor:
    """`sos_loss` where every centre lies in its crop; which ones do cannot be told without data."""
    owners = [organ for _ in crop.image for organ in range(len(network.roi_sizes))]
    centers = torch.zeros(len(owners), 4, dtype=torch.int64)
    return rois_loss(network, crop, snet, heatmaps, owners, centers, plan, config)


def _optimizer_bytes(parameters: Sequence[nn.Parameter], settings: StageConfig) -> int:
    """Of the optimizer's state after a step."""
    shapes = [nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta")) for p in parameters]
    for parameter in shapes:
        parameter.grad = torch.empty_like(parameter)
    optimizer = make_optimizer(shapes, settings)
    for group in optimizer.param_groups:
        group["foreach"] = True  # all parameters at once, which is much faster here
    optimizer.step()
    return sum(value.nbytes for value in tree_leaves(list(optimizer.state.values())) if isinstance(value, Tensor))


def _estimate(
    ledger: MemoryLedger, weights: set[int], saved: set[int], optimizer: int, forward: int, backward: int
) -> Estimate:
    peak = ledger.peak
    of_weights = sum(size for key, size in peak.items() if key in weights)
    kept = sum(size for key, size in peak.items() if key in saved - weights)
    return Estimate(of_weights + optimizer, kept, sum(peak.values()) - of_weights - kept, forward, backward)


def peaks_of(config: Config, plan: Plan, shape: Triple, device_type: str) -> dict[str, Callable[[Triple], int]]:
    """Peak bytes as functions of the crop: of a step of every stage, and of the prediction of a CT of `shape`.

    The one that takes most comes first.
    """

    def prediction(crop: Triple) -> int:
        with_crop = replace(config, train=replace(config.train, crop=crop))
        return predict_estimate(with_crop, plan, shape, device_type).peak

    def step(stage: str, crop: Triple) -> int:
        return train_estimate(config, plan, stage, crop, device_type).peak

    return {**{stage: partial(step, stage) for stage in reversed(stages_of(plan))}, PREDICT: prediction}


def whole_crop(shape: Sequence[int], strides: list[Triple]) -> Triple:
    """The crop that holds a volume of `shape`: a multiple of the total stride, as large as crops must be at least."""
    d, h, w = (
        max(-(-side // stride), -(-LEAST_CROP // stride), 2) * stride
        for side, stride in zip(shape, total_stride(strides), strict=True)
    )
    return d, h, w


def crop_with(voxels: float, shape: Triple, strides: list[Triple]) -> Triple | None:
    """The largest crop of about the proportions of `shape` with at most so many voxels; None if there is none."""
    share = (max(voxels, 0) / math.prod(shape)) ** (1 / 3)
    # rounded down to the total stride
    sides = [int(share * side + 1e-6) // stride * stride for side, stride in zip(shape, total_stride(strides))]
    crop = whole_crop(sides, strides)
    return crop if math.prod(crop) <= voxels else None


def largest_crop(peak: Callable[[Triple], int], limit: float, shape: Triple, strides: list[Triple]) -> Triple | None:
    """The largest crop of about the proportions of `shape`, and no larger, whose peak is at most `limit`; or None.

    Peaks are nearly linear in voxels, so that the secant method needs few of them. It ends within 3 % of the limit.
    """
    found, before, last = None, (0, 0.0), (math.prod(shape), float(peak(shape)))
    if last[1] <= limit:
        return shape
    for _ in range(MOST_RUNS):
        if last[1] == before[1]:
            break
        voxels = last[0] + (limit - last[1]) / (last[1] - before[1]) * (last[0] - before[0])
        crop = crop_with(min(voxels, math.prod(shape)), shape, strides)
        if crop is None or math.prod(crop) in (before[0], last[0]):
            break
        before, last = last, (math.prod(crop), float(peak(crop)))
        if last[1] <= limit and (found is None or last[0] > math.prod(found)):
            found = crop
            if last[1] > 0.97 * limit:
                break
    return found


def fitting_crop(config: Config, plan: Plan, memory: str, device: torch.device, processes: int = 1) -> Triple:
    """The largest `train.crop`, up to the largest case, with which every stage is predicted to fit into memory.

    A tenth of the memory stays free. Crops have the proportions of the largest case.

    Args:
        config: The configuration; `train.crop` is passed over.
        plan: The plan of the data set.
        memory: Of the device in GB; or "auto" for what is free on a GPU.
        device: Where to train.
        processes: How many share a batch.

    Raises:
        FocusNetError: no crop fits, or no prediction of the largest case.
    """
    limit = (1 - SPARE) * bytes_of(memory, device)
    config = replace(config, train=replace(config.train, batch_size=config.train.batch_size // processes))
    largest = [max(sides) for sides in zip(*(case.shape for case in plan.cases), strict=True)]
    crop: Triple | None
    crop = whole = whole_crop(largest, config.model.downsampling)
    for name, peak in peaks_of(config, plan, whole, device.type).items():
        if name != PREDICT and not getattr(config.train, name).epochs:
            continue
        crop = largest_crop(peak, limit, crop, config.model.downsampling)
        if crop is None:
            raise FocusNetError(
                f"--memory {memory}: {name} takes more than {limit / 1e9:.3g} GB with any crop of a case of "
                f"{size_of(largest)} voxels; lower train.batch_size or take a coarser data.spacing"
            )
    return crop


def stages_of(plan: Plan) -> tuple[str, ...]:
    """All that there are; without small organs the first alone."""
    return STAGES if plan.small_organs else STAGES[:1]


def bytes_of(memory: str, device: torch.device) -> float:
    """Of `--memory`.

    Raises:
        FocusNetError: neither a number of GB nor "auto" on a GPU.
    """
    if memory == "auto" and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        gigabytes = float(memory)
    except ValueError:
        gigabytes = math.nan
    if not 0 < gigabytes < math.inf:
        auto = "or auto for what is free" if device.type == "cuda" else "auto is for training on a GPU"
        raise FocusNetError(f"--memory {memory}: expected GB above 0; {auto}")
    return gigabytes * 1e9


def size_of(sides: Sequence[int]) -> str:
    """In words."""
    return " x ".join(map(str, sides))
