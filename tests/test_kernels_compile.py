"""Triton kernels compile to machine code of every architecture without a GPU, and keep all they hold in registers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from focuskernels.kernels import channelwise as kernels

capability, dtype, channels, channels_last = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "True"
block_c, block_v = kernels.tile(channels, channels_last)
types = {name: "*" + dtype for name in ("x", "grad", "residual", "output", "out", "kept")}
types |= {"table": "*fp32", "weights": "*fp32", "found": "*fp32", "channels": "i32", "voxels": "i64", "slope": "fp32"}
constants = dict(ACTIVATION=2, RESIDUAL=True, OUTPUT=True, KEEP=True, TILES=kernels.TILES_PER_PROGRAM)
constants |= dict(BLOCK_C=block_c, BLOCK_V=block_v, CHANNELS_LAST=channels_last)
sixteen = ("channels", "voxels")
tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
for kernel in (kernels.moments_kernel, kernels.affine_kernel, kernels.sums_kernel, kernels.backward_kernel):
    fixed = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in fixed else types[name] for name in kernel.arg_names}
    names = [n for n in kernel.arg_names if signature[n].startswith("*") or (n in sixteen and n not in fixed)]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in names}
    source = ASTSource(kernel, signature, fixed, attributes)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": kernels.WARPS})
    print("WIDE" if "ld.global.v4" in compiled.asm["ptx"] else "NARROW")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        print(subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "channels", "channels_last"), [("bf16", 32, True), ("fp32", 32, False)])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_channelwise(capability: int, dtype: str, channels: int, channels_last: bool, tmp_path: Path) -> None:
    pytest.importorskip("triton.backends.nvidia")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = str(Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    # Triton reads the source of a kernel from its file.
    script = tmp_path / "check.py"
    script.write_text(SCRIPT)
    arguments = [sys.executable, str(script), str(capability), dtype, str(channels), str(channels_last)]
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    usage = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", result.stdout)
    assert len(usage) == 4, result.stdout
    assert result.stdout.count("WIDE") == 4, result.stdout  # 16 bytes at a time
    for registers, stack, shared, local in usage:
        assert int(stack) == int(local) == 0, result.stdout
        # Half of a multiprocessor's threads or more at a time.
        assert int(registers) <= 128 and int(shared) <= 48 * 1024, result.stdout


#: Of a thread, by kernel.
CONV_REGISTERS = {
    "conv_kernel": 200,
    "weight_kernel": 190,
    "reduce_kernel": 160,
    "sums_kernel": 250,
    "backward_kernel": 230,
}
#: The matrix instructions an architecture has.
MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


@pytest.mark.slow
@pytest.mark.parametrize("capability", MATRIX)
def test_dilated_conv3d(capability: int) -> None:
    pytest.importorskip("triton.backends.nvidia")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    tests = Path(__file__).parent
    environment["PYTHONPATH"] = os.pathsep.join([str(tests.parent), environment.get("PYTHONPATH", "")])
    arguments = [sys.executable, str(tests / "compile_dilated_conv3d.py"), str(capability)]
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    compiled = json.loads(result.stdout)
    assert {each["kernel"] for each in compiled} == set(CONV_REGISTERS)
    for each in compiled:
        assert each["spilled"] == 0, each
        assert each["registers"] <= CONV_REGISTERS[each["kernel"]], each
        assert each["tensor_cores"] == [MATRIX[capability]], each
        assert each["shared"] <= (163 if capability == 80 else 227) * 1024, each
