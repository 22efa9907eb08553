"""Precision and recall: the definition, and TensorFlow's float16 distances."""

import numpy as np
import pytest
import torch

from tests.helpers.evaluation import brute_force, features
from utils.evaluation import precision_recall as pr
from utils.evaluation.precision_recall import precision_recall, radii, squared_distances, squared_norms_in_half


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(pr, "BLOCK", 40)
    monkeypatch.setattr(pr, "STRIP", 16)
    monkeypatch.setattr(pr, "TILE", 40)


def test_float32_is_the_definition_and_blocks_do_not_matter(monkeypatch):
    x, y = features(150, 12), features(130, 12, seed=1, shift=0.1)
    expected = brute_force(x, y)
    assert 0.1 < expected[0] < 1 and 0.1 < expected[1] < 1
    for block, strip, tile in ((10_000, 1_000, 2_000), (40, 16, 9), (7, 7, 7)):
        monkeypatch.setattr(pr, "BLOCK", block)
        monkeypatch.setattr(pr, "STRIP", strip)
        monkeypatch.setattr(pr, "TILE", tile)
        assert precision_recall(torch.from_numpy(x), torch.from_numpy(y), half=False) == pytest.approx(expected)


def test_equal_sets_are_inside_each_other_and_far_ones_are_not(small_blocks):
    x = torch.from_numpy(features(100, 20))
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x.flip(0), half=False) == (1, 1)
    assert precision_recall(x, x + 50) == (0, 0)
    with pytest.raises(ValueError, match="at least 4 sample images, got 3"):
        precision_recall(x, x[:3])


def test_the_border_of_a_ball_belongs_to_it():
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0]])  # the ball of 3 reaches to 0 and 6, that of 8 to 5
    samples = torch.tensor([[6.0], [6.5], [7.0], [8.0]])
    assert precision_recall(line, samples) == (1 / 4, 0)
    assert precision_recall(samples, line) == (0, 1 / 4)


def tensorflow_distances(u, v):
    """The published block: float16, and float32 for all of it when a value is not finite."""
    import tensorflow as tf

    def distances(u, v):
        product = tf.matmul(u, v, transpose_b=True)
        norm_u, norm_v = tf.reduce_sum(tf.square(u), axis=1), tf.reduce_sum(tf.square(v), axis=1)
        return tf.maximum(norm_u[:, None] - 2 * product + norm_v[None], 0)

    half = distances(tf.cast(u, tf.float16), tf.cast(v, tf.float16))
    finite = bool(tf.reduce_all(tf.math.is_finite(half)))
    return (tf.cast(half, tf.float32) if finite else distances(tf.constant(u), tf.constant(v))).numpy()


def published_precision_recall(reference, samples):
    def balls(x):
        return np.partition(tensorflow_distances(x, x), 3, axis=1)[:, 3]

    between = tensorflow_distances(reference, samples)
    inside_reference, inside_samples = between <= balls(reference)[:, None], between <= balls(samples)
    return inside_reference.any(axis=0).mean(), inside_samples.any(axis=1).mean()


def test_squared_norms_are_tensorflows_bit_for_bit():
    import tensorflow as tf

    for scale in (0.1, 1, 5):
        x = features(500, 2048) * np.float32(scale)
        expected = tf.reduce_sum(tf.square(tf.cast(x, tf.float16)), axis=1).numpy()
        assert np.array_equal(squared_norms_in_half(torch.from_numpy(x).half()).numpy(), expected)


@pytest.mark.parametrize(("counts", "shift"), [((2000, 2000), 0.02), ((2500, 1500), 0.01)])
def test_float16_is_tensorflows_to_one_image(counts, shift):
    x, y = features(counts[0], 2048), features(counts[1], 2048, seed=1, shift=shift)
    expected = published_precision_recall(x, y)
    assert 0.05 < expected[0] < 0.98 and 0.05 < expected[1] < 0.98
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    assert precision_recall(x, y) == pytest.approx(expected, abs=1.001 / min(counts))
    assert precision_recall(x.half(), y.half()) == precision_recall(x, y)
    assert precision_recall(x, y, half=False) != pytest.approx(expected, abs=1e-3)  # the rounding is what matters


def test_float16_rounds_and_falls_back_to_float32_where_it_overflows():
    x = features(300, 64)
    rounded = squared_distances(torch.from_numpy(x), torch.from_numpy(x), half=True)
    assert torch.equal(rounded, rounded.half().float())
    for scale in (1, 60, 1000):  # well inside, partly beyond and far beyond the range of float16
        expected = np.partition(tensorflow_distances(x * scale, x * scale), 3, axis=1)[:, 3]
        found = radii(torch.from_numpy(x * scale), half=True).numpy()
        assert np.abs(found - expected).max() <= 2e-3 * np.square(x * scale).sum(axis=1).max()


def test_only_the_block_that_overflows_is_in_float32(small_blocks):
    x = torch.from_numpy(features(80, 64))
    x[40:] *= 1000
    in_half = [
        bool(torch.equal(distances, distances.half().float()))
        for _, columns, distances in pr.distance_tiles(x, x, half=True)
        if columns.start == 0
    ]
    assert in_half == [True] * 3 + [False] * 3
