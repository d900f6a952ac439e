"""What every module owes to PyTorch: copies, pickles, functional calls, DDP, CUDA graphs."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from processes import in_two_processes, needs_gloo
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import focuskernels.nn as fnn


class Network(nn.Module):
    """All modules, from a volume (N, 1, D, H, W) and labels to a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = fnn.DilatedConv3d(1, 4, bias=True)
        self.norm = fnn.NormAct3d(4, sync=True)
        self.block = fnn.SEResBlock3d(4, 6, norm="group")
        self.se = fnn.SEResidual3d(6)
        self.aspp = fnn.DenseASPP3d(6, 3, 4, [1, 2], norm="instance")
        self.gather = fnn.ROIGather3d(3, spatial_scales=[1, 1])
        self.align = fnn.ROIAlign3d(2)
        self.up = fnn.convert_sync_norm(fnn.UpSEResBlock3d(12 + 4, 12))
        self.head = nn.Conv3d(12, 3, 1)
        self.loss = fnn.FocalDiceLoss(alpha=[1.0, 2.0, 3.0])
        self.register_buffer("box", torch.tensor([[0, 1, 1, 3, 4, 4]]), persistent=False)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        stem = self.norm(self.stem(x))
        h = self.block(stem)
        h = self.aspp(self.se(h, h))
        h = self.up(nn.functional.max_pool3d(h, (1, 2, 2)), stem)
        samples = torch.arange(len(x), device=x.device)[:, None]
        rois = self.gather([h, x], torch.cat([samples, torch.full((len(x), 3), 2, device=x.device)], dim=1))
        boxes = torch.cat([samples, self.box.expand(len(x), -1)], dim=1)
        return self.loss(self.head(h), labels) + rois.square().mean() + self.align(h, boxes).square().mean()


def network() -> Network:
    torch.manual_seed(0)
    return Network()


def batch(size: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 1, 4, 5, 6, generator=generator)
    return x, torch.randint(0, 3, (size, 4, 5, 6), generator=generator)


def test_network_has_all_modules() -> None:
    held = {type(module).__name__ for module in network().modules()}
    assert {name for name in fnn.__all__ if isinstance(getattr(fnn, name), type)} <= held


def _saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved])
@pytest.mark.parametrize("training", [True, False])
def test_copies_and_pickles(copied: object, training: bool) -> None:
    module, arguments = network().train(training), batch()
    module(*arguments)  # a used module holds nothing that cannot be copied
    other = copied(module)  # type: ignore[operator]
    assert repr(other) == repr(module)
    assert {type(m) for m in other.modules()} == {type(m) for m in module.modules()}
    assert torch.equal(other(*arguments), module(*arguments))
    torch.testing.assert_close(other.state_dict(), module.state_dict(), rtol=0, atol=0)
    shared = {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in module.parameters()}
    assert not shared


def test_functional_call() -> None:
    module, arguments = network().eval(), batch()
    parameters = {name: p.detach() + 0.1 for name, p in module.named_parameters()}
    actual = torch.func.functional_call(module, parameters, arguments)
    assert not torch.equal(actual, module(*arguments))
    module.load_state_dict({**module.state_dict(), **parameters})
    assert torch.equal(actual, module(*arguments))


def distributed(rank: int, folder: Path) -> None:
    """One of two processes, each with half of the batch; gradients must be those of the whole one."""
    x, labels = (t[rank : rank + 1] for t in batch())
    module = network().double()
    parallel = DistributedDataParallel(module)
    for _ in range(2):
        module.zero_grad()
        parallel(x.double(), labels).backward()
    torch.save([p.grad for p in module.parameters()], folder / f"{rank}.pt")


@pytest.mark.slow
@needs_gloo
def test_distributed_data_parallel(tmp_path: Path) -> None:
    in_two_processes(distributed, tmp_path, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    x, labels = batch()
    module = network().double()
    # Both halves have as many voxels and the dice part is a mean over samples: the loss is the mean of theirs.
    module(x.double(), labels).backward()
    torch.testing.assert_close(first, [p.grad for p in module.parameters()])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graph() -> None:
    """A captured step, forward and backward, replays with new numbers; nothing in it waits for the device."""
    module = network().cuda()
    module.norm.sync = False
    x, labels = (t.cuda() for t in batch())
    state = copy.deepcopy(module.state_dict())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # kernels are compiled and chosen before the capture
            module(x, labels).backward()
    torch.cuda.current_stream().wait_stream(stream)
    module.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = module(x, labels)
        loss.backward()
    other, other_labels = (t.flip(0, 2).contiguous() for t in (x, labels.unsqueeze(1)))
    x.copy_(other)
    labels.copy_(other_labels.squeeze(1))
    module.load_state_dict(state)
    graph.replay()
    replayed = [loss.clone(), *(p.grad.clone() for p in module.parameters())]
    module.load_state_dict(state)
    module.zero_grad(set_to_none=True)
    expected = module(x, labels)
    expected.backward()
    torch.testing.assert_close(replayed, [expected.detach(), *(p.grad for p in module.parameters())])
