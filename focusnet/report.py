"""`python -m focusnet.report PREDICTIONS --out report.html`: one page about a cohort, which needs no network."""

import base64
import io
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from rich.console import Console
from rich.progress import track

from . import measures
from .cli import command_parser, parse, run
from .cohort import ERROR_SUFFIX, RECORD, read_failure
from .data.organs import organ_color
from .errors import FocusNetError
from .evaluate import OrganScore, evaluate, spread
from .files import atomic_write, check_no_folder
from .measures import STATISTICS, read_json, read_statistics

Pictures = Literal["all", "flagged", "none"]
_TEMPLATE = Path(__file__).with_name("report.html")
_WEBP_QUALITY = 80
_IN_RECORD = {"made_with": dict, "input": dict, "shape": list, "spacing_mm": list, "device": str, "parts": list}


@dataclass
class Row:
    """One organ of one case; `score` if there is a truth for it."""

    organ: str
    measured: Mapping[str, Any]
    score: OrganScore | None = None

    @property
    def flags(self) -> list[str]:
        """What a person should look at; predictions of earlier versions have none."""
        return list(self.measured.get("flags", []))

    @property
    def values(self) -> dict[str, float | None]:
        """What the overview can show, by name."""
        shown = {
            "volume": self.measured.get("volume_cm3"),
            "confidence": self.measured.get("confidence"),
            "peak": self.measured.get("heatmap_peak"),
        }
        if self.score is not None:
            shown |= {"dsc": self.score.dsc, "hd95": self.score.hd95_mm}
        return shown


@dataclass
class CaseView:
    """One case as the page shows it."""

    name: str
    rows: list[Row]
    record: Mapping[str, Any] = field(default_factory=dict)
    picture: str = ""

    @property
    def flags(self) -> int:
        """Number of flags."""
        return sum(len(row.flags) for row in self.rows)

    def row(self, organ: str) -> Row | None:
        """The organ's row, if the case has one."""
        return next((row for row in self.rows if row.organ == organ), None)


def make_report(predictions: Path, truth: Path | None = None, *, pictures: Pictures = "all") -> str:
    """The page, as HTML that loads nothing.

    Args:
        predictions: What `focusnet.predict` wrote.
        truth: A folder of true segmentations in any known layout, to score those of the cases that it has.
        pictures: Whose QC pictures are in it.

    Raises:
        FocusNetError: there are no predictions, or a file cannot be read.
    """
    files = sorted(predictions.glob(f"[!.]*/{STATISTICS}")) if predictions.is_dir() else []
    if not files:
        raise FocusNetError(f"no predictions in {predictions}: expected folders with {STATISTICS}, as predict writes")
    evaluation = None if truth is None else evaluate(truth, predictions, allow_missing_cases=True)
    scores = {} if evaluation is None else {(score.case, score.organ): score for score in evaluation.scores}
    cases = []
    for file in track(files, "reading", console=Console(stderr=True), transient=True):
        case = _read_case(file.parent, scores)
        if pictures == "all" or (pictures == "flagged" and case.flags):
            case.picture = _picture(file.parent / "qc.png")
        cases.append(case)
    cases.sort(key=lambda case: (-case.flags, case.name))
    organs = list(dict.fromkeys(row.organ for case in cases for row in case.rows))
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"number": _number, "mm": _millimetres, "spread": partial(spread, missing="–")}
    return page.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        folder=str(predictions),
        truth=truth,
        made=f"{datetime.now():%Y-%m-%d %H:%M}",
        cases=cases,
        organs=organs,
        colors={organ: "#{:02x}{:02x}{:02x}".format(*organ_color(organ)) for organ in organs},
        failures=_failures(predictions),
        notes=[] if evaluation is None else evaluation.notes,
        table=[] if evaluation is None else evaluation.rows,
        plots=_plots(cases, organs, evaluation is not None),
        settings=_settings(cases),
        rules=measures,
    )


def _read_case(folder: Path, scores: Mapping[tuple[str, str], OrganScore]) -> CaseView:
    table = read_statistics(folder / STATISTICS)
    rows = [Row(organ, measured, scores.get((folder.name, organ))) for organ, measured in table.items()]
    record = read_json(folder / RECORD) if (folder / RECORD).exists() else {}
    odd = [name for name, kind in _IN_RECORD.items() if not isinstance(record.get(name), kind)]
    if record and odd:
        raise FocusNetError(f"{folder / RECORD} is none that predict wrote: odd {odd[0]}")
    return CaseView(folder.name, rows, record)


