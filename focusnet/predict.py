"""`python -m focusnet.predict CHECKPOINT INPUT --out OUT`: segment CTs on exactly their own grids."""

import dataclasses
import json
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.progress import track

from .checkpoint import Model, load_checkpoint
from .cli import EXIT_ERROR, command_parser, parse, pick_device, run
from .cohort import RECORD, Cohort, file_digest, is_complete, make_record
from .config import Backend, Config
from .data.dicom import check_dicom_extra, read_slices, write_rtstruct, write_seg
from .data.images import Volume, read_image, write_labels
from .data.inputs import find_inputs
from .data.preprocess import BODY_HU, prepare_image, restore_labels
from .data.series import is_series
from .errors import FocusNetError
from .files import atomic_folder, check_replaceable, check_writable
from .inference import Segmentation, segment_hu
from .measures import STATISTICS, measure, write_cohort
from .qc import draw_qc

if TYPE_CHECKING:
    from pydicom import Dataset

_WRITTEN = {
    "labels.nii.gz", "labels.seg.nrrd", "labels.json", "segmentations", "seg.dcm", "rtstruct.dcm", "qc.png",
    STATISTICS, RECORD,
}  # fmt: skip
_PREDICTION = ("prediction", _WRITTEN, (STATISTICS, RECORD))  # with the data set as --out, the CTs would be replaced
_PARTS = {"snet": "S-Net", "sol": "SOL-Net", "sos": "SOS-Net"}

Format = Literal["nii.gz", "nrrd"]


@dataclass(frozen=True)
class Outputs:
    """What is written of a case beside statistics and picture.

    Attributes:
        format: Of label map and masks; "nrrd" is what 3D Slicer reads as a segmentation with names and colours.
        per_organ: One binary mask per organ instead of one label map.
        dicom: DICOM-SEG and RTSTRUCT too.
    """

    format: Format = "nii.gz"
    per_organ: bool = False
    dicom: bool = False

    @property
    def suffix(self) -> str:
        """Of label maps and masks."""
        return {"nii.gz": ".nii.gz", "nrrd": ".seg.nrrd"}[self.format]


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


@dataclass(frozen=True)
class Job:
    """What is the same for all cases.

    Attributes:
        model: With its network in evaluation mode on `device`.
        checkpoint: Where it came from.
        out: Folder of all cases.
        device: Where to compute.
        outputs: What to write.
        digest: SHA-256 of the checkpoint.
    """

    model: Model
    checkpoint: Path
    out: Path
    device: torch.device
    outputs: Outputs
    digest: str

    @property
    def made_with(self) -> dict[str, Any]:
        """All that a result depends on beside the CT, as `prediction.json` holds it."""
        config = self.model.config
        return {
            "checkpoint_sha256": self.digest,
            "version": version("focuskernels"),
            "backend": config.model.backend,
            "predict": dataclasses.asdict(config.predict),
            "outputs": dataclasses.asdict(self.outputs),
        }


def predict_case(job: Job, name: str, source: Path) -> None:
    """Segment the CT `source` and write everything about it to the folder `name`, which replaces an earlier prediction
    as a whole.

    Raises:
        FocusNetError: `source` cannot be read, or the folder cannot be written or is no prediction's.
    """
    model, outputs = job.model, job.outputs
    check_replaceable(job.out / name, *_PREDICTION)
    image, slices = _read(source, outputs)
    if not (image.array > BODY_HU).any():
        print(f"note: {name}: {source} shows nobody: no voxel is above {BODY_HU} HU", file=sys.stderr)
    labels, result, prepared = predict_volume(model, image, job.device)
    organs = dict(enumerate(model.plan.organ_names, start=1))
    with atomic_folder(job.out / name) as folder:
        if outputs.per_organ:
            for value, organ in organs.items():
                mask = (labels == value).astype(np.uint8)
                write_labels(folder / "segmentations" / f"{organ}{outputs.suffix}", mask, image.grid, {1: organ})
        else:
            write_labels(folder / f"labels{outputs.suffix}", labels, image.grid, organs)
            _write_json(folder / "labels.json", {str(value): organ for value, organ in organs.items()})
        if outputs.dicom:
            write_seg(folder / "seg.dcm", slices, labels, organs)
            write_rtstruct(folder / "rtstruct.dcm", slices, labels, organs)
        _write_json(folder / STATISTICS, measure(model, labels, image, result, prepared.grid))
        draw_qc(folder / "qc.png", prepared, result, model)
        _write_json(
            folder / RECORD,
            make_record(
                folder, job.made_with, source, image, _uids(slices),
                checkpoint=str(job.checkpoint), parts=model.parts, training_cases=len(model.plan.cases),
                device=str(job.device), shape=image.grid.shape, spacing_mm=image.grid.spacing,
            ),
        )  # fmt: skip


