"""Trains, predicts and scores every row of a table; what is done already is kept."""

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.rule import Rule

from .. import predict
from ..checkpoint import Model, build_network, load_checkpoint, save_checkpoint
from ..cli import console
from ..cohort import file_digest
from ..config import Config
from ..data.cache import cache_folder, digest_of, source_of
from ..data.cases import Case, find_cases
from ..data.inputs import find_inputs
from ..data.plan import Plan
from ..errors import FocusNetError
from ..evaluate import OrganScore, evaluate, write_results
from ..files import atomic_write
from ..prepare import prepare
from ..train import start_training
from ..trainer import split_cases
from .atlas import segment_by_atlases
from .rows import Row, parameters


@dataclass(frozen=True)
class RowResult:
    """One row with one seed.

    Attributes:
        scores: Of every test case and organ.
        facts: What else the report tells: parameters, steps, minutes, and how well small organs were located in the
            validation cases; None where it does not apply.
    """

    scores: list[OrganScore]
    facts: dict[str, float | None]


class Study:
    """The rows of a table on one data set.

    Args:
        train: Folder of training cases.
        test: Folder of test cases with contours.
        out: Folder of all runs: `seed_N/ROW`.
        base: The preset, from which every row differs as its definition says.
        cache: Folder for prepared data.
        device: Where to compute.
        skip_bad: Leave out unusable training cases instead of failing.
        atlases: Training cases that the atlas row registers.
    """

    def __init__(
        self,
        train: Path,
        test: Path,
        out: Path,
        base: Config,
        *,
        cache: Path,
        device: torch.device,
        skip_bad: bool = False,
        atlases: int = 5,
    ) -> None:
        self.train, self.test, self.out, self.cache, self.device = train, test, out, cache, device
        self.skip_bad, self.atlases = skip_bad, atlases
        self.base = copy.deepcopy(base)
        self._configs: dict[str, Config] = {}
        self.plan = self._plan_of(base)
        # the same in all rows and with all seeds
        _, held_out = split_cases(self.plan, base)
        self.base.train.validation_cases = [case.name for case in held_out]
        cases = find_cases(test)
        self.organs = _scored_organs(test, cases, self.plan)
        self.test_cases = [case.name for case in cases]
        self._tested = {case.name: digest_of(source_of(case)) for case in cases}
        self.console: Console = console()

    def run(self, row: Row, others: Sequence[Row], seed: int) -> RowResult:
        """Train (or register), predict and score one row, or read what is there of it already.

        Args:
            row: What to run.
            others: All rows of the table; one of them may be what this one starts from.
            seed: Added to the preset's.

        Raises:
            FocusNetError: it fails, or `out` holds another study.
        """
        self.console.print(Rule(f"{row.name}, seed {self.base.train.seed + seed}"))
        row = self._first_alike(row, others)
        folder = self._folder(row, seed)
        if row.atlas:
            made_of: dict[str, Any] = {"atlases": self.atlases, "plan": self.plan.fingerprint}
            facts: dict[str, float | None] = {}
        else:
            self._train(row, others, seed)
            made_of = {"checkpoint": file_digest(folder / "best.pt")}
            facts = _facts(folder)
        made_of["test_cases"] = self._tested
        scores = _stored_scores(folder, made_of)
        if scores is None:
            self._predict(row, folder, seed)
            scores = self._score(folder, self._predictions(row, folder))
            content = {"row": row.name, "seed": seed, "made_of": made_of, **facts, "scores": list(map(asdict, scores))}
            with atomic_write(folder / "row.json") as temporary:
                temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
        return RowResult(scores, facts)

    def config(self, row: Row, seed: int) -> Config:
        """The configuration of a row."""
        if row.name not in self._configs:
            self._configs[row.name] = row.config(self.base, self.plan)
        config = copy.deepcopy(self._configs[row.name])
        config.train.seed += seed
        return config

    def _first_alike(self, row: Row, others: Sequence[Row]) -> Row:
        """The first row that is the same computation: with a preset's own ROI scale, two rows are FocusNet."""
        if row.atlas:
            return row
        rows = [other for other in others if other.change is not None and other.starts_from == row.starts_from]
        return next(other for other in rows if self.config(other, 0) == self.config(row, 0))

    def _folder(self, row: Row, seed: int) -> Path:
        return self.out / f"seed_{self.base.train.seed + seed}" / row.slug

    def _plan_of(self, config: Config) -> Plan:
        folder = cache_folder(self.cache, self.train, config.data)
        return prepare(self.train, folder, config.data, skip_bad=self.skip_bad)

    def _train(self, row: Row, others: Sequence[Row], seed: int) -> None:
        folder, config = self._folder(row, seed), self.config(row, seed)
        if row.starts_from is not None and not (folder / "last.pt").exists():
            parent = next(other for other in others if other.name == row.starts_from)
            self._train(parent, others, seed)
            self._go_on_from(self._folder(parent, seed), folder, config)
        start_training(
            self.train,
            folder,
            config,
            cache=self.cache,
            resume=(folder / "last.pt").exists(),
            skip_bad=self.skip_bad,
            device=self.device,
        )

    def _go_on_from(self, parent: Path, folder: Path, config: Config) -> None:
        """Let a run begin where S-Net's ended: what it would have come to itself, with the same seed and crops."""
        plan = self._plan_of(config)
        for name in ("best.pt", "last.pt"):  # the one by which a run is known comes last
            trained, training = load_checkpoint(parent / name, torch.device("cpu"))
            torch.manual_seed(config.train.seed)
            network = build_network(config, plan)
            network.snet.load_state_dict(trained.network.snet.state_dict())
            if "weights" in training:  # of which the checkpoint's own are the average
                training["weights"] = network.state_dict()
            save_checkpoint(folder / name, Model(network, config, plan, trained.parts), training)

    def _predictions(self, row: Row, folder: Path) -> Path:
        return folder / (f"predictions_of_{self.atlases}" if row.atlas else "predictions")

    def _predict(self, row: Row, folder: Path, seed: int) -> None:
        out = self._predictions(row, folder)
        if row.atlas:
            segment_by_atlases(
                self.plan, cache_folder(self.cache, self.train, self.base.data), self.test, out, self.base,
                count=self.atlases, seed=self.base.train.seed + seed,
            )  # fmt: skip
            return
        arguments = [str(folder / "best.pt"), str(self.test), "--out", str(out), "--device", str(self.device)]
        if predict.main([*arguments, "--continue"]):
            raise FocusNetError(f"{row.name}: not all test cases could be segmented")

    def _score(self, folder: Path, predictions: Path) -> list[OrganScore]:
        # predictions of what is no test case any more may be there too
        found = evaluate(
            self.test, predictions, organs=self.organs, small=self.plan.small_organs, allow_missing_cases=True
        )
        write_results(found, folder / "evaluation")
        return found.scores


