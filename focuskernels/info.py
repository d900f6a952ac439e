"""`python -m focuskernels.info`: the backend that serves each op on this machine and why, and what it runs on."""

import importlib.metadata
import inspect
import os
import platform

import torch

import focuskernels

from ._lib import backends


def operations() -> list[str]:
    """Names of the public functions, which are the ops."""
    public = sorted(focuskernels.__all__)
    return [name for name in public if inspect.isfunction(getattr(focuskernels, name))]


def describe(op: str) -> str:
    """One op's backends: `cpu: C++ (csrc); cuda: reference (no kernel yet)`."""
    served = (f"{device}: {name}" + (f" ({reason})" if reason else "") for device, name, reason in backends(op))
    return "; ".join(served)


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
    tables = {op: describe(op) for op in operations()}, environment()
    width = max(len(name) for table in tables for name in table)
    return "\n\n".join("\n".join(f"{name:{width}}  {text}" for name, text in table.items()) for table in tables)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print(report())
