"""Which cases train and which test, as two folders of links, so that every command takes them."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..data.cases import Case, find_cases
from ..errors import FocusNetError


def choose_test_cases(cases: Sequence[Case], named: Sequence[str] | None, share: float, seed: int) -> list[str]:
    """Names of the test cases: those `named`, else a seeded draw of `share` of all.

    Raises:
        FocusNetError: a named case is not there, or none is left to train on.
    """
    names = [case.name for case in cases]
    if named is None:
        order = np.random.default_rng(seed).permutation(len(names))
        named = sorted(names[i] for i in order[: max(1, round(share * len(names)))])
    absent = sorted(set(named) - set(names))
    if absent:
        raise FocusNetError(f"no case named {', '.join(absent)} among the {len(names)} cases")
    if len(set(named)) == len(names):
        raise FocusNetError(f"all {len(names)} cases are test cases, none is left to train on")
    return list(named)


def link_split(data: Path, test: Sequence[str] | Path, out: Path) -> tuple[Path, Path]:
    """Make `out`/train and `out`/test, which hold links to the cases of `data`; a folder as `test` stays where it is.

    Raises:
        FocusNetError: `data` holds no cases, a test case is also trained on, or the folders cannot be written.
    """
    cases = find_cases(data)
    if isinstance(test, Path):
        trained = {case.image.resolve() for case in cases if case.image is not None}
        both = [case.name for case in find_cases(test) if case.image is not None and case.image.resolve() in trained]
        if both:
            raise FocusNetError(f"{', '.join(both)} in {test}: also among the training cases in {data}")
        _link(data, cases, out / "train")
        return out / "train", test
    for name, chosen in (
        ("train", [case for case in cases if case.name not in test]),
        ("test", [case for case in cases if case.name in test]),
    ):
        _link(data, chosen, out / name)
    return out / "train", out / "test"


def _link(data: Path, cases: Sequence[Case], folder: Path) -> None:
    """Let `folder`, which is made anew, hold links to `cases` alone; where it does, another study may be reading it."""
    links = _links(data, cases)
    inside = [Path(root) / name for root, folders, files in os.walk(folder, topdown=False) for name in folders + files]
    for path in inside:
        if not path.is_symlink() and not path.is_dir():
            raise FocusNetError(f"{folder} holds {path.name}, expected links alone; choose another --out")
    if {path.relative_to(folder): Path(os.readlink(path)) for path in inside if path.is_symlink()} == links:
        return
    for path in inside:
        path.unlink() if path.is_symlink() else path.rmdir()
    for place, target in links.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).symlink_to(target, target_is_directory=target.is_dir())


def _links(data: Path, cases: Sequence[Case]) -> dict[Path, Path]:
    """Places in a folder of links, and what they link to."""
    if not ((data / "labelsTr").is_dir() or (data / "imagesTr").is_dir()):
        return {Path(case.name): (data / case.name).resolve() for case in cases}
    files = [data / "dataset.json", *(file for case in cases for file in case.files)]
    return {file.relative_to(data): file.resolve() for file in files}
