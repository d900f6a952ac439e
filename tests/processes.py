"""A test in several processes of one gloo group."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo"
)


def in_two_processes(function: Callable[..., None], folder: Path, *arguments: object) -> None:
    """Call `function(rank, *arguments)` in two processes, which keep their store in `folder`."""
    torch.multiprocessing.spawn(_member, (function, str(folder / "store"), arguments), nprocs=2)


def _member(rank: int, function: Callable[..., None], store: str, arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    function(rank, *arguments)
    # DDP lies in a reference cycle, and the group's threads must end before the interpreter does: they free tensors
    gc.collect()
    dist.destroy_process_group()
