import importlib
import os
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

from focusnet import demo, prepare, train
from focusnet.cli import PRESETS, add_config, command_parser, config_of, parse, pick_device, run
from focusnet.config import _RULES, Config, LossConfig, settings_of
from focusnet.data.organs import canonical_name
from focusnet.data.plan import OrganPlan, Plan
from focusnet.errors import FocusNetError
from focusnet.losses import focal_alpha

# what the installed script does
SCRIPT = "from focusnet.__main__ import main; main()"


def config(*arguments: str) -> Config:
    parser = command_parser("test", "", "A command.", [])
    add_config(parser)
    return config_of(parse(parser, list(arguments)))


def test_default_is_the_paper() -> None:
    assert config() == config("--config", "paper") == Config()


def test_options_override_the_preset() -> None:
    chosen = config("--config", "released", "--model.norm", "group", "--train.snet.epochs", "3")
    assert chosen.model.downsampling == [(1, 2, 2), (2, 2, 2)]
    assert chosen.data.roi_size == (8, 64, 64)
    assert (chosen.model.norm, chosen.train.snet.epochs) == ("group", 3)


@pytest.mark.parametrize("preset", ["paper", "released", "demo", "openkbp"])
def test_config_survives_a_checkpoint(preset: str) -> None:
    chosen = config("--config", preset)
    assert Config.from_dict(chosen.to_dict()) == chosen


def test_options_are_spelled_either_way() -> None:
    assert config("--data.small-voxels=5", "--predict.min-peak", "0.1").data.small_voxels == 5
    assert config("--data.small-organs=[a-b]").data.small_organs == ["a-b"]
    for option in ("--skip-bad", "--skip_bad"):
        with pytest.raises(FocusNetError, match="no-such_folder"):
            prepare.main(["no-such_folder", option])


def test_options_are_not_abbreviated() -> None:
    with pytest.raises(FocusNetError, match="--skip"):
        prepare.main(["no_such_folder", "--skip"])


def test_nothing_to_resume(tmp_path) -> None:
    with pytest.raises(FocusNetError, match=r"last.pt: nothing to resume: leave out --resume$"):
        train.main([str(tmp_path), "--out", str(tmp_path / "run"), "--resume"])


