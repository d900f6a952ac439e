"""The plan: what was measured on the training data, and what follows from it."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import Triple
from ..files import atomic_write

FloatTriple = tuple[float, float, float]
_LARGEST_ROI = 1024


@dataclass
class OrganPlan:
    """One organ; means are over the cases in which it is contoured. Triples are (z, y, x).

    Attributes:
        name: TG-263 name.
        cases: Number of cases that have it.
        volume_mm3: Mean volume.
        voxels: Mean number of voxels on the original grids.
        diameter_mm: Diameter of the sphere of that volume.
        extent_mm: Mean side of its bounding box along z, y, x of the image axes.
        small: Whether SOL-Net and SOS-Net take care of it.
        roi_size: Size of a small organ's ROI in prepared voxels; None for the other organs.
        alpha: Weight in the focal loss.
        volume_range_mm3: Smallest and largest volume; None in checkpoints that are older than this entry.
    """

    name: str
    cases: int
    volume_mm3: float
    voxels: float
    diameter_mm: float
    extent_mm: FloatTriple
    small: bool
    roi_size: Triple | None
    alpha: float
    volume_range_mm3: tuple[float, float] | None = None


@dataclass
class CaseRecord:
    """One prepared case; coordinates are voxels (z, y, x) of the prepared grid.

    Attributes:
        name: Name of the case.
        shape: Shape of the prepared arrays.
        organs: Organs contoured in this case; the label value of each in the cache is its position + 1.
        centers: Centre of mass of every contoured organ.
    """

    name: str
    shape: Triple
    organs: list[str]
    centers: dict[str, FloatTriple]


@dataclass
class Plan:
    """The plan of a data set.

    Attributes:
        spacing: Voxel size of the prepared volumes in mm (z, y, x).
        background_alpha: Weight of the background in the focal loss.
        organs: All organs to segment; the label value of each is its position + 1.
        cases: All prepared cases.
        fingerprint: Identifies the settings and the prepared cases by their content, wherever the data lie.
    """

    spacing: FloatTriple
    background_alpha: float
    organs: list[OrganPlan]
    cases: list[CaseRecord] = field(default_factory=list)
    fingerprint: str = ""

    @property
    def organ_names(self) -> list[str]:
        """Names in the order of the label values 1, 2, ..."""
        return [organ.name for organ in self.organs]

    @property
    def small_organs(self) -> list[str]:
        """Names of the small organs, in the order of the heat maps."""
        return [organ.name for organ in self.organs if organ.small]

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, strings and numbers, as JSON or a checkpoint holds them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Plan":
        """The plan of `to_dict`, also after a round trip through JSON.

        Raises:
            KeyError, TypeError, ValueError: `content` is no plan.
        """
        return cls(
            spacing=_floats(content["spacing"]),
            background_alpha=float(content["background_alpha"]),
            organs=[_organ(organ) for organ in content["organs"]],
            cases=[case_record(case) for case in content["cases"]],
            fingerprint=str(content["fingerprint"]),
        )

    def save(self, path: Path) -> None:
        """Write JSON, atomically."""
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def case_record(content: dict[str, Any]) -> CaseRecord:
    """A case's record from plain containers; other entries, as older checkpoints have them, are passed over."""
    return CaseRecord(
        name=_file_name(content["name"]),
        shape=_ints(content["shape"]),
        organs=[str(name) for name in content["organs"]],
        centers={str(name): _floats(center) for name, center in content["centers"].items()},
    )


def _organ(content: dict[str, Any]) -> OrganPlan:
    roi_size = content["roi_size"]
    if roi_size is not None and not all(1 <= side <= _LARGEST_ROI for side in _ints(roi_size)):
        raise ValueError(f"an ROI of {roi_size} voxels")
    volume_range = content.get("volume_range_mm3")
    return OrganPlan(
        name=_file_name(content["name"]),
        cases=int(content["cases"]),
        volume_mm3=float(content["volume_mm3"]),
        voxels=float(content["voxels"]),
        diameter_mm=float(content["diameter_mm"]),
        extent_mm=_floats(content["extent_mm"]),
        small=bool(content["small"]),
        roi_size=None if roi_size is None else _ints(roi_size),
        alpha=float(content["alpha"]),
        volume_range_mm3=None if volume_range is None else _pair(volume_range),
    )


def _file_name(value: Any) -> str:
    """The name of a case or organ, of which files are named."""
    name = str(value)
    if name in ("", "..") or Path(name).name != name:
        raise ValueError(f"the name {name!r}")
    return name


def _pair(values: Any) -> tuple[float, float]:
    low, high = values
    return float(low), float(high)


def _floats(values: Any) -> FloatTriple:
    z, y, x = values
    return float(z), float(y), float(x)


def _ints(values: Any) -> Triple:
    z, y, x = values
    return int(z), int(y), int(x)
