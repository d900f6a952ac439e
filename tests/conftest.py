"""Set-up of every test: the same random numbers, small thread pools, how many cases hypothesis draws."""

import locale
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import pytest
import torch

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # on a machine with a GPU and little else, whose tests draw nothing
    pass
else:
    # Drawing tensors of many sizes is no fault of a test, and a first call of the vendor's library is slow.
    _patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    settings.register_profile("quick", _patient, max_examples=200, derandomize=True)
    settings.register_profile("nightly", _patient, max_examples=5000, print_blob=True)
    settings.load_profile("quick")


def pytest_configure(config: pytest.Config) -> None:
    """A time limit ends the run as Ctrl-C does: what was found until then is written."""
    if not hasattr(config, "workerinput"):  # else a process of pytest-xdist, which ends with the one that started it
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(*_: Any) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` sends it twice: to the process and to its group
    raise KeyboardInterrupt


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # The tensors are tiny and the tests run in parallel.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _device_of_its_own(request: pytest.FixtureRequest) -> Iterator[None]:
    """A fault on a GPU ends the process of pytest-xdist that met it: a new one runs the tests that follow."""
    yield
    if hasattr(request.config, "workerinput") and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as fault:
            print(fault, file=sys.stderr, flush=True)
            os._exit(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _locale() -> Iterator[None]:
    """SimpleITK sets that of the process to "C" when it writes DICOM, after which no text beyond ASCII can be read."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


@pytest.fixture(params=["op", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The best backend of this machine, then the definition, of the op that a test file imports as `module`."""
    if request.param == "reference":
        module, reference = request.module.module, request.module.reference
        monkeypatch.setattr(module, "_forward", reference.forward)
        monkeypatch.setattr(module, "_backward", reference.backward)
    return request.param
