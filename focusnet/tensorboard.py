"""What `tensorboard --logdir RUN` shows of a training: curves, and slices of validation cases with outlines.

TensorBoard is the extra `tensorboard`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .data.organs import organ_color
from .data.plan import CaseRecord, Plan
from .errors import FocusNetError
from .qc import WINDOW_HU

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "tensorboard"
PICTURED_CASES, PICTURED_SLICES = 3, 4
_INCHES, _DPI = 3.0, 100


def check_tensorboard_extra() -> None:
    """Raises FocusNetError if TensorBoard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise FocusNetError('--tensorboard needs tensorboard: pip install "focuskernels[tensorboard]"') from error


class Board:
    """Writes into the folder `tensorboard` of a run. The step is the number of finished epochs of all stages.

    Args:
        out: Folder of the run.
        plan: Names the organs.
        step: Where training goes on; what was written of later ones is hidden.
    """

    def __init__(self, out: Path, plan: Plan, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer, self._plan = SummaryWriter(str(out / FOLDER), purge_step=step + 1), plan
        self._pictures: dict[str, Figure] = {}

    def look(self, case: CaseRecord, hu: np.ndarray, truth: np.ndarray, found: np.ndarray) -> None:
        """Keep a picture of a validation case for `write`, of the first ones."""
        if len(self._pictures) < PICTURED_CASES:
            self._pictures[case.name] = draw_slices(self._plan, hu, truth, found)

    def write(self, step: int, entry: Mapping[str, Any]) -> None:
        """Write an entry of the history and the pictures kept since the last one."""
        for tag, value in _scalars(entry).items():
            self._writer.add_scalar(tag, value, step)
        for name, figure in self._pictures.items():
            self._writer.add_figure(f"validation/{name}", figure, step, close=False)
        self._pictures.clear()
        self._writer.flush()

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()


def _scalars(entry: Mapping[str, Any]) -> dict[str, float]:
    """Tags and numbers. Every stage has a loss of its own kind, so a curve of its own."""
    scalars = {
        f"loss/{entry['stage']}": entry["loss"],
        **{name: entry[name] for name in ("lr", "seconds")},
        **{f"validation/{name}": entry.get(name) for name in ("score", "localisation_mm", "inside_roi")},
        **{f"dsc/{organ}": dsc for organ, dsc in entry.get("dsc", {}).items()},
    }
    return {tag: value for tag, value in scalars.items() if value is not None}


def draw_slices(plan: Plan, hu: np.ndarray, truth: np.ndarray, found: np.ndarray) -> "Figure":
    """Axial slices through organs, the small ones first: truth dashed, found solid.

    Args:
        plan: Names the organs of the labels.
        hu: (D, H, W), as are the labels.
        truth: True labels.
        found: Labels found.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = _slices(plan, truth)
    figure = Figure(figsize=(_INCHES * len(heights), _INCHES), dpi=_DPI, facecolor="black", layout="tight")
    FigureCanvasAgg(figure)
    for ax, (organ, z) in zip(figure.subplots(1, len(heights), squeeze=False)[0], heights.items(), strict=True):
        ax.imshow(hu[z], cmap="gray", vmin=WINDOW_HU[0], vmax=WINDOW_HU[1], aspect=plan.spacing[1] / plan.spacing[2])
        ax.set_title(organ, color="white", fontsize=8)
        ax.set_axis_off()
        for labels, style in ((truth[z], "dashed"), (found[z], "solid")):
            for value in np.unique(labels[labels > 0]):
                color = [part / 255 for part in organ_color(plan.organ_names[value - 1])]
                ax.contour(labels == value, levels=[0.5], colors=[color], linewidths=1, linestyles=style)
    return figure


def _slices(plan: Plan, truth: np.ndarray) -> dict[str, int]:
    """Organs and the slices through their middles; the middle slice if there are none."""
    names = [*plan.small_organs, *(name for name in plan.organ_names if name not in plan.small_organs)]
    heights: dict[str, int] = {}
    for name in names:
        slices = np.flatnonzero((truth == plan.organ_names.index(name) + 1).any(axis=(1, 2)))
        if len(slices) and len(heights) < PICTURED_SLICES:
            heights[name] = int(slices[len(slices) // 2])
    return heights or {"no organ": len(truth) // 2}
