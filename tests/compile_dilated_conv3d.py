"""Compile the kernels of the dilated convolution and of DenseASPP without a GPU; print what they take, as JSON.

A script of its own, since Triton compiles nothing in a process in which it interprets.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from focuskernels.kernels import dense_aspp3d as passes
from focuskernels.kernels import dilated_conv3d as kernels
from focuskernels.kernels.dilated_conv3d_tiles import Tile, WeightTile, tiles, weight_tiles

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TENSOR_CORES = re.compile(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync")
PROBLEMS = [(64, 64, 3), (64, 32, 3), (128, 64, 1)]
VOLUME = (60, 128, 128)


def compile_kernel(
    kernel: Any, capability: int, options: dict[str, int], types: dict[str, str], fixed: dict[str, Any]
) -> Any:
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in kernel.arg_names}
    # As maps of at least 16 channels have them.
    strides = {n for n in kernel.arg_names if n == "stride" or (n.startswith("s") and len(n) == 3)}
    aligned = [n for n in kernel.arg_names if signature[n].startswith("*") or n in strides]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, fixed, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups()  # type: ignore[union-attr]
    return {
        "kernel": kernel.__name__,
        "options": options,
        "constants": fixed,
        "registers": int(registers),
        "spilled": int(stack) + int(local),
        "shared": compiled.metadata.shared,
        "tensor_cores": sorted(set(TENSOR_CORES.findall(compiled.asm["ptx"]))),
    }


def options_of(tile: Tile | WeightTile) -> dict[str, int]:
    return {"num_warps": tile.warps, "num_stages": tile.stages}


def conv(capability: int, inputs: int, outputs: int, planes: int, tile: Tile, epilogue: bool) -> Any:
    types = {"x": "*bf16", "weight": "*bf16", "y": "*bf16", "bias": "*bf16", "sums": "*fp32"}
    if tile.tma:
        types["x"] = f"tensordesc<bf16[1,1,{tile.bh},{tile.bw},{tile.bk}]>"
        types["weight"] = f"tensordesc<bf16[{tile.bn},{tile.bk}]>"
    fixed = kernels.conv_constants(inputs, outputs, planes, tile, bias=epilogue, sums=epilogue, accumulate=epilogue)
    return compile_kernel(kernels.conv_kernel, capability, options_of(tile.roomy() if epilogue else tile), types, fixed)


def weight(capability: int, inputs: int, outputs: int, planes: int, tile: WeightTile) -> Any:
    types = {"x": "*bf16", "grad": "*bf16", "partial": "*fp32"}
    if tile.tma:
        types["x"] = f"tensordesc<bf16[1,1,1,{tile.bw},{tile.bc}]>"
        types["grad"] = f"tensordesc<bf16[1,1,1,{tile.bw},{tile.bn}]>"
    fixed = kernels.weight_constants(inputs, outputs, planes, tile)
    return compile_kernel(kernels.weight_kernel, capability, options_of(tile), types, fixed)


def dense_aspp(capability: int) -> Any:
    tables = dict.fromkeys(("table", "weights", "found", "partial"), "*fp32")
    maps = dict.fromkeys(("x", "grad", "h", "into", "weight"), "*bf16")
    types = {**tables, **maps, "voxels": "i64", "stride": "i64"}
    for channels in (64, 160):
        fixed = passes.constants(channels, 64, passes.VOXELS)
        sums = passes.constants(channels, 64, passes.VOXELS, passes.SUMS_WIDEST) | {"TILES": passes.TILES_PER_PROGRAM}
        for kernel, constants in (
            (passes.reduce_kernel, fixed),
            (passes.sums_kernel, sums),
            (passes.backward_kernel, fixed),
        ):
            yield compile_kernel(kernel, capability, {"num_warps": passes.WARPS}, types, constants)


def main(capability: int) -> None:
    generation = (capability // 10, capability % 10)
    found = []
    for inputs, outputs, planes in PROBLEMS:
        kernel = (planes, 3, 3)
        for i, tile in enumerate(tiles(generation, inputs, outputs, kernel, 1, VOLUME, (1, 6, 6))):
            found.append(conv(capability, inputs, outputs, planes, tile, epilogue=False))
            if i == 0:
                found.append(conv(capability, inputs, outputs, planes, tile, epilogue=True))
        # Candidates that differ in the number of shares alone are one kernel.
        candidates = {t._replace(shares=1) for t in weight_tiles(generation, inputs, outputs, kernel, 1, VOLUME)}
        found += [weight(capability, inputs, outputs, planes, tile) for tile in sorted(candidates)]
    print(json.dumps([*found, *dense_aspp(capability)]))


if __name__ == "__main__":
    main(int(sys.argv[1]))
