"""The Triton passes of DenseASPP: interpreted without a GPU, and on the GPU at hand."""

import copy
import importlib.util
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_runs import skip_unless_kernels_run

from focuskernels import dense_aspp3d
from focuskernels.nn import DenseASPP3d
from focuskernels.reference.nn import PlainDenseASPP

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Of the convolution that writes into the buffer.
calls: list[int] = []


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Any:
    skip_unless_kernels_run()
    kernels = pytest.importorskip("focuskernels.kernels.dense_aspp3d")
    from focuskernels.kernels import dilated_conv3d as convolutions

    monkeypatch.setattr(kernels, "VOXELS", 16)
    monkeypatch.setattr(kernels, "TILES_PER_PROGRAM", 2)
    monkeypatch.setattr(sys.modules["focuskernels.dilated_conv3d"], "SMALLEST", 0)
    monkeypatch.setenv("FOCUSKERNELS_TUNE", "0")
    if DEVICE == "cpu":
        monkeypatch.setattr(convolutions, "_capability", lambda x: (9, 0))
        monkeypatch.setattr(convolutions, "_problem", lambda *_: "a problem")
    convolve = convolutions.convolve
    calls.clear()
    monkeypatch.setattr(kernels, "convolve", lambda *args, **options: calls.append(1) or convolve(*args, **options))
    return kernels.Passes()


def close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    return float((actual.cpu().double() - expected.double()).norm()) <= tolerance * float(expected.double().norm())


@pytest.mark.parametrize("given", [False, True])
def test_passes_are_those_of_pytorch(passes: Any, given: bool) -> None:
    channels, growth, bottleneck, dilations = 48, 32, 32, [1, 2, 2, 1, 1, 3]
    module = DenseASPP3d(channels, growth, bottleneck, [dilations[:3], dilations[3:]]).half()
    parameters = [p.detach() + 0.1 * torch.randn_like(p) for p in module.parameters()]
    running = [torch.rand(len(p)).add(0.5) for p in parameters if p.dim() == 1] if given else []
    x = torch.randn(2, channels, 2, 3, 5).half().to(memory_format=torch.channels_last_3d)
    # In double precision on the CPU, which has kernels for it.
    double = [p.double() for p in parameters]
    exact_norms = dense_aspp3d.Norms("batch", [1] * 4, [1e-5] * 4, running, None)
    x, *parameters = (t.to(DEVICE) for t in (x, *parameters))
    norms = exact_norms._replace(given=[t.to(DEVICE) for t in running])
    actual = dense_aspp3d.forward(passes, x, parameters, dilations, norms, True)
    assert len(calls) == 2
    plain = dense_aspp3d.Passes()
    expected = dense_aspp3d.forward(plain, x.cpu().double(), double, dilations, exact_norms, True)
    for one, other in zip(actual, expected):
        for a, e in zip([one] if isinstance(one, Tensor) else one, [other] if isinstance(other, Tensor) else other):
            assert a.shape == e.shape and close(a, e, 3e-3)

    grad = torch.randn(actual[0].shape).to(DEVICE, torch.float16, memory_format=torch.channels_last_3d)
    # From the same point, since rectifiers switch where roundings differ.
    buffer, *saved = actual
    exact = [buffer.cpu().double(), *([t.cpu().double() for t in each] for each in saved)]
    found = dense_aspp3d.backward(passes, grad, buffer, *saved, parameters, dilations, norms)
    wanted = dense_aspp3d.backward(plain, grad.cpu().double(), *exact, double, dilations, exact_norms)
    assert found[0].stride() == x.stride() and close(found[0], wanted[0], 5e-3)
    for a, e in zip(found[1], wanted[1]):
        assert a.dtype == torch.float16 and a.shape == e.shape and close(a, e, 5e-3)
    again = dense_aspp3d.backward(passes, grad, buffer, *saved, parameters, dilations, norms)
    assert torch.equal(found[0], again[0]) and all(torch.equal(a, b) for a, b in zip(found[1], again[1]))


def test_what_does_not_fit_is_left_to_pytorch(passes: Any) -> None:
    module = DenseASPP3d(12, 8, 10, [1])
    parameters = [p.detach().to(DEVICE) for p in module.parameters()]
    norms = dense_aspp3d.Norms("instance", [1] * 2, [1e-5] * 2, [], None)
    x = torch.randn(1, 12, 2, 3, 5, device=DEVICE)
    buffer, *_ = dense_aspp3d.forward(passes, x, parameters, [1, 1, 1], norms, False)
    assert torch.equal(buffer, dense_aspp3d.forward(dense_aspp3d.Passes(), x, parameters, [1, 1, 1], norms, False)[0])


def run(module: DenseASPP3d, x: Tensor, upstream: Tensor, amp: bool = True) -> tuple[list[Tensor], int]:
    """Result, gradients and peak memory beyond what was there."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16, enabled=amp):
        y = module(leaf)
    result = [y.detach(), *torch.autograd.grad(y, [leaf, *module.parameters()], upstream)]
    return result, torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
def test_module_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOCUSKERNELS_TUNE", "0")
    module = DenseASPP3d(64).cuda()
    chain = copy.deepcopy(module)
    chain.__class__ = PlainDenseASPP
    x = torch.randn(1, 64, 40, 96, 96, device="cuda").to(torch.bfloat16, memory_format=torch.channels_last_3d)
    upstream = torch.randn(1, 192, 40, 96, 96, device="cuda").to(x.dtype, memory_format=torch.channels_last_3d)
    ours, peak = run(module, x, upstream)
    again, _ = run(module, x, upstream)
    assert all(torch.equal(a, b) for a, b in zip(ours, again))
    exact, _ = run(copy.deepcopy(chain), x.float(), upstream.float(), amp=False)
    theirs, usual = run(chain, x, upstream)
    for actual, other, expected in zip(ours, theirs, exact):
        # Small gradients cancel through eight layers: as good as the chain in the same precision.
        size = float(expected.double().norm())
        error, allowed = (float((t.double() - expected.double()).norm()) for t in (actual, other))
        assert error <= 1.5 * allowed + 1e-2 * size
    assert peak <= usual / 2
