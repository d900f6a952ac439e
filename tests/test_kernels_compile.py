"""Triton kernels compile to machine code of every architecture without a GPU, and take no more than they did."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import ptx, resources
from bench.results import BadResults

ROOT = Path(__file__).resolve().parent.parent

#: Registers of a thread, with any version of Triton. The passes of channelwise leave room for half of a
#: multiprocessor's threads or more at a time.
REGISTERS = {
    "channelwise": 128,
    "norm_tables": 64,
    "focal_dice": 255,
    "linear_focal_dice.argmax_kernel": 128,
    "linear_focal_dice": 255,
    "roi_gather3d": 230,
    "roi_align3d": 128,
    "heatmap_argmax3d": 128,
    "paste_rois3d": 128,
    "dilated_conv3d.conv_kernel": 200,
    "dilated_conv3d.weight_kernel": 190,
    "dilated_conv3d.reduce_kernel": 64,
    "dense_aspp3d.reduce_kernel": 160,
    "dense_aspp3d.sums_kernel": 250,
    "dense_aspp3d.backward_kernel": 230,
}
#: Bytes of a thread on the stack, where that is not 0: with sizes from a table ptxas keeps some of them there.
SPILLED = {
    ("roi_gather3d.backward_kernel", True): 104,  # with Triton 3.6; less with 3.9
    ("roi_gather3d.forward_kernel", True): 8,  # with Triton 3.8; none with 3.6 and 3.9
    ("roi_align3d.backward_kernel", False): 32,  # read once per ROI and tile
    ("roi_align3d.forward_kernel", False): 8,  # with Triton 3.6; none with 3.9
    ("roi_align3d.table_kernel", False): 8,  # likewise
}
#: The tensor-core instructions an architecture has.
MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}
WITH_MATRIX = ("dilated_conv3d.conv_kernel", "dilated_conv3d.weight_kernel", "dense_aspp3d")


@pytest.mark.slow
@pytest.mark.parametrize("target", resources.TARGETS)
def test_resources(target: str) -> None:
    """The limits hold with any version of Triton; the table, where the versions are its own."""
    pytest.importorskip("triton.backends.nvidia")
    # Triton compiles nothing in a process in which it interprets.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.resources", "--json", "--target", target]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    measured = json.loads(run.stdout)
    for row in measured["rows"]:
        assert_within_limits(row)
    assert {row["kernel"] for row in measured["rows"]} == kernels_of_the_library()
    table = resources.load(resources.TABLE)
    if table.tools != measured["tools"]:
        pytest.skip(f"limits hold; the table is of {table.tools}, here is {measured['tools']}: not compared")
    found = resources.compare(measured["rows"], table)
    assert not found, "\n".join([*found, "python -m bench.resources --update --reason WHY accepts this"])


def assert_within_limits(row: dict[str, Any]) -> None:
    kernel = row["kernel"]
    module = kernel.split(".")[0]
    assert row["spilled"] <= SPILLED.get((kernel, "many sizes" in row["use"]), 0), row
    assert row["registers"] <= REGISTERS.get(kernel, REGISTERS.get(module, 0)), row
    argmax, loss = kernel == "linear_focal_dice.argmax_kernel", module == "linear_focal_dice"
    if kernel.startswith(WITH_MATRIX) or (argmax and row["use"].startswith("bf16")):
        assert {name.split()[0] for name in row["matrix"]} == {MATRIX[row["target"]]}, row
        assert row["shared"] <= (163 if row["target"] == "sm_80" else 227) * 1024, row
    elif loss and not argmax:
        # matrices of few classes or voxels take the instructions of sm_80 everywhere
        assert row["matrix"], row
        assert row["shared"] <= (163 if row["target"] == "sm_80" else 227) * 1024, row
    else:
        assert row["shared"] <= 48 * 1024, row
    if module == "channelwise" and kernel != "channelwise.merge_kernel":
        assert row["widest"] == 16, row


def kernels_of_the_library() -> set[str]:
    """Every function that a launch names, by the source: what is added must be compiled here too."""
    found = set()
    for path in (ROOT / "focuskernels" / "kernels").glob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        names = [b[4 : b.index("(")] for a, b in itertools.pairwise(lines) if a == "@triton.jit"]
        found |= {f"{path.stem}.{name}" for name in names if not name.startswith("_")}
    return found


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets")
def test_arguments_are_typed_as_in_a_launch() -> None:
    """An integer that is 1 is fixed only where the kernel does not give its type; else other code is counted."""
    pytest.importorskip("triton.backends.nvidia")
    from bench.specialisations import specialisations

    for one in specialisations((9, 0)):
        for parameter in one.kernel.params:
            name, annotated = parameter.name, parameter.annotation_type
            if parameter.is_constexpr or name in one.fixed:
                assert name in one.fixed and not annotated, (one.kernel.__name__, name)
            elif annotated:
                assert one.types.get(name, "i32") == annotated, (one.kernel.__name__, name)


LOOPS = """
.version 8.7
.target sm_90a
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid 128
{
	.reg .pred 	%p<9>;                  // a comment; of two parts
	.loc	1 10 20
	ld.param.b64 	%rd1, [kernel_param_0];
	// begin inline asm
	mov.u32 %r1, 0x0;
	@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
	// end inline asm
$L__BB0_1:                              // outer
	mov.b32 	%r5, 0;
$L__BB0_2:                              // inner
	.loc	1 12 20
	cp.async.cg.shared.global [ %r6 + 0 ], [ %rd2 + 0 ], 0x10, %r7;
	@%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r8], 4096;
	{
		.reg .pred complete;
		waitLoop:
		mbarrier.try_wait.parity.shared::cta.b64 complete, [%r8], %r9;
		@!complete bra.uni waitLoop;
	}
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1, %f2}, %rd3, %rd4, 1, 1, 1, 0, 0;
	wgmma.commit_group.sync.aligned;
	@%p3 bra 	$L__BB0_2;
	st.global.b16 	[%rd1], %rs1;
	@%p4 bra 	$L__BB0_1;
