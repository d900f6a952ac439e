"""What the machine can do at best, measured in the run whose numbers it is compared with."""

from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any

import torch

from .case import Cost, dtype_name
from .measure import Timer

COPY_BYTES = {("cpu", "full"): 2**28, ("cuda", "full"): 2**31, ("cpu", "quick"): 2**22, ("cuda", "quick"): 2**26}
# bfloat16 and float16 take PyTorch minutes on a CPU without instructions for them
HALF_SIDE = 512
MATMUL_SIDE = {("cpu", "full"): 2048, ("cuda", "full"): 8192, ("cpu", "quick"): 256, ("cuda", "quick"): 1024}
REPEATS = {"full": 9, "quick": 2}


def measure_ceilings(device: str, size: str, dtypes: Iterable[torch.dtype], timer: Timer) -> dict[str, Any]:
    """Copy bandwidth in GB/s (bytes read plus written) and matrix multiplication in TFLOP/s per dtype.

    float32 matrices are multiplied in full precision; "tf32" is the same with tensor cores, on a GPU. A CPU is at least
    as fast in half precision as in float32, to which it can convert.
    """
    tflops = {dtype_name(dtype): _matmul(device, size, dtype, timer) for dtype in dtypes}
    if device == "cuda" and torch.float32 in dtypes:
        with tf32(True):
            tflops["tf32"] = _matmul(device, size, torch.float32, timer)
    if device == "cpu":
        for half in tflops.keys() & {"bfloat16", "float16"}:
            tflops[half] = max(tflops[half], tflops.get("float32", 0.0))
    return {"copy_gb_s": _copy(device, size, timer), "matmul_tflop_s": tflops}


def floor_ms(cost: Cost, dtype: torch.dtype, ceilings: dict[str, Any]) -> float:
    """The time that the bytes take at copy bandwidth or the FLOPs at matmul speed, whichever is longer."""
    moving = cost.bytes / (ceilings["copy_gb_s"] * 1e9)
    computing = cost.flops / (ceilings["matmul_tflop_s"][dtype_name(dtype)] * 1e12)
    return 1000 * max(moving, computing)


@contextmanager
def tf32(allowed: bool) -> Any:
    """Whether float32 products on a GPU may run on tensor cores."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _copy(device: str, size: str, timer: Timer) -> float:
    source = torch.ones(COPY_BYTES[device, size] // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    times = [timer.time(lambda: target.copy_(source))[0] for _ in range(REPEATS[size])]
    return 2 * COPY_BYTES[device, size] / min(times) / 1e6


def _matmul(device: str, size: str, dtype: torch.dtype, timer: Timer) -> float:
    side = MATMUL_SIDE[device, size]
    if device == "cpu" and dtype.itemsize < 4:
        side = min(side, HALF_SIDE)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.mm(a, b)
    times = [timer.time(lambda: torch.mm(a, b, out=out))[0] for _ in range(REPEATS[size])]
    return 2 * side**3 / min(times) / 1e9
