"""Validation during training: the evaluation's scores on the prepared grid, and how well small organs were located."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from .checkpoint import Model
from .data.crops import label_values, load_case
from .data.plan import CaseRecord
from .distributed import ALONE, Ranks
from .evaluate import OrganScore, Stat, TableRow, evaluate_pair, format_table, summarize
from .inference import Segmentation, segment_hu


@dataclass
class Validation:
    """Scores of all validation cases.

    Attributes:
        score: Mean over organs of the mean DSC over cases; chooses the checkpoint.
        rows: One row per organ and the means.
    """

    score: float
    rows: list[TableRow]

    def table(self) -> Table:
        """The table for the terminal, small organs apart."""
        return format_table(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """For the history: the score, every organ's mean DSC, and how well the small organs were located.

        `localisation_mm` (mean distance) and `inside_roi` (share of organs) are means over organs, None before SOL-Net.
        """
        organs = [row for row in self.rows if row.group != "mean"]
        return {
            "score": self.score,
            "dsc": {row.organ: row.dsc.mean for row in organs},
            "localisation_mm": Stat.of(row.localisation_mm.mean for row in organs).mean,
            "inside_roi": Stat.of(row.inside_roi.mean for row in organs).mean,
        }


def validate(
    model: Model,
    cache: Path,
    cases: list[CaseRecord],
    device: torch.device,
    ranks: Ranks = ALONE,
    look: Callable[[CaseRecord, np.ndarray, np.ndarray, np.ndarray], None] | None = None,
) -> Validation:
    """Segment and score prepared cases.

    Args:
        model: With its network in evaluation mode.
        cache: Folder of the prepared data set.
        cases: What to segment; several processes share them, and all get all scores.
        device: Where to compute.
        ranks: This process among those.
        look: Called with every case of this process, its HU, true and found labels, all (D, H, W).
    """
    scores: list[list[OrganScore]] = []
    for case in cases[ranks.rank :: ranks.world]:
        hu, labels = load_case(cache, case)
        truth, result = label_values(case, model.plan)[labels], segment_hu(model, hu, device)
        scores.append(_score(model, case, truth, result))
        if look is not None:
            look(case, hu, truth, result.labels.cpu().numpy())
    shares = ranks.gather(scores)
    ordered = [score for i in range(len(cases)) for score in shares[i % ranks.world][i // ranks.world]]
    rows = summarize(ordered, model.plan.small_organs)
    score = Stat.of(row.dsc.mean for row in rows if row.group != "mean").mean
    return Validation(score or 0.0, rows)


def _score(model: Model, case: CaseRecord, labels: np.ndarray, result: Segmentation) -> list[OrganScore]:
    plan, found = model.plan, result.labels.cpu().numpy()
    located = plan.small_organs if "sol" in model.parts else []
    scores = []
    for value, organ in enumerate(plan.organ_names, start=1):
        truth = labels == value
        (score,) = evaluate_pair({organ: truth}, {organ: found == value}, plan.spacing, case=case.name)
        if organ in located and organ in case.organs:
            position = located.index(organ)
            peak = result.peaks[position].cpu().numpy()
            score = dataclasses.replace(
                score,
                localisation_mm=_distance_mm(peak, case.centers[organ], plan.spacing),
                inside_roi=_inside(truth, peak, model.network.roi_sizes[position]),
            )
        scores.append(score)
    return scores


def _distance_mm(peak: np.ndarray, center: tuple[float, float, float], spacing: tuple[float, float, float]) -> float:
    return float(np.linalg.norm((peak - np.array(center)) * np.array(spacing)))


def _inside(mask: np.ndarray, peak: np.ndarray, size: tuple[int, int, int]) -> bool:
    """Whether the ROI around `peak` holds every voxel of `mask`."""
    start = peak - np.array(size) // 2
    voxels = np.argwhere(mask)
    return bool(len(voxels) and (voxels >= start).all() and (voxels < start + np.array(size)).all())
