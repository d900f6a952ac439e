"""Results as tables: on the terminal and as Markdown."""

from collections.abc import Sequence
from typing import Any

from .results import Row, best_peer, our_row

#: FLOPs per byte above which the rate that matters is that of arithmetic.
COMPUTE_BOUND = 50
HEADER = ("provider", "median", "p20 - p80", "x ours", "floor", "rate", "extra", "returned", "note")


def title(rows: Sequence[Row]) -> str:
    """One line about a group."""
    row = rows[0]
    floor = f"floor {milliseconds(row['floor_ms'])}"
    return f"{row['op']}  {row['case']}  {row['mode']}  ({floor})"


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """One line per provider, fastest first, then those without a time."""
    timed = sorted((row for row in rows if row["status"] == "ok"), key=lambda row: row["median_ms"])
    base = our_row(list(rows))
    lines: list[tuple[str, ...]] = []
    for row in timed:
        ratio = f"{row['median_ms'] / base['median_ms']:.2f}" if base else ""
        lines.append(
            (
                row["provider"],
                milliseconds(row["median_ms"]),
                f"{milliseconds(row['p20_ms'])} - {milliseconds(row['p80_ms'])}",
                ratio,
                f"{row['floor_ms'] / row['median_ms']:.0%}",
                rate(row),
                size(row["peak_extra_bytes"]),
                size(row["returned_bytes"]),
                note(row),
            )
        )
    rest = [row for row in rows if row["status"] != "ok"]
    return lines + [(row["provider"], row["status"], *("",) * 6, row["reason"] or "") for row in rest]


def verdict(rows: Sequence[Row]) -> str:
    """How ours stands against the best peer."""
    mine, peer = our_row(list(rows)), best_peer(list(rows))
    if mine is None or peer is None:
        return ""
    ratio = peer["median_ms"] / mine["median_ms"]
    return f"ours is {ratio:.2f}x as fast as {peer['provider']}, the best peer"


def note(row: Row) -> str:
    """Who computed, and what a reader must know about the number."""
    return ", ".join(part for part in (row["backend"] or "", caution(row)) if part)


def caution(row: Row) -> str:
    """What a reader must know about a number; mostly nothing."""
    parts = []
    if row["role"] == "other":
        parts.append("different work")
    if row.get("partial"):
        parts.append("cut short")
    if row["noisy_samples"] > row["samples"] / 2:
        parts.append("noisy machine")
    return ", ".join(parts)


def rate(row: Row) -> str:
    """Bytes or FLOPs per second, whichever its floor is made of."""
    if row["flops"] > COMPUTE_BOUND * row["min_bytes"]:
        return f"{row['tflop_s']:.3g} TFLOP/s"
    return f"{row['gb_s']:.3g} GB/s"


def milliseconds(value: float) -> str:
    """Three digits with a unit."""
    return f"{value:.3g} ms" if value >= 0.1 else f"{value * 1000:.3g} us"


def size(value: int | None) -> str:
    """Bytes for people."""
    if value is None:
        return ""
    return f"{value / 1e6:.1f} MB" if value < 1e9 else f"{value / 1e9:.2f} GB"


def memory(row: Row) -> str:
    """Bytes beyond what was there before: for the time of the call, and for what it returns."""
    return f"{size(row['peak_extra_bytes'])} + {size(row['returned_bytes'])}"


def print_group(rows: Sequence[Row]) -> None:
    """On the terminal, with rich where it is installed."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("\n" + plain(rows), flush=True)
        return
    table = Table(box=box.SIMPLE_HEAD, title=title(rows), title_justify="left", title_style="bold", pad_edge=False)
    for i, name in enumerate(HEADER):
        table.add_column(name, justify="left" if i in (0, len(HEADER) - 1) else "right", no_wrap=i < len(HEADER) - 1)
    for line in cells(rows):
        table.add_row(*line)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    console.print(table)
    console.print(verdict(rows), markup=False)


def plain(rows: Sequence[Row]) -> str:
    """The same as text."""
    lines = [HEADER, *cells(rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    return "\n".join([title(rows), *text, verdict(rows)]).rstrip()


def markdown(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)
