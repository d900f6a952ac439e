"""`python -m focusnet.plan`, and `train --memory`."""

import math
from dataclasses import replace

import pytest
import torch
from test_memory import steps

from focusnet.checkpoint import load_checkpoint
from focusnet.config import Config, DataConfig
from focusnet.errors import FocusNetError
from focusnet.plan import _counts, main
from focusnet.stages import STAGES
from focusnet.train import start_training
from tests.tiny import tiny_config, write_data


def test_command(capsys) -> None:
    assert main(["--shape", "160", "512", "512", "--config", "demo", "--small", "1"]) == 0
    printed = capsys.readouterr().out
    assert "9 organs, 1 of them small with an ROI of (8, 64, 64); float32" in printed
    assert all(name in printed for name in [*STAGES, "predict", "160 x 512 x 512", "24 x 40 x 40"])
    with pytest.raises(FocusNetError, match=r"--shape \(1, 512, 512\)"):
        main(["--shape", "1", "512", "512"])
    with pytest.raises(FocusNetError, match="9 organs, 10 of them small: expected"):
        main(["--shape", "8", "16", "16", "--organs", "9", "--small", "10"])
    with pytest.raises(FocusNetError, match="--device tpu"):
        main(["--shape", "8", "16", "16", "--device", "tpu"])


@pytest.mark.parametrize(
    ("data", "asked", "counts"),
    [
        ({}, (None, None), (9, 3)),
        ({"small_organs": []}, (None, None), (9, 0)),
        ({"organs": ["Brainstem", "Parotid_L"]}, (None, None), (2, 2)),
        ({"organs": ["Brainstem", "Lens_L"], "small_organs": ["Lens_L"]}, (None, None), (2, 1)),
        ({}, (2, None), (2, 2)),
        ({}, (None, 12), (12, 12)),
    ],
)
def test_numbers_of_organs(data: dict, asked: tuple, counts: tuple[int, int]) -> None:
    assert _counts(Config(data=DataConfig(**data)), *asked) == counts


def test_command_for_the_largest_volume(capsys, monkeypatch) -> None:
    monkeypatch.setattr("focusnet.plan.peaks_of", steps(snet=1000, sol=500, sos=500, joint=2000))
    arguments = ["--shape", "160", "512", "512", "--train.batch_size", "1", "--memory"]
    assert main([*arguments, "80"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "160 x 512 x 512 41.94 / 125.83 20.97 / 62.91 20.97 / 62.91 83.89 / 251.66 6.29 / 6.29" in printed
    assert "joint 152 x 486 x 486 105 x 336 x 336" in printed  # 72 GB for 2000 and 6000 bytes a voxel
    assert "--train.crop [152,486,486] fits all of it, up to 160 x 512 x 512" in printed
    assert main([*arguments, "100"]) == 0
    assert "--train.crop [160,512,512] fits" in capsys.readouterr().out
    assert main([*arguments, "0.001"]) == 0
    assert "no crop fits all of it" in capsys.readouterr().out


def test_train_takes_the_largest_crop(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("focusnet.memory.peaks_of", steps(snet=1000, sol=500, sos=500, joint=2000))
    config = tiny_config(steps_per_epoch=1)
    for stage in STAGES:
        getattr(config.train, stage).epochs = int(stage == "snet")
    data, out = write_data(tmp_path / "data"), tmp_path / "run"
    folders = {"cache": tmp_path / "cache", "device": torch.device("cpu")}
    start_training(data, out, config, memory="0.008", **folders)
    found = load_checkpoint(out / "best.pt", torch.device("cpu"))[0].config.train.crop
    assert 1000 * math.prod(found) <= 0.9 * 8e6 and found != config.train.crop == (8, 16, 16)
    assert f"train.crop is {found}, the largest that fits" in capsys.readouterr().out
    resumed = replace(config, train=replace(config.train, crop=found))
    start_training(data, out, resumed, memory="0.001", resume=True, **folders)
    assert "is complete" in capsys.readouterr().out
