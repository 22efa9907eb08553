"""The flow of the diffusion head: path, guidance, and the samplers that follow it.

Convention, everywhere: t runs from 0 (noise) to 1 (data); velocity = data − noise.
"""

from collections.abc import Callable

import torch
from torch import Tensor

CFG_SCHEDULES = ("linear", "constant")
SAMPLERS = ("sde", "ode")


def interpolate(noise: Tensor, target: Tensor, t: Tensor) -> Tensor:
    """The point x_t = (1 − t)·noise + t·target on the linear path; t broadcasts."""
    return (1 - t) * noise + t * target


def score(velocity: Tensor, x: Tensor, t: float | Tensor) -> Tensor:
    """∇ log p_t(x) of the linear path, from its velocity: (t·v − x) / (1 − t)."""
    return (t * velocity - x) / (1 - t)


def guide(velocity: Tensor, null_velocity: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance in float32: v_null + scale·(v − v_null)."""
    velocity, null_velocity = velocity.float(), null_velocity.float()
    return null_velocity + scale * (velocity - null_velocity)


def guidance_at(position: int, num_tokens: int, cfg_scale: float, schedule: str) -> float:
    """Guidance scale of the token at `position` (0-based); the linear schedule is exactly 1, unguided, at token 0."""
    if schedule not in CFG_SCHEDULES:
        raise ValueError(f"cfg_schedule {schedule!r} is not one of {', '.join(CFG_SCHEDULES)}")
    return cfg_scale if schedule == "constant" else 1 + (cfg_scale - 1) * position / num_tokens


def time_grid(num_sampling_steps: int, last_step_size: float) -> tuple[list[float], float]:
    """The times at which the velocity is evaluated (one per step, then the last step's), and the step size dt."""
    if num_sampling_steps < 1:
        raise ValueError(f"num_sampling_steps {num_sampling_steps} must be at least 1")
    if not 0 <= last_step_size < 1:
        raise ValueError(f"last_step_size {last_step_size} must lie in [0, 1)")
    dt = (1 - last_step_size) / num_sampling_steps
    return [k * dt for k in range(num_sampling_steps + 1)], dt


def step(sampler: str, x: Tensor, velocity: Tensor, noise: Tensor, t: float | Tensor, dt: float) -> Tensor:
    """One step from t to t + dt, in float32.

    "sde" is Euler–Maruyama on dx = (v + (1 − t)·score) dt + √(2(1 − t)) dw, whose drift is (1 + t)·v − x; "ode" is
    Euler on v.
    """
    v = velocity.float()
    if sampler == "sde":
        return x + ((1 + t) * v - x) * dt + (2 * (1 - t) * dt) ** 0.5 * noise
    return x + v * dt


def integrate(
    velocity: Callable[[Tensor, int], Tensor],
    noise: Tensor,
    last_step_size: float,
    sampler: str = "sde",
    step: Callable[..., Tensor] = step,
) -> Tensor:
    """Follow the flow from noise to data, by `step`s and a last plain Euler step of `last_step_size`.

    velocity(x, k): the (guided) velocity at x (N, C) and the k-th time of `time_grid`. noise: (steps + 1, N, C), the
    start and then one tensor per step. Nothing waits for the device: a whole integration can become one CUDA graph.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is not one of {', '.join(SAMPLERS)}")
    last, (_, dt) = len(noise) - 1, time_grid(len(noise) - 1, last_step_size)
    times = dt * torch.arange(last, dtype=noise.dtype, device=noise.device)
    times = times.repeat_interleave(4)  # 16 bytes apart: a compiled step would copy unaligned ones
    x = noise[0]
    for k in range(last):
        x = step(sampler, x, velocity(x, k), noise[k + 1], times[4 * k], dt)
    return x + last_step_size * velocity(x, last).float()
