"""The flow of the diffusion head: path, score and guidance.

Convention, everywhere: t runs from 0 (noise) to 1 (data); velocity = data − noise.
"""

from torch import Tensor

CFG_SCHEDULES = ("linear", "constant")


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
    return cfg_scale if schedule == "constant" else 1 + (cfg_scale - 1) * position / num_tokens
