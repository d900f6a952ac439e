"""Batch norms of blocks over two processes against one process with the whole batch, as `torch.nn.SyncBatchNorm` has it
(which does not run on the CPU)."""

import copy
from pathlib import Path

import pytest
import torch
from processes import in_two_processes, needs_gloo
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from focuskernels.nn import DenseASPP3d, NormAct3d, SEResBlock3d, convert_sync_norm


def synchronised(rank: int, folder: Path) -> None:
    """One of two processes, with one of three samples or with the other two."""
    torch.manual_seed(0)
    network = nn.Sequential(SEResBlock3d(2, 8), DenseASPP3d(8, 4, 4, [(1, 2, 2), 2]), NormAct3d(16)).double()
    whole = copy.deepcopy(network)  # without synchronisation, on all samples
    shared = DistributedDataParallel(convert_sync_norm(network), broadcast_buffers=False)
    samples, mine = torch.randn(3, 2, 3, 5, 4, dtype=torch.float64), slice(0, 1) if rank == 0 else slice(1, 3)
    x, part = samples.clone().requires_grad_(), samples[mine].clone().requires_grad_()
    expected, actual = whole(x), shared(part)
    torch.testing.assert_close(actual, expected[mine])
    torch.testing.assert_close(network.state_dict(), whole.state_dict())
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    actual.backward(upstream[mine])
    torch.testing.assert_close(part.grad, x.grad[mine])
    for ours, theirs in zip(network.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(2 * ours.grad, theirs.grad)  # DDP averages
    torch.testing.assert_close(network.eval()(part), whole.eval()(part))
    without_samples(rank)
    (folder / str(rank)).touch()


def without_samples(rank: int) -> None:
    """A process without a sample takes part, and moves its running statistics as the others do."""
    network = SEResBlock3d(2, 3).double()
    whole, shared = copy.deepcopy(network), convert_sync_norm(network)
    samples, mine = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64), slice(0, 2 * rank)
    expected, actual = whole(samples), shared(samples[mine])
    torch.testing.assert_close(actual, expected[mine])
    torch.testing.assert_close(network.state_dict(), whole.state_dict())
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    actual.backward(upstream[mine])
    for ours, theirs in zip(network.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, rank * theirs.grad)


@pytest.mark.slow
@needs_gloo
def test_blocks_take_statistics_over_processes(tmp_path: Path) -> None:
    in_two_processes(synchronised, tmp_path, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"0", "1"}


def test_conversion_leaves_other_norms() -> None:
    network = nn.Sequential(SEResBlock3d(2, 2), NormAct3d(2, "instance"))
    assert convert_sync_norm(network) is network
    assert [m.sync for m in network.modules() if isinstance(m, NormAct3d)] == [True, True, False]
