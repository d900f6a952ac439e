"""Result files: JSON that is complete after every row.

{"schema": 1, "runs": [Run, ...], "rows": [Row, ...]}; a row names its run, which holds the machine, its ceilings and
the commit. Ratios are computed when they are shown, never stored.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCHEMA = 1
STATUSES = ("ok", "missing", "skipped", "failed", "wrong")
Row = dict[str, Any]

#: What identifies a row within a machine; a newer one replaces an older one.
KEY = ("op", "case", "mode", "provider")
#: The provider of ours that stands for an op.
OURS = "focuskernels"
#: What must agree between two runs for their rows to stand in one table.
MACHINE = ("device", "device_name", "threads", "heap", "size")

RUN_FIELDS: dict[str, type | tuple[type, ...]] = {
    "id": int,
    "started": str,
    "finished": (str, type(None)),
    "device": str,
    "device_name": str,
    "threads": int,
    "heap": str,
    "size": str,
    "hardware": dict,
    "versions": dict,
    "clocks": (dict, type(None)),
    "ceilings": dict,
    "commit": (str, type(None)),
    "dirty": (bool, type(None)),
}
ROW_FIELDS: dict[str, type | tuple[type, ...]] = {
    "run": int,
    "op": str,
    "case": str,
    "mode": str,
    "provider": str,
    "role": str,
    "status": str,
    "reason": (str, type(None)),
    "backend": (str, type(None)),
    "shape": dict,
    "dtype": str,
    "layout": str,
    "min_bytes": int,
    "flops": int,
    "floor_ms": (float, int),
    "sources": str,
}
OK_FIELDS: dict[str, type | tuple[type, ...]] = {
    "median_ms": (float, int),
    "p20_ms": (float, int),
    "p80_ms": (float, int),
    "samples": int,
    "noisy_samples": int,
    "peak_extra_bytes": (int, type(None)),
    "returned_bytes": (int, type(None)),
    "gb_s": (float, int),
    "tflop_s": (float, int),
    "first_call_s": (float, int, type(None)),
    "relative_error": (float, int, type(None)),
    "partial": bool,
    "clocks": (dict, type(None)),
    "kernels": (dict, type(None)),
}


class BadResults(Exception):
    """A file that does not hold results; the message names it."""


class Results:
    """The results in one file, written after every change.

    Args:
        path: The file; what it holds already stays, unless a new row replaces it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: list[dict[str, Any]] = []
        self.rows: list[Row] = []
        if path.exists():
            document = load(path)
            self.runs, self.rows = document["runs"], document["rows"]

    def start(self, run: dict[str, Any]) -> dict[str, Any]:
        """Add a run; returns it with its number."""
        run = {"id": 1 + max((r["id"] for r in self.runs), default=0), **run, "finished": None}
        self.runs.append(run)
        return run

    def add(self, row: Row) -> None:
        """Add or replace a row and write the file.

        What kernels took to compile and tiles to find is known only where nothing was cached yet; a row measured again
        with the same sources and versions keeps it.
        """
        machine, key = self.machine_of(row), _key(row)
        before = [r for r in self.rows if (self.machine_of(r), _key(r)) == (machine, key)]
        self.rows = [r for r in self.rows if r not in before]
        for old in before:
            same = old["sources"] == row["sources"] and self.run_of(old)["versions"] == self.run_of(row)["versions"]
            if same and old.get("kernels") and row.get("kernels"):
                row["kernels"] = _uncached(old["kernels"], row["kernels"])
        self.rows.append(row)
        self.save()

    def finish(self, run: dict[str, Any], now: str) -> None:
        """Note the end of a run that was not cut."""
        run["finished"] = now
        self.save()

    def machine_of(self, row: Row) -> tuple[Any, ...]:
        """What the row was measured on."""
        run = self.run_of(row)
        return tuple(run[name] for name in MACHINE)

    def run_of(self, row: Row) -> dict[str, Any]:
        """The run of a row."""
        return next(run for run in self.runs if run["id"] == row["run"])

    def complete(self, run: dict[str, Any], op: str, case: str, mode: str, providers: list[str], sources: str) -> bool:
        """Whether all of this was measured on the run's machine, with the same versions and sources, to the end."""
        machine = tuple(run[name] for name in MACHINE)
        done = set()
        for row in self.rows:
            same = (row["op"], row["case"], row["mode"], row["sources"]) == (op, case, mode, sources)
            whole = row["status"] in ("ok", "missing", "skipped") and not row.get("partial")
            if same and whole and self.machine_of(row) == machine and self.run_of(row)["versions"] == run["versions"]:
                done.add(row["provider"])
        return done >= set(providers)

    def save(self) -> None:
        """Replace the file in one step, without the runs that have no row."""
        used = {row["run"] for row in self.rows}
        runs = [run for run in self.runs if run["id"] in used]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text(_document(runs, self.rows), encoding="utf-8")
        os.replace(temporary, self.path)


