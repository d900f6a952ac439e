"""`python -m focusnet.demo OUT`: phantoms, all stages of training, prediction and evaluation, on a CPU in minutes."""

import time
from pathlib import Path

from rich.rule import Rule

from . import evaluate, phantom, predict, train
from .cli import command_parser, console, parse, run
from .files import check_replaceable

TRAINING_CASES, TEST_CASES = 12, 2
ORGANS = (
    "Brainstem,Bone_Mandible,Eye_L,Eye_R,Parotid_L,Parotid_R,Lens_L,Lens_R,OpticNrv_L,OpticNrv_R,OpticChiasm,Pituitary"
)
PHANTOM = ["--spacing", "[2.5,2.0,2.0]", "--field_of_view", "head", "--organs", f"[{ORGANS}]"]


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = command_parser(
        "demo",
        "OUT",
        "Make phantoms, train all stages on them, segment and score held-out ones.",
        ["demo", "runs/demo"],
    )
    parser.add_argument("out", type=Path, help="folder for everything; a stopped demo goes on where it was")
    out = parse(parser, argv).out
    check_replaceable(out, "demo", *[("phantoms", "run", "cache", "predictions", "evaluation")] * 2)
    try:
        return _demo(out)
    except KeyboardInterrupt:
        print(f"to go on with the demo, repeat it: {parser.prog} {out}")
        raise


def _demo(out: Path) -> int:
    report, started = console(), time.monotonic()
    data, run_folder, predictions = out / "phantoms", out / "run", out / "predictions"
    for name, cases, seed in (("train", TRAINING_CASES, 1), ("test", TEST_CASES, 2)):
        if len(list((data / name).glob("phantom_*"))) < cases:
            report.print(Rule(f"{cases} phantoms: {data / name}"))
            phantom.main([str(data / name), "--cases", str(cases), "--seed", str(seed), "--overwrite", *PHANTOM])
    report.print(Rule("training: S-Net, SOL-Net, SOS-Net, end to end"))
    config = ["--resume"] if (run_folder / "last.pt").exists() else ["--config", "demo"]
    train.main([str(data / "train"), "--out", str(run_folder), "--cache", str(out / "cache"), *config])
    report.print(Rule("prediction and evaluation of phantoms that training never saw"))
    if status := predict.main([str(run_folder / "best.pt"), str(data / "test"), "--out", str(predictions)]):
        return status
    evaluate.main([str(data / "test"), str(predictions), "--out", str(out / "evaluation")])
    report.print(f"\npictures: {predictions}/*/qc.png, table: {out / 'evaluation'}")
    report.print(f"the demo took {(time.monotonic() - started) / 60:.1f} minutes", highlight=False)
    return 0


if __name__ == "__main__":
    run(lambda: main())
