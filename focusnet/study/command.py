"""`python -m focusnet.study table1|table2|table3 DATA --out OUT`: the paper's comparisons."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveFloat, PositiveInt
from rich.console import Console

from ..cli import add_config, command_parser, config_of, parse, pick_device
from ..config import Config
from ..data.cache import DEFAULT_CACHE
from ..data.cases import find_cases
from ..errors import FocusNetError
from ..files import check_writable
from ..stages import STAGES, check_stages
from .report import Column, Report
from .rows import NOTES, PDDCA_TEST, PUBLISHED_ON, TABLES, Row
from .runner import RowResult, Study
from .split import choose_test_cases, link_split

TEST_SHARE = 0.25


def _parser() -> ArgumentParser:
    names = "; ".join(f"{table}: {', '.join(row.slug for row in rows)}" for table, rows in TABLES.items())
    parser = command_parser(
        "study",
        "TABLE DATA --out OUT",
        "The paper's comparisons: every row of a table is trained on the same cases for the same number of epochs, "
        "predicts and scores the same test cases. OUT/TABLE.txt, .md and .csv hold the table with the published "
        f"figures; OUT/seed_N/ROW the runs. Started again, it goes on where it was. Rows of {names}.",
        [
            "table3 PDDCA --out runs/pddca --split pddca",
            "table1 DATA --out runs/table1 --config demo --seeds 3 --rows s-net focusnet",
            "table2 DATA --out runs/table2 --config demo --budget 0.1 --test TEST_CASES",
        ],
    )
    parser.add_argument("table", type=Literal["table1", "table2", "table3"], help="the table of the paper")
    parser.add_argument("source", type=Path, metavar="DATA", help="folder of cases with CTs and organs (docs/data.md)")
    parser.add_argument("--out", type=Path, required=True, help="folder of runs and tables; tables may share one")
    parser.add_argument("--rows", type=str, nargs="+", help="after the folder: rows to run (default: all)")
    parser.add_argument(
        "--test",
        type=str,
        nargs="+",
        help=f"after the folder: names of test cases, or a folder of them (default: {TEST_SHARE:.0%} of all, drawn)",
    )
    parser.add_argument("--split", type=Literal["pddca"] | None, help="pddca: the authors' ten test cases of PDDCA")
    parser.add_argument("--seeds", type=PositiveInt, default=1, help="runs of every row, with seeds from train.seed on")
    parser.add_argument(
        "--budget", type=PositiveFloat, default=1.0, help="times the epochs of every stage of every row"
    )
    parser.add_argument("--atlases", type=PositiveInt, default=5, help="training cases that the atlas row registers")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder for prepared data, as of prepare")
    parser.add_argument("--skip_bad", action="store_true", help="leave out unusable cases instead of failing")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add_config(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command."""
    arguments = parse(_parser(), argv)
    device = pick_device(arguments.device)
    base, table = config_of(arguments), TABLES[arguments.table]
    if not math.isfinite(arguments.budget):
        raise FocusNetError(f"--budget {arguments.budget}: expected a number")
    scale_epochs(base, arguments.budget)
    check_stages(base.train)
    rows = choose_rows(table, arguments.rows)
    check_writable(arguments.out)
    train, test = link_split(
        arguments.source,
        _test_cases(arguments.source, arguments.test, arguments.split, base.train.seed),
        arguments.out / "split",
    )
    study = Study(
        train,
        test,
        arguments.out,
        base,
        cache=arguments.cache,
        device=device,
        skip_bad=arguments.skip_bad,
        atlases=arguments.atlases,
    )
    title = (
        f"{arguments.table} on {arguments.source.resolve().name}: {len(study.plan.cases)} training cases, "
        f"{len(study.test_cases)} test cases"
    )
    results: dict[str, list[RowResult]] = {row.name: [] for row in rows}
    for seed in range(arguments.seeds):
        for row in rows:
            if not row.only_published:
                results[row.name].append(study.run(row, table, seed))
            columns = [Column(row, results[row.name]) for row in rows]
            report = Report(title, columns, study.plan.small_organs, _notes(arguments.table, rows, base))
            report.write(arguments.out, arguments.table)
    Console(width=4000).print(report.text(), markup=False, highlight=False, soft_wrap=True)
    print(f"written: {arguments.out / arguments.table}{{.txt,.md,.csv}}")
    return 0


def choose_rows(table: Sequence[Row], wanted: Sequence[str] | None) -> list[Row]:
    """The rows of a table by their names or options, in the table's order.

    Raises:
        FocusNetError: there is no such row.
    """
    if wanted is None:
        return list(table)
    slugs = {Row(name).slug for name in wanted}
    unknown = slugs - {row.slug for row in table}
    if unknown:
        raise FocusNetError(f"no row {min(unknown)}, expected {', '.join(row.slug for row in table)}")
    return [row for row in table if row.slug in slugs]


def scale_epochs(config: Config, factor: float) -> None:
    """Multiply the epochs of every stage, rounded up; 0 stays 0."""
    for name in STAGES:
        stage = getattr(config.train, name)
        # 1.1 * 100 is a little above 110
        stage.epochs = math.ceil(round(stage.epochs * factor, 6))


def _test_cases(data: Path, named: list[str] | None, split: str | None, seed: int) -> list[str] | Path:
    if named is not None and split is not None:
        raise FocusNetError("give --test or --split, not both")
    cases = find_cases(data)
    if named is not None and len(named) == 1 and named[0] not in {case.name for case in cases}:
        folder = Path(named[0])
        if folder.is_dir():
            return folder
    return choose_test_cases(cases, PDDCA_TEST if split else named, TEST_SHARE, seed)


def _notes(table: str, rows: Sequence[Row], base: Config) -> list[str]:
    epochs = ", ".join(f"{name} {getattr(base.train, name).epochs}" for name in STAGES)
    return [
        "Mean ± standard deviation over test cases (in brackets: of the mean, over seeds); means over organs ± over "
        "organs. A missed organ counts as DSC 0 and with the volume's diagonal. docs/metrics.md defines all of it.",
        f"Ours: epochs {epochs}; every network of one stage has those of snet. Published: on {PUBLISHED_ON[table]}; "
        "compare it with ours only on the same data.",
        NOTES[table],
        *(f"{row.name}: {row.note}." for row in rows if row.note),
    ]
