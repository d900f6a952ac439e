"""The Triton kernels of the dilated convolution: interpreted without a GPU, and on the GPU at hand."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton_runs import skip_unless_kernels_run

from focuskernels import dilated_conv3d
from focuskernels.dilated_conv3d import why_not
from focuskernels.reference import dilated_conv3d as reference

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHANNELS_LAST = torch.channels_last_3d
#: Relative to the norm of the result; one rounding of the result is most of it.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}

# (N, D, H, W), (inputs, of a map with), (outputs, of a map with), planes of the kernel, dilation
CASES = [
    ((2, 2, 5, 11), (16, 48), (32, 64), 3, (1, 1, 1)),
    ((1, 4, 6, 9), (32, 32), (32, 32), 3, (3, 2, 4)),
    ((1, 5, 3, 17), (16, 64), (32, 48), 3, (2, 1, 5)),
    ((1, 3, 5, 12), (16, 64), (16, 48), 3, (2, 24, 24)),
    ((1, 1, 1, 1), (16, 16), (16, 16), 3, (1, 6, 12)),
    ((1, 2, 6, 13), (32, 32), (64, 64), 1, (1, 3, 6)),
]
#: Whether a program loads through descriptors, and computes two planes.
WAYS = [(False, False), (True, False), (True, True)]


# The interpreter, which is slow, cannot multiply bf16; a GPU rounds fp32 to tf32.
RUNS = [(dtype, case) for dtype in (torch.bfloat16, torch.float16) for case in CASES]
if DEVICE == "cpu":
    RUNS = [*((torch.float16, case) for case in CASES), (torch.float32, CASES[1])]


@pytest.fixture
def kernels() -> Any:
    skip_unless_kernels_run()
    return pytest.importorskip("focuskernels.kernels.dilated_conv3d")


@pytest.fixture
def tiles() -> Any:
    return pytest.importorskip("focuskernels.kernels.dilated_conv3d_tiles")


def some_channels(n: int, channels: tuple[int, int], volume: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """A channels-last map, and its last channels, which is what is read or written."""
    wide = torch.randn(n, channels[1], *volume).to(DEVICE, dtype, memory_format=CHANNELS_LAST)
    return wide, wide[:, channels[1] - channels[0] :]


def has_descriptors() -> bool:
    return DEVICE == "cpu" or torch.cuda.get_device_capability() >= (9, 0)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error, size = (actual.double().cpu() - expected).norm(), expected.norm()
    assert float(error) <= TOLERANCE[dtype] * float(size), float(error / size)


@pytest.mark.parametrize(("tma", "pair"), WAYS)
@pytest.mark.parametrize(("dtype", "case"), RUNS, ids=str)
def test_forward(kernels: Any, tiles: Any, dtype: torch.dtype, case: Any, tma: bool, pair: bool) -> None:
    (n, *volume), inputs, outputs, planes, dilation = case
    if pair and (planes == 1 or outputs[0] > 32):
        pytest.skip("two planes are computed at once with three planes of taps and few outputs")
    if tma and not has_descriptors():
        pytest.skip("needs sm_90")
    _, x = some_channels(n, inputs, volume, dtype)
    wide, y = some_channels(n, outputs, volume, dtype)
    before = wide.clone()
    weight = (torch.randn(outputs[0], inputs[0], planes, 3, 3) / (9 * planes * inputs[0]) ** 0.5).to(DEVICE, dtype)
    bias = torch.randn(outputs[0]).to(DEVICE, dtype)
    # More than one output block, inner step, row and tile along each axis.
    block = 2 * outputs[0] if pair else 16 if dtype == torch.float32 else outputs[0]
    tile = tiles.Tile(4, 8, block, 16, 4, 2, tma, pair)
    padding = reference.padding(weight, dilation)
    expected = F.conv3d(
        x.double().cpu(), weight.double().cpu(), bias.double().cpu(), padding=padding, dilation=dilation
    )

    sums = kernels.convolve(x, weight, bias, y, dilation, tile, sums=True)
    assert_close(y, expected, dtype)
    assert torch.equal(wide[:, : outputs[1] - outputs[0]], before[:, : outputs[1] - outputs[0]])
    exact = torch.stack([expected.sum(dim=(2, 3, 4)), expected.square().sum(dim=(2, 3, 4))], dim=1)
    scale = float(expected.abs().sum(dim=(2, 3, 4)).max() + exact[:, 1].max())
    torch.testing.assert_close(sums.cpu(), exact, rtol=0, atol=1e-5 * scale)

    first = y.double().cpu()
    assert kernels.convolve(x, weight, None, y, dilation, tile, accumulate=True) is None
    assert_close(y, first + expected - bias.double().cpu()[:, None, None, None], dtype)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize(("dtype", "case"), RUNS, ids=str)
def test_weight_gradient(kernels: Any, tiles: Any, dtype: torch.dtype, case: Any, tma: bool) -> None:
    (n, *volume), inputs, outputs, planes, dilation = case
    if tma and not has_descriptors():
        pytest.skip("needs sm_90")
    _, x = some_channels(n, inputs, volume, dtype)
    _, grad = some_channels(n, outputs, volume, dtype)
    weight = torch.zeros(outputs[0], inputs[0], planes, 3, 3).double()
    expected, _ = reference.grad_weight(grad.double().cpu(), x.double().cpu(), weight, dilation, False)
    # More shares than rows in the smallest case.
    tile = tiles.WeightTile(16, 16, outputs[0], 3, 4, 2, tma)
    actual = kernels.weight_gradient(grad, x, (planes, 3, 3), dilation, tile)
    assert_close(actual, expected, dtype)
    assert torch.equal(kernels.weight_gradient(grad, x, (planes, 3, 3), dilation, tile), actual)


def test_a_weight_may_lie_anywhere(kernels: Any, tiles: Any) -> None:
    """A descriptor wants multiples of 16 bytes, of which a view into other weights may be none."""
    _, x = some_channels(1, (32, 32), (2, 3, 5), torch.float16)
    weight = torch.randn(32 * 27 * 32 + 1).to(DEVICE, torch.float16)[1:].view(32, 3, 3, 3, 32).permute(0, 4, 1, 2, 3)
    assert weight.data_ptr() % 16 and weight.is_contiguous(memory_format=CHANNELS_LAST)
    tile = tiles.Tile(4, 8, 32, 16, 4, 2, has_descriptors(), False)
    results = [torch.empty_like(x) for _ in range(2)]
    for y, each in zip(results, (weight, weight.contiguous())):
        kernels.convolve(x, each, None, y, (1, 1, 1), tile)
    assert torch.equal(*results)


def on_the_way(kernels: Any, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(kernels, "_capability", lambda x: capability)
    monkeypatch.setattr(kernels, "_problem", lambda *_: "a problem")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("FOCUSKERNELS_TUNE", "0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="dilated_conv3d itself calls the launchers on a GPU")
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_launchers_are_the_reference(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    on_the_way(kernels, monkeypatch, capability)
    x = torch.randn(1, 32, 2, 3, 4).half().to(memory_format=CHANNELS_LAST)
    grad = torch.randn(1, 32, 2, 3, 4).half().to(memory_format=CHANNELS_LAST)
    weight, bias, dilation = torch.randn(32, 32, 3, 3, 3).half(), torch.randn(32).half(), (1, 2, 1)
    double = (x.double(), weight.double(), bias.double())
    y = kernels.forward(x, weight, bias, dilation)
    assert torch.equal(kernels.forward(x, weight, torch.stack([bias, -bias], dim=1)[:, 0], dilation), y)
    assert y.is_contiguous(memory_format=CHANNELS_LAST)
    assert_close(y, reference.forward(*double, dilation), torch.float16)
    expected = reference.grad_input(grad.double(), weight.double(), dilation)
    assert_close(kernels.grad_input(grad, weight, dilation), expected, torch.float16)
    for actual, wanted in zip(
        kernels.grad_weight(grad, x, weight, dilation, True),
        reference.grad_weight(grad.double(), x.double(), weight.double(), dilation, True),
    ):
        assert_close(actual, wanted, torch.float16)


def test_why_not_names_what_is_in_the_way() -> None:
    x = torch.empty(1, 64, 60, 128, 128, dtype=torch.bfloat16, device="meta").to(memory_format=CHANNELS_LAST)
    weight = torch.empty(64, 64, 3, 3, 3, device="meta")
    assert why_not(x, weight) is None
    assert why_not(x[:, :32], weight[:, :32]) is None
    for reason, arguments in {
        "float32 is left": (x.float(), weight),
        "kernel 3x5x3": (x, torch.empty(64, 64, 3, 5, 3, device="meta")),
        "kernel 1x1x1": (x, weight[:, :, :1, :1, :1]),
        "40 to 64 channels": (x[:, :40], weight[:, :40]),
        "64 to 8 channels": (x, weight[:8]),
        "not in channels_last_3d": (x.contiguous(), weight),
        "multiples of 16 bytes": (x.new_empty(1, 60, 128, 128, 68).movedim(-1, 1)[:, :64], weight),
        "0.093 GFLOP": (x[:, :, :1, :10, :42], weight),
    }.items():
        assert reason in str(why_not(*arguments)), reason
    # As the second map of a gradient.
    assert "not in channels_last_3d" in str(why_not(x, weight, x.contiguous()))


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_candidates_divide_the_channels_and_fit(tiles: Any, capability: tuple[int, int]) -> None:
    limit = {(8, 0): 163, (9, 0): 227, (10, 0): 227}.get(capability, 99) * 1024
    for inputs in (32, 48, 64, 96, 128, 224, 256):
        for outputs in (32, 48, 64, 128):
            for volume in ((60, 128, 128), (3, 7, 9), (96, 240, 240)):
                found = tiles.tiles(capability, inputs, outputs, (3, 3, 3), 1, volume, (1, 6, 6))
                assert found and all(tile.shared_memory < limit for tile in found)
                assert all(inputs % t.bk == 0 and (2 if t.pair else 1) * outputs % t.bn == 0 for t in found)
                assert all(t.tma == (capability >= (9, 0)) and t.bh * t.bw in (128, 256) for t in found)
                for tile in tiles.weight_tiles(capability, inputs, outputs, (3, 3, 3), 1, volume):
                    assert tile.shared_memory < limit
                    assert inputs % tile.bc == 0 and outputs % tile.bn == 0 and tile.shares >= 1


def test_box_wastes_least(tiles: Any) -> None:
    for width, box in {128: (2, 128), 240: (16, 16), 160: (8, 32), 96: (8, 32)}.items():
        assert tiles.tiles((9, 0), 64, 64, (3, 3, 3), 1, (60, width, width), (1, 1, 1))[0][:2] == box


@pytest.fixture
def file(tiles: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "folder" / "tiles.json"
    monkeypatch.setenv("FOCUSKERNELS_TILES", str(path))
    monkeypatch.delenv("FOCUSKERNELS_TUNE", raising=False)
    return path


def second_of(candidates: list[Any]) -> Any:
    return candidates[1]


def test_winner_is_kept_in_the_file(tiles: Any, file: Path) -> None:
    candidates = tiles.tiles((9, 0), 64, 64, (3, 3, 3), 1, (60, 128, 128), (1, 6, 6))
    assert tiles.choose("a", candidates, None) == candidates[0]
    assert not file.exists()
    assert tiles.choose("a", candidates, second_of) == candidates[1]
    assert tiles.choose("b", candidates, lambda c: c[-1]) is None
    assert json.loads(file.read_text()) == {"a": list(candidates[1]), "b": "vendor"}
    tiles._table.cache_clear()
    assert tiles.choose("a", candidates, None) == candidates[1]
    assert tiles.choose("b", candidates, second_of) is None


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": [9, 9]}', '{"a": 3}'])
def test_file_of_no_use_is_measured_anew(tiles: Any, file: Path, content: str) -> None:
    file.parent.mkdir()
    file.write_text(content)
    candidates = tiles.weight_tiles((8, 0), 64, 64, (3, 3, 3), 1, (60, 128, 128))
    assert tiles.choose("a", candidates, None) == candidates[0]
    assert tiles.choose("a", candidates, second_of) == candidates[1]


def test_variable_turns_tuning_off(tiles: Any, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOCUSKERNELS_TUNE", "0")

    def never(_: Any) -> Any:
        raise AssertionError("measured")

    assert tiles.choose("a", ["tile", "other"], never) == "tile"
    assert not file.exists()


def test_file_that_cannot_be_written_is_no_error(tiles: Any, file: Path) -> None:
    file.parent.write_text("in the way")
    candidates = tiles.weight_tiles((8, 0), 64, 64, (3, 3, 3), 1, (60, 128, 128))
    assert tiles.choose("a", candidates, second_of) == candidates[1]


@pytest.mark.parametrize(
    ("milliseconds", "seconds_each", "winner"),
    [
        ({"a": 3.0, "b": 2.0, "c": 1.0, None: 4.0}, 0, "c"),
        ({"a": 3.0, "b": 2.0, "c": 1.0, None: 4.0}, 5, "a"),
        ({"a": None, "b": 2.0, "c": None, None: 4.0}, 0, "b"),
        ({"a": 3.0, "b": 2.0, "c": 5.0, None: 1.0}, 0, None),
    ],
)
def test_race(tiles: Any, milliseconds: dict[Any, float | None], seconds_each: float, winner: Any) -> None:
    now = 0.0

    def measure(tile: Any) -> float | None:
        nonlocal now
        now += seconds_each
        return milliseconds[tile]

    assert tiles.race(["a", "b", "c", None], measure, clock=lambda: now) == winner


def test_nothing_is_stored_where_nothing_could_be_measured(tiles: Any, file: Path) -> None:
    candidates = tiles.weight_tiles((8, 0), 64, 64, (3, 3, 3), 1, (60, 128, 128))
    assert tiles.choose("a", candidates, lambda c: tiles.race(c, lambda _: None)) == candidates[0]
    assert not file.exists()
    assert tiles.choose("a", candidates, second_of) == candidates[1]


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_nothing_is_measured_beside_zeros_or_nan(
    kernels: Any, tiles: Any, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    race = kernels._race(lambda tile: torch.full((3,), value, device=DEVICE), torch.ones(3, device=DEVICE))
    with pytest.raises(tiles.Undecided):
        race(["a", "b", None])


def test_problems_within_a_power_of_two_are_one(tiles: Any) -> None:
    def name(*volume: int) -> str:
        return tiles.problem("GPU", "3", "bfloat16", "forward", (64, 32), (3, 3, 3), (1, 6, 6), volume, True)

    assert name(60, 128, 128) == name(40, 100, 65) != name(60, 128, 129)


GPU_CASES = [
    ((1, 60, 128, 128), 64, 64, (6, 6, 6)),
    ((2, 59, 125, 131), 64, 32, (1, 12, 12)),
    ((1, 30, 96, 96), 128, 64, (24, 24, 24)),
    ((1, 60, 128, 128), 32, 32, (1, 18, 18)),
]


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected).norm() / expected.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("planes", [3, 1])
@pytest.mark.parametrize(("shape", "inputs", "outputs", "dilation"), GPU_CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    shape: Any,
    inputs: int,
    outputs: int,
    dilation: Any,
    planes: int,
) -> None:
    monkeypatch.setenv("FOCUSKERNELS_TUNE", "0")
    n, *volume = shape
    wide = torch.randn(n, 2 * inputs, *volume, device="cuda").to(dtype, memory_format=CHANNELS_LAST)
    x = wide[:, :inputs].requires_grad_()
    weight = torch.randn(outputs, inputs, planes, 3, 3, device="cuda").div((9 * planes * inputs) ** 0.5)
    weight = weight.to(dtype).requires_grad_()
    assert why_not(x, weight) is None
    upstream = torch.randn(n, outputs, *volume, device="cuda").to(dtype, memory_format=CHANNELS_LAST)

    def run(function: Callable[..., Tensor], x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y = function(x, weight)
        return y, *torch.autograd.grad(y, (x, weight), upstream.to(y))

    ours = run(lambda x, w: dilated_conv3d(x, w, dilation=dilation), x, weight)
    again = run(lambda x, w: dilated_conv3d(x, w, dilation=dilation), x, weight)
    assert all(torch.equal(a, b) for a, b in zip(ours, again))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    exact_x, exact_weight = (t.detach().float().contiguous().requires_grad_() for t in (x, weight))
    padding = reference.padding(weight, dilation)
    exact = run(lambda x, w: F.conv3d(x, w, padding=padding, dilation=dilation), exact_x, exact_weight)
    for actual, expected in zip(ours, exact):
        assert relative(actual, expected) < 2 * TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.large
def test_more_than_2_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOCUSKERNELS_TUNE", "0")
    x = torch.zeros(1, 128, 300, 256, 256, device="cuda", dtype=torch.bfloat16, memory_format=CHANNELS_LAST)
    assert x.numel() > 2**31
    corner = torch.randn(128, 14, 13, 13, device="cuda").bfloat16()
    x[0, :, -14:, -13:, -13:] = corner
    weight = torch.randn(32, 128, 3, 3, 3, device="cuda").bfloat16()
    assert why_not(x, weight) is None
    y = dilated_conv3d(x, weight, dilation=6)
    expected = F.conv3d(corner[None].float(), weight.float(), padding=6, dilation=6)
    assert relative(y[..., -8:, -7:, -7:], expected[..., -8:, -7:, -7:]) < 1e-2
