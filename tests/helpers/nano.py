"""SphereAR-Nano with stirred weights, tokens on its sphere, and noise for its generation."""

import torch

from models import PRESETS, SphereAR, project_to_sphere

NANO = PRESETS["SphereAR-Nano"]


def stirred_nano() -> SphereAR:
    """In eval mode; the head starts at zero: stirred, so that tokens depend on conditions."""
    torch.manual_seed(0)
    model = SphereAR(NANO).eval().requires_grad_(False)
    for value in model.parameters():
        value.add_(0.05 * torch.randn_like(value))
    return model


def tokens_of(config, batch: int, seed: int = 0) -> torch.Tensor:
    """Random tokens (batch, P, C) on the sphere."""
    noise = torch.randn(batch, config.num_tokens, config.latent_dim, generator=torch.Generator().manual_seed(seed))
    return project_to_sphere(noise, config.radius)


def seeded_noise(settings, seed: int = 0):
    """A noise source for `generate_tokens`: the same for the same (seed, token)."""

    def noise(token: int, rows: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed * 10_000 + token)
        return torch.randn(settings.num_noise, rows, NANO.latent_dim, generator=generator)

    return noise
