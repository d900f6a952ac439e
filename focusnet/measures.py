"""What is measured of every organ of a prediction, what of it a person should look at, and the table of a cohort.

Lengths are mm and positions (x, y, z) LPS: x to the patient's left, y to posterior, z to superior.
"""

import csv
import io
import math
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import Model
from .data.images import Grid, Volume
from .data.organs import mirror_name
from .data.plan import OrganPlan
from .data.preprocess import reorient
from .errors import FocusNetError
from .files import atomic_write, load_json
from .inference import Segmentation

STATISTICS = "statistics.json"
COHORT = "statistics.csv"
#: Organs that leave every CT of the head and neck, so that touching its border says nothing.
OPEN_ENDED = frozenset(
    ("Brain", "SpinalCord", "SpinalCanal", "Esophagus", "Trachea", "Lung_L", "Lung_R", "A_Carotid_L", "A_Carotid_R")
)
#: A volume is odd this far outside of what training saw, or of the training mean where only that is known.
RANGE_MARGIN, MEAN_MARGIN = 1.25, 2.5
#: An organ is odd if it is larger than its other side by this factor, less sure than this, or in parts of which the
#: largest holds less than this.
SIDES_RATIO, LOW_CONFIDENCE, WHOLE = 2.0, 0.5, 0.95
#: Volumes are rounded to this.
LEAST_CM3 = 1e-4
_SIDES = (("inferior", "superior"), ("anterior", "posterior"), ("right", "left"))  # along z, y, x
_COLUMNS = (
    "volume_cm3", "training_volume_cm3", "center_mm", "extent_mm", "mean_hu", "confidence", "parts", "largest_part",
    "at_border", "heatmap_peak", "heatmap_peak_mm", "peak_to_center_mm", "flags",
)  # fmt: skip


def measure(
    model: Model, labels: np.ndarray, image: Volume, result: Segmentation, prepared: Grid
) -> dict[str, dict[str, Any]]:
    """Measure every organ of a prediction; what does not exist is None.

    Args:
        model: What predicted it.
        labels: Label map on the image's grid.
        image: HU.
        result: The segmentation on the network's grid.
        prepared: That grid.

    Returns:
        Per organ `volume_cm3`; `training_volume_cm3`, smallest, mean and largest in training, or the mean alone;
        `center_mm`, of mass; `extent_mm`, sides of the box along the axes of the image; `mean_hu`; `confidence`, mean
        probability over its voxels; `parts`, whose voxels do not even touch at corners, and `largest_part`, that one's
        share of the volume; `at_border`, the faces of the image that it touches; `flags`, what a person should look at,
        one line each. Of small organs also `heatmap_peak`, its height, `heatmap_peak_mm`, and `peak_to_center_mm`.
    """
    from scipy.ndimage import find_objects

    organs = model.plan.organs
    along_patient = reorient(Volume(labels, image.grid))
    hu = reorient(image).array
    boxes = find_objects(along_patient.array, max_label=len(organs))
    table: dict[str, dict[str, Any]] = {}
    for value, (organ, box) in enumerate(zip(organs, boxes, strict=True), start=1):
        confidence = float(result.confidence[value])
        found = _shape(along_patient, hu, value, box)
        table[organ.name] = {
            "volume_cm3": found.pop("volume_cm3"),
            "training_volume_cm3": _training_volumes(organ),
            **found,
            "confidence": None if math.isnan(confidence) else round(confidence, 4),
        }
    for name, peak, height in zip(model.plan.small_organs, result.peaks.tolist(), result.peak_values.tolist()):
        position, center = prepared.point(peak), table[name]["center_mm"]
        table[name] |= {
            "heatmap_peak": round(height, 4),
            "heatmap_peak_mm": position.round(2).tolist(),
            "peak_to_center_mm": center and round(float(np.linalg.norm(position - center)), 2),
        }
    for name, measured in table.items():
        measured["flags"] = flags(name, table, model.config.predict.min_peak)
    for number in result.empty_rois:
        table[model.plan.small_organs[number]]["flags"].append("nothing in its ROI")
    return table


def flags(name: str, table: dict[str, dict[str, Any]], min_peak: float) -> list[str]:
    """What a person should look at of the organ `name`, one line each (docs/metrics.md says when each is raised)."""
    found = table[name]
    low_peak = [f"low heat-map peak, {found['heatmap_peak']:.2f}"] if found.get("heatmap_peak", 1) < min_peak else []
    if not found["parts"]:
        return ["not found", *low_peak]
    cut = bool(found["at_border"])
    odd = [*low_peak] if cut and name in OPEN_ENDED else [_odd_volume(found), *low_peak]
    if found["confidence"] is not None and found["confidence"] < LOW_CONFIDENCE:
        odd.append(f"low confidence, {found['confidence']:.2f}")
    if found["largest_part"] < WHOLE:
        odd.append(f"in {found['parts']} parts, the largest {found['largest_part']:.1%}")
    if cut and name not in OPEN_ENDED:
        odd.append(f"cut off by the image: {', '.join(found['at_border'])}")
    other = mirror_name(name)
    if other != name and other in table and table[other]["parts"]:
        side = found["center_mm"][0] - table[other]["center_mm"][0]
        if (side < 0) == name.endswith("_L"):
            odd.append(f"on the wrong side of {other}")
        ratio = found["volume_cm3"] / max(table[other]["volume_cm3"], LEAST_CM3)
        if ratio > SIDES_RATIO:
            odd.append(f"{ratio:.1f} times the volume of {other}")
    return [flag for flag in odd if flag]


