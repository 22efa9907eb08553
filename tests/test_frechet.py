"""Metrics on feature arrays: identities, the published protocol's formulas, TensorFlow's float16 distances."""

import numpy as np
import pytest
import scipy.linalg
import torch

from utils.evaluation import precision_recall as pr
from utils.evaluation.frechet import Moments, frechet_distance, inception_score
from utils.evaluation.precision_recall import precision_recall, radii, squared_distances


def features(count, dim, seed=0, shift=0.0):
    """Rectified correlated Gaussians, float32 (count, dim), of the size of Inception's pool features."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(dim, dim)) / np.sqrt(dim) * np.exp(-np.arange(dim) / dim * 3)
    return np.maximum(rng.normal(size=(count, dim)) @ mixing.T + 0.3 + shift, 0).astype(np.float32)


def statistics(x):
    return x.astype(np.float64).mean(axis=0), np.cov(x.astype(np.float64), rowvar=False)


def published_frechet(mu1, sigma1, mu2, sigma2):
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    return np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root).real


def test_moments_in_pieces_equal_numpys_covariance():
    x = features(500, 40) + 3
    moments = Moments.zeros(40)
    for piece in torch.from_numpy(x).split(64):
        moments.add(piece)
    mean, covariance = moments.mean_and_covariance()
    expected_mean, expected = statistics(x)
    assert np.abs(mean - expected_mean).max() < 1e-13
    assert np.abs(covariance - expected).max() < 6e-14 * np.abs(x).max() ** 2
    with pytest.raises(ValueError, match="at least 2 images, got 0"):
        Moments.zeros(4).mean_and_covariance()


@pytest.mark.parametrize("count", [400, 60])  # more than dimensions, and fewer
def test_equal_covariances_give_the_distance_of_means(count):
    mean, covariance = statistics(features(count, 100))
    shift = np.random.default_rng(1).normal(size=100)
    assert frechet_distance(mean + shift, covariance, mean, covariance) == pytest.approx(shift @ shift, rel=1e-8)
    assert abs(frechet_distance(mean, covariance, mean, covariance)) < 1e-8


def test_known_gaussians():
    a, b = np.random.default_rng(0).uniform(0.1, 2, (2, 30))
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(30, 30)))[0]
    first, second = (rotation * a) @ rotation.T, (rotation * b) @ rotation.T
    expected = 4 * 30 + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert frechet_distance(np.zeros(30), first, np.full(30, 2.0), second) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("count", "other"), [(30, 20), (30, 500), (500, 30)])
def test_few_images_give_the_nuclear_norm(count, other):
    x, y = features(count, 100), features(other, 100, seed=1, shift=0.1)
    (mu1, sigma1), (mu2, sigma2) = statistics(x), statistics(y)
    factors = (x - mu1) @ (y - mu2).T / np.sqrt((count - 1) * (other - 1))
    expected = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.linalg.norm(factors, "nuc")
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("count", "tolerance"), [(600, 1e-10), (50, 1e-6)])
def test_the_published_formula(count, tolerance):
    first, second = statistics(features(count, 200)), statistics(features(count, 200, seed=1, shift=0.05))
    expected = published_frechet(*first, *second)
    assert frechet_distance(*first, *second) == pytest.approx(expected, rel=tolerance)
    assert frechet_distance(*second, *first) == pytest.approx(expected, rel=tolerance)


def published_score(logits, block):
    p = torch.softmax(logits.double(), dim=1).numpy()
    parts = [p[start : start + block] for start in range(0, len(p), block)]
    return np.mean([np.exp((q * (np.log(q) - np.log(q.mean(axis=0)))).sum(axis=1).mean()) for q in parts])


def test_inception_score_is_the_published_one_with_a_short_last_block():
    logits = torch.randn(230, 50, generator=torch.Generator().manual_seed(0)) * 3
    assert inception_score(logits, block=100) == pytest.approx(published_score(logits, 100), rel=1e-12)
    assert inception_score(logits) == pytest.approx(published_score(logits, 5000), rel=1e-12)


def test_inception_score_of_known_predictions():
    certain = torch.eye(8).repeat(10, 1) * 400  # float32 softmax would give zeros, and 0 * log 0
    assert inception_score(certain) == pytest.approx(8)
    assert inception_score(torch.zeros(20, 8)) == pytest.approx(1)


def test_inception_score_depends_on_the_order_and_fid_does_not():
    logits = torch.eye(8).repeat(10, 1) * 400
    in_classes = logits[logits.argmax(dim=1).argsort()]
    assert inception_score(in_classes, block=10) == pytest.approx(1)
    assert inception_score(logits, block=10) > 7
    x = torch.from_numpy(features(200, 30))
    forward, backward = Moments.zeros(30), Moments.zeros(30)
    forward.add(x)
    backward.add(x.flip(0))
    other = statistics(features(200, 30, seed=1))
    a, b = (frechet_distance(*moments.mean_and_covariance(), *other) for moments in (forward, backward))
    assert a == pytest.approx(b, rel=1e-10)


# Precision and recall


def brute_force(reference, samples):
    """The definition in float64, on numpy arrays."""
    x, y = reference.astype(np.float64), samples.astype(np.float64)

    def distances(a, b):
        return np.square(a[:, None] - b[None]).sum(axis=2)

    balls_x, balls_y = np.sort(distances(x, x), axis=1)[:, 3], np.sort(distances(y, y), axis=1)[:, 3]
    between = distances(x, y)
    return (between <= balls_x[:, None]).any(axis=0).mean(), (between <= balls_y).any(axis=1).mean()


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


def test_float16_is_tensorflows_within_a_thousandth():
    x, y = features(2000, 2048), features(2000, 2048, seed=1, shift=0.02)
    expected = published_precision_recall(x, y)
    assert 0.05 < expected[0] < 0.98 and 0.05 < expected[1] < 0.98
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    assert precision_recall(x, y) == pytest.approx(expected, abs=1e-3)
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
