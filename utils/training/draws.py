"""Random numbers of a training step, addressed by (seed, image, step): the same whichever process draws them, and when.

Letters: B images · P tokens · C latent channels · M flow times per token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from utils.noise import Purpose, normals, uniforms


@dataclass(frozen=True)
class StepDraws:
    """The draws of the images `index` (B,), on its device, at update `step` (from 0); `compiled`: a kernel or two each,
    where there are 140 otherwise."""

    seed: int
    step: int
    index: Tensor
    compiled: bool = False

    def posterior(self, num_tokens: int, num_normals: int, num_uniforms: int) -> tuple[Tensor, Tensor]:
        """Normals (B, P, num_normals) and uniforms (B, P, num_uniforms) of the S-VAE's posterior."""
        return (
            self._draw(normals, Purpose.POSTERIOR_NORMAL, num_tokens, num_normals),
            self._draw(uniforms, Purpose.POSTERIOR_UNIFORM, num_tokens, num_uniforms),
        )

    def is_dropped(self, probability: float) -> Tensor:
        """Whether an image's class becomes the null class, bool (B,)."""
        return self._draw(uniforms, Purpose.CLASS_DROPOUT, 1)[:, 0] < probability

    def flow_times(self, times_per_token: int, num_tokens: int) -> Tensor:
        """Sigmoids of normals, (M, B, P)."""
        return self._draw(normals, Purpose.FLOW_TIME, times_per_token, num_tokens).transpose(0, 1).sigmoid()

    def flow_noise(self, times_per_token: int, num_tokens: int, latent_dim: int) -> Tensor:
        """Normals (M, B, P, C)."""
        return self._draw(normals, Purpose.FLOW_NOISE, times_per_token, num_tokens, latent_dim).transpose(0, 1)

    def _draw(self, draw: Callable, purpose: Purpose, *shape: int) -> Tensor:
        """Numbers of a purpose, (B, *shape)."""
        step = self.step
        if self.compiled:
            draw, step = _compiled(draw), torch.full((), step, device=self.index.device)  # an int: compiled every step
        address = dict(seed=self.seed, purpose=purpose, index=self.index, step=step)
        return draw(**address, count=math.prod(shape), device=self.index.device).unflatten(-1, shape)


@cache
def _compiled(draw: Callable) -> Callable:
    return torch.compile(draw, dynamic=False)
