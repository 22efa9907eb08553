"""Distances between images without a network: of their colours on a coarse grid. Cheap, and blind to fine detail.

For many runs on a CPU, beside the metrics of Inception features. Legend: N images, H x W their size, D channels.
"""

import numpy as np
import torch
from torch import Tensor

from utils.evaluation.frechet import Moments, frechet_distance
from utils.evaluation.metrics import SEED
from utils.evaluation.mind import mind

GRID = 16  # 768 numbers per image


def pixel_features(images: np.ndarray) -> Tensor:
    """Mean colours in [0, 1] of 16 x 16 fields, (N, 768) float32, of uint8 images (N, H, W, 3)."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return torch.nn.functional.adaptive_avg_pool2d(pixels, GRID).flatten(1)


def pixel_distances(features: Tensor, reference: Tensor) -> dict[str, float]:
    """Fréchet distance and MIND of pixel features (N, D) to a reference's (M, D)."""
    moments = []
    for values in (features, reference):
        moments.append(Moments.zeros(values.shape[1]))
        moments[-1].add(values)
    frechet = frechet_distance(*moments[0].mean_and_covariance(), *moments[1].mean_and_covariance())
    return {"pixel_frechet": frechet, "pixel_mind": mind(features, reference, seed=SEED)}
