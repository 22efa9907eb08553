"""The per-token diffusion head: an adaLN MLP that predicts the velocity of one token from its condition.

Letters: N rows (tokens) · C latent channels · D condition width · W head width · M diffusion batch multiplier.
Parameter names of the released checkpoints.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from models.flow import guide, interpolate
from models.samplers import Sampler

TIME_FREQUENCIES = 256
MODULATION_ROWS = 8192  # rows of adaLN parameters computed at a time while sampling

Modulation = tuple[Tensor, ...]  # per adaLN set (..., 3W): scale, shift, gate; then the final layer's (..., 2W)


def sinusoid(t: Tensor) -> Tensor:
    """[cos, sin] features (..., 256) of times t (...), of 1000·t with periods up to 10,000, float32."""
    half = TIME_FREQUENCIES // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = 1000 * t.float().unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(sinusoid(t))


class ResBlock(nn.Module):
    """x += gate · SwiGLU(LayerNorm(x)·(1 + scale) + shift)."""

    def __init__(self, width: int):
        super().__init__()
        hidden = int(1.5 * width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.w1 = nn.Linear(width, 2 * hidden)
        self.w2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor, gate: Tensor) -> Tensor:
        h1, h2 = self.w1(self.norm(x) * (1 + scale) + shift).chunk(2, dim=-1)
        return x + gate * self.w2(F.silu(h1) * h2)


class FinalLayer(nn.Module):
    def __init__(self, width: int, out_channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.ada_ln_modulation = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, out_channels)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.linear(self.norm(x) * (1 + scale) + shift)


class VelocityMLP(nn.Module):
    """The network: velocity (N, C) at x (N, C), given the adaLN parameters of its time and condition."""

    def __init__(self, latent_dim: int, condition_width: int, width: int, num_blocks: int, adaln_sets: int):
        super().__init__()
        self.blocks_per_set = num_blocks // adaln_sets
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(condition_width, width)
        self.input_proj = nn.Linear(latent_dim, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(num_blocks))
        self.ada_ln_blocks = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(adaln_sets))
        self.final_layer = FinalLayer(width, latent_dim)
        self.apply(self._init)
        for linear in (self.time_embed.mlp[0], self.time_embed.mlp[2]):
            nn.init.normal_(linear.weight, std=0.02)
        for linear in (*self.ada_ln_blocks, self.final_layer.ada_ln_modulation, self.final_layer.linear):
            nn.init.zeros_(linear.weight)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    def modulation(self, embedding: Tensor) -> Modulation:
        """adaLN parameters of the sum of time and condition embeddings (..., W): all that does not depend on x."""
        y = F.silu(embedding)
        return *(ada_ln(y) for ada_ln in self.ada_ln_blocks), self.final_layer.ada_ln_modulation(y)

    def forward(self, x: Tensor, modulation: Modulation) -> Tensor:
        *sets, final = modulation
        x = self.input_proj(x)
        for j, parameters in enumerate(sets):
            scale, shift, gate = parameters.chunk(3, dim=-1)  # one set serves consecutive blocks
            for block in self.res_blocks[j * self.blocks_per_set : (j + 1) * self.blocks_per_set]:
                x = block(x, scale, shift, gate)
        return self.final_layer(x, *final.chunk(2, dim=-1))


class DiffusionHead(nn.Module):
    """p(token | condition), as a flow from noise to the token."""

    def __init__(self, latent_dim: int, condition_width: int, width: int, num_blocks: int, adaln_sets: int):
        super().__init__()
        self.net = VelocityMLP(latent_dim, condition_width, width, num_blocks, adaln_sets)

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Velocity at x (N, C), times t (N,), condition (N, D)."""
        return self.net(x, self.net.modulation(self.net.time_embed(t) + self.net.cond_embed(condition)))

    def forward(self, target: Tensor, condition: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Flow-matching loss, float32 scalar: mean ‖velocity(x_t) − (target − noise)‖² over all elements.

        target: (B, P, C); condition: (B, P, D); t: (M, B, P); noise: (M, B, P, C): every token is used M times, its
        condition embedded once.
        """
        target, noise, t = target.float(), noise.float(), t.float()
        x_t = interpolate(noise, target, t.unsqueeze(-1))
        embedding = self.net.time_embed(t) + self.net.cond_embed(condition)  # (M, B, P, W)
        return F.mse_loss(self.net(x_t, self.net.modulation(embedding)).float(), target - noise)

    def embed_times(self, times: Sequence[float]) -> Tensor:
        """Embeddings (K, W) of the K times at which `sample` evaluates the velocity: once per generation."""
        return self.net.time_embed(torch.tensor(times, device=self.net.input_proj.weight.device))

    def step(
        self, x: Tensor, modulation: Modulation, scale: float | Tensor | None, update: Callable, *more: object
    ) -> Tensor:
        """A sampler's update with the velocity at x (N, C), guided where there is a scale: what a script compiles.

        With guidance the modulation has 2N rows, the null ones behind: both see the same x.
        """
        if scale is None:
            return update(self.net(x, modulation), *more)
        return update(guide(*self.net(torch.cat([x, x]), modulation).chunk(2), scale), *more)

    def sample(
        self,
        condition: Tensor,
        noise: Tensor,
        time_embedding: Tensor,
        scale: float | Tensor | None = None,
        *,
        times: Sequence[float],
        sampler: Sampler,
        step: Callable | None = None,
    ) -> Tensor:
        """Unprojected tokens (N, C) from noise (num_noise, N, C), by a sampler over `times` and their `embed_times`.

        condition: (N, D); with guidance (`scale` given) (2N, D), the null rows behind the class rows. step: this
        head's own, or what equals it. Nothing waits for the device: all of it can become one CUDA graph.
        """
        condition_embedding = self.net.cond_embed(condition)  # (N or 2N, W)
        chunk = max(1, MODULATION_ROWS // len(condition))
        step = step or self.step

        @lru_cache(maxsize=1)
        def modulations(part: int) -> list[Modulation]:
            """What does not depend on x, for a chunk of the times: one large product for many steps."""
            embedding = time_embedding[part * chunk : (part + 1) * chunk, None] + condition_embedding
            return list(zip(*self.net.modulation(embedding)))

        def step_at(k: int, at: Tensor, update: Callable, *more: object) -> Tensor:
            return step(at, modulations(k // chunk)[k % chunk], scale, update, *more)

        return sampler.walk(step_at, noise, times)
