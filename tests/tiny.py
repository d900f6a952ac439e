"""A tiny data set with three organs whose intensities give them away, and a configuration to train on it in seconds."""

from pathlib import Path

import numpy as np

from focusnet.config import AugmentConfig, Config, DataConfig, ModelConfig, StageConfig, TrainConfig
from focusnet.data.images import Grid, Volume, write_image, write_labels

SPACING = (3.0, 2.0, 2.0)
GRID = Grid((14, 24, 26), SPACING, (-20.0, 30.0, 5.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
ORGANS = ("Brainstem", "Eye_L", "Eye_R")


def write_case(folder: Path, seed: int, organs=ORGANS, grid: Grid = GRID) -> None:
    """A soft-tissue block in air; the brainstem at 200 HU, the eyes at 400 HU on either side of it."""
    rng = np.random.default_rng(seed)
    image = np.full(grid.shape, -1000, dtype=np.int16)
    image[1:-1, 2:-2, 2:-2] = 0
    z, y, x = rng.integers((4, 8, 10), (8, 14, 14))
    boxes = {
        "Brainstem": (slice(z, z + 4), slice(y, y + 6), slice(x - 2, x + 3)),
        "Eye_R": (slice(z, z + 2), slice(y - 4, y - 1), slice(x - 7, x - 4)),
        "Eye_L": (slice(z, z + 2), slice(y - 4, y - 1), slice(x + 5, x + 8)),
    }
    for name, box in boxes.items():
        image[box] = 200 if name == "Brainstem" else 400
    image[1:-1, 2:-2, 2:-2] += rng.normal(0, 5, image[1:-1, 2:-2, 2:-2].shape).astype(np.int16)
    write_image(folder / "img.nrrd", Volume(image, grid))
    for name in organs:
        mask = np.zeros(grid.shape, dtype=np.uint8)
        mask[boxes[name]] = 1
        write_labels(folder / "structures" / f"{name}.nrrd", mask, grid)


def write_data(root: Path, cases: int = 4) -> Path:
    """`cases` cases in the PDDCA layout; the second lacks an organ's contour."""
    for index in range(cases):
        write_case(root / f"case_{index}", index, ORGANS[:2] if index == 1 else ORGANS)
    return root


def tiny_config(**train) -> Config:
    stage = {"epochs": 2, "optimizer": "adam", "lr": 1e-2, "warmup": 0, "weight_decay": 0.0}
    settings = {
        "crop": (8, 16, 16),
        "steps_per_epoch": 3,
        "validation": 0.25,
        "validate_every": 2,
        "workers": 0,
        "augment": AugmentConfig(rotation_deg=(5.0, 0.0, 0.0), zoom=(0.0, 0.0, 0.1), mirror=True),
        "snet": StageConfig(**stage),
        "sol": StageConfig(**stage),
        "sos": StageConfig(**stage),
        "joint": StageConfig(**stage),
        **train,
    }
    return Config(
        data=DataConfig(spacing=SPACING, small_organs=["Eye_L", "Eye_R"], body_margin_mm=4.0),
        model=ModelConfig(
            widths=[[4], [6, 8]],
            dilated_blocks=1,
            aspp_dilations=[(1, 2, 2)],
            aspp_growth=4,
            aspp_bottleneck=6,
            norm="instance",
            sos_width=4,
        ),
        train=TrainConfig(**settings),
    )