def _read(source: Path, outputs: Outputs) -> "tuple[Volume, list[Dataset]]":
    return read_image(source), read_slices(source) if outputs.dicom else []


def _uids(slices: "list[Dataset]") -> list[str]:
    return [str(ds.SOPInstanceUID) for ds in slices]


def _check_dicom(inputs: dict[str, Path]) -> None:
    check_dicom_extra()
    for source in inputs.values():
        if not is_series(source):
            raise FocusNetError(f"--dicom needs a DICOM series to refer to, and {source} is none; leave --dicom out")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _with_options(config: Config, chosen: dict[str, Any]) -> Config:
    """`config` with the options of prediction that were given, checked."""
    given = {name: value for name, value in chosen.items() if value is not None}
    config = dataclasses.replace(config, predict=dataclasses.replace(config.predict, **given))
    config.check()
    return config


def _describe(job: Job) -> str:
    config, parts = job.model.config, [_PARTS[part] for part in job.model.parts]
    settings = ", ".join(f"{name} {value}" for name, value in vars(config.predict).items())
    trained = f"{', '.join(parts)}{' alone' if len(parts) == 1 else ''}"
    return f"{job.checkpoint}: {trained}; {settings}; backend {config.model.backend}; device {job.device}"


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU has too little memory for it; --device cpu needs none"
    if isinstance(error, MemoryError):
        return "it does not fit into memory"
    return str(error).partition("\n")[0] or type(error).__name__


def _predict_all(job: Job, cohort: Cohort, inputs: dict[str, Path], *, keep: bool, bar: bool) -> tuple[int, list[str]]:
    """Predict what no other process does; returns how many were there before, and a line for each that failed."""
    kept, failures = 0, []
    console = Console(stderr=True, quiet=not bar)
    for name in track(cohort.share(inputs), "predicting", total=len(inputs), console=console, transient=True):
        source = inputs[name]
        reason = cohort.failure(name)
        try:
            if not reason:  # of another process, just now
                read = partial(_content, source, job.outputs)
                if keep and is_complete(job.out / name, job.made_with, source, read):
                    kept += not cohort.is_new(job.out / name / RECORD)
                else:
                    predict_case(job, name, source)
                cohort.note_failure(name, "")
        except (FocusNetError, OSError, RuntimeError, ValueError, MemoryError) as error:
            reason = _reason(error)
            with suppress(FocusNetError):
                cohort.note_failure(name, reason)
            if isinstance(error, torch.AcceleratorError):  # of no more use to this process
                raise FocusNetError(f"{name}: {job.device} failed: {reason}; go on with --continue") from error
        if reason:
            failures.append(f"{name}: {reason}")
    return kept, failures


def _content(source: Path, outputs: Outputs) -> tuple[Volume, list[str]]:
    image, slices = _read(source, outputs)
    return image, _uids(slices)


