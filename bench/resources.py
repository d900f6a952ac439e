"""What the Triton kernels take, known without a GPU: `python -m bench.resources --help`.

Every kernel is compiled for every architecture; registers, spills, shared memory, the instructions of one pass through
the hottest loop and the bytes it moves are compared with the table in `kernel_resources.json`.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .results import BadResults
from .sources import ROOT

if TYPE_CHECKING:
    from .specialisations import Specialisation

TABLE = ROOT / "bench" / "kernel_resources.json"
TARGETS = ("sm_80", "sm_90", "sm_100")
EXIT_WORSE, EXIT_USAGE = 1, 2
Row = dict[str, Any]
KEY = ("kernel", "use", "target")
#: What should not grow.
COSTS = ("registers", "spilled", "shared", "instructions", "bytes", "bytes_outside")


@dataclass(frozen=True)
class Table:
    """Rows, and the tools they belong to: other versions give other numbers for the same source.

    Attributes:
        tools: {"triton": version, "ptxas": version, ...}.
        reason: Why the table was made anew for these tools.
        rows: By kernel, use and target.
    """

    tools: dict[str, str]
    reason: str
    rows: dict[tuple[str, ...], Row]

    def save(self, path: Path) -> None:
        """As JSON with a line per row, in one step."""
        lines = [json.dumps(self.rows[key]) for key in sorted(self.rows)]
        head = f'{{"tools": {json.dumps(self.tools)},\n"reason": {json.dumps(self.reason)},\n"rows": [\n'
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(head + ",\n".join(lines) + "\n]}\n", encoding="utf-8")
        os.replace(temporary, path)


def load(path: Path) -> Table:
    """Read a table.

    Raises:
        BadResults: the file does not hold one.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return Table(document["tools"], document["reason"], _by_key(document["rows"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BadResults(f"{path} is not a table of kernels' resources: {error!r}") from error


def worse(row: Row, before: Row) -> list[str]:
    """In what a kernel takes more than before, in words."""
    found = [f"{name} {before[name]} -> {row[name]}" for name in COSTS if row[name] > before[name]]
    # A wider access is better; 0 is a kernel whose bytes go by tensor copies alone.
    if 0 < row["widest"] < before["widest"]:
        found.append(f"bytes per access {before['widest']} -> {row['widest']}")
    gone = {name.split()[0] for name in before["matrix"]} - {name.split()[0] for name in row["matrix"]}
    found += [f"no {name}" for name in sorted(gone)]
    # Of another shape they do another amount of work.
    both = sorted(row["matrix"].keys() & before["matrix"].keys())
    found += [
        f"{name} {before['matrix'][name]} -> {row['matrix'][name]}"
        for name in both
        if row["matrix"][name] > before["matrix"][name]
    ]
    return found


def compare(rows: Iterable[Row], table: Table) -> list[str]:
    """What got worse, a line per row, and which rows the table lacks."""
    found = []
    for row in rows:
        before = table.rows.get(_key(row))
        if before is None:
            found.append(f"{_title(row)}: not in the table")
        elif changes := worse(row, before):
            found.append(f"{_title(row)}: {', '.join(changes)}")
    return found


def updated(rows: Iterable[Row], tools: dict[str, str], before: Table | None, reason: str | None) -> Table:
    """The table of these rows.

    A row that got worse carries the reason until it changes again; so does the whole table when the tools changed.

    Raises:
        BadResults: something got worse, or the tools changed, and no reason is given.
    """
    if before is None or before.tools != tools:
        if not reason:
            raise BadResults(f"the table is not of {_words(tools)}: say why it is made anew with --reason")
        return Table(tools, reason, _by_key({**row, "reason": ""} for row in rows))
    lines, result = [], {}
    for row in rows:
        old = before.rows.get(_key(row), {})
        changes = worse(row, old) if old else []
        if changes:
            lines.append(f"{_title(row)}: {', '.join(changes)}")
        same = {**row, "reason": ""} == {**old, "reason": ""}
        result[_key(row)] = {**row, "reason": reason or "" if changes else old["reason"] if same else ""}
    if lines and not reason:
        raise BadResults("\n".join(["worse than in the table; say why with --reason:", *lines]))
    return Table(tools, before.reason, result)


def measure(targets: Sequence[str]) -> list[Row]:
    """Compile everything, and say what it takes."""
    from .specialisations import specialisations

    return [resources(one, target) for target in targets for one in specialisations(_capability(target))]


def resources(one: "Specialisation", target: str) -> Row:
    """The row of one kernel."""
    from . import ptx

    compiled = _compile(one, target)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(_binaries() / "cuobjdump"), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    counts = asdict(ptx.count(compiled.asm["ptx"], 32 * compiled.metadata.num_warps))
    return {
        "kernel": f"{one.stem}.{one.kernel.__name__}",
        "use": one.name,
        "target": target,
        "registers": numbers["REG"],
        "spilled": numbers["STACK"] + numbers["LOCAL"],
        "shared": compiled.metadata.shared,
        "per": "pass" if counts["loop"] else "program",
        "instructions": counts["instructions"],
        "matrix": counts["matrix"],
        "bytes": counts["moved"],
        "needed": one.needed,
        "bytes_outside": counts["moved_outside"],
        "widest": counts["widest"],
    }


def tools() -> dict[str, str]:
    """Versions of Triton and of the assemblers in it."""
    import triton

    found = {"triton": triton.__version__}
    for path in sorted(_binaries().glob("ptxas*")):
        said = subprocess.run([str(path), "--version"], capture_output=True, text=True, check=True).stdout
        found[path.name] = next(iter(re.findall(r"\bV([\d.]+)", said)), "unknown")
    return found


def _compile(one: "Specialisation", target: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = one.kernel.arg_names
    fixed = {name: value for name, value in one.fixed.items() if name in arguments}
    signature = {name: "constexpr" if name in fixed else one.types.get(name, "i32") for name in arguments}
    aligned = [n for n in arguments if signature[n].startswith("*") or (n in one.aligned and n not in fixed)]
    attributes = {(arguments.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(one.kernel, signature, fixed, attributes)
    major, minor = _capability(target)
    return triton.compile(source, target=GPUTarget("cuda", 10 * major + minor, 32), options=one.options)


def _binaries() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _capability(target: str) -> tuple[int, int]:
    number = int(target.removeprefix("sm_"))
    return number // 10, number % 10


def _by_key(rows: Iterable[Row]) -> dict[tuple[str, ...], Row]:
    return {_key(row): row for row in rows}


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def _title(row: Row) -> str:
    return f"{row['kernel']} ({row['use']}) on {row['target']}"


def _words(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def main(argv: list[str] | None = None) -> int:
    """Compile, compare or update; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.resources", description=__doc__)
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all; may be given again")
    parser.add_argument("--table", type=Path, default=TABLE, metavar="FILE", help="default: %(default)s")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--update", action="store_true", help="write the table; what got worse needs --reason")
    what.add_argument("--json", action="store_true", help="only print rows and versions")
    parser.add_argument("--reason", help="why it is right that a kernel takes more, or that the tools are others")
    arguments = parser.parse_args(argv)
    try:
        return _run(arguments)
    except (BadResults, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE


def _run(arguments: argparse.Namespace) -> int:
    if arguments.update and arguments.target:
        raise BadResults("--update compiles for all targets; leave out --target")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise BadResults("Triton compiles nothing while it interprets; unset TRITON_INTERPRET")
    versions = tools()
    rows = measure(arguments.target or TARGETS)
    if arguments.json:
        print(json.dumps({"tools": versions, "rows": rows}))
        return 0
    if arguments.update:
        before = load(arguments.table) if arguments.table.exists() else None
        updated(rows, versions, before, arguments.reason).save(arguments.table)
        print(f"{len(rows)} rows: {arguments.table}")
        return 0
    table = load(arguments.table)
    if table.tools != versions:
        raise BadResults(f"the table is of {_words(table.tools)}; here is {_words(versions)}, nothing to compare")
    found = compare(rows, table)
    print("\n".join(found) or f"{len(rows)} rows, none worse than in {arguments.table}")
    return EXIT_WORSE if found else 0


if __name__ == "__main__":
    sys.exit(main())