def test_a_file_of_the_users_own(tmp_path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train: {seed: 7}\n")
    assert config("--config", str(file)).train.seed == 7


@pytest.mark.parametrize("command", [train.main, prepare.main])
def test_a_printed_configuration_serves_every_command(command, tmp_path, capsys) -> None:
    options = ["--config", "demo", "--train.seed", "7", "--data.small_voxels", "50", "--print_config"]
    with pytest.raises(SystemExit):
        train.main(["DATA", "--out", "RUN", *options])
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert config("--config", str(file)) == config(*options[:-1])
    required = ["--out", str(tmp_path / "run")] if command is train.main else []
    with pytest.raises(FocusNetError, match="the_positional_one"):
        command([str(tmp_path / "the_positional_one"), *required, "--config", str(file)])


def test_a_configuration_has_settings_alone(tmp_path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("source: elsewhere\ntrain: {seed: 7}\n")
    with pytest.raises(FocusNetError, match=r"mine.yaml has source, expected only data, model, loss, train, predict$"):
        train.main(["DATA", "--out", "RUN", "--config", str(file)])
    file.write_text("train: [")
    with pytest.raises(FocusNetError, match=r"mine.yaml is no YAML") as raised:
        config("--config", str(file))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ": it is null, expected settings"),
        ("train: {}", None),
        ("data: {organs: Brainstem}", ": --data.organs Brainstem: expected a list such as [a,b], or null"),
        ("train: {snet: {epochs: many}}", ": --train.snet.epochs many: expected a whole number"),
        ("predict: {colour: red}", " has predict.colour, expected only overlap, min_peak, largest_component"),
        ("train: {augment: null}", ": train.augment is null, expected settings"),
        ("train: 3", ": train is 3, expected settings"),
        ("[1]", ": it is [1], expected settings"),
    ],
)
def test_a_wrong_setting_of_a_file_names_it(text: str, said: str | None, tmp_path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    if said is None:
        assert config("--config", str(file)) == Config()
        return
    with pytest.raises(FocusNetError) as raised:
        config("--config", str(file), "--data.organs", "[Eye_L]")
    assert str(raised.value) == f"--config {file}{said}"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--train.sed", "3"], "train.sed"),
        (["--model.norm", "layer"], "^--model.norm layer: expected one of batch, instance, group$"),
        (["--data.spacing", "[1,2]"], r"^--data.spacing \[1, 2\]: expected a list such as \[1.5,2.5,3.5\]$"),
        (["--data.organs", "Brainstem"], r"^--data.organs Brainstem: expected a list such as \[a,b\], or null$"),
        (["--data.roi_size", "8"], r"^--data.roi_size 8: expected a list such as \[1,2,3\], or null$"),
        (["--model.widths", "[[32],x]"], r"^--model.widths x: expected a list such as \[\[1,2\],\[1,2\]\]$"),
        (["--train.amp", "maybe"], "^--train.amp maybe: expected true or false$"),
        (["--train", "3"], "^--train: expected settings$"),
        (["--train", "null"], "^--train: expected settings$"),
        (["--train", "{augment: null}"], "^--train.augment null: expected settings$"),
        (["--train.snet", "{epochs: x}"], "^--train.snet.epochs x: expected a whole number$"),
        (["--train.augment", "null"], "^--train.augment: expected settings$"),
        (["--data.organs", "[" * 5000], "data.organs|recursion"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such file; presets are demo, openkbp, paper, released"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], named: str) -> None:
    with pytest.raises(FocusNetError, match=named):
        config(*arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: DATA, --out"),
        (["DATA", "--out"], "--out: expected one argument"),
        (["DATA", "--out", "RUN", "--epochs", "0"], "--epochs: expected a whole number above 0"),
    ],
)
def test_arguments_are_named_as_in_the_usage(arguments: list[str], said: str) -> None:
    with pytest.raises(FocusNetError) as raised:
        train.main(arguments)
    assert str(raised.value) == said


def test_unknown_setting_of_a_checkpoint() -> None:
    values = Config().to_dict()
    values["model"]["colour"] = "red"
    with pytest.raises(FocusNetError, match="colour"):
        Config.from_dict(values)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("data.spacing", "[2.5,0,1]"),
        ("data.hu_range", "[100,-100]"),
        ("data.hu_range", "[0,.inf]"),
        ("data.organs", "[]"),
        ("data.roi_size", "[0,8,8]"),
        ("data.roi_scale", "-1"),
        ("model.widths", "[]"),
        ("model.widths", "[[32]]"),
        ("model.widths", "[[32],[]]"),
        ("model.widths", "[[32],[48,0]]"),
        ("model.downsampling", "[[1,2,0]]"),
        ("model.downsampling", "[[1,2,2],[1,1,1],[1,1,1],[1,1,1],[1,1,1]]"),
        ("model.stem_kernel", "[1,4,3]"),
        ("model.stem_kernel", "[-1,3,3]"),
        ("loss.alpha", "[1,-1]"),
        ("loss.alpha", "[]"),
        ("loss.gamma", "-1"),
        ("loss.heatmap_sigma_mm", "0"),
        ("loss.dice_weight", ".nan"),
        ("train.crop", "[7,16,16]"),
        ("train.batch_size", "0"),
        ("train.steps_per_epoch", "-1"),
        ("train.organ_crops", "1.1"),
        ("train.validation", "1"),
        ("train.validate_every", "0"),
        ("train.seed", "-1"),
        ("train.seed", "9223372036854775808"),
        ("train.augment.zoom", "[0,1,0]"),
        ("train.augment.elastic_grid_mm", "0.001"),
        ("train.snet.epochs", "-1"),
        ("train.sol.lr", "0"),
        ("train.sos.milestones", "[0.5,0.2]"),
        ("train.joint.milestones", "[2]"),
        ("predict.overlap", "1"),
        ("predict.min_peak", "1.5"),
    ],
)
def test_values_out_of_range_are_named(option: str, value: str) -> None:
    with pytest.raises(FocusNetError, match=f"^{option}.*expected"):
        config(f"--{option}", value)


