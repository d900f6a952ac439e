"""`python -m focusnet.predict CHECKPOINT INPUT --out OUT`: segment CTs on exactly their own grids."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from .checkpoint import Model, load_checkpoint
from .cli import command_parser, parse, pick_device, run
from .data.cases import find_cases
from .data.images import Grid, Volume, read_image, write_labels
from .data.preprocess import normalize, prepare_image, restore_labels
from .errors import FocusNetError
from .files import atomic_write
from .inference import Segmentation, segment
from .qc import draw_qc

IMAGE_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")


def predict_volume(model: Model, image: Volume, device: torch.device) -> tuple[np.ndarray, Segmentation, Volume]:
    """Segment one CT.

    Args:
        model: With its network in evaluation mode on `device`.
        image: HU on any grid.
        device: Where to compute.

    Returns:
        The label map (uint8) on the image's own grid, the segmentation on the network's grid, and the CT on that grid.
    """
    prepared = prepare_image(image, model.config.data)
    intensities = normalize(torch.from_numpy(prepared.array.astype(np.float32)), model.config.data)
    result = segment(
        model.network,
        intensities.to(device),
        model.small_labels,
        window=model.config.train.crop,
        overlap=model.config.predict.overlap,
        min_peak=model.config.predict.min_peak,
        largest_component=model.config.predict.largest_component,
        parts=model.parts,
    )
    return restore_labels(result.labels.cpu().numpy(), prepared.grid, image.grid), result, prepared


def statistics(model: Model, labels: np.ndarray, image: Volume, result: Segmentation) -> dict[str, Any]:
    """Per organ: volume in cm3, centre of mass in mm (x, y, z; LPS), confidence; for small organs the peak too."""
    peaks = dict(zip(model.plan.small_organs, result.peak_values.tolist(), strict=False))
    table = {}
    for value, name in enumerate(model.plan.organ_names, start=1):
        voxels = np.argwhere(labels == value)
        confidence = float(result.confidence[value])
        table[name] = {
            "volume_cm3": round(len(voxels) * image.grid.voxel_mm3 / 1000, 4),
            "center_mm": _physical(image.grid, voxels.mean(axis=0)) if len(voxels) else None,
            "confidence": None if math.isnan(confidence) else round(confidence, 4),
        }
        if name in peaks:
            table[name]["heatmap_peak"] = round(peaks[name], 4)
    return table


def _physical(grid: Grid, voxel: np.ndarray) -> list[float]:
    """Voxel (z, y, x) to millimetres (x, y, z)."""
    offset = np.array(grid.direction).reshape(3, 3) @ (voxel[::-1] * np.array(grid.spacing)[::-1])
    return [round(float(c), 2) for c in np.array(grid.origin) + offset]


def predict_case(model: Model, name: str, source: Path, out: Path, device: torch.device, *, per_organ: bool) -> None:
    """Segment `source` and write everything about it to `out`/`name`."""
    image = read_image(source)
    labels, result, prepared = predict_volume(model, image, device)
    folder = out / name
    names = {str(value): organ for value, organ in enumerate(model.plan.organ_names, start=1)}
    if per_organ:
        for value, organ in enumerate(model.plan.organ_names, start=1):
            write_labels(folder / "segmentations" / f"{organ}.nii.gz", (labels == value).astype(np.uint8), image.grid)
    else:
        write_labels(folder / "labels.nii.gz", labels, image.grid)
        _write_json(folder / "labels.json", names)
    _write_json(folder / "statistics.json", statistics(model, labels, image, result))
    with atomic_write(folder / "qc.png") as temporary:
        draw_qc(temporary, prepared, result, model)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n")


def find_inputs(source: Path) -> list[tuple[str, Path]]:
    """Names and images of a file, a folder of cases, or a DICOM folder.

    Raises:
        FocusNetError: there is nothing to segment.
    """
    if source.is_file():
        suffix = next((s for s in IMAGE_SUFFIXES if source.name.lower().endswith(s)), None)
        if suffix is None:
            raise FocusNetError(
                f"{source}: not an image; expected one of {', '.join(IMAGE_SUFFIXES)} or a DICOM folder"
            )
        return [(source.name[: -len(suffix)], source)]
    if not source.is_dir():
        raise FocusNetError(f"{source}: no such file or folder")
    images = [path for path in sorted(source.iterdir()) if path.name.lower().endswith(IMAGE_SUFFIXES)]
    if images and not (source / "structures").is_dir():
        return [found for path in images for found in find_inputs(path)]
    try:
        cases = find_cases(source)
    except FocusNetError:
        cases = []
    return [(case.name, case.image) for case in cases if case.image is not None] or [(source.name, source)]


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = command_parser(
        "predict", "CHECKPOINT INPUT --out OUT", "Segment CTs; masks lie on exactly the CTs' grids."
    )
    parser.add_argument("checkpoint", type=Path, help="best.pt of a training run")
    parser.add_argument("input", type=Path, help="an image file, a folder of images or of cases, or a DICOM folder")
    parser.add_argument(
        "--out", type=Path, required=True, help="one folder per case: label map, statistics, QC picture"
    )
    parser.add_argument("--per_organ", action="store_true", help="one binary mask per organ instead of one label map")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    arguments = parse(parser, argv)
    device, console = pick_device(arguments.device), Console(stderr=True)
    model, _ = load_checkpoint(arguments.checkpoint, device)
    model.network.eval()
    inputs, failures = find_inputs(arguments.input), []
    for name, source in track(inputs, description="predicting", console=console, transient=True):
        try:
            predict_case(model, name, source, arguments.out, device, per_organ=arguments.per_organ)
        except FocusNetError as error:
            failures.append(str(error))
    print(f"segmented {len(inputs) - len(failures)} of {len(inputs)} CTs into {arguments.out}")
    if failures:
        raise FocusNetError("; ".join(failures))
    return 0


if __name__ == "__main__":
    run(main)