def write_cohort(out: Path) -> None:
    """Write `out`/statistics.csv: a row for every organ of every prediction in `out`.

    Raises:
        FocusNetError: a statistics.json cannot be read, or the table cannot be written.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["case", "organ", *(name for column in _COLUMNS for name in _names(column))])
    for file in sorted(out.glob(f"[!.]*/{STATISTICS}")):
        for organ, measured in read_statistics(file).items():
            cells = (cell for column in _COLUMNS for cell in _cells(column, measured.get(column)))
            writer.writerow([file.parent.name, organ, *cells])
    with atomic_write(out / COHORT) as temporary:
        temporary.write_text(stream.getvalue(), encoding="utf-8")


def read_json(file: Path) -> dict[str, Any]:
    """The content of a JSON file that `predict` wrote.

    Raises:
        FocusNetError: it cannot be read, or holds something else.
    """
    content = load_json(file)
    if not isinstance(content, dict):
        raise FocusNetError(f"cannot read {file}: it is a list or a value, expected a table")
    return content


def read_statistics(file: Path) -> dict[str, dict[str, Any]]:
    """What was measured of every organ of a case.

    Raises:
        FocusNetError: as of `read_json`.
    """
    table = read_json(file)
    for organ, measured in table.items():
        if not _is_measured(measured):
            raise FocusNetError(f"{file} is none that predict wrote: odd values of {organ[:100]!r}")
    return table


def _is_measured(found: Any) -> bool:
    """Whether these are values of an organ as `measure` has them; earlier versions had fewer."""
    if not isinstance(found, dict) or not found.keys() >= {"volume_cm3", "center_mm", "confidence"}:
        return False
    return all(_fits(column, found[column]) for column in _COLUMNS if column in found)


def _fits(column: str, value: Any) -> bool:
    if column in ("at_border", "flags"):
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    if column == "training_volume_cm3":
        return isinstance(value, list) and len(value) in (1, 3) and all(map(_is_number, value))
    if len(_names(column)) == 3:
        return value is None or (isinstance(value, list) and len(value) == 3 and all(map(_is_number, value)))
    return value is None or _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _shape(labels: Volume, hu: np.ndarray, value: int, box: tuple[slice, slice, slice] | None) -> dict[str, Any]:
    """What a label's voxels alone tell; both arrays run along the patient's axes (z, y, x)."""
    from scipy.ndimage import label

    if box is None:
        nothing = {"volume_cm3": 0.0, "center_mm": None, "extent_mm": None, "mean_hu": None}
        return {**nothing, "parts": 0, "largest_part": None, "at_border": []}
    mask = labels.array[box] == value
    corner = [side.start for side in box]
    numbered, parts = label(mask, structure=np.ones((3, 3, 3)))
    sizes = np.bincount(numbered.ravel())[1:]
    touched = [
        name
        for side, n, names in zip(box, labels.array.shape, _SIDES)
        for name, touches in zip(names, (side.start == 0, side.stop == n))
        if touches
    ]
    sides = [(side.stop - side.start) * step for side, step in zip(box, labels.grid.spacing)]
    return {
        "volume_cm3": round(int(sizes.sum()) * labels.grid.voxel_mm3 / 1000, 4),
        "center_mm": labels.grid.point(np.argwhere(mask).mean(axis=0) + corner).round(2).tolist(),
        "extent_mm": [round(side, 2) for side in reversed(sides)],
        "mean_hu": round(float(hu[box][mask].mean()), 1),
        "parts": int(parts),
        "largest_part": round(float(sizes.max() / sizes.sum()), 4),
        "at_border": touched,
    }


def _training_volumes(organ: OrganPlan) -> list[float]:
    low_high = organ.volume_range_mm3
    volumes = [organ.volume_mm3] if low_high is None else [low_high[0], organ.volume_mm3, low_high[1]]
    return [round(volume / 1000, 4) for volume in volumes]


def _odd_volume(found: dict[str, Any]) -> str:
    volume, training = found["volume_cm3"], found["training_volume_cm3"]
    low, high = training[0], training[-1]
    margin = RANGE_MARGIN if len(training) > 1 else MEAN_MARGIN
    if low / margin <= volume <= high * margin:
        return ""
    known = f"{low:.3g} to {high:.3g} cm3 in training" if len(training) > 1 else f"on average {low:.3g} in training"
    return f"volume {volume:.3g} cm3, {known}"


def _names(column: str) -> list[str]:
    if column == "training_volume_cm3":
        return ["training_smallest_cm3", "training_mean_cm3", "training_largest_cm3"]
    if column in ("center_mm", "extent_mm", "heatmap_peak_mm"):
        return [f"{column.removesuffix('_mm')}_{axis}_mm" for axis in "xyz"]
    return [column]


def _cells(column: str, value: Any) -> list[Any]:
    count = len(_names(column))
    if isinstance(value, list) and count == 3:
        return value if len(value) == 3 else ["", *value, ""]
    if isinstance(value, list):
        return ["; ".join(value)]
    return [""] * count if value is None else [value]
