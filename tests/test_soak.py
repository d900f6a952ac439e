"""Long runs and extreme numbers: memory stays flat over thousands of steps, and losses and gradients stay finite."""

import os
import resource
import statistics
from pathlib import Path

import pytest
import torch

from focusnet.checkpoint import Model, build_network
from focusnet.config import StageConfig
from focusnet.data.crops import Crop
from focusnet.losses import focal_alpha
from focusnet.prepare import prepare
from focusnet.stages import STAGES, make_optimizer, set_trained, stage_loss
from focusnet.train import start_training
from focusnet.trainer import Trainer
from tests.tiny import tiny_config, write_data

EPOCHS, STEPS = 5, 100  # of each of the four stages: 2,000 steps
# what allocators and caches may still take from a stage's second epoch on; to keep one crop's image (8 x 16 x 16,
# float32) a step would be 2.5 MB
GROWTH_MB = 2.0


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def soak(folder: Path, epochs: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """Resident memory in MB after every step, by stage."""
    memory: dict[str, list[float]] = {stage: [] for stage in STAGES}
    step = Trainer._step

    def step_and_look(self, stage, *arguments):
        loss = step(self, stage, *arguments)
        memory[stage].append(_resident_mb())
        return loss

    monkeypatch.setattr(Trainer, "_step", step_and_look)
    stages = {stage: StageConfig(epochs=epochs, optimizer="adam", lr=1e-4) for stage in STAGES}
    config = tiny_config(**stages, steps_per_epoch=steps, validate_every=1)
    data = write_data(folder / "data")
    start_training(data, folder / "run", config, cache=folder / "cache", device=torch.device("cpu"))
    return memory


@pytest.mark.nightly
def test_two_thousand_steps_in_flat_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = len(os.listdir("/proc/self/fd"))
    memory = soak(tmp_path, EPOCHS, STEPS, monkeypatch)
    assert sum(map(len, memory.values())) == 2000
    growth = {}
    for stage, found in memory.items():
        second, last = (statistics.median(found[start : start + STEPS]) for start in (STEPS, (EPOCHS - 1) * STEPS))
        growth[stage] = last - second
        print(f"{stage}: {second:.1f} MB in epoch 2, {last:.1f} MB in epoch {EPOCHS}")
    assert max(growth.values()) < GROWTH_MB, growth
    assert len(os.listdir("/proc/self/fd")) == files


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("numerics")
    config = tiny_config()
    plan = prepare(write_data(folder / "data", 2), folder / "cache", config.data)
    return Model(build_network(config, plan), config, plan, ())


def _crop(model: Model, fill: float | None) -> Crop:
    """Two samples, constant or random, with random labels; the first sample's labels are the background alone."""
    shape, organs = model.config.train.crop, len(model.plan.organs)
    image = torch.randn(2, 1, *shape) if fill is None else torch.full((2, 1, *shape), fill)
    labels = torch.randint(0, organs + 1, (2, *shape), dtype=torch.uint8)
    labels[0] = 0
    centers = torch.tensor([3.0, 8.0, 8.0]).expand(2, len(model.plan.small_organs), 3).clone()
    centers[0, 0] = float("nan")
    return Crop(image, labels, torch.ones(2, organs + 1, dtype=torch.bool), centers)


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fill", [0.0, 3.171, None], ids=["zero", "metal", "random"])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_step_stays_finite(model: Model, norm: str, dtype: torch.dtype, fill: float | None, scale: float) -> None:
    """Constant volumes have no variance, and heads scaled by 1e4 give logits near the largest float16."""
    model.config.model.norm = norm
    model.network = build_network(model.config, model.plan)
    for name, parameter in model.network.named_parameters():
        if name.endswith("head.weight"):
            parameter.data.mul_(scale)
    parameters = set_trained(model.network, "joint")
    optimizer = make_optimizer(parameters, StageConfig(optimizer="adam", lr=1e-3))
    alpha = focal_alpha(model.plan, model.config.loss)
    crop = _crop(model, fill)
    if scale > 1 and fill is None:
        assert model.network.snet(crop.image).logits.abs().max() > 1000
    for _ in range(2):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = stage_loss(model, "joint", crop, alpha)
        assert loss is not None and loss.isfinite()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        assert len(gradients) == len(parameters) and all(gradient.isfinite().all() for gradient in gradients)
        optimizer.step()
        assert all(parameter.isfinite().all() for parameter in parameters)
