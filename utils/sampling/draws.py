"""What is drawn at random for image i: its label and its noise, addressed by seed and i alone (see utils.noise)."""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from utils.noise import Purpose, normals, words


def make_labels(kind: str, count: int, num_classes: int, seed: int, class_ids: list[int] | None = None) -> np.ndarray:
    """The class of every image, int64 (count,).

    kind: "random" (uniform, the published protocol) or "balanced" (equally many of each class, shuffled); with
    class_ids only those, in turn. ValueError names a class id that the model does not have.
    """
    if class_ids is not None:
        wrong = [label for label in class_ids if not 0 <= label < num_classes]
        if wrong:
            raise ValueError(f"--class-ids {wrong[0]} must lie in 0 to {num_classes - 1}")
        return np.resize(np.array(class_ids), count)
    drawn = words(seed, Purpose.LABELS, torch.arange(count), count=2).numpy()
    if kind == "random":
        return drawn[:, 0] * num_classes >> 32
    labels = np.empty(count, np.int64)
    labels[np.lexsort(drawn.T)] = np.arange(count) % num_classes
    return labels


def image_noise(
    seed: int, images: Tensor, num_noise: int, channels: int, draw: Callable[..., Tensor] = normals
) -> Callable[[int, int], Tensor]:
    """The noise source of a batch for `generate_tokens`: every value addressed by (seed, image, token, step).

    images: their indices (B,), on the device where the noise is wanted; num_noise: tensors per token.
    """
    steps = torch.arange(num_noise, device=images.device)[:, None]

    def noise(token: int, rows: int) -> Tensor:  # (num_noise, rows, C)
        token = torch.full((), token, device=images.device)  # a tensor: a compiled `draw` is compiled once
        purposes = (Purpose.SAMPLING, Purpose.SAMPLING_NULL)[: rows // len(images)]
        return torch.cat(
            [draw(seed, purpose, images, steps, token, count=channels, device=images.device) for purpose in purposes], 1
        )

    return noise


@cache
def compiled_normals() -> Callable[..., Tensor]:
    """`normals`, compiled: the same bits."""
    return torch.compile(normals, dynamic=False)
