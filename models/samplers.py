"""Samplers of the diffusion head: how noise becomes a token. t: 0 noise → 1 data; velocity = data − noise.

A sampler is one row of SAMPLERS: the times at which it asks for the velocity, how much noise it needs, the arithmetic
of one step (without the network, so that a script may compile it), and the walk that takes these steps.
Letters: N rows (tokens) · C latent channels. Everything here is float32.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Velocity = Callable[[Tensor, int], Tensor]  # at x (N, C) and the k-th of the sampler's times, in any order


class Sampler(NamedTuple):
    """walk(velocity, noise, times, update) -> tokens (N, C); noise (num_noise, N, C): the start, then one per step."""

    walk: Callable[[Velocity, Tensor, list[float], Callable], Tensor]
    update: Callable[..., Tensor]
    times: Callable[[int, float], list[float]]  # (num_steps, last_step_size) -> times
    num_noise: Callable[[int], int]  # num_steps -> tensors of noise per token


def uniform_times(num_steps: int, last_step_size: float) -> list[float]:
    """num_steps + 1 evenly spaced times from 0 to 1 − last_step_size: one per step, then the last step's."""
    dt = (1 - last_step_size) / num_steps
    return [k * dt for k in range(num_steps + 1)]


def euler_maruyama_update(x: Tensor, velocity: Tensor, noise: Tensor, t: Tensor, dt: float) -> Tensor:
    """One step on dx = (v + (1 − t)·score) dt + √(2(1 − t)) dw, whose drift is (1 + t)·v − x."""
    return x + ((1 + t) * velocity.float() - x) * dt + (2 * (1 - t) * dt) ** 0.5 * noise


def euler_maruyama(velocity: Velocity, noise: Tensor, times: list[float], update: Callable) -> Tensor:
    """Stochastic steps over evenly spaced times, and a last plain Euler step to t = 1."""
    last, dt = len(times) - 1, times[1] - times[0]
    on_device = dt * torch.arange(last, dtype=noise.dtype, device=noise.device)
    on_device = on_device.repeat_interleave(4)  # 16 bytes apart: a compiled update would copy unaligned ones
    x = noise[0]
    for k in range(last):
        x = update(x, velocity(x, k), noise[k + 1], on_device[4 * k], dt)
    return x + (1 - times[-1]) * velocity(x, last).float()


def euler_update(x: Tensor, velocity: Tensor, dt: float) -> Tensor:
    """One step on dx = v dt."""
    return x + velocity.float() * dt


def euler(velocity: Velocity, noise: Tensor, times: list[float], update: Callable) -> Tensor:
    """Deterministic steps over evenly spaced times, and a last one to t = 1."""
    last, dt = len(times) - 1, times[1] - times[0]
    x = noise[0]
    for k in range(last):
        x = update(x, velocity(x, k), dt)
    return x + (1 - times[-1]) * velocity(x, last).float()


SAMPLERS = {
    "sde": Sampler(euler_maruyama, euler_maruyama_update, uniform_times, lambda num_steps: num_steps + 1),  # published
    "ode": Sampler(euler, euler_update, uniform_times, lambda num_steps: 1),
}
