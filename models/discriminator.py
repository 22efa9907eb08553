"""The 70x70 PatchGAN of pix2pix (Isola et al. 2017): one logit per overlapping 70x70 patch."""

import torch
from torch import nn

from models.losses import discriminator_loss

WIDTHS = 64, 128, 256, 512
STRIDES = 2, 2, 2, 1


class PatchDiscriminator(nn.Module):
    """Images (B, 3, S, S) in [-1, 1] -> logits (B, 1, s, s); s = 30 at S = 256. Needs S >= 32.

    The norms always use the statistics of their batch (the discriminator exists only in training), so no running ones
    are kept. Initialised N(0, 0.02) as in pix2pix: the norms' gains around 1, their biases 0; the convolutions' biases
    keep PyTorch's default, as in the released code.
    """

    def __init__(self):
        super().__init__()
        layers, inputs = [], 3
        for i, (width, stride) in enumerate(zip(WIDTHS, STRIDES)):
            layers.append(nn.Conv2d(inputs, width, 4, stride, padding=1, bias=i == 0))
            if i > 0:
                layers.append(nn.BatchNorm2d(width, track_running_stats=False))
            layers.append(nn.LeakyReLU(0.2))
            inputs = width
        self.net = nn.Sequential(*layers, nn.Conv2d(inputs, 1, 4, padding=1))
        for module in self.net:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images)


class Adversary(nn.Module):
    """The discriminator's training graph: both its batches in one call, each normed by its own statistics."""

    def __init__(self, discriminator: PatchDiscriminator):
        super().__init__()
        self.discriminator = discriminator

    def forward(self, images: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
        return discriminator_loss(self.discriminator(images), self.discriminator(reconstruction))
