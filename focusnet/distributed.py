"""Training by several processes that `torchrun` started, of which one alone speaks and writes."""

import gc
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .cli import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_TERMINATED, Terminated, pick_device
from .errors import FocusNetError

T = TypeVar("T")

#: How long one may wait for another, which may prepare data or validate. Dead ones are noticed at once.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Ranks:
    """This process among all that train one model.

    Attributes:
        rank: Its number; 0 reports and writes.
        world: The number of processes.
        local: Its number on this machine.
    """

    rank: int = 0
    world: int = 1
    local: int = 0

    def device(self, name: str) -> torch.device:
        """The device of `--device`: of several processes on a machine, each has a GPU of its own.

        Raises:
            FocusNetError: as of `pick_device`, or too few GPUs.
        """
        device = pick_device(name)
        if self.world > 1 and device.type == "cuda":
            if device.index is not None:
                raise FocusNetError(f"--device {name}: every process has a GPU of its own, expected auto, cpu or cuda")
            device = pick_device(f"cuda:{self.local}")
            torch.cuda.set_device(device)
        return device

    def first(self, work: Callable[[], T]) -> T:
        """What `work` returns; rank 0 does it for all."""
        if self.world == 1:
            return work()
        result = [work() if self.rank == 0 else None]
        dist.broadcast_object_list(result)
        return result[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """The value of every process, in all of them."""
        if self.world == 1:
            return [value]
        values: list[T | None] = [None] * self.world
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def sum(self, numbers: Sequence[int]) -> list[int]:
        """Sums over all processes."""
        total = torch.tensor(numbers)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def mean(self, value: Tensor) -> float:
        """Mean of a scalar over all processes."""
        if self.world > 1:
            value = value.detach().clone()
            dist.all_reduce(value)
        return value.item() / self.world

    def replicate(
        self, parameters: Sequence[nn.Parameter], loss: Callable[..., Tensor | None]
    ) -> Callable[..., Tensor | None]:
        """`loss`, whose gradients are averaged over all processes; parameters become rank 0's.

        Args:
            parameters: What is trained.
            loss: Returns a scalar; of the same parameters in every process, which may be a part of all.
        """
        if self.world == 1:
            return loss
        return DistributedDataParallel(_Loss(parameters, loss), find_unused_parameters=True)


ALONE = Ranks()


class _Loss(nn.Module):
    """A function as a module, which is what DDP averages the gradients of."""

    def __init__(self, parameters: Sequence[nn.Parameter], loss: Callable[..., Tensor | None]) -> None:
        super().__init__()
        self.trained, self.loss = nn.ParameterList(parameters), loss
        # DDP warns where it finds none that is unused, as in a batch with all organs
        self.unused = nn.Parameter(torch.zeros((), device=parameters[0].device))

    def forward(self, *arguments: object, **options: object) -> Tensor | None:
        return self.loss(*arguments, **options)


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that `torchrun` started, if it did; leave them at the end.

    Whatever ends one of them ends all: the others lose the connection or get a signal from `torchrun`. The first to
    end raises, the others exit in silence.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield ALONE
        return
    store, rank, world = next(dist.rendezvous("env://", timeout=PATIENCE))
    # gloo for objects and counts, which are in memory of the CPU
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
    # a 1x1x1 kernel has the strides of either layout, and DDP takes one for the other
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    _stop_once()
    try:
        yield Ranks(rank, world, int(os.environ["LOCAL_RANK"]))
    except SystemExit:
        raise
    except BaseException as error:
        if not _is_first(store):
            raise SystemExit(_status(error)) from error
        raise
    gc.collect()  # DDP lies in a reference cycle, and the group's threads must end before the interpreter does
    dist.destroy_process_group()


def is_lost(error: RuntimeError) -> bool:
    """Whether an error says that another process is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _is_first(store: "dist.Store") -> bool:
    try:
        return int(store.add("focusnet_ended", 1)) == 1
    except RuntimeError:  # the store went with its process
        return True


def _status(error: BaseException) -> int:
    kinds = {FocusNetError: EXIT_ERROR, Terminated: EXIT_TERMINATED, KeyboardInterrupt: EXIT_INTERRUPTED}
    return next((status for kind, status in kinds.items() if isinstance(error, kind)), 1)


def _stop_once() -> None:
    """Ctrl-C reaches every process from the terminal, and again from `torchrun`: heed the first of all signals."""

    def stop(number: int, frame: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop)
