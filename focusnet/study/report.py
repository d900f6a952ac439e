"""The paper's table of a study as text, Markdown and CSV, published figures beside ours."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..evaluate import Stat, TableRow, summarize
from ..files import atomic_write
from .rows import Metric, Published, Row
from .runner import RowResult

METRICS: dict[Metric, tuple[str, float, int]] = {"dsc": ("DSC %", 100.0, 1), "hd95": ("95HD mm", 1.0, 2)}
FACTS = {
    "parameters": "parameters",
    "steps": "steps",
    "minutes": "minutes",
    "localisation_mm": "localisation mm",
    "inside_roi": "in ROI",
}
UNKNOWN, NOT_RUN = "", "-"


@dataclass(frozen=True)
class Column:
    """One row of the paper's table; here they are columns, organs being more than methods.

    Attributes:
        row: The method.
        seeds: Its results with every seed that has run; none of a method that is only published.
    """

    row: Row
    seeds: Sequence[RowResult]

    def published(self, metric: Metric) -> Published:
        """Figures of the paper."""
        return self.row.dsc if metric == "dsc" else self.row.hd95

    def table(self, small: Sequence[str]) -> list[TableRow]:
        """The scores of all cases with all seeds together."""
        return summarize([score for result in self.seeds for score in result.scores], small)

    def spread(self, small: Sequence[str], metric: Metric) -> dict[str, Stat]:
        """By organ, mean and standard deviation over seeds of the mean over cases."""
        means: dict[str, list[float | None]] = {}
        for result in self.seeds:
            for row in summarize(result.scores, small):
                means.setdefault(row.organ, []).append(_stat(row, metric).mean)
        return {organ: Stat.of(found) for organ, found in means.items()}

    def fact(self, name: str) -> float | None:
        """Mean over seeds."""
        return Stat.of(result.facts.get(name) for result in self.seeds).mean


@dataclass(frozen=True)
class Report:
    """A table of the paper.

    Attributes:
        title: What was compared on which data.
        columns: The methods.
        small: Small organs.
        notes: Lines below the table.
    """

    title: str
    columns: Sequence[Column]
    small: Sequence[str]
    notes: Sequence[str]

    def write(self, out: Path, name: str) -> None:
        """Write NAME.txt, NAME.md and NAME.csv.

        Raises:
            FocusNetError: a file cannot be written.
        """
        for suffix, text in ((".txt", self.text()), (".md", self.markdown()), (".csv", self.csv())):
            with atomic_write(out / f"{name}{suffix}") as temporary:
                temporary.write_text(text, encoding="utf-8")

    def text(self) -> str:
        """For a terminal."""
        stream = io.StringIO()
        console = Console(file=stream, width=4000, color_system=None)
        console.print(Text(self.title))
        for header, lines in self._tables():
            table = Table(box=box.SIMPLE)
            for position, cell in enumerate(header):
                table.add_column(Text(cell.replace(", ", ",\n")), justify="right" if position else "left", no_wrap=True)
            for line in lines:
                table.add_row(*map(Text, line))
            console.print(table)
        for note in self.notes:
            console.print(Text(note))
        return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"

    def markdown(self) -> str:
        """For a document."""
        parts = [f"## {self.title}"]
        for header, lines in self._tables():
            rule = ["---", *["---:"] * (len(header) - 1)]
            parts.append("\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines]))
        return "\n\n".join([*parts, *self.notes]) + "\n"

    def csv(self) -> str:
        """Long form, a line for every method, metric and organ; DSC is 0 to 1 for ours, in per cent as published."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(
            ["method", "metric", "organ", "group", "n", "missed", "mean", "sd", "seeds", "sd_over_seeds", "published"]
        )
        for metric in METRICS:
            for column in self.columns:
                published, spread = column.published(metric), column.spread(self.small, metric)
                rows = {row.organ: row for row in column.table(self.small)}
                for organ in [*rows, *(name for name in published if name not in rows)]:
                    row, figure = rows.get(organ), published.get(organ, UNKNOWN)
                    ours: list[object] = [""] * 7
                    if row is not None:
                        stat, seeds = _stat(row, metric), len(column.seeds)
                        ours = [row.group, row.n, row.missed, stat.mean, stat.sd, seeds, spread[organ].sd]
                    writer.writerow([column.row.name, metric, organ, *map(_rounded, ours), figure])
        return stream.getvalue()

    def _tables(self) -> list[tuple[list[str], list[list[str]]]]:
        tables = [self._metric(metric) for metric in METRICS]
        return [table for table in [*tables, self._facts()] if table[1]]

    def _metric(self, metric: Metric) -> tuple[list[str], list[list[str]]]:
        title, scale, digits = METRICS[metric]
        header, cells = [title], dict[str, list[str]]()
        organs = self._organs()
        for column in self.columns:
            rows = {row.organ: row for row in column.table(self.small)}
            spread = column.spread(self.small, metric)
            if column.seeds:
                header.append(column.row.name)
                for organ in organs:
                    text = NOT_RUN
                    if organ in rows:
                        text = _cell(_stat(rows[organ], metric), spread[organ], scale, digits)
                    cells.setdefault(organ, []).append(text)
            published = column.published(metric)
            if any(organ in published for organ in organs):
                header.append(f"{column.row.name}, published")
                for organ in organs:
                    cells.setdefault(organ, []).append(_figure(published.get(organ, UNKNOWN)))
        return header, [[organ, *cells[organ]] for organ in organs if organ in cells]

    def _organs(self) -> list[str]:
        """Those that were scored; without any, those of which a figure was published."""
        scored = [row.organ for column in self.columns for row in column.table(self.small)]
        published = [organ for column in self.columns for organ in (*column.row.dsc, *column.row.hd95)]
        return list(dict.fromkeys(scored or published))

    def _facts(self) -> tuple[list[str], list[list[str]]]:
        ran = [column for column in self.columns if column.seeds and column.fact("parameters") is not None]
        lines = []
        for name, title in FACTS.items():
            values = [column.fact(name) for column in ran]
            if any(value is not None for value in values):
                lines.append([title, *(_fact(name, value) for value in values)])
        return ["training", *(column.row.name for column in ran)], lines


def _stat(row: TableRow, metric: Metric) -> Stat:
    return row.dsc if metric == "dsc" else row.hd95_mm


def _cell(stat: Stat, seeds: Stat, scale: float, digits: int) -> str:
    if stat.mean is None:
        return NOT_RUN
    text = f"{stat.mean * scale:.{digits}f}"
    if stat.sd is not None:
        text += f" ± {stat.sd * scale:.{digits}f}"
    if seeds.sd is not None:
        text += f" ({seeds.sd * scale:.{digits}f})"
    return text


def _figure(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _fact(name: str, value: float | None) -> str:
    if value is None:
        return NOT_RUN
    if name == "inside_roi":
        return f"{value:.0%}"
    return f"{value:.1f}" if name in ("minutes", "localisation_mm") else f"{value:,.0f}"


def _rounded(value: object) -> object:
    return round(value, 6) if isinstance(value, float) else ("" if value is None else value)
