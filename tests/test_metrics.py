"""All metrics, the floor of real images and the intervals, on small features whose answers are computed by hand."""

import numpy as np
import pytest
import torch

from tests.helpers.evaluation import features, random_images
from utils.evaluation import metrics
from utils.evaluation.batches import Batches
from utils.evaluation.extraction import Evaluated
from utils.evaluation.features import Features, statistics_of
from utils.evaluation.frechet import frechet_distance
from utils.evaluation.intervals import half_widths
from utils.evaluation.metrics import Reference, all_metrics, as_reference, fid_at_infinity, floor, intervals
from utils.evaluation.mind import mind
from utils.evaluation.precision_recall import precision_recall

CPU = torch.device("cpu")


def evaluated(count: int, seed: int = 0, shift: float = 0.0, name: str = "reference") -> Evaluated:
    """Images with features of 16 channels."""
    file = Batches([random_images(1, 8).numpy()], name)
    file.count = count
    pool, spatial = (torch.from_numpy(features(count, 16, seed=seed + 50 * i, shift=shift)) for i in range(2))
    return Evaluated(file, Features(pool, {**statistics_of(pool), **statistics_of(spatial, "_s")}, spatial), "0")


def frechet(x: torch.Tensor, y: torch.Tensor) -> float:
    return frechet_distance(*statistics_of(x).values(), *statistics_of(y).values())


def test_all_metrics_and_those_that_are_not_there():
    samples, reference = evaluated(60, seed=1, shift=0.1), evaluated(80)
    x, y = samples.features, reference.features
    found = all_metrics(x, as_reference(reference, CPU), half=False)
    assert list(found) == list(metrics.METRICS) and found["Inception Score"] is None
    assert found["FID"] == pytest.approx(frechet(x.pool, y.pool))
    assert found["sFID"] == pytest.approx(frechet(x.spatial, y.spatial))
    assert (found["Precision"], found["Recall"]) == precision_recall(y.pool, x.pool, half=False)
    assert found["MIND"] == mind(x.pool, y.pool, seed=2020)
    bare = all_metrics(x, Reference("statistics", statistics_of(y.pool), None), half=False)
    assert {name for name, value in bare.items() if value is not None} == {"FID"}


@pytest.mark.parametrize(("count", "images"), [(30, 30), (70, 40)])
def test_the_floor_of_halves_is_that_of_disjoint_ones(count, images):
    reference = evaluated(80)
    found = floor(count, reference, None, CPU)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(2020))
    first, second = order[:images], order[40:]
    x, y = reference.features.pool, reference.features.spatial
    assert (found["images"], found["reference_images"]) == (images, 40) and not set(first.tolist()) & set(
        second.tolist()
    )
    assert found["metrics"]["FID"] == pytest.approx(frechet(x[first], x[second]))
    assert found["metrics"]["sFID"] == pytest.approx(frechet(y[first], y[second]))
    assert found["metrics"]["MIND"] == mind(x[first], x[second], seed=2020)


def test_the_floor_of_a_second_real_set_is_against_the_whole_reference():
    reference, real = evaluated(80), evaluated(50, seed=7, name="real")
    found = floor(30, reference, real, CPU)
    some = real.features.subset(torch.randperm(50, generator=torch.Generator().manual_seed(2020))[:30])
    assert (found["images"], found["reference_images"], found["real"]["path"]) == (30, 80, "real")
    assert found["metrics"]["FID"] == pytest.approx(frechet(some.pool, reference.features.pool))
    assert found["metrics"]["MIND"] == mind(some.pool, reference.features.pool, seed=2020)
    assert floor(70, reference, real, CPU)["images"] == 50
    reference.file.statistics.update(statistics_of(reference.features.pool))
    reference.file.count = 0
    only = floor(30, Evaluated(reference.file, None, "0"), real, CPU)
    assert only["metrics"] == {"FID": pytest.approx(found["metrics"]["FID"])}


def test_intervals_are_the_spread_over_halves_of_the_samples():
    samples, reference = evaluated(60, seed=1, shift=0.1), evaluated(80)
    against = as_reference(reference, CPU)
    found = intervals(samples.features, against, resamples=5, half=False)
    y = reference.features.pool

    def by_hand(half):
        precision, recall = precision_recall(y, half, half=False)
        return {"FID": frechet(half, y), "MIND": mind(half, y, seed=2020), "Precision": precision, "Recall": recall}

    expected = half_widths(by_hand, samples.features.pool, seed=2020, resamples=5)
    assert found["half_widths"] == pytest.approx(expected) and all(width > 0 for width in expected.values())
    assert (found["level"], found["resamples"], found["FID at infinitely many samples"]) == (0.95, 5, None)
    only_fid = intervals(samples.features, Reference("-", statistics_of(y), None), resamples=5, half=False)
    assert only_fid["half_widths"] == {"FID": pytest.approx(expected["FID"])}
    with pytest.raises(ValueError, match="7 samples: intervals are taken from halves of them, and need 8"):
        intervals(evaluated(7).features, against, resamples=5, half=False)


def test_fid_at_infinity_has_lost_the_bias_of_few_samples():
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(10_000, 64, generator=generator)
    truth = Reference("-", {"mu": np.zeros(64), "sigma": np.eye(64)}, None)  # of the same distribution
    biased = frechet_distance(*statistics_of(pool).values(), *truth.statistics.values())
    assert biased > 0.1
    assert abs(fid_at_infinity(pool, truth)) < 0.2 * biased
    assert fid_at_infinity(pool[1:], truth) is None
