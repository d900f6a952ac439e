"""The atlas baseline: training cases are registered to a test case by SyN, and their contours vote.

SyN of ANTs (Avants et al., Medical Image Analysis 2008). Everything happens on the prepared grid, as for the networks.
"""

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from ..cohort import RECORD, is_complete, make_record
from ..config import Config
from ..data.cases import find_cases
from ..data.crops import label_values, load_case
from ..data.images import Volume, read_image, write_labels
from ..data.plan import CaseRecord, Plan
from ..data.preprocess import prepare_image, restore_labels
from ..errors import FocusNetError
from ..files import atomic_folder

WINDOW_HU = (-1000, 1000)
ENOUGH_VOTES = 0.5


def segment_by_atlases(
    plan: Plan, cache: Path, test: Path, out: Path, config: Config, *, count: int, seed: int
) -> None:
    """Segment every test case by `count` atlases, into `out`/CASE/labels.nii.gz; what is there of the same CT by the
    same atlases stays.

    Args:
        plan: Of the training cases.
        cache: Folder of the prepared training cases.
        test: Folder of test cases.
        out: Folder of predictions.
        config: How to prepare the test cases; the training cases named there for validation serve too.
        count: Number of atlases: the cases with most organs, drawn where these are more.
        seed: Of the draw and of the registration.

    Raises:
        FocusNetError: the extra `atlas` is not installed, or a case has no CT.
    """
    ants = _ants()
    atlases = _choose(plan, count, seed)
    names = dict(enumerate(plan.organ_names, start=1))
    made_with = {"plan": plan.fingerprint, "atlases": count, "seed": seed}
    for case in track(find_cases(test), "registering", console=Console(stderr=True), transient=True):
        if case.image is None:
            raise FocusNetError(f"{case.name} has no CT")
        image = read_image(case.image)
        if is_complete(out / case.name, made_with, case.image, partial(_content, image)):
            continue
        prepared = prepare_image(image, config.data)
        fixed = _image(ants, prepared.array, plan)
        found = [_transferred(ants, fixed, atlas, plan, cache, seed) for atlas in atlases]
        labels = vote(found, [[organ in atlas.organs for organ in plan.organ_names] for atlas in atlases])
        with atomic_folder(out / case.name) as folder:
            restored = restore_labels(labels, prepared.grid, image.grid)
            write_labels(folder / "labels.nii.gz", restored, image.grid)
            (folder / "labels.json").write_text(json.dumps(names), encoding="utf-8")
            record = make_record(folder, made_with, case.image, image, [])
            (folder / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")


def _content(image: Volume) -> tuple[Volume, list[str]]:
    return image, []


def vote(labels: list[np.ndarray], contoured: list[list[bool]]) -> np.ndarray:
    """One label map from several.

    An organ is where at least half of the atlases that have it say so; of several organs, the one with the largest
    share.

    Args:
        labels: Label maps (D, H, W) of one shape; value n is organ n.
        contoured: For every atlas, whether it has organ 1, 2, ...
    """
    result = np.zeros(labels[0].shape, np.uint8)
    best = np.zeros(result.shape, np.float32)
    for value, known in enumerate(zip(*contoured, strict=True), start=1):
        maps = [one for one, has in zip(labels, known, strict=True) if has]
        if not maps:
            continue
        share = np.stack([one == value for one in maps]).mean(axis=0, dtype=np.float32)
        won = (share >= ENOUGH_VOTES) & (share > best)
        result[won], best[won] = value, share[won]
    return result


def _ants() -> Any:
    try:
        import ants
    except ImportError as error:
        raise FocusNetError("the atlas row needs ANTs: pip install 'focuskernels[atlas]', or leave it out") from error
    return ants


def _choose(plan: Plan, count: int, seed: int) -> list[CaseRecord]:
    order = np.random.default_rng(seed).permutation(len(plan.cases))
    return sorted((plan.cases[i] for i in order), key=lambda case: -len(case.organs))[:count]


def _transferred(ants: Any, fixed: Any, atlas: CaseRecord, plan: Plan, cache: Path, seed: int) -> np.ndarray:
    """The atlas's labels (D, H, W) on the grid of `fixed`."""
    hu, stored = load_case(cache, atlas)
    moving, labels = _image(ants, hu, plan), _image(ants, label_values(atlas, plan)[stored], plan, window=False)
    with tempfile.TemporaryDirectory() as folder:
        found = ants.registration(fixed, moving, type_of_transform="SyN", outprefix=f"{folder}/", random_seed=seed + 1)
        moved = ants.apply_transforms(
            fixed, labels, transformlist=found["fwdtransforms"], interpolator="nearestNeighbor"
        )
    return moved.numpy().transpose(2, 1, 0).astype(np.uint8)


def _image(ants: Any, array: np.ndarray, plan: Plan, *, window: bool = True) -> Any:
    values = np.clip(array, *WINDOW_HU) if window else array
    # (x, y, z), as ANTs has them
    return ants.from_numpy(values.transpose(2, 1, 0).astype(np.float32), spacing=tuple(reversed(plan.spacing)))
