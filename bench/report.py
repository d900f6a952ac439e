"""`python -m bench.report`: tables and plots of bench/results/*.json in docs/benchmarks.md. Never measures."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .case import Cost, ops
from .ceilings import floor_ms
from .results import MACHINE, BadResults, Row, best_peer, groups, load, our_row
from .sources import ROOT, source_hash
from .table import caution, markdown, memory, milliseconds, rate

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
HEADER = ("case", "mode", "ours", "best peer", "speed-up", "of floor", "rate", "memory, ours", "memory, peer", "others")


def main(argv: list[str] | None = None) -> int:
    """Write the report; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of result files")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where benchmarks.md and img/ are")
    arguments = parser.parse_args(argv)
    page = arguments.docs / "benchmarks.md"
    try:
        machines = collect(sorted(arguments.results.glob("*.json")))
        text = page.read_text(encoding="utf-8")
        head, tail = text.split(BEGIN)[0], text.split(END)[1]
    except (BadResults, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except IndexError:
        print(f"error: {page} lacks the lines {BEGIN} and {END}", file=sys.stderr)
        return 2
    plots = draw(machines, arguments.docs / "img")
    page.write_text(f"{head}{BEGIN}\n\n{report(machines, plots)}\n\n{END}{tail}", encoding="utf-8")
    return 0


Pairs = list[tuple[dict[str, Any], Row]]
Machines = dict[tuple[Any, ...], Pairs]


def collect(paths: Sequence[Path]) -> Machines:
    """(run, row) by machine; of rows with the same meaning the newest stays. Quick runs are no measurements."""
    newest: dict[tuple[Any, ...], tuple[dict[str, Any], Row]] = {}
    for path in paths:
        document = load(path)
        runs = {run["id"]: run for run in document["runs"]}
        for row in document["rows"]:
            run = runs[row["run"]]
            if run["size"] == "quick":
                continue
            key = (*(run[name] for name in MACHINE), row["op"], row["case"], row["mode"], row["provider"])
            if key not in newest or newest[key][0]["started"] <= run["started"]:
                newest[key] = (run, row)
    machines: Machines = {}
    for key, pair in newest.items():
        machines.setdefault(key[: len(MACHINE)], []).append(pair)
    return {machine: _under_one_ceiling(pairs) for machine, pairs in machines.items()}


def _under_one_ceiling(pairs: Pairs) -> Pairs:
    """Floors by the best ceilings of all runs: what a machine once did, it can do."""
    ceilings = [run["ceilings"] for run, _ in pairs]
    dtypes = {dtype for one in ceilings for dtype in one["matmul_tflop_s"]}
    best = {
        "copy_gb_s": max(one["copy_gb_s"] for one in ceilings),
        "matmul_tflop_s": {d: max(one["matmul_tflop_s"].get(d, 0.0) for one in ceilings) for d in sorted(dtypes)},
    }
    return [
        (
            {**run, "ceilings": best},
            {**row, "floor_ms": floor_ms(Cost(row["min_bytes"], row["flops"]), getattr(torch, row["dtype"]), best)},
        )
        for run, row in pairs
    ]


def is_stale(row: Row) -> bool:
    """Whether the kernels have changed since."""
    op = ops().get(row["op"])
    return op is None or row["sources"] not in {source_hash(op, device) for device in ("cpu", "cuda")}


def report(machines: Machines, plots: dict[tuple[Any, ...], list[str]]) -> str:
    """The generated part of the page."""
    if not machines:
        return "No results yet."
    parts = []
    for machine, pairs in machines.items():
        runs = sorted({run["started"]: run for run, _ in pairs}.values(), key=lambda run: run["started"])
        parts.append(f"## {_heading(runs[-1])}\n\n{_facts(runs)}")
        parts += [f"![{name}](img/{name})" for name in plots.get(machine, [])]
        for op, rows in sorted(groups([row for _, row in pairs], lambda row: row["op"]).items()):
            lines = [_line(group) for group in groups(rows).values()]
            parts.append(f"### {op}\n\n{markdown(HEADER, lines)}")
            parts += _compiled(rows) + _absent(rows)
    return "\n\n".join(parts)


def _heading(run: dict[str, Any]) -> str:
    if run["device"] == "cuda":
        return str(run["device_name"])
    return f"{run['device_name']}, {run['threads']} threads, {run['heap']} heap"


def _facts(runs: Sequence[dict[str, Any]]) -> str:
    last = runs[-1]
    versions = ", ".join(f"{name} {value}" for name, value in last["versions"].items() if value)
    matmul = ", ".join(f"{name} {value:.3g}" for name, value in last["ceilings"]["matmul_tflop_s"].items())
    options = f" --threads {last['threads']} --heap {last['heap']}" if last["device"] == "cpu" else ""
    when = "; ".join(f"{run['started'][:16].replace('T', ' ')} at {_commit(run)}" for run in runs)
    return (
        f"`python -m bench --device {last['device']}{options}`, {when} (UTC). Ceilings: copy "
        f"{last['ceilings']['copy_gb_s']:.3g} GB/s, matrix product in TFLOP/s: {matmul}. {versions}."
    )


def _commit(run: dict[str, Any]) -> str:
    return f"commit {run['commit'][:12]}{' with changes' if run['dirty'] else ''}" if run["commit"] else "no commit"


def _line(rows: list[Row]) -> tuple[str, ...]:
    mine, peer, first = our_row(rows), best_peer(rows), rows[0]
    others = [
        f"{row['provider']} {_time(row)}, {memory(row)}"
        for row in sorted((r for r in rows if r["status"] == "ok"), key=lambda r: r["median_ms"])
        if row is not mine and row is not peer
    ]
    stale = " **(stale)**" if any(is_stale(row) for row in rows) else ""
    return (
        first["case"] + stale,
        first["mode"],
        f"{_time(mine)} ({mine['backend']})" if mine else _why_not(rows),
        f"{_time(peer)} ({peer['provider']})" if peer else "",
        f"{peer['median_ms'] / mine['median_ms']:.2f}" if mine and peer else "",
        f"{mine['floor_ms'] / mine['median_ms']:.0%}" if mine else "",
        rate(mine) if mine else "",
        memory(mine) if mine else "",
        memory(peer) if peer else "",
        "; ".join(others),
    )


def _time(row: Row) -> str:
    """Median, 20 % and 80 % quantile, and what a reader must know about them."""
    spread = f"{milliseconds(row['median_ms'])} [{milliseconds(row['p20_ms'])}, {milliseconds(row['p80_ms'])}]"
    return f"{spread} **({caution(row)})**" if caution(row) else spread


def _why_not(rows: list[Row]) -> str:
    return next((f"{row['status']}: {row['reason']}" for row in rows if row["role"] == "ours"), "")


def _compiled(rows: list[Row]) -> list[str]:
    """A line about the compilation of our kernels and the search for tiles, where there was any."""
    last: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        # Each row of a case holds what was compiled until then.
        if row.get("kernels"):
            last[row["case"], row["provider"]] = row["kernels"]
    if not last:
        return []
    total = {name: sum(kernels[name] for kernels in last.values()) for name in next(iter(last.values()))}
    return [
        f"Kernels: {total['compiled']} compiled in {total['compile_s']:.1f} s, {total['cached']} from Triton's cache; "
        f"{total['trials']} trials of tiles in {total['trial_s']:.1f} s."
    ]


def _absent(rows: list[Row]) -> list[str]:
    """Lines about who is not in the table, and why."""
    found = {
        f"{row['provider']}{_of_case(row)}: {row['status']}, {row['reason']}"
        for row in rows
        if row["status"] != "ok" and row["role"] != "ours"
    }
    return ["Not measured: " + "; ".join(sorted(found)) + "."] if found else []


def _of_case(row: Row) -> str:
    """Who is missing is so in every case, with one reason."""
    return "" if row["status"] == "missing" else f" ({row['case']})"


def draw(machines: Machines, folder: Path) -> dict[tuple[Any, ...], list[str]]:
    """Bars of ours against the best peer, a roofline, and memory and time over volume; file names by machine."""
    if not machines:
        return {}
    try:
        from . import plots
    except ImportError as error:
        print(f"no plots: {error}", file=sys.stderr)
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[tuple[Any, ...], list[str]] = {}
    for machine, pairs in machines.items():
        # By what the machine is, so that another one's results leave the files of this one alone.
        name = re.sub(r"[^a-z0-9]+", "-", f"{machine[0]} {_heading(pairs[0][0])}".lower()).strip("-")
        drawn[machine] = plots.draw_machine(pairs, folder, name, is_stale)
    return drawn


if __name__ == "__main__":
    sys.exit(main())
