"""Distances without a network, on known answers."""

import numpy as np
import pytest
import torch

from tests.helpers.evaluation import random_images
from utils.evaluation.pixels import pixel_distances, pixel_features


def test_pixel_features_are_the_mean_colours_of_fields():
    images = random_images(3, 32).numpy()
    fields = images.reshape(3, 16, 2, 16, 2, 3).mean(axis=(2, 4)) / 255
    assert np.allclose(pixel_features(images).unflatten(1, (3, 16, 16)).permute(0, 2, 3, 1), fields, atol=1e-6)
    assert pixel_features(random_images(2, 17).numpy()).shape == (2, 768)


def test_distances_of_equal_and_of_shifted_features():
    features = torch.rand(200, 6, generator=torch.Generator().manual_seed(0))
    assert list(pixel_distances(features, features).values()) == [pytest.approx(0, abs=1e-12), 0]
    shift = torch.tensor([0.5, 0, 0, 0, 0, 0])
    frechet, mind = pixel_distances(features + shift, features).values()
    assert frechet == pytest.approx(0.25, rel=1e-4)
    assert mind == pytest.approx(3 * 0.25, rel=0.1)  # 3 D times the mean over directions of the shift's square