def _picture(path: Path) -> str:
    """As a data URL, of a tenth of the size."""
    from PIL import Image

    if not path.exists():
        return ""
    stream = io.BytesIO()
    try:
        with Image.open(path) as picture:
            picture.convert("RGB").save(stream, "WEBP", quality=_WEBP_QUALITY)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        cause = error.strerror if isinstance(error, OSError) else None
        raise FocusNetError(f"cannot read {path}: {cause or 'it is no picture, or damaged'}") from error
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _failures(predictions: Path) -> dict[str, str]:
    files = sorted(predictions.glob(f"[!.]*{ERROR_SUFFIX}"))
    return {file.name.removesuffix(ERROR_SUFFIX): read_failure(file) for file in files}


def _settings(cases: Sequence[CaseView]) -> list[dict[str, Any]]:
    """Each way of predicting that occurs, with the number of cases."""
    found: dict[str, dict[str, Any]] = {}
    counts: Counter[str] = Counter()
    for case in cases:
        made_with = case.record.get("made_with", {})
        flat = {
            "checkpoint": case.record.get("checkpoint", "unknown: predicted by an earlier version"),
            "SHA-256": made_with.get("checkpoint_sha256", ""),
            "parts": ", ".join(map(str, case.record.get("parts", []))),
            "training cases": case.record.get("training_cases", ""),
            "focuskernels": made_with.get("version", ""),
            "backend": made_with.get("backend", ""),
            "device": case.record.get("device", ""),
            **_table(made_with.get("predict")),
            **_table(made_with.get("outputs")),
        }
        key = repr(flat)
        found[key] = flat
        counts[key] += 1
    return [{"cases": counts[key], **flat} for key, flat in found.items()]


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class _Dot:
    case: int
    name: str
    value: float
    flagged: bool


