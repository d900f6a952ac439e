"""`python -m focusnet.predict CHECKPOINT INPUT --out OUT`: segment CTs on exactly their own grids."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from .checkpoint import Model, load_checkpoint
from .cli import EXIT_ERROR, command_parser, parse, pick_device, run
from .config import Backend, Config
from .data.dicom import check_dicom_extra, read_slices, write_rtstruct, write_seg
from .data.images import Volume, read_image, write_labels
from .data.inputs import find_inputs
from .data.preprocess import BODY_HU, prepare_image, restore_labels
from .data.series import is_series
from .errors import FocusNetError
from .files import atomic_folder, check_writable
from .inference import Segmentation, segment_hu
from .qc import draw_qc

_WRITTEN = {
    "labels.nii.gz", "labels.json", "segmentations", "seg.dcm", "rtstruct.dcm", "statistics.json", "qc.png",
}  # fmt: skip
_PARTS = {"snet": "S-Net", "sol": "SOL-Net", "sos": "SOS-Net"}


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
    result = segment_hu(model, prepared.array, device)
    return restore_labels(result.labels.cpu().numpy(), prepared.grid, image.grid), result, prepared


def statistics(model: Model, labels: np.ndarray, image: Volume, result: Segmentation) -> dict[str, Any]:
    """Per organ: volume in cm3, centre of mass in mm (x, y, z; LPS), confidence; for small organs the peak too."""
    peaks = dict(zip(model.plan.small_organs, result.peak_values.tolist(), strict=False))
    table = {}
    for value, name in enumerate(model.plan.organ_names, start=1):
        voxels = np.argwhere(labels == value)
        center = image.grid.point(voxels.mean(axis=0)).round(2).tolist() if len(voxels) else None
        confidence = float(result.confidence[value])
        table[name] = {
            "volume_cm3": round(len(voxels) * image.grid.voxel_mm3 / 1000, 4),
            "center_mm": center,
            "confidence": None if math.isnan(confidence) else round(confidence, 4),
        }
        if name in peaks:
            table[name]["heatmap_peak"] = round(peaks[name], 4)
    return table


def predict_case(
    model: Model, name: str, source: Path, out: Path, device: torch.device, *, per_organ: bool, dicom: bool
) -> None:
    """Segment `source` and write everything about it to `out`/`name`, which replaces an earlier prediction as a whole.

    Raises:
        FocusNetError: `source` cannot be read, or `out`/`name` cannot be written or is no prediction's folder.
    """
    _check_replaceable(out / name)
    image = read_image(source)
    slices = read_slices(source) if dicom else []
    if not (image.array > BODY_HU).any():
        print(f"note: {name}: {source} shows nobody: no voxel is above {BODY_HU} HU", file=sys.stderr)
    labels, result, prepared = predict_volume(model, image, device)
    organs = dict(enumerate(model.plan.organ_names, start=1))
    with atomic_folder(out / name) as folder:
        if per_organ:
            for value, organ in organs.items():
                mask = (labels == value).astype(np.uint8)
                write_labels(folder / "segmentations" / f"{organ}.nii.gz", mask, image.grid)
        else:
            write_labels(folder / "labels.nii.gz", labels, image.grid)
            _write_json(folder / "labels.json", {str(value): organ for value, organ in organs.items()})
        if dicom:
            write_seg(folder / "seg.dcm", slices, labels, organs)
            write_rtstruct(folder / "rtstruct.dcm", slices, labels, organs)
        _write_json(folder / "statistics.json", statistics(model, labels, image, result))
        draw_qc(folder / "qc.png", prepared, result, model)


def _check_replaceable(folder: Path) -> None:
    """Refuse to replace what `predict` did not write: with the data set as --out, that would be the CTs."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FocusNetError(f"cannot write {folder}: it is a file, expected a folder")
    found = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if found and ("statistics.json" not in found or found - _WRITTEN):
        odd = min(found - _WRITTEN, default="no statistics.json")
        raise FocusNetError(f"cannot replace {folder}: it is no prediction ({odd}); choose another --out")


