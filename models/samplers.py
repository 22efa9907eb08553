"""Samplers of the diffusion head: how noise becomes a token. t: 0 noise → 1 data; velocity = data − noise.

A sampler is one row of SAMPLERS: the times at which it asks for the velocity, how much noise it needs, and the walk
that takes its steps. A step is the velocity at a point and an update of x with it; both in one call, so that a script
may compile them as one.
Letters: N rows (tokens) · C latent channels. Everything here is float32. Numbers reach an update as tensors without
dimensions: a compiled step is then compiled once, whatever the number of steps.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Step = Callable[..., Tensor]  # (k, at, update, *more) -> update(velocity at the k-th time and `at` (N, C), *more)
Steps = int | tuple[int, int]  # per token; two numbers: of the first tokens and of the last
STAIRS = 4  # each number of steps has its own graph


def steps_at(position: int, num_tokens: int, steps: Steps) -> int:
    """Steps of the token at `position` (0-based): of two numbers a linear staircase from the first to the second."""
    if isinstance(steps, int):
        return steps
    first, last = steps
    return round(first + (last - first) * (position * STAIRS // num_tokens) / (STAIRS - 1))


class Sampler(NamedTuple):
    """walk(step, noise, times) -> tokens (N, C); noise (num_noise, N, C): the start, then one per step."""

    walk: Callable[[Step, Tensor, Sequence[float]], Tensor]
    times: Callable[[int, float], list[float]]  # (num_steps, last_step_size) -> times
    num_noise: Callable[[int], int]  # num_steps -> tensors of noise per token


def uniform_times(num_steps: int, last_step_size: float) -> list[float]:
    """num_steps + 1 evenly spaced times from 0 to 1 − last_step_size: one per step, then the last step's."""
    dt = (1 - last_step_size) / num_steps
    return [k * dt for k in range(num_steps + 1)]


def euler_maruyama_update(velocity: Tensor, x: Tensor, noise: Tensor, t: Tensor, dt: Tensor) -> Tensor:
    """One step on dx = (v + (1 − t)·score) dt + √(2(1 − t)) dw, whose drift is (1 + t)·v − x."""
    return x + ((1 + t) * velocity.float() - x) * dt + (2 * (1 - t) * dt) ** 0.5 * noise


def euler_maruyama(step: Step, noise: Tensor, times: Sequence[float]) -> Tensor:
    """Stochastic steps over evenly spaced times, and a last plain Euler step to t = 1."""
    last, dt = len(times) - 1, noise.new_full((), times[1] - times[0])
    on_device = dt * torch.arange(last, dtype=noise.dtype, device=noise.device)
    on_device = on_device.repeat_interleave(4)  # 16 bytes apart: a compiled update would copy unaligned ones
    x = noise[0]
    for k in range(last):
        x = step(k, x, euler_maruyama_update, x, noise[k + 1], on_device[4 * k], dt)
    return step(last, x, euler_update, x, noise.new_full((), 1 - times[-1]))


def euler_update(velocity: Tensor, x: Tensor, dt: Tensor) -> Tensor:
    """One step on dx = v dt."""
    return x + velocity.float() * dt


def euler(step: Step, noise: Tensor, times: Sequence[float]) -> Tensor:
    """Deterministic steps over evenly spaced times, and a last one to t = 1."""
    last, dt = len(times) - 1, noise.new_full((), times[1] - times[0])
    x = noise[0]
    for k in range(last):
        x = step(k, x, euler_update, x, dt)
    return step(last, x, euler_update, x, noise.new_full((), 1 - times[-1]))


def even_times(num_steps: int, last_step_size: float) -> list[float]:
    """num_steps evenly spaced times from 0; the last step ends at 1, where the velocity is never asked for."""
    return [k / num_steps for k in range(num_steps)]


def halved_times(num_steps: int, last_step_size: float) -> list[float]:
    """The beginnings and the middles of num_steps equal steps from 0 to 1."""
    return even_times(2 * num_steps, last_step_size)


def midpoint(step: Step, noise: Tensor, times: Sequence[float]) -> Tensor:
    """Second order: the slope of a step is the one at its middle, where half an Euler step leads."""
    half, whole, x = noise.new_full((), times[1]), noise.new_full((), 2 * times[1]), noise[0]
    for k in range(0, len(times), 2):
        middle = step(k, x, euler_update, x, half)
        x = step(k + 1, middle, euler_update, x, whole)
    return x


def adams_bashforth_update(velocity: Tensor, x: Tensor, before: Tensor | None, dt: Tensor) -> tuple[Tensor, Tensor]:
    """One step along the slope that goes on as the last two velocities changed; and the velocity, for the next."""
    now = velocity.float()
    return euler_update(now if before is None else 1.5 * now - 0.5 * before, x, dt), now


def adams_bashforth(step: Step, noise: Tensor, times: Sequence[float]) -> Tensor:
    """Second order with one velocity per step. The first step is Euler's."""
    dt, x, before = noise.new_full((), 1 / len(times)), noise[0], None
    for k in range(len(times)):
        x, before = step(k, x, adams_bashforth_update, x, before, dt)
    return x


def expected_data(velocity: Tensor, x: Tensor, rest: Tensor) -> Tensor:
    """E[data | x], which is where a straight line leads in the `rest` of the time, 1 − t."""
    return x + rest * velocity.float()


def renoise_update(
    velocity: Tensor, x: Tensor, before: Tensor | None, noise: Tensor, rest: Tensor, ahead: Tensor, *shares: Tensor
) -> tuple[Tensor, Tensor]:
    """The shares of x, data and noise at the next time, the data taken `ahead` of what is expected now by that much of
    its last change; and the data expected now, for the step after."""
    data = expected_data(velocity, x, rest)
    held = data if before is None else data + ahead * (data - before)
    of_x, of_data, of_noise = shares
    return of_x * x + of_data * held + of_noise * noise, data


def renoise_shares(t: float, later: float) -> tuple[float, float, float]:
    """From t to `later` on the SDE that keeps the path's marginals, with the data held fixed: of x, data and noise."""
    kept = t * (1 - later) / (later * (1 - t))  # e^-h, h the step in log(t / (1 - t)); 0 from the start
    return (1 - later) / (1 - t) * kept, later * (1 - kept**2), (1 - later) * (1 - kept**2) ** 0.5


def sde_2m(step: Step, noise: Tensor, times: Sequence[float]) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al., arXiv 2211.01095) on the linear path: second order, one velocity per step."""
    x, before, h_before = noise[0], None, math.inf
    for k, (t, later) in enumerate(pairwise(times)):
        h = log_odds(later) - log_odds(t)
        ahead = 0.0 if math.isinf(h_before) else h / (2 * h_before)
        numbers = [noise.new_full((), number) for number in (1 - t, ahead, *renoise_shares(t, later))]
        x, before = step(k, x, renoise_update, x, before, noise[k + 1], *numbers)
        h_before = h
    return step(len(times) - 1, x, expected_data, x, noise.new_full((), 1 - times[-1]))


def log_odds(t: float) -> float:
    return math.log(t / (1 - t)) if t > 0 else -math.inf


SAMPLERS = {
    "sde": Sampler(euler_maruyama, uniform_times, lambda num_steps: num_steps + 1),  # published
    "ode": Sampler(euler, uniform_times, lambda num_steps: 1),
    "midpoint": Sampler(midpoint, halved_times, lambda num_steps: 1),
    "ab2": Sampler(adams_bashforth, even_times, lambda num_steps: 1),
    "sde-2m": Sampler(sde_2m, even_times, lambda num_steps: num_steps),
}
