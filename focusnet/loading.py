"""Batches of training crops, cut by processes whose failures name the case."""

import os
import re
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from .data.crops import Crop, CropDataset
from .errors import FocusNetError


def crop_batches(
    dataset: CropDataset, batches: Sequence[list[int]], *, workers: int, pin_memory: bool, again: Callable[[], str]
) -> Iterator[Crop]:
    """Batches of crops, in memory of the CPU.

    Args:
        dataset: The crops.
        batches: Numbers of the crops of every batch.
        workers: Processes that cut crops; 0 cuts them in this one.
        pin_memory: For copies to a GPU.
        again: How to go on after an error.

    Raises:
        FocusNetError: a crop's data are missing or damaged, or a process died; one line that names the case.
        RuntimeError: any other error of a crop, with the traceback of its process and the case.
    """
    watched = _Watched(dataset, workers)
    loader = DataLoader(watched, batch_sampler=batches, num_workers=workers, pin_memory=pin_memory)
    try:
        yield from loader
    except FocusNetError as error:  # from a process, with its traceback
        raise FocusNetError(str(error).rstrip().rpartition(f"{FocusNetError.__name__}: ")[2]) from error
    except RuntimeError as error:
        died = re.match(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", str(error))
        if not died:
            raise
        cases = watched.cases({int(pid) for pid in died[1].split(",")})
        raise FocusNetError(
            f"a process that loads training crops died at {cases}, maybe for lack of memory ({str(error).strip()}): "
            f"lower train.workers and {again()}"
        ) from error


class _Watched(Dataset[Crop]):
    """Crops, and which one each of the processes that cut them is at."""

    def __init__(self, crops: CropDataset, workers: int) -> None:
        self._crops = crops
        self._at = torch.full((workers, 2), -1).share_memory_()  # process and crop

    def __getitem__(self, index: int) -> Crop:
        worker = get_worker_info()
        if worker is not None:
            self._at[worker.id] = torch.tensor([os.getpid(), index])
        return self._crops[index]

    def cases(self, pids: set[int]) -> str:
        """The cases that these processes were at."""
        names = [self._crops.case(index).name for pid, index in self._at.tolist() if pid in pids]
        return f"case {', '.join(names)}" if names else "an unknown case"
