"""S-Net, the segmentation network of FocusNet, trained and run with MONAI's transforms and `SlidingWindowInferer`.

`Segmenter` returns the logits alone, as MONAI expects; its weights have the names of `focusnet.model.SNet`.
The CT is a synthetic head (`focusnet.phantom`), so that the example needs no data and a minute on a CPU. It shows how
the parts fit, not how well they segment: after that minute the Dice score of the unseen phantom is low, 0.03 to 0.23,
and more steps alone did not raise it. For your CTs, put `LoadImaged` in front of the transforms. To have small organs
found by FocusNet's own branches, train with `python -m focusnet.train`. Needs `pip install '.[focusnet]' monai`.
Run it: `python examples/monai_sliding_window.py`.
"""

import numpy as np
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.metrics import DiceMetric
from monai.networks import one_hot
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    RandCropByLabelClassesd,
    RandScaleIntensityd,
    ScaleIntensityRanged,
)
from torch import Tensor

from focuskernels.integrations.monai import DiceCELoss
from focusnet.config import ModelConfig
from focusnet.model import SNet
from focusnet.phantom import make_phantom

ORGANS = ("Brainstem", "Bone_Mandible", "Eye_L", "Eye_R")
CLASSES = len(ORGANS) + 1
SMALL = ModelConfig(
    widths=[[8], [12, 16]],
    dilated_blocks=1,
    aspp_dilations=[(1, 2, 2), (1, 4, 4)],
    aspp_growth=8,
    aspp_bottleneck=16,
    norm="instance",
)


class Segmenter(SNet):
    """S-Net as MONAI expects a network: image (N, 1, D, H, W) -> logits (N, classes, D, H, W)."""

    def forward(self, image: Tensor) -> Tensor:
        """Segment."""
        return super().forward(image).logits


def phantom(index: int, spacing: tuple[float, float, float]) -> dict[str, np.ndarray]:
    """A CT in HU and its label map, both (D, H, W)."""
    volume, masks = make_phantom(index, seed=1, spacing=spacing, field_of_view="head", organs=ORGANS)
    label = np.zeros(volume.array.shape, dtype=np.uint8)
    for value, organ in enumerate(ORGANS, start=1):
        label[masks[organ]] = value
    return {"image": volume.array.astype(np.float32), "label": label}


def main(
    steps: int = 120,
    crop: tuple[int, int, int] = (16, 24, 24),
    spacing: tuple[float, float, float] = (5.0, 4.0, 4.0),
) -> tuple[MetaTensor, Tensor]:
    """Train on two phantoms, segment a third; returns its logits (1, classes, D, H, W) and the dice of every organ."""
    torch.manual_seed(0)
    prepare = [
        EnsureChannelFirstd(["image", "label"], channel_dim="no_channel"),
        ScaleIntensityRanged("image", -1024, 1024, -1, 1, clip=True),
        EnsureTyped(["image", "label"]),
    ]
    sample = [
        RandCropByLabelClassesd(["image", "label"], "label", crop, num_classes=CLASSES, num_samples=2),
        RandScaleIntensityd("image", 0.1, prob=0.5),
    ]
    training = Dataset([phantom(0, spacing), phantom(1, spacing)], Compose([*prepare, *sample]).set_random_state(0))

    network = Segmenter(SMALL, CLASSES)
    loss_function = DiceCELoss(softmax=True, to_onehot_y=True, batch=True)
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        for batch in DataLoader(training, batch_size=2):
            optimizer.zero_grad()
            loss_function(network(batch["image"]), batch["label"]).backward()
            optimizer.step()
        schedule.step()

    case = Compose(prepare)(phantom(2, spacing))
    network.eval()
    with torch.no_grad():
        logits = SlidingWindowInferer(crop, sw_batch_size=2, overlap=0.25, mode="gaussian")(
            case["image"][None], network
        )
    dice = DiceMetric(include_background=False)(
        one_hot(logits.argmax(1, keepdim=True), CLASSES), one_hot(case["label"][None], CLASSES)
    )
    return logits, dice[0]


if __name__ == "__main__":
    _, found = main()
    for organ, value in zip(ORGANS, found.tolist(), strict=True):
        print(f"{organ:14} DSC {value:.3f}")