def _check_dicom(inputs: dict[str, Path]) -> None:
    check_dicom_extra()
    for source in inputs.values():
        if not is_series(source):
            raise FocusNetError(f"--dicom needs a DICOM series to refer to, and {source} is none; leave --dicom out")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _with_options(config: Config, chosen: dict[str, Any]) -> Config:
    """`config` with the options of prediction that were given, checked."""
    given = {name: value for name, value in chosen.items() if value is not None}
    config = dataclasses.replace(config, predict=dataclasses.replace(config.predict, **given))
    config.check()
    return config


def _describe(model: Model, checkpoint: Path, device: torch.device) -> str:
    parts = ", ".join(_PARTS[part] for part in model.parts)
    settings = ", ".join(f"{name} {value}" for name, value in vars(model.config.predict).items())
    backend = f"backend {model.config.model.backend}"
    return f"{checkpoint}: {parts}{' alone' if len(model.parts) == 1 else ''}; {settings}; {backend}; device {device}"


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU has too little memory for it; --device cpu needs none"
    if isinstance(error, MemoryError):
        return "it does not fit into memory"
    return str(error).partition("\n")[0] or type(error).__name__


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, or 2 if a CT could not be segmented."""
    parser = command_parser(
        "predict",
        "CHECKPOINT INPUT --out OUT",
        "Segment CTs; masks lie on exactly the CTs' grids. OUT/<case>/ gets labels.nii.gz with labels.json (which "
        "value is which organ) or, with --per_organ, segmentations/<Organ>.nii.gz; with --dicom also seg.dcm and "
        "rtstruct.dcm, in the CT's study and frame of reference; statistics.json (per organ its volume in cm3, centre "
        "in mm (x, y, z; LPS) and how sure the network was, 0 to 1); and qc.png to look at.",
        [
            "RUN/best.pt CTS --out OUT",
            "RUN/best.pt patient.nii.gz --out OUT --per_organ --device cpu",
            "RUN/best.pt DICOM_FOLDER --out OUT --dicom",
        ],
    )
    parser.add_argument("checkpoint", type=Path, help="best.pt of a training run")
    parser.add_argument("input", type=Path, help="an image file, a folder of images or of cases, or a DICOM folder")
    parser.add_argument(
        "--out", type=Path, required=True, help="one folder per case: label map, statistics, QC picture"
    )
    parser.add_argument("--per_organ", action="store_true", help="one binary mask per organ instead of one label map")
    parser.add_argument("--dicom", action="store_true", help="DICOM-SEG and RTSTRUCT too, of CTs that are DICOM series")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    for name, kind, text in (
        ("overlap", float, "share by which neighbouring windows overlap"),
        ("min_peak", float, "a small organ whose heat map stays below this keeps S-Net's segmentation"),
        ("largest_component", bool, "keep the largest connected part alone of what S-Net segments"),
    ):
        parser.add_argument(f"--{name}", f"--predict.{name}", type=kind | None, help=f"{text} (default: checkpoint's)")
    parser.add_argument(
        "--backend",
        type=Backend | None,
        help="layers by focuskernels (fused) or by stock PyTorch (reference) (default: checkpoint's)",
    )
    arguments = parse(parser, argv)
    device, console = pick_device(arguments.device), Console(stderr=True)
    model, _ = load_checkpoint(arguments.checkpoint, device, arguments.backend)
    options = {field.name: arguments[field.name] for field in dataclasses.fields(model.config.predict)}
    model = dataclasses.replace(model, config=_with_options(model.config, options))
    model.network.eval()
    inputs, empty = find_inputs(arguments.input)
    if empty:
        print(f"note: no CT in {', '.join(empty)}", file=sys.stderr)
    if arguments.dicom:
        _check_dicom(inputs)
    check_writable(arguments.out)
    failures = []
    print(_describe(model, arguments.checkpoint, device))
    for name, source in track(list(inputs.items()), description="predicting", console=console, transient=True):
        try:
            predict_case(
                model, name, source, arguments.out, device, per_organ=arguments.per_organ, dicom=arguments.dicom
            )
        except (FocusNetError, OSError, RuntimeError, ValueError, MemoryError) as error:
            failures.append(f"{name}: {_reason(error)}")
    print(f"segmented {len(inputs) - len(failures)} of {len(inputs)} CTs into {arguments.out}")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return EXIT_ERROR if failures else 0


if __name__ == "__main__":
    run(main)