def _scored_organs(test: Path, cases: Sequence[Case], plan: Plan) -> list[str]:
    """The organs that test cases have; all cases can be scored, which is known before anything is trained."""
    inputs, _ = find_inputs(test)
    without = [case.name for case in cases if case.name not in inputs]
    if without:
        raise FocusNetError(f"test cases in {test} have no CT, or several: {', '.join(without)}")
    for case in cases:
        for problem in case.problems + case.unknown:
            raise FocusNetError(f"test case {case.name}: {problem}")
    organs = [organ for organ in plan.organ_names if any(organ in case.organs for case in cases)]
    if not organs:
        raise FocusNetError(f"no test case in {test} has any of {', '.join(plan.organ_names)}")
    return organs


def _stored_scores(folder: Path, made_of: dict[str, Any]) -> list[OrganScore] | None:
    """Those of an earlier command; None if there are none that are of the same."""
    try:
        content = json.loads((folder / "row.json").read_text(encoding="utf-8"))
        return [OrganScore(**score) for score in content["scores"]] if content["made_of"] == made_of else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _facts(folder: Path) -> dict[str, float | None]:
    model, training = load_checkpoint(folder / "last.pt", torch.device("cpu"))
    state, train = training["state"], model.config.train
    cases, _ = split_cases(model.plan, model.config)
    per_epoch = train.steps_per_epoch or -(-len(cases) // train.batch_size)
    located = [entry for entry in state["history"] if entry.get("localisation_mm") is not None]
    return {
        "parameters": parameters(model.config, model.plan),
        "steps": len(state["history"]) * per_epoch,
        "minutes": state["seconds"] / 60,
        "localisation_mm": located[-1]["localisation_mm"] if located else None,
        "inside_roi": located[-1]["inside_roi"] if located else None,
    }
