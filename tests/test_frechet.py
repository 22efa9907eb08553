"""Fréchet distance and Inception Score: identities, and the published protocol's formulas."""

import numpy as np
import pytest
import torch

from tests.helpers.evaluation import features, published_frechet, published_score, statistics
from utils.evaluation.frechet import INCEPTION_SCORE_BLOCK, InceptionScore, Moments, frechet_distance


def inception_score(logits, block=INCEPTION_SCORE_BLOCK):
    score = InceptionScore(block)
    score.add(logits)
    return score.value()


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


def test_a_distance_is_not_negative():
    """Equal statistics in many sizes: some of these differences round to below 0."""
    for count, dim in ((400, 300), (300, 100), (60, 100), (5, 50)):
        for seed in range(5):
            mean, covariance = statistics(features(count, dim, seed=seed))
            assert 0 <= frechet_distance(mean, covariance, mean, covariance) < 1e-12


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
