"""The machine and the packages a number was measured with. No host or user names."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("focuskernels", "monai", "nnunetv2", "numpy", "torchvision", "triton")
GPU_FIELDS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "temperature.gpu")


@contextmanager
def settings(plans: int = 0) -> Iterator[None]:
    """cuDNN searches among `plans` plans of a convolution, 0 for all, and a kernel that is passed over is an error."""
    cudnn, strict = torch.backends.cudnn, os.environ.get("FOCUSKERNELS_STRICT")
    before = cudnn.benchmark, cudnn.benchmark_limit
    cudnn.benchmark, cudnn.benchmark_limit = True, plans
    # A kernel that is passed over must not pass for a slow one.
    os.environ.setdefault("FOCUSKERNELS_STRICT", "1")
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.benchmark_limit = before
        if strict is None:
            del os.environ["FOCUSKERNELS_STRICT"]


@contextmanager
def without_search() -> Iterator[None]:
    """cuDNN takes the plan it thinks best: for what is not timed."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def hardware(device: str) -> dict[str, Any]:
    """The processor, and the GPU where that is what is measured."""
    facts: dict[str, Any] = {
        "cpu": cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "last_level_cache": last_level_cache(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}",
            "gpu_memory": properties.total_memory,
            "gpu_l2": l2_bytes(),
            "multiprocessors": properties.multi_processor_count,
            "driver": (gpu_query("driver_version") or {}).get("driver_version"),
        }
    return facts


def device_name(device: str) -> str:
    """The name people know the measured device by."""
    return torch.cuda.get_device_name(0) if device == "cuda" else cpu_name()


def versions() -> dict[str, str | None]:
    """Everything whose version moves numbers; None is not installed."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": str(torch.backends.cudnn.version()) if torch.backends.cudnn.is_available() else None,
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def clocks(device: str) -> dict[str, float] | None:
    """The GPU's clocks in MHz, power in W and temperature in C now; None where nvidia-smi does not tell."""
    found = gpu_query(*GPU_FIELDS) if device == "cuda" else None
    if found is None:
        return None
    numbers = {}
    for name, text in found.items():
        try:
            numbers[name] = float(text)
        except ValueError:  # "[N/A]"
            continue
    return numbers


def gpu_query(*fields: str) -> dict[str, str] | None:
    """What nvidia-smi says about the first visible GPU."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", f"--id={_gpu_id()}"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = [value.strip() for value in run.stdout.splitlines()[0].split(",")] if run.stdout.strip() else []
    return dict(zip(fields, values, strict=True)) if run.returncode == 0 and len(values) == len(fields) else None


def _gpu_id() -> str:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"


def heap() -> str:
    """ "warm" where the C allocator was told to keep what it got, else "default"."""
    return "warm" if all(os.environ.get(key) == value for key, value in WARM_HEAP.items()) else "default"


#: glibc keeps freed memory, in huge pages where it may. Else every large temporary is mapped, faulted in page by page
#: and unmapped again, which costs several times its use and hides what an implementation does.
WARM_HEAP = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
}


@cache
def cpu_name() -> str:
    """The processor's model."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@cache
def last_level_cache() -> int:
    """Bytes of the largest cache of a core; 64 MiB where the system does not tell."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=64 * 2**20)


@cache
def l2_bytes() -> int:
    """Bytes of the GPU's L2; 128 MiB where torch does not tell."""
    return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)) or 128 * 2**20
