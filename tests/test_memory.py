"""Predicted memory and FLOPs against what a step really takes; needs no package but torch, so that it runs anywhere."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import focuskernels.flops  # noqa: F401  registers the formulas
from bench.measure import CpuTimer
from focuskernels.nn import DenseASPP3d, SEResBlock3d
from focuskernels.reference.nn import to_reference
from focusnet.checkpoint import Model, build_network
from focusnet.config import Config, DataConfig, ModelConfig, Triple
from focusnet.data.crops import Crop
from focusnet.data.plan import CaseRecord, Plan
from focusnet.errors import FocusNetError
from focusnet.inference import segment
from focusnet.memory import (
    SPARE,
    MemoryLedger,
    assumed_plan,
    crop_with,
    fitting_crop,
    largest_crop,
    predict_estimate,
    train_estimate,
    whole_crop,
)
from focusnet.stages import STAGES, make_optimizer, set_trained, stage_loss

#: Of predicted and measured peak. What oneDNN takes for itself depends on the shape; 3 % was the most in docs/model.md.
#: Not yet measured on a GPU.
BOUND = 0.1
ORGANS, SMALL, ROI = 5, 2, (6, 12, 12)


def configuration() -> Config:
    aspp = {"aspp_growth": 8, "aspp_bottleneck": 16, "aspp_dilations": [(1, 2, 2), (1, 4, 4)]}
    model = ModelConfig(widths=[[8], [16, 24]], dilated_blocks=1, sos_width=8, **aspp)
    config = Config(model=model, data=DataConfig(roi_size=ROI))
    config.train.crop = (12, 24, 24)
    return config


def real_step(config: Config, stage: str, shape: Triple, device: str):
    """The second step of a stage, to be called; and the bytes that are there before."""
    plan = assumed_plan(config, ORGANS, SMALL, ROI)
    network = build_network(config, plan).to(device)
    model = Model(network, config, plan, ("snet", "sol", "sos"))
    parameters = set_trained(network, stage)
    optimizer = make_optimizer(parameters, getattr(config.train, stage))
    crop = Crop(
        torch.randn(1, 1, *shape),
        torch.randint(0, ORGANS + 1, (1, *shape), dtype=torch.uint8),
        torch.ones(1, ORGANS + 1, dtype=torch.bool),
        torch.tensor([[[side / 2 for side in shape]] * SMALL]),
    )
    crop = Crop(*(tensor.to(device) for tensor in crop))
    alpha = torch.ones(ORGANS + 1, device=device)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=config.train.amp):
            loss = stage_loss(model, stage, crop, alpha)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return (), {}

    step()
    state = [value for values in optimizer.state.values() for value in values.values()]
    there = [*network.parameters(), *network.buffers(), *(p.grad for p in parameters), *state, *crop]
    return step, sum(tensor.nbytes for tensor in there)


@pytest.mark.parametrize("stage", STAGES)
def test_memory_of_a_step(stage: str) -> None:
    config, shape = configuration(), (16, 40, 32)
    step, before = real_step(config, stage, shape, "cpu")
    measured = before + CpuTimer(2**12).peak(step)
    predicted = train_estimate(config, assumed_plan(config, ORGANS, SMALL, ROI), stage, shape)
    assert predicted.peak == pytest.approx(measured, rel=BOUND)


@pytest.mark.gpu
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_memory_of_a_step_on_a_gpu(stage: str, amp: bool) -> None:
    config = configuration()
    config.train.amp = amp
    step, _ = real_step(config, stage, (32, 96, 96), "cuda")
    torch.cuda.reset_peak_memory_stats()
    step()
    predicted = train_estimate(config, assumed_plan(config, ORGANS, SMALL, ROI), stage, (32, 96, 96), "cuda")
    assert predicted.peak == pytest.approx(torch.cuda.max_memory_allocated(), rel=BOUND)


def test_memory_of_a_prediction() -> None:
    config, shape = configuration(), (20, 40, 36)
    plan = assumed_plan(config, ORGANS, SMALL, ROI)
    network, image = build_network(config, plan).eval(), torch.randn(shape)
    labels = [ORGANS - 1, ORGANS]

    def predict():
        segment(network, image, labels, window=config.train.crop, overlap=0.5, min_peak=0.0)
        return (), {}

    predict()
    weights = sum(t.nbytes for t in [*network.parameters(), *network.buffers()])
    measured = weights + CpuTimer(2**12).peak(predict)
    assert predict_estimate(config, plan, shape).peak == pytest.approx(measured, rel=BOUND)


def test_what_is_weights_saved_and_workspace() -> None:
    config, shape = configuration(), (12, 24, 24)
    plan = assumed_plan(config, ORGANS, SMALL, ROI)
    found = train_estimate(config, plan, "joint", shape)
    network = build_network(config, plan)
    parameters = sum(p.nbytes for p in network.parameters())
    buffers = sum(b.nbytes for b in network.buffers())
    # Adam has two numbers per weight and a step count per tensor; some gradients do not exist yet at the peak
    steps = 4 * len(list(network.parameters()))
    assert 3 * parameters + buffers + steps <= found.weights <= 4 * parameters + buffers + steps
    voxels = math.prod(shape)
    assert found.saved > 4 * voxels * 3 * 8  # stem, both inputs of the first block's convolutions
    assert found.backward == pytest.approx(2 * found.forward, rel=0.02)  # the image has no gradient


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_flops_are_those_of_stock_pytorch(norm: str) -> None:
    counts = []
    for convert in (lambda network: network, to_reference):
        network = convert(
            torch.nn.Sequential(SEResBlock3d(2, 8, norm=norm), DenseASPP3d(8, 4, 6, [1, (1, 2, 2)], norm))
        )
        with FlopCounterMode(display=False) as counter:
            network(torch.randn(2, 2, 4, 6, 5, requires_grad=True)).sum().backward()
        counts.append(counter.get_flop_counts()["Global"])
    products = [sum(n for op, n in count.items() if "mm" not in str(op)) for count in counts]
    assert products[0] == products[1] > 0


def test_the_ledger_counts_what_is_alive() -> None:
    ledger = MemoryLedger("cpu")
    with ledger:
        a = torch.zeros(1000)
        b = a.view(10, 100)[3:] + 1
        del a
        a = torch.zeros(100)
    assert sum(ledger.alive.values()) == b.nbytes + a.nbytes
    assert sum(ledger.peak.values()) == 4000 + b.nbytes
    with MemoryLedger("cuda") as rounded:
        c = torch.zeros(3)
    assert sum(rounded.alive.values()) == 512 and c.nbytes == 12


@pytest.mark.parametrize("share", [1.5, 0.99, 0.5, 0.03])
@pytest.mark.parametrize(
    "per_voxel",
    [lambda v: 1.0, lambda v: 1 + 1e6 / v, lambda v: 1 - 0.3 * min(1, v / 8e6)],
    ids=["line", "fixed", "kink"],
)
def test_few_runs_find_the_largest_crop(per_voxel, share: float) -> None:
    whole, runs = (160, 512, 512), []

    def peak(crop: Triple) -> int:
        runs.append(crop)
        return round(math.prod(crop) * per_voxel(math.prod(crop)))

    limit = share * math.prod(whole)
    found = largest_crop(peak, limit, whole, [(1, 2, 2)])
    assert peak(found) <= limit
    assert found == whole or peak(found) > 0.95 * limit
    assert len(runs) <= 8  # two of them here
    assert largest_crop(peak, 100.0, whole, [(1, 2, 2)]) is None


def test_crops_of_the_proportions_of_a_volume() -> None:
    strides = [(1, 2, 2), (2, 2, 2)]
    assert whole_crop((157, 511, 2), strides) == (158, 512, 8)
    whole = (160, 512, 512)
    assert crop_with(math.prod(whole), whole, strides) == whole
    assert crop_with(2 * math.prod(whole), whole, strides) == (200, 644, 644)
    for share in (0.9, 0.5, 0.1, 0.01):
        crop = crop_with(share * math.prod(whole), whole, strides)
        larger = [side + stride for side, stride in zip(crop, (2, 4, 4), strict=True)]
        assert math.prod(crop) <= share * math.prod(whole) < math.prod(larger)
        assert all(side % stride == 0 for side, stride in zip(crop, (2, 4, 4), strict=True))
    assert crop_with(8**3, whole, strides) == (8, 8, 8)
    assert crop_with(8**3 - 1, whole, strides) is None
    assert crop_with(-1.0, whole, strides) is None


def plan_of_cases(config: Config) -> Plan:
    cases = [CaseRecord(str(shape), shape, [], {}) for shape in [(19, 40, 36), (16, 47, 30)]]
    return replace(assumed_plan(config, ORGANS, SMALL, ROI), cases=cases)


def test_the_largest_crop_that_fits() -> None:
    config, plan = configuration(), plan_of_cases(configuration())
    config.train.batch_size = 4
    config.train.sol.epochs = config.train.sos.epochs = config.train.joint.epochs = 0
    memory = 0.02
    crop = fitting_crop(config, plan, str(memory), torch.device("cpu"), processes=2)
    config.train.batch_size = 2
    limit = (1 - SPARE) * memory * 1e9
    assert 0.9 * limit < train_estimate(config, plan, "snet", crop).peak <= limit
    assert math.prod(crop) < math.prod((19, 48, 36))


def steps(**per_voxel: float):
    """In the place of `peaks_of`: so many bytes per voxel; prediction takes 50 per voxel of the whole CT too."""

    def peaks(config: Config, plan: Plan, shape: Triple, device_type: str):
        batch = config.train.batch_size
        factor = {"fused": 1, "reference": 3}[config.model.backend]
        training = {n: lambda crop, b=b: round(factor * b * batch * math.prod(crop)) for n, b in per_voxel.items()}
        return {**training, "predict": lambda crop: 100 * math.prod(crop) + 50 * math.prod(shape)}

    return peaks


def test_every_stage_that_is_trained_fits(monkeypatch) -> None:
    monkeypatch.setattr("focusnet.memory.peaks_of", steps(joint=2000, sos=500, sol=3000, snet=1000))
    config, plan, cpu = configuration(), plan_of_cases(configuration()), torch.device("cpu")
    whole, least = 19 * 48 * 36, 8**3  # voxels
    assert fitting_crop(config, plan, f"{3000 * whole / 0.9e9}", cpu) == (19, 48, 36)
    crop = fitting_crop(config, plan, f"{0.5 * 3000 * whole / 0.9e9}", cpu)
    assert 0.4 * whole < math.prod(crop) <= 0.5 * whole
    config.train.sol.epochs = 0  # the next most is 2000
    assert math.prod(fitting_crop(config, plan, f"{0.5 * 3000 * whole / 0.9e9}", cpu)) > 0.6 * whole
    with pytest.raises(FocusNetError, match=r"--memory 0.001: joint takes more than 0.0009 GB with any crop"):
        fitting_crop(config, plan, "0.001", cpu)
    monkeypatch.setattr("focusnet.memory.peaks_of", steps(snet=1))
    with pytest.raises(FocusNetError, match=r"predict takes more than .* any crop of a case of 19 x 47 x 36 voxels"):
        fitting_crop(config, plan, f"{(100 * least + 49 * whole) / 0.9e9}", cpu)


@pytest.mark.parametrize("memory", ["auto", "0", "nan", "much"])
def test_memory_is_a_number(memory: str) -> None:
    config = configuration()
    with pytest.raises(FocusNetError, match=f"^--memory {memory}: expected GB above 0; auto is for training on a GPU$"):
        fitting_crop(config, plan_of_cases(config), memory, torch.device("cpu"))
