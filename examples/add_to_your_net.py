"""Ten lines that put `focuskernels` into a 3D network that you have already.

`PlainUNet` stands for yours: convolutions, `InstanceNorm3d`, `LeakyReLU`. `fuse_norm_act` swaps each norm and its
activation for one fused module on the same parameters, so that old checkpoints load and the output stays the same;
`FocalDiceLoss` takes the logits and integer labels as they are, without softmax or one-hot copies. `python -m bench`
measures what each saves. Run it: `python examples/add_to_your_net.py`.
"""

import torch
from torch import Tensor, nn

from focuskernels.integrations import fuse_norm_act
from focuskernels.nn import FocalDiceLoss


def block(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    """Convolution, norm, activation."""
    conv = nn.Conv3d(channels, out, 3, stride, padding=1)
    return nn.Sequential(conv, nn.InstanceNorm3d(out, affine=True), nn.LeakyReLU(inplace=True))


class PlainUNet(nn.Module):
    """A U-Net with one downsampling: (N, 1, D, H, W), sizes even -> logits (N, classes, D, H, W)."""

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        self.encoder = block(1, width)
        self.bottom = nn.Sequential(block(width, 2 * width, 2), block(2 * width, width))
        self.decoder = nn.Sequential(block(2 * width, width), nn.Conv3d(width, classes, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Segment."""
        skip = self.encoder(image)
        up = nn.functional.interpolate(self.bottom(skip), scale_factor=2, mode="trilinear")
        return self.decoder(torch.cat([skip, up], dim=1))


def train(steps: int = 60, size: int = 24) -> list[float]:
    """Learn to find a bright cube; returns the loss of every step."""
    torch.manual_seed(0)
    labels = torch.zeros(2, size, size, size, dtype=torch.uint8)
    labels[:, 4:12, 6:14, 8:16] = 1
    image = labels[:, None] + 0.3 * torch.randn(2, 1, size, size, size)

    network = fuse_norm_act(PlainUNet(classes=2))
    loss_function = FocalDiceLoss(gamma=2.0, include_background=False)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_function(network(image), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    history = train()
    print(f"loss {history[0]:.3f} -> {history[-1]:.3f}")
