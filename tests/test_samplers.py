"""Samplers of the diffusion head on targets whose flow has a closed form: law, order, times, limits."""

import math
from itertools import pairwise

import pytest
import torch

from models.samplers import SAMPLERS, STAIRS, steps_at

MEAN, SPREAD = 2.0, 0.5
GAUSSIAN = [(1.0, MEAN, SPREAD)]  # weight, mean, deviation
MIXTURE = [(0.4, -1.0, 0.5), (0.6, 2.0, 0.7)]  # its flow is not linear
DETERMINISTIC = [name for name, sampler in SAMPLERS.items() if sampler.num_noise(2) == 1]


class Double(torch.Tensor):
    """float64 that stays it where a sampler asks for float32: small errors are then visible."""

    def float(self):
        return self


def exact_velocity(target, x, t):
    """(E[data | x] − x) / (1 − t) for a mixture of normals."""
    log_weights, means = [], []
    for weight, mean, deviation in target:
        variance = (1 - t) ** 2 + (t * deviation) ** 2
        log_weights.append(math.log(weight) - (x - t * mean) ** 2 / (2 * variance) - math.log(variance) / 2)
        means.append(mean + t * deviation**2 / variance * (x - t * mean))
    shares = torch.stack(log_weights).softmax(0)
    return ((shares * torch.stack(means)).sum(0) - x) / (1 - t)


def walk(name, steps, start, target=GAUSSIAN, asked=None, noise=None):
    """What a sampler makes of the starts (N, 1) with the exact velocity; `asked` collects the numbers of its times."""
    sampler = SAMPLERS[name]
    times = sampler.times(steps, 0.04)

    def step(k, at, update, *more):
        if asked is not None:
            asked.append(k)
        return update(exact_velocity(target, at.as_subclass(torch.Tensor), times[k]).as_subclass(Double), *more)

    if noise is None:
        noise = torch.randn(sampler.num_noise(steps), *start.shape, dtype=start.dtype)
    noise[0] = start
    return sampler.walk(step, noise, times).as_subclass(torch.Tensor)


STARTS = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_samplers_reach_the_law(name):
    torch.manual_seed(0)
    x = walk(name, 200, torch.randn(20_000, 1))
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x.std().item() == pytest.approx(SPREAD, abs=0.02)


def law_of(name, steps):
    """Mean and deviation of what a sampler makes on the Gaussian target, exactly: it is affine in its noise."""
    count = SAMPLERS[name].num_noise(steps)
    units = torch.cat([torch.zeros(count, 1), torch.eye(count)], dim=1).double()[..., None]  # none, then each alone
    mean, *shares = walk(name, steps, units[0].clone(), noise=units).flatten()
    return mean.item(), (torch.stack(shares) - mean).norm().item()


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_the_law_of_the_published_sampler_at_any_number_of_steps(steps):
    """By the recursion that its steps are."""
    mean, variance, dt = 0.0, 1.0, 0.96 / steps
    for k in range(steps + 1):
        t, h = k * dt, dt if k < steps else 0.04
        total = (1 - t) ** 2 + (t * SPREAD) ** 2
        slope = (t * SPREAD**2 / total - 1) / (1 - t)  # velocity = slope·x + shift
        shift = MEAN * (1 - t * t * SPREAD**2 / total) / (1 - t)
        if k < steps:
            factor, add, noise = 1 + ((1 + t) * slope - 1) * h, (1 + t) * shift * h, 2 * (1 - t) * h
        else:
            factor, add, noise = 1 + slope * h, shift * h, 0.0
        mean, variance = factor * mean + add, factor**2 * variance + noise
    assert law_of("sde", steps) == pytest.approx((mean, variance**0.5))


@pytest.mark.parametrize("steps", [1, 2, 5, 30])
def test_the_second_order_sde_has_the_mean_at_any_number_of_steps(steps):
    assert law_of("sde-2m", steps)[0] == pytest.approx(MEAN)


def test_the_second_order_sde_is_of_second_order_in_law():
    errors = [law_of("sde-2m", steps)[1] - SPREAD for steps in (160, 320, 640)]
    assert [math.log2(a / b) for a, b in pairwise(errors)] == pytest.approx([2, 2], abs=0.3)


@pytest.mark.parametrize("name, order", [("ode", 1), ("midpoint", 2), ("ab2", 2)])
def test_order_of_convergence(name, order):
    """The error falls with the number of steps to the minus `order`, towards the sampler's own limit."""
    exact = walk(name, 4096, STARTS, MIXTURE)
    errors = [(walk(name, steps, STARTS, MIXTURE) - exact).abs().max().item() for steps in (32, 64, 128)]
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert slopes == pytest.approx([order] * 2, abs=0.15)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_all_deterministic_samplers_have_one_limit(name):
    """The exact flow takes a start x to MEAN + SPREAD·x; the ode's last step keeps its size of 0.04."""
    assert torch.allclose(walk(name, 4000, STARTS), MEAN + SPREAD * STARTS, atol=0.02 if name == "ode" else 1e-3)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_the_velocity_is_asked_once_at_every_time_and_at_no_other(name, steps):
    asked = []
    walk(name, steps, torch.zeros(3, 1), asked=asked)
    times = SAMPLERS[name].times(steps, 0.04)
    assert asked == list(range(len(times)))
    assert all(0 <= t < 1 for t in times) and times == sorted(times)


def test_the_published_times():
    times = SAMPLERS["sde"].times(100, 0.04)
    assert len(times) == 101 and times[0] == 0 and times[-1] == pytest.approx(0.96)


def test_annealed_steps_fall_linearly_by_stairs():
    steps = [steps_at(position, 256, (50, 20)) for position in range(256)]
    assert (steps[0], steps[-1], sum(steps)) == (50, 20, 256 * 35)
    assert steps == sorted(steps, reverse=True) and len(set(steps)) == STAIRS
    line = [50 - 30 * position / 255 for position in range(256)]
    assert max(abs(a - b) for a, b in zip(steps, line)) <= 30 / STAIRS + 0.5


@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_a_single_number_of_steps_is_every_tokens(tokens):
    assert {steps_at(position, tokens, 50) for position in range(tokens)} == {50}
    assert {steps_at(position, tokens, (50, 50)) for position in range(tokens)} == {50}
    assert steps_at(0, tokens, (50, 20)) == 50
