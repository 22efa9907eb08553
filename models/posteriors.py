"""Posteriors of the S-VAE: what the encoder's output means. A posterior is a class behind POSTERIORS.

It says how many numbers it needs from the encoder and from the random streams, and gives tokens and their KL; nobody
outside knows more of it. Letters: B images · P tokens · C latent channels. SphereAR, arXiv 2509.24335, section 3.2.
"""

from typing import NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor

from models.sphere import GAMMA_ROUNDS, HypersphericalUniform, PowerSpherical, kl_divergence, project_to_sphere


class Draws(NamedTuple):
    """Random numbers of a posterior's sample."""

    normals: Tensor  # standard, (B, P, ·)
    uniforms: Tensor  # in (0, 1), (B, P, ·)


class Posterior(Protocol):
    """What a posterior must offer; it is made from the encoder's output (B, P, num_outputs), of any float dtype."""

    def __init__(self, raw: Tensor): ...

    @staticmethod
    def num_outputs(latent_dim: int) -> int:
        """Numbers that the encoder gives per token."""

    @staticmethod
    def num_draws(latent_dim: int) -> tuple[int, int]:
        """Normals and uniforms that the sample of one token takes."""

    def sample(self) -> Tensor:
        """Tokens (B, P, C) from torch's global generator."""

    def sample_from(self, draws: Draws) -> Tensor:
        """Tokens (B, P, C) as a function of given draws."""

    def mode(self) -> Tensor:
        """The likeliest tokens (B, P, C)."""

    def kl(self) -> Tensor:
        """KL from the prior in nats, (B, P)."""


class PowerSphericalPosterior:
    """Directions by the Power Spherical law, times the radius √C; the prior is the uniform law on the sphere.

    The encoder gives the mean direction, then what becomes the concentration kappa >= 1.
    """

    def __init__(self, raw: Tensor):
        raw = raw.float()
        mu = project_to_sphere(raw[..., :-1], 1.0)  # (B, P, C)
        self.law = PowerSpherical(mu, F.softplus(raw[..., -1]) + 1, validate_args=False)
        self.radius = mu.shape[-1] ** 0.5

    @staticmethod
    def num_outputs(latent_dim: int) -> int:
        return latent_dim + 1

    @staticmethod
    def num_draws(latent_dim: int) -> tuple[int, int]:
        return 2 * (latent_dim - 1) + GAMMA_ROUNDS, GAMMA_ROUNDS

    def sample(self) -> Tensor:
        return self.radius * self.law.rsample()

    def sample_from(self, draws: Draws) -> Tensor:
        return self.radius * self.law.rsample_from(*draws)

    def mode(self) -> Tensor:
        return self.radius * self.law.mu

    def kl(self) -> Tensor:
        return kl_divergence(self.law, HypersphericalUniform(self.law.dim, device=self.law.mu.device))


POSTERIORS: dict[str, type[Posterior]] = {"power-spherical": PowerSphericalPosterior}
