"""Predicted memory and FLOPs against what a step really takes."""

import math

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
from focusnet.errors import FocusNetError
from focusnet.inference import segment
from focusnet.plan import MemoryLedger, assumed_plan, main, predict_estimate, train_estimate
from focusnet.train import STAGES, make_optimizer, set_trained, stage_loss

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


def test_command(capsys) -> None:
    assert main(["--shape", "160", "512", "512", "--config", "demo", "--small", "1"]) == 0
    printed = capsys.readouterr().out
    assert "9 organs, 1 of them small with an ROI of (8, 64, 64); float32" in printed
    assert all(name in printed for name in [*STAGES, "predict", "160 x 512 x 512", "24 x 40 x 40"])
    with pytest.raises(FocusNetError, match=r"--shape \(1, 512, 512\)"):
        main(["--shape", "1", "512", "512"])
    with pytest.raises(FocusNetError, match="--small 10"):
        main(["--shape", "8", "16", "16", "--organs", "9", "--small", "10"])
    with pytest.raises(FocusNetError, match="--device tpu"):
        main(["--shape", "8", "16", "16", "--device", "tpu"])