$L__BB0_3:                              // waits, and does nothing else
	add.s32 	%r1, %r1, 1;
	@%p5 bra 	$L__BB0_3;
	ret;
}
"""


def test_counts_of_a_pass_through_the_hottest_loop() -> None:
    counts = ptx.count(LOOPS, threads=128)
    assert counts.loop
    assert counts.instructions == 7
    assert counts.matrix == {"wgmma.mma_async m64n64k16": 1}
    assert counts.moved == 128 * 16 + 4096
    assert counts.moved_outside == 128 * (16 + 2)
    assert counts.widest == 16


def test_counts_of_a_kernel_without_a_loop() -> None:
    text = LOOPS.replace("@%p3 bra", "@%p3 not_bra").replace("@%p4 bra", "@%p4 not_bra")
    counts = ptx.count(text, threads=32)
    assert not counts.loop
    assert counts.instructions == 16
    assert (counts.moved, counts.moved_outside) == (32 * (16 + 16 + 2) + 4096, 0)


def row(**changed: Any) -> dict[str, Any]:
    values = {"kernel": "stem.kernel", "use": "bf16", "target": "sm_90", "registers": 64, "spilled": 0, "shared": 1024}
    values |= {"per": "pass", "instructions": 100, "matrix": {"wgmma.mma_async m64n64k16": 4}, "bytes": 4096}
    return {**values, "needed": 4096, "bytes_outside": 0, "widest": 16, **changed}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, []),
        ({"registers": 60, "instructions": 90, "bytes": 4000}, []),
        ({"registers": 72, "spilled": 8}, ["registers 64 -> 72", "spilled 0 -> 8"]),
        ({"widest": 4}, ["bytes per access 16 -> 4"]),
        ({"widest": 0}, []),
        ({"matrix": {}}, ["no wgmma.mma_async"]),
        ({"matrix": {"wgmma.mma_async m64n64k16": 8}}, ["wgmma.mma_async m64n64k16 4 -> 8"]),
        ({"matrix": {"wgmma.mma_async m64n32k16": 8}}, []),
    ],
)
def test_what_is_worse(changed: dict[str, Any], words: list[str]) -> None:
    assert resources.worse(row(**changed), row()) == words


TOOLS = {"triton": "3.9.0", "ptxas": "12.9.86"}


def test_what_got_worse_needs_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    with pytest.raises(BadResults, match="say why it is made anew"):
        resources.updated([row()], TOOLS, None, None)
    resources.updated([row()], TOOLS, None, "first").save(path)
    table = resources.load(path)
    assert (table.tools, table.reason) == (TOOLS, "first")
    assert resources.compare([row()], table) == []
    heavier = row(registers=80)
    assert resources.compare([heavier], table) == ["stem.kernel (bf16) on sm_90: registers 64 -> 80"]
    with pytest.raises(BadResults, match="registers 64 -> 80"):
        resources.updated([heavier], TOOLS, table, None)
    accepted = resources.updated([heavier], TOOLS, table, "two rows at a time")
    assert [r["reason"] for r in accepted.rows.values()] == ["two rows at a time"]
    assert resources.compare([heavier], accepted) == []
    # It stays with what it explains, and goes with it.
    kept = resources.updated([heavier], TOOLS, accepted, None)
    assert [r["reason"] for r in kept.rows.values()] == ["two rows at a time"]
    better = resources.updated([row(registers=70)], TOOLS, kept, None)
    assert [(r["registers"], r["reason"]) for r in better.rows.values()] == [(70, "")]


def test_a_new_kernel_and_new_tools(tmp_path: Path) -> None:
    table = resources.updated([row()], TOOLS, None, "first")
    new = row(use="fp32")
    assert resources.compare([row(), new], table) == ["stem.kernel (fp32) on sm_90: not in the table"]
    assert len(resources.updated([row(), new], TOOLS, table, None).rows) == 2
    others = {**TOOLS, "triton": "3.10.0"}
    with pytest.raises(BadResults, match=r"not of triton 3\.10\.0"):
        resources.updated([row()], others, table, None)
    assert resources.updated([row(registers=99)], others, table, "newer Triton").reason == "newer Triton"


def test_the_table_holds_every_kernel_on_every_target() -> None:
    table = resources.load(resources.TABLE)
    assert {(kernel, target) for kernel, _, target in table.rows} == {
        (kernel, target) for kernel in kernels_of_the_library() for target in resources.TARGETS
    }


def test_a_bad_table_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text("[]")
    with pytest.raises(BadResults, match=r"table\.json is not a table of kernels' resources"):
        resources.load(path)