def test_a_crop_must_hold_the_total_stride() -> None:
    strides = ["--model.widths", "[[4],[4],[4],[4]]", "--model.downsampling", "[[1,2,2],[2,2,2],[2,2,2]]"]
    assert config(*strides, "--train.crop", "[8,16,16]").train.crop == (8, 16, 16)
    with pytest.raises(FocusNetError, match=r"train.crop is \(8, 16, 8\), expected at least \(8, 16, 16\)"):
        config(*strides, "--train.crop", "[8,16,8]")


def test_every_numeric_setting_has_a_rule() -> None:
    patterns = [pattern for _, _, patterns in _RULES for pattern in patterns.split()]
    for name, value in settings_of(Config()).items():
        if not isinstance(value, (bool, str)):
            assert any(fnmatchcase(name, pattern) for pattern in patterns) or name == "data.small_organs", name


def test_values_of_a_checkpoint_are_checked_too() -> None:
    values = Config().to_dict()
    values["predict"]["overlap"] = 2.0
    with pytest.raises(FocusNetError, match="predict.overlap is 2.0"):
        Config.from_dict(values)


@pytest.mark.parametrize("command", ["train", "predict", "evaluate", "prepare", "phantom"])
def test_errors_are_one_line_and_status_2(command: str) -> None:
    done = subprocess.run([sys.executable, "-m", f"focusnet.{command}", "--nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["train", "predict", "evaluate", "prepare", "phantom", "demo"])
@pytest.mark.parametrize(
    ("script", "prog"), [("/bin/focusnet", "focusnet {}"), ("/focusnet/x.py", "python -m focusnet.{}")]
)
def test_help_has_examples(command: str, script: str, prog: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(f"focusnet.{command}").main()
    said, prog = capsys.readouterr().out, prog.format(command)
    assert said.startswith(f"usage: {prog} [options] ")
    assert said.partition("\nexamples")[2].count(f"  {prog} ") >= 2


def test_a_stopped_demo_says_how_it_goes_on(tmp_path, monkeypatch, capsys) -> None:
    def stop(argv: list[str]) -> int:
        (tmp_path / "demo" / "phantoms").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.phantom, "main", stop)
    with pytest.raises(KeyboardInterrupt):
        demo.main([str(tmp_path / "demo")])
    assert (
        f"to go on with the demo, repeat it: python -m focusnet.demo {tmp_path / 'demo'}\n" in capsys.readouterr().out
    )
    (tmp_path / "demo" / "notes.txt").touch()
    with pytest.raises(FocusNetError, match=r"demo: it is no demo \(notes.txt\)"):
        demo.main([str(tmp_path / "demo")])


def test_help_of_prepare_has_the_settings_of_data(capsys) -> None:
    with pytest.raises(SystemExit):
        prepare.main(["--help"])
    said = capsys.readouterr().out
    assert "--data.spacing" in said
    assert not re.search(
        r"--(model|loss|train|predict)|squeeze|Prediction|The layout|Weights of the losses", said, re.I
    )


def test_the_script_lists_its_commands() -> None:
    done = subprocess.run([sys.executable, "-m", "focusnet"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("train", "predict", "evaluate", "prepare", "phantom"))
    done = subprocess.run([sys.executable, "-m", "focusnet", "nonsense"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("error: no command nonsense, expected prepare, plan, train, .*demo\n", done.stderr)


@pytest.mark.parametrize("option", [["--config", "demo"], ["--config=demo"]])
def test_only_the_configuration_names_a_preset(option: list[str], tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    parser = command_parser("train", "SOURCE", "Train.", [])
    parser.add_argument("source", type=Path)
    add_config(parser)
    arguments = parse(parser, ["demo", *option])
    assert arguments.source == Path("demo")
    assert config_of(arguments).predict.overlap == 0.25


@pytest.mark.parametrize("name", ["meta", "mps", "cpu:1", "cuda:", "cuda:x", "cuda:-1", "cuda:²", "gpu", "", "xla"])
def test_other_devices_are_refused(name: str) -> None:
    with pytest.raises(FocusNetError, match="expected auto, cpu, cuda or cuda:N"):
        pick_device(name)


def test_a_gpu_must_exist(monkeypatch) -> None:
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(FocusNetError, match="--device cuda:99"):
        pick_device("cuda:99")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FocusNetError, match="--device cuda: PyTorch finds no GPU"):
        pick_device("cuda")
    assert pick_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(FocusNetError, match="there is only cuda:0, cuda:1"):
        pick_device("cuda:2")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "Permission denied", "/out"), "error: /out: Permission denied\n"),
        (OSError("no room"), "error: no room\n"),
        (FocusNetError("wrong [red]"), "error: wrong [red]\n"),
    ],
)
def test_the_operating_systems_errors_are_one_line(error: Exception, line: str, capsys) -> None:
    def fail() -> int:
        raise error

    with pytest.raises(SystemExit) as stopped:
        run(fail)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == line


def test_any_file_name_is_printed() -> None:
    code = "from focusnet.cli import run; run(lambda: print('M\\udcfcller') or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("M\\udcfcller\n", "")


def test_a_closed_pipe_is_silent() -> None:
    code = "import sys; from focusnet.cli import run; run(lambda: print('x' * 100_000) or 0)"
    done = subprocess.run(f'{sys.executable} -c "{code}" | head -c 1', shell=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("x", "")


def test_one_focal_weight_per_class() -> None:
    organ = OrganPlan("Brainstem", 1, 1.0, 1.0, 1.0, (1.0, 1.0, 1.0), False, None, 1.5)
    plan = Plan((1.0, 1.0, 1.0), 0.5, [organ], [], "")
    assert focal_alpha(plan, LossConfig()).tolist() == [0.5, 1.5]
    with pytest.raises(FocusNetError, match="loss.alpha has 3 values, expected 2: background, Brainstem"):
        focal_alpha(plan, LossConfig(alpha=[1.0, 2.0, 3.0]))


@pytest.mark.parametrize("command", [["-m", "focusnet.predict"], ["-m", "focusnet"], ["-c", SCRIPT]])
def test_without_the_extra_it_is_one_line(command: list[str], tmp_path) -> None:
    # a module of None is one that cannot be imported
    (tmp_path / "sitecustomize.py").write_text(
        "import sys; sys.modules['jsonargparse'] = None; sys.modules['rich'] = None"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parent.parent)])}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr == 'error: focusnet needs jsonargparse, rich: pip install "focuskernels[focusnet]"\n'


def test_released_with_the_authors_nine_organs() -> None:
    text = (PRESETS / "released.yaml").read_text()
    options = re.findall(r"^#   (\S+): (.+)$", text, flags=re.MULTILINE)
    chosen = config("--config", "released", *(part for name, value in options for part in (f"--{name}", value)))
    assert chosen.data.organs is not None and chosen.data.small_organs is not None and chosen.loss.alpha is not None
    assert len(chosen.loss.alpha) == len(chosen.data.organs) + 1 == 10
    assert all(canonical_name(name) == name for name in chosen.data.organs)
    assert set(chosen.data.small_organs) <= set(chosen.data.organs)
    assert (chosen.train.joint.epochs, chosen.train.joint.lr) == (0, Config().train.joint.lr)
    assert chosen.train.augment.zoom == Config().train.augment.zoom
    assert chosen.loss.smooth == 1e-5
