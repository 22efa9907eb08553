"""Samplers of the diffusion head: the law that they reach, and the times at which they ask."""

import pytest
import torch

from models.samplers import SAMPLERS

MEAN, SPREAD = 2.0, 0.5  # data N(MEAN, SPREAD²): the exact velocity is known


def known_velocity(times, asked=None):
    def velocity(x, k):
        if asked is not None:
            asked.append(k)
        t = times[k]
        variance = (1 - t) ** 2 + (t * SPREAD) ** 2
        data = MEAN + t * SPREAD**2 / variance * (x - t * MEAN)  # E[data | x]
        return (data - x) / (1 - t)

    return velocity


def walk(name, steps, rows, asked=None):
    sampler = SAMPLERS[name]
    times = sampler.times(steps, 0.04)
    noise = torch.randn(sampler.num_noise(steps), rows, 1)
    return sampler.walk(known_velocity(times, asked), noise, times, sampler.update), times


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_samplers_reach_a_known_law(name):
    torch.manual_seed(0)
    x, _ = walk(name, 200, 20_000)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x.std().item() == pytest.approx(SPREAD, abs=0.02)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_the_velocity_is_asked_once_at_each_time_and_at_no_other(name, steps):
    asked = []
    _, times = walk(name, steps, 3, asked)
    assert asked == list(range(len(times)))
    assert times[0] == 0 and times[-1] == pytest.approx(0.96)
