"""What a pass through a kernel's hottest loop does, counted in its PTX.

PTX, not machine code: there a loop is still as the source has it, neither unrolled nor with its waiting moved out of
line, so that one pass can be counted. What the assembler makes of it shows in registers and spills. The hottest loop is
the innermost one, of several the one with the most tensor-core instructions, then accesses to global memory, then
instructions; a kernel without such a loop is counted as a whole.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

_COMMENT = re.compile(r"//[^\n]*")
_LABEL = re.compile(r"^\s*(\$L__\w+):", re.MULTILINE)
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$L__\w+)")
#: Labels and line numbers, which end without a semicolon.
_NO_INSTRUCTION = re.compile(r"^\s*(?:[$\w]+:|\.loc\b[^\n]*|\.file\b[^\n]*)", re.MULTILINE)
_MATRIX = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.(\S+)")
_SHAPE = re.compile(r"m\d+n\d+k\d+")
_ACCESS = re.compile(r"\b(?:ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\s")
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\S*\s.*?\],\s*(0x[0-9a-f]+|\d+)", re.DOTALL)
#: Tensor copies: what the barrier that waits for them expects.
_EXPECTED = re.compile(r"\bmbarrier\.arrive\.expect_tx\S*\s[^;]*,\s*(\d+)\s*$")


@dataclass(frozen=True)
class Counts:
    """Of one program.

    Attributes:
        loop: Whether `instructions`, `matrix` and `moved` are those of one pass through a loop, or of everything.
        instructions: PTX instructions of a thread.
        matrix: Tensor-core instructions of a warp or warp group by kind, with the shape where it is in the name.
        moved: Bytes that loads, stores and copies from and to global memory ask for, masked ones included.
        moved_outside: Such bytes outside the loop.
        widest: Bytes of the widest load, store or copy of a thread; 0 where tensor copies do it all.
    """

    loop: bool
    instructions: int
    matrix: dict[str, int]
    moved: int
    moved_outside: int
    widest: int


def count(ptx: str, threads: int) -> Counts:
    """Count the PTX of a module with one kernel, started with that many threads."""
    text = _COMMENT.sub("", ptx)
    text = text[text.index("{", text.index(".entry")) :]
    everything = list(instructions(text))
    inner = max((list(instructions(text[start:end])) for start, end in innermost_loops(text)), key=_heat, default=[])
    # A loop that neither computes nor moves anything waits for something.
    hot = inner if any(_heat(inner)[:2]) else everything
    moved = _moved(hot, threads)
    return Counts(
        loop=hot is inner,
        instructions=len(hot),
        matrix=dict(sorted(_matrix(hot).items())),
        moved=moved,
        moved_outside=_moved(everything, threads) - moved,
        widest=max((width for line in everything for width in _widths(line)), default=0),
    )


def instructions(text: str) -> Iterator[str]:
    """The instructions in a piece of PTX without comments."""
    for statement in _NO_INSTRUCTION.sub("", text).split(";"):
        statement = statement.lstrip("{} \t\n")
        if statement and not statement.startswith("."):
            yield statement


def innermost_loops(text: str) -> list[tuple[int, int]]:
    """(start, end) of the loops that contain no other: from a label to the last branch back to it."""
    labels = {match[1]: match.start() for match in _LABEL.finditer(text)}
    loops: dict[int, int] = {}
    for branch in _BRANCH.finditer(text):
        start = labels.get(branch[1], len(text))
        if start < branch.start():
            loops[start] = max(loops.get(start, 0), branch.end())
    return [
        (start, end)
        for start, end in loops.items()
        if not any(start < inner and inner_end <= end for inner, inner_end in loops.items())
    ]


def _heat(body: list[str]) -> tuple[int, int, int]:
    return sum(_matrix(body).values()), sum(1 for line in body if _moves(line)), len(body)


def _matrix(body: list[str]) -> Counter[str]:
    found = (match for line in body if (match := _MATRIX.search(line)))
    return Counter(" ".join([match[1], *_SHAPE.findall(match[2])]) for match in found)


def _moves(line: str) -> bool:
    return bool(_EXPECTED.search(line)) or any(_widths(line))


def _moved(body: list[str], threads: int) -> int:
    expected = (int(match[1]) for line in body if (match := _EXPECTED.search(line)))
    return threads * sum(width for line in body for width in _widths(line)) + sum(expected)


def _widths(line: str) -> list[int]:
    """Bytes a thread moves."""
    accesses = [int(vector or 1) * int(bits) // 8 for vector, bits in _ACCESS.findall(line)]
    return accesses + [int(size, 0) for size in _COPY.findall(line)]