@dataclass(frozen=True)
class _Scale:
    """An axis from `ticks[0]` to `ticks[-1]`; beyond these, dots lie on its ends."""

    ticks: tuple[float, ...]
    unit: str = ""
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Position from 0 to 1."""
        low, high = self.ticks[0], self.ticks[-1]
        value = min(max(value, low), high)
        if self.logarithmic:
            return math.log(value / low) / math.log(high / low)
        return (value - low) / (high - low)


def _plots(cases: Sequence[CaseView], organs: Sequence[str], scored: bool) -> list[tuple[str, Markup]]:
    """Strip plots of the cohort, with their titles."""
    ratio = _Scale((0.25, 0.5, 1.0, 2.0, 4.0), "x", logarithmic=True)
    share = _Scale((0.0, 0.2, 0.4, 0.6, 0.8, 1.0))
    plots = []
    if scored:
        distances = [d.value for organ in organs for d in _dots(cases, organ, _matched_hd95)]
        top = max(2.0, *(math.ceil(distance / 2) * 2.0 for distance in distances)) if distances else 2.0
        millimetres = _Scale(tuple(top * i / 4 for i in range(5)), " mm")
        plots.append(("DSC", _strips(cases, organs, lambda row: row.values.get("dsc"), share)))
        plots.append(("95HD of what was found, mm", _strips(cases, organs, _matched_hd95, millimetres)))
    title = "Volume over the training mean; grey: range in training"
    plots.append((title, _strips(cases, organs, _volume_ratio, ratio, _training_band)))
    plots.append(("Confidence", _strips(cases, organs, lambda row: row.measured.get("confidence"), share)))
    if any("heatmap_peak" in row.measured for case in cases for row in case.rows):
        plots.append(("Height of the heat map's peak", _strips(cases, organs, lambda row: row.values["peak"], share)))
    return plots


def _matched_hd95(row: Row) -> float | None:
    return row.score.hd95_mm if row.score is not None and row.score.status == "ok" else None


def _volume_ratio(row: Row) -> float | None:
    """Against the mean of training; None where nothing was found, which no logarithmic axis holds."""
    volume, mean = row.measured.get("volume_cm3"), _training_mean(row)
    return volume / mean if volume and mean else None


def _training_mean(row: Row) -> float | None:
    known = row.measured.get("training_volume_cm3")
    return known[len(known) // 2] if known else None


def _training_band(row: Row) -> tuple[float, float] | None:
    known, mean = row.measured.get("training_volume_cm3"), _training_mean(row)
    return (known[0] / mean, known[-1] / mean) if known and mean and len(known) > 1 else None


def _dots(cases: Sequence[CaseView], organ: str, value_of: Callable[[Row], float | None]) -> list[_Dot]:
    found = ((number, case, case.row(organ)) for number, case in enumerate(cases))
    values = ((number, case, row, value_of(row)) for number, case, row in found if row is not None)
    return [_Dot(n, case.name, value, bool(row.flags)) for n, case, row, value in values if value is not None]


def _strips(
    cases: Sequence[CaseView],
    organs: Sequence[str],
    value_of: Callable[[Row], float | None],
    scale: _Scale,
    band_of: Callable[[Row], tuple[float, float] | None] = lambda row: None,
) -> Markup:
    """A line of dots for every organ, one dot per case, as SVG."""
    label, width, step, bottom = 130, 400, 22, 24
    lines: list[Markup] = []
    height = 0
    for tick in scale.ticks:
        x = label + scale.at(tick) * width
        text = f"{tick:g}{scale.unit}"
        lines.append(_svg('<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="0" y2="100%"/>', x))
        lines.append(_svg('<text class="tick" x="{:.1f}" y="100%" dy="-6">{}</text>', x, text))
    for organ in organs:
        dots = _dots(cases, organ, value_of)
        if not dots:
            continue
        y = height + step / 2
        lines.append(_svg('<text class="organ" x="{}" y="{:.1f}">{}</text>', label - 8, y + 4, organ))
        bands = (band_of(row) for case in cases if (row := case.row(organ)) is not None)
        if band := next((found for found in bands if found is not None), None):
            left, right = (label + scale.at(end) * width for end in band)
            wide = max(right - left, 1)
            shape = '<rect class="band" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{}"/>'
            lines.append(_svg(shape, left, y - 8, wide, 16))
        middle = label + scale.at(statistics.median(dot.value for dot in dots)) * width
        lines.append(
            _svg('<line class="median" x1="{0:.1f}" x2="{0:.1f}" y1="{1:.1f}" y2="{2:.1f}"/>', middle, y - 8, y + 8)
        )
        color = "#{:02x}{:02x}{:02x}".format(*organ_color(organ))
        for dot in sorted(dots, key=lambda dot: dot.flagged):
            shape = (
                '<a href="#case-{}"><circle cx="{:.1f}" cy="{:.1f}" r="3.5" fill="{}" class="{}">'
                "<title>{}: {:.3g}{}</title></circle></a>"
            )
            jitter = (dot.case * 5) % 9 - 4  # so that equal values can be told apart
            x, kind = label + scale.at(dot.value) * width, "flagged" if dot.flagged else ""
            lines.append(_svg(shape, dot.case, x, y + jitter, color, kind, dot.name, dot.value, scale.unit))
        height += step
    size = _svg('<svg viewBox="0 0 {0} {1}" width="{0}" height="{1}" role="img">', label + width + 24, height + bottom)
    return size + Markup("\n").join(lines) + Markup("</svg>")


def _svg(text: str, *values: object) -> Markup:
    """`text` with `values`, of which strings are escaped."""
    return Markup(text).format(*values)


def _number(value: float | None, digits: int = 3) -> str:
    """To `digits` significant digits, and no exponent."""
    if value is None:
        return "–"
    decimals = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(decimals, 0)}f}"


def _millimetres(values: Iterable[float] | None) -> str:
    return "–" if values is None else ", ".join(f"{value:.1f}" for value in values)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = command_parser(
        "report",
        "PREDICTIONS --out report.html",
        "Write one HTML file about a cohort that predict segmented: what to look at first, all organs of all cases, "
        "distributions, QC pictures, settings. It needs no network and sends nothing; it holds the cases' names and "
        "the CTs' paths.",
        ["OUT --out report.html", "OUT --truth DATA --out report.html", "OUT --out report.html --pictures flagged"],
    )
    parser.add_argument("predictions", type=Path, help="what predict wrote")
    parser.add_argument("--truth", type=Path | None, help="folder of true segmentations; scores are in the report then")
    parser.add_argument("--out", type=Path, required=True, help="the HTML file")
    parser.add_argument(
        "--pictures", type=Pictures, default="all", help="all, flagged (of cases with flags) or none; about 0.1 MB each"
    )
    arguments = parse(parser, argv)
    check_no_folder(arguments.out)
    page = make_report(arguments.predictions, arguments.truth, pictures=arguments.pictures)
    with atomic_write(arguments.out) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
    print(f"written: {arguments.out}, {arguments.out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    run(main)
