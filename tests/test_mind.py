"""Monge Inception Distance: torch-fidelity's numbers, closed forms, identities."""

import numpy as np
import pytest
import torch

from utils.evaluation import mind as module
from utils.evaluation.mind import mind


def features(count, dim, seed, shift=0.0):
    """Rectified Gaussians, float32 (count, dim), the same on every version of numpy."""
    normals = np.random.default_rng(seed).normal(size=(count, dim))
    return torch.from_numpy(np.maximum(normals + shift, 0).astype(np.float32))


def gaussians(count, dim, seed):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("count", "reference", "expected"),
    [(300, 300, 3.876938581466675), (300, 200, 4.420264363288879), (200, 300, 4.354502320289612)],
)
def test_torch_fidelitys_number(count, reference, expected):
    """What mind_features_to_metric of its commit a51aa64 returned for these features."""
    x, y = features(count, 64, seed=1, shift=0.2), features(reference, 64, seed=2)
    assert mind(x, y, seed=2020, num_projections=150) == pytest.approx(expected, rel=1e-6)
    assert mind(y, x, seed=2020, num_projections=150) == pytest.approx(expected, rel=1e-6)


def test_a_shift_in_one_dimension_is_exact():
    x = torch.arange(100.0)[:, None]
    assert mind(x, x + 0.5, seed=0, num_projections=3) == pytest.approx(3 * 0.5**2)


def test_gaussians_of_another_mean_and_size():
    dim, mean, size = 8, 0.5, 1.5  # on every direction u N(u mean, size^2) against N(0, 1)
    x, y = gaussians(4000, dim, seed=1) * size + mean, gaussians(4000, dim, seed=2)
    expected = 3 * dim * mean**2 + 3 * dim * (size - 1) ** 2
    assert mind(x, y, seed=3, num_projections=1000) == pytest.approx(expected, rel=0.04)


def test_equal_sets_are_at_zero_in_any_order():
    x, y = features(300, 32, seed=1), features(300, 32, seed=2)
    assert mind(x, x, seed=0) == 0
    assert mind(x.flip(0), x, seed=0) == pytest.approx(0, abs=1e-9)
    assert mind(x.flip(0), y, seed=0) == pytest.approx(mind(x, y, seed=0), rel=1e-6)


def test_scale_goes_in_squared_and_a_common_shift_not_at_all():
    x, y = features(300, 32, seed=1), features(300, 32, seed=2, shift=0.2)
    value = mind(x, y, seed=0)
    assert mind(4 * x, 4 * y, seed=0) == pytest.approx(16 * value)
    assert mind(x + 3, y + 3, seed=0) == pytest.approx(value, rel=1e-5)


def test_the_seed_chooses_the_subset_and_the_directions():
    x, y = features(300, 32, seed=1), features(200, 32, seed=2)
    assert mind(x, y, seed=0) == mind(x, y, seed=0)
    assert mind(x, y, seed=0) != mind(x, y, seed=1)
    same = x[:1].repeat(200, 1)  # every subset of it is the same: only the directions can differ
    assert mind(same, y, seed=0) != mind(same, y, seed=1)
    assert mind(x, same, seed=0) != pytest.approx(mind(x[:200], same, seed=0), rel=1e-3)


def test_pieces_and_float16_do_not_matter(monkeypatch):
    x, y = features(300, 32, seed=1).half(), features(300, 32, seed=2, shift=0.2).half()
    whole = mind(x, y, seed=0)
    assert mind(x.float(), y, seed=0) == pytest.approx(whole, rel=1e-12)
    monkeypatch.setattr(module, "DIRECTIONS_AT_ONCE", 7)
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 77)
    assert mind(x, y, seed=0) == pytest.approx(whole, rel=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_number():
    x, y = features(300, 32, seed=1), features(200, 32, seed=2)
    assert mind(x.cuda(), y, seed=0) == pytest.approx(mind(x, y, seed=0), rel=1e-5)


def test_what_cannot_be_compared():
    x = features(10, 4, seed=1)
    with pytest.raises(ValueError, match=r"features of shape \(0, 4\): must be"):
        mind(x[:0], x, seed=0)
    with pytest.raises(ValueError, match=r"reference of shape \(4,\): must be"):
        mind(x, x[0], seed=0)
    with pytest.raises(ValueError, match="features have 4 channels, reference 3: take both"):
        mind(x, x[:, :3], seed=0)
    with pytest.raises(ValueError, match="num_projections 0 must be at least 1"):
        mind(x, x, seed=0, num_projections=0)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not finite"):
            mind(torch.where(x > 1, bad, x), x, seed=0)
