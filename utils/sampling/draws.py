"""Random numbers of sampling, addressed by (seed, image, token, step)."""

from collections.abc import Callable

import torch
from torch import Tensor

from utils.noise import Purpose, normals


def image_noise(
    seed: int, images: Tensor, num_noise: int, channels: int, draw: Callable = normals
) -> Callable[[int, int], Tensor]:
    """The noise of a batch of images (B,) for `generate_tokens`: (token, rows) -> (num_noise, rows, C)."""
    steps = torch.arange(num_noise, device=images.device)[:, None]

    def noise(token: int, rows: int) -> Tensor:
        token = torch.full((), token, device=images.device)  # a tensor: a compiled `draw` is compiled once
        purposes = (Purpose.SAMPLING, Purpose.SAMPLING_NULL)[: rows // len(images)]
        return torch.cat(
            [draw(seed, purpose, images, steps, token, count=channels, device=images.device) for purpose in purposes], 1
        )

    return noise
