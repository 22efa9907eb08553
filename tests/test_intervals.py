"""Intervals of metrics and their extrapolation: known answers, and the coverage on Gaussians."""

import pytest
import torch

from utils.evaluation.frechet import Moments, frechet_distance
from utils.evaluation.intervals import extrapolate, half_widths


def gaussians(count, dim, seed):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def fid(x, y):
    """Fréchet distance of features (N, D) and (M, D)."""
    statistics = []
    for features in (x, y):
        moments = Moments.zeros(features.shape[1])
        moments.add(features)
        statistics += moments.mean_and_covariance()
    return frechet_distance(*statistics)


def mean(x):
    return {"mean": x.mean().item()}


def test_the_interval_of_a_mean_is_the_known_one():
    x = gaussians(400, 1, seed=1)
    width = half_widths(mean, x, seed=2, resamples=4000)["mean"]
    assert width == pytest.approx(1.96 * x.std().item() / 20, rel=0.05)


def test_level_and_seed():
    x = gaussians(400, 1, seed=1)
    width = half_widths(mean, x, seed=2)["mean"]
    assert half_widths(mean, x, seed=2)["mean"] == width != half_widths(mean, x, seed=3)["mean"]
    one = half_widths(mean, x, seed=2, level=0.6826895)["mean"]  # one standard deviation
    assert width / one == pytest.approx(1.959964, rel=1e-6)


def test_every_metric_sees_the_same_halves_and_no_row_twice():
    rows = torch.arange(100.0)
    widths = half_widths(
        lambda x: {"share": len(x.unique()) / len(x), "sum": x.sum().item(), "twice": 2 * x.sum().item()},
        rows,
        seed=0,
    )
    assert widths["share"] == 0 and widths["twice"] == pytest.approx(2 * widths["sum"]) and widths["sum"] > 0


def test_coverage_of_the_frechet_distance():
    reference, trials = gaussians(300, 4, seed=0), range(1, 81)
    samples = [gaussians(300, 4, seed=seed) + 0.25 for seed in trials]
    expected = sum(fid(x, reference) for x in samples) / len(samples)
    covered = 0
    for seed, x in zip(trials, samples):
        width = half_widths(lambda half: {"FID": fid(half, reference)}, x, seed=seed, resamples=40)["FID"]
        covered += abs(fid(x, reference) - expected) <= width
    assert 0.9 <= covered / len(trials) <= 0.99


def test_extrapolation_of_a_line_is_exact():
    counts = [100, 200, 400, 1000]
    assert extrapolate(counts, [3 + 50 / n for n in counts]) == pytest.approx(3)


def test_extrapolation_removes_the_bias_of_the_frechet_distance():
    x, reference = gaussians(4000, 16, seed=1), gaussians(100_000, 16, seed=2)
    counts = [500, 1000, 2000, 4000]
    values = [fid(x[:n], reference) for n in counts]  # of the same distribution: the truth is 0
    assert values[-1] > 0.02
    assert abs(extrapolate(counts, values)) < 0.2 * values[-1]


def test_what_has_no_interval_or_line():
    x = gaussians(10, 1, seed=1)
    with pytest.raises(ValueError, match="1 row in the sample: an interval needs at least 2"):
        half_widths(mean, x[:1], seed=0)
    with pytest.raises(ValueError, match="resamples 1 must be at least 2"):
        half_widths(mean, x, seed=0, resamples=1)
    for level in (0, 1):
        with pytest.raises(ValueError, match=f"level {level} must be between 0 and 1"):
            half_widths(mean, x, seed=0, level=level)
    with pytest.raises(ValueError, match="2 counts but 1 values"):
        extrapolate([1, 2], [3.0])
    for counts in ([5, 5], [0, 5]):
        with pytest.raises(ValueError, match="a line needs at least 2 different ones, all at least 1"):
            extrapolate(counts, [1.0, 2.0])