def _load(checkpoint: Path, device: torch.device, backend: Backend | None) -> tuple[Model, str]:
    """The model and the digest of its file, which a training may replace at any time."""
    before = file_digest(checkpoint) if checkpoint.is_file() else ""
    model, _ = load_checkpoint(checkpoint, device, backend)
    if file_digest(checkpoint) != before:
        raise FocusNetError(f"{checkpoint} was replaced while it was read: start again")
    return model, before


def _device_of_rank(name: str) -> torch.device:
    """`name`; where torchrun started several processes and no card is named, each takes its own."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name in ("auto", "cuda") and cards and "LOCAL_RANK" in os.environ:
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % cards}"
    return pick_device(name)


def _parser() -> ArgumentParser:
    parser = command_parser(
        "predict",
        "CHECKPOINT INPUT --out OUT",
        "Segment CTs; masks lie on exactly the CTs' grids. OUT/<case>/ gets labels.nii.gz with labels.json (which "
        "value is which organ) or, with --per_organ, segmentations/<Organ>.nii.gz; with --dicom also seg.dcm and "
        "rtstruct.dcm, in the CT's study and frame of reference; statistics.json (per organ volume, centre, extent, "
        "confidence, and what a person should look at); qc.png to look at; and prediction.json, which says what it was "
        "made with. OUT/statistics.csv has all cases. Several processes may share a cohort, by torchrun or each with "
        "--continue.",
        [
            "RUN/best.pt CTS --out OUT",
            "RUN/best.pt CTS --out OUT --continue --format nrrd",
            "RUN/best.pt patient.nii.gz --out OUT --per_organ --device cpu",
            "RUN/best.pt DICOM_FOLDER --out OUT --dicom",
        ],
    )
    parser.add_argument("checkpoint", type=Path, help="best.pt of a training run")
    parser.add_argument("input", type=Path, help="an image file, a folder of images or of cases, or a DICOM folder")
    parser.add_argument(
        "--out", type=Path, required=True, help="one folder per case: label map, statistics, QC picture"
    )
    parser.add_argument(
        "--continue",
        action="store_true",
        help="leave predictions that are there already, of the same CT with the same checkpoint and options",
    )
    parser.add_argument(
        "--format", type=Format, default="nii.gz", help="nii.gz; or nrrd, for 3D Slicer, with names and colours"
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
    return parser


def _job(arguments: Namespace) -> Job:
    device = _device_of_rank(arguments.device)
    model, digest = _load(arguments.checkpoint, device, arguments.backend)
    options = {field.name: arguments[field.name] for field in dataclasses.fields(model.config.predict)}
    model = dataclasses.replace(model, config=_with_options(model.config, options))
    model.network.eval()
    outputs = Outputs(arguments.format, arguments.per_organ, arguments.dicom)
    return Job(model, arguments.checkpoint, arguments.out, device, outputs, digest)


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, or 2 if a CT could not be segmented."""
    arguments = parse(_parser(), argv)
    job = _job(arguments)
    inputs, empty = find_inputs(arguments.input)
    if arguments.dicom:
        _check_dicom(inputs)
    for name in inputs:
        if not (job.out / name / STATISTICS).exists():
            check_replaceable(job.out / name, *_PREDICTION)  # before hours of work
    check_writable(job.out)
    processes, speaks = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("RANK", "0") == "0"
    if speaks:
        if empty:
            print(f"note: no CT in {', '.join(empty)}", file=sys.stderr)
        print(_describe(job))
    with Cohort(job.out, shared=processes > 1) as cohort:
        # processes that share a cohort have to know each other's predictions by what is there
        kept, failures = _predict_all(job, cohort, inputs, keep=arguments["continue"] or processes > 1, bar=speaks)
    if not speaks:
        return 0
    write_cohort(job.out)
    segmented = len(inputs) - len(failures) - kept
    print(f"segmented {segmented} of {len(inputs)} CTs into {job.out}" + f"; {kept} were there already" * bool(kept))
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return EXIT_ERROR if failures else 0


if __name__ == "__main__":
    run(main)