def _uncached(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The compilations and the trials, each of whichever had more."""
    compiled = old if old["compiled"] > new["compiled"] else new
    tried = old if old["trials"] > new["trials"] else new
    return {name: (tried if name.startswith("trial") else compiled)[name] for name in new}


def _document(runs: list[dict[str, Any]], rows: list[Row]) -> str:
    """JSON with a line per run and row: quick to write again and again, and version control shows what changed."""
    lines = [",\n".join(json.dumps(item, allow_nan=False) for item in items) for items in (runs, rows)]
    return f'{{"schema": {SCHEMA}, "runs": [\n{lines[0]}\n], "rows": [\n{lines[1]}\n]}}\n'


def load(path: Path) -> dict[str, Any]:
    """Read and check a result file.

    Raises:
        BadResults: not JSON, another schema, a wrong or missing field.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadResults(f"{path}: {error}") from error
    try:
        validate(document)
    except ValueError as error:
        raise BadResults(f"{path}: {error}") from error
    return document


def validate(document: Any) -> None:
    """Check structure and types.

    Raises:
        ValueError: naming what is wrong.
    """
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ValueError(f"expected benchmark results of schema {SCHEMA}")
    for name in ("runs", "rows"):
        if not isinstance(document.get(name), list):
            raise ValueError(f"{name} is not a list")
    for run in document["runs"]:
        _check_fields("run", run, RUN_FIELDS)
    known = {run["id"] for run in document["runs"]}
    for row in document["rows"]:
        _check_fields("row", row, ROW_FIELDS)
        if row["status"] not in STATUSES or row["run"] not in known:
            raise ValueError(f"row {_key(row)}: status {row['status']!r}, run {row['run']}")
        if row["status"] == "ok":
            _check_fields("row", row, OK_FIELDS)
        elif not row["reason"]:
            raise ValueError(f"row {_key(row)}: {row['status']} without a reason")


def best_peer(rows: list[Row]) -> Row | None:
    """The fastest of the others that do the same work, among rows of one op, case and mode."""
    return _fastest(row for row in rows if row["role"] in ("eager", "compile", "peer"))


def our_row(rows: list[Row]) -> Row | None:
    """Ours as it is called without options; its variants stand among the others."""
    return _fastest(row for row in rows if row["provider"] == OURS)


def groups(rows: list[Row], key: Callable[[Row], Any] | None = None) -> dict[Any, list[Row]]:
    """Rows by op, case and mode, or by `key`, in the order they first appear."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row) if key else (row["op"], row["case"], row["mode"]), []).append(row)
    return found


def _fastest(rows: Any) -> Row | None:
    return min((row for row in rows if row["status"] == "ok"), key=lambda row: row["median_ms"], default=None)


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def _check_fields(what: str, value: Any, fields: dict[str, type | tuple[type, ...]]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"a {what} is not an object")
    for name, kind in fields.items():
        if name not in value:
            raise ValueError(f"a {what} lacks {name!r}")
        found = value[name]
        if not isinstance(found, kind) or (isinstance(found, float) and not math.isfinite(found)):
            raise ValueError(f"{name!r} of a {what} is {found!r}")
