"""The variants of the C++ kernels for processors with less than this one has (csrc/variants.h)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = ("test_focal_dice.py", "test_norm_act.py", "test_se_residual.py", "test_norm_se_residual.py")


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_kernels_of_lesser_processors(capability: str) -> None:
    """One process each: which variant runs is decided once."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    chosen = ["-m", "not gpu and not large and not nightly", "-k", "not compile and not opcheck and not processes"]
    chosen += [str(TESTS / name) for name in FILES]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    run = subprocess.run([*command, *chosen], env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-4000:]


def test_the_variable_is_heeded() -> None:
    """Registers of another size add up in another order: last bits differ."""
    program = (
        "import torch; from focuskernels import focal_dice_sums;"
        "torch.manual_seed(0); x = torch.randn(1, 9, 9, 31, 33).double();"
        "print(torch.backends.cpu.get_cpu_capability(), focal_dice_sums(x, x.argmax(1)).prediction.tolist())"
    )
    found = {}
    for capability in ("default", "avx2", "avx512"):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        name, sums = run.stdout.split(maxsplit=1)
        found[name] = sums
    assert len(set(found.values())) == len(found)
