"""Samplers of the diffusion head: how noise becomes a token. t: 0 noise → 1 data; velocity = data − noise.

A sampler is one row of SAMPLERS: the times at which it asks for the velocity, how much noise it needs, the arithmetic
of one step (without the network, so that a script may compile it), and the walk that takes these steps.
Letters: N rows (tokens) · C latent channels. Everything here is float32. Numbers reach an update as tensors without
dimensions: a compiled one is then compiled once, whatever the number of steps.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Velocity = Callable[[Tensor, int], Tensor]  # at x (N, C) and the k-th of the sampler's times, in any order


Steps = int | tuple[int, int]  # per token; two numbers: of the first tokens and of the last
STAIRS = 4  # each number of steps has its own graph


def steps_at(position: int, num_tokens: int, steps: Steps) -> int:
    """Steps of the token at `position` (0-based): of two numbers a linear staircase from the first to the second."""
    if isinstance(steps, int):
        return steps
    first, last = steps
    return round(first + (last - first) * (position * STAIRS // num_tokens) / (STAIRS - 1))


class Sampler(NamedTuple):
    """walk(velocity, noise, times, update) -> tokens (N, C); noise (num_noise, N, C): the start, then one per step."""

    walk: Callable[[Velocity, Tensor, Sequence[float], Callable], Tensor]
    update: Callable[..., Tensor]
    times: Callable[[int, float], list[float]]  # (num_steps, last_step_size) -> times
    num_noise: Callable[[int], int]  # num_steps -> tensors of noise per token


def uniform_times(num_steps: int, last_step_size: float) -> list[float]:
    """num_steps + 1 evenly spaced times from 0 to 1 − last_step_size: one per step, then the last step's."""
    dt = (1 - last_step_size) / num_steps
    return [k * dt for k in range(num_steps + 1)]


def euler_maruyama_update(x: Tensor, velocity: Tensor, noise: Tensor, t: Tensor, dt: Tensor) -> Tensor:
    """One step on dx = (v + (1 − t)·score) dt + √(2(1 − t)) dw, whose drift is (1 + t)·v − x."""
    return x + ((1 + t) * velocity.float() - x) * dt + (2 * (1 - t) * dt) ** 0.5 * noise


def euler_maruyama(velocity: Velocity, noise: Tensor, times: Sequence[float], update: Callable) -> Tensor:
    """Stochastic steps over evenly spaced times, and a last plain Euler step to t = 1."""
    last, dt = len(times) - 1, noise.new_full((), times[1] - times[0])
    on_device = (times[1] - times[0]) * torch.arange(last, dtype=noise.dtype, device=noise.device)
    on_device = on_device.repeat_interleave(4)  # 16 bytes apart: a compiled update would copy unaligned ones
    x = noise[0]
    for k in range(last):
        x = update(x, velocity(x, k), noise[k + 1], on_device[4 * k], dt)
    return x + (1 - times[-1]) * velocity(x, last).float()


def euler_update(x: Tensor, velocity: Tensor, dt: Tensor) -> Tensor:
    """One step on dx = v dt."""
    return x + velocity.float() * dt


def euler(velocity: Velocity, noise: Tensor, times: Sequence[float], update: Callable) -> Tensor:
    """Deterministic steps over evenly spaced times, and a last one to t = 1."""
    last, dt = len(times) - 1, noise.new_full((), times[1] - times[0])
    x = noise[0]
    for k in range(last):
        x = update(x, velocity(x, k), dt)
    return x + (1 - times[-1]) * velocity(x, last).float()


def even_times(num_steps: int, last_step_size: float) -> list[float]:
    """num_steps evenly spaced times from 0; the last step ends at 1, where the velocity is never asked for."""
    return [k / num_steps for k in range(num_steps)]


def halved_times(num_steps: int, last_step_size: float) -> list[float]:
    """The beginnings and the middles of num_steps equal steps from 0 to 1."""
    return even_times(2 * num_steps, last_step_size)


def midpoint(velocity: Velocity, noise: Tensor, times: Sequence[float], update: Callable) -> Tensor:
    """Second order: the slope of a step is the one at its middle, where half an Euler step leads."""
    half, whole, x = noise.new_full((), times[1]), noise.new_full((), 2 * times[1]), noise[0]
    for k in range(0, len(times), 2):
        middle = update(x, velocity(x, k), half)
        x = update(x, velocity(middle, k + 1), whole)
    return x


def adams_bashforth(velocity: Velocity, noise: Tensor, times: Sequence[float], update: Callable) -> Tensor:
    """Second order with one velocity per step: its slope goes on as the last two changed. The first step is Euler's."""
    dt, x, before = noise.new_full((), 1 / len(times)), noise[0], None
    for k in range(len(times)):
        now = velocity(x, k).float()
        x = update(x, now if before is None else 1.5 * now - 0.5 * before, dt)
        before = now
    return x


def renoise_update(x: Tensor, data: Tensor, noise: Tensor, t: Tensor, later: Tensor) -> Tensor:
    """From t to `later` on the SDE that keeps the path's marginals, with the data that is expected held fixed."""
    kept = t * (1 - later) / (later * (1 - t))  # e^-h, h the step in log(t / (1 - t)); 0 from the start, at the end
    spread = (1 - later) * (1 - kept**2) ** 0.5
    return (1 - later) / (1 - t) * kept * x + later * (1 - kept**2) * data + spread * noise


def sde_2m(velocity: Velocity, noise: Tensor, times: Sequence[float], update: Callable) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al., arXiv 2211.01095) on the linear path: second order, one velocity per step."""
    x, before, h_before = noise[0], None, math.inf
    for k, (t, later) in enumerate(pairwise([*times, 1.0])):
        data = x + (1 - t) * velocity(x, k).float()  # E[data | x]
        if later == 1:
            return data
        h = log_odds(later) - log_odds(t)
        ahead = data if math.isinf(h_before) else data + h / (2 * h_before) * (data - before)
        x = update(x, ahead, noise[k + 1], noise.new_full((), t), noise.new_full((), later))
        before, h_before = data, h


def log_odds(t: float) -> float:
    return math.log(t / (1 - t)) if t > 0 else -math.inf


SAMPLERS = {
    "sde": Sampler(euler_maruyama, euler_maruyama_update, uniform_times, lambda num_steps: num_steps + 1),  # published
    "ode": Sampler(euler, euler_update, uniform_times, lambda num_steps: 1),
    "midpoint": Sampler(midpoint, euler_update, halved_times, lambda num_steps: 1),
    "ab2": Sampler(adams_bashforth, euler_update, even_times, lambda num_steps: 1),
    "sde-2m": Sampler(sde_2m, renoise_update, even_times, lambda num_steps: num_steps),
}
