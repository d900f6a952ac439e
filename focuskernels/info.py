"""`python -m focuskernels.info`: the backend that serves each op on this machine and why, and what it runs on."""

import importlib.metadata
import os
import platform

import torch

from . import nn  # noqa: F401 -- its modules have ops too
from ._lib import DEVICE_TYPES, backends, served


def describe(public: str) -> str:
    """The backends of a public function or module: `cpu: C++ (csrc); cuda: Triton, roi_gather_3d_centers_bwd:
    reference (no kernel yet)`; what is named has another one than the forward pass."""
    devices = []
    for device in DEVICE_TYPES:
        found = {op: f"{name} ({why})" if why else name for op, (name, why) in backends(public, device).items()}
        first, *_ = found.values()
        others = [f"{op}: {text}" for op, text in found.items() if text != first]
        devices.append(f"{device}: {', '.join([first, *others])}")
    return "; ".join(devices)


def environment() -> dict[str, str]:
    """Versions, devices and threads."""
    facts = {
        "focuskernels": _version("focuskernels"),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda or "torch is a build without CUDA",
    }
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        facts[f"gpu {index}"] = f"{properties.name}, sm_{properties.major}{properties.minor}, {memory}"
    if not count:
        facts["gpu"] = "none"
    facts["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} cores, {torch.get_num_interop_threads()} interop"
    return facts


def report() -> str:
    """All of it as text."""
    tables = {public: describe(public) for public in served()}, environment()
    width = max(len(name) for table in tables for name in table)
    return "\n\n".join("\n".join(f"{name:{width}}  {text}" for name, text in table.items()) for table in tables)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print(report())
