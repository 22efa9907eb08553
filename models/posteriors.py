"""Posteriors of the S-VAE: what the encoder's output means. A posterior is a class behind POSTERIORS.

It says how many numbers it needs from the encoder and from the random streams, and gives latents and their KL; nobody
outside knows more of it. Letters: B images · P tokens · C latent channels. SphereAR, arXiv 2509.24335, section 3.2 and
its ablations (S: Power Spherical, G: diagonal Gaussian, F: fixed scale).
"""

import math
from typing import ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from models.sphere import (
    GAMMA_ROUNDS,
    AxialDistribution,
    HypersphericalUniform,
    PowerSpherical,
    kl_divergence,
    project_to_sphere,
)
from models.von_mises_fisher import VonMisesFisher, draws_per_sample

LOG_VARIANCES = -30.0, 20.0  # the Gaussian's are clamped to these
EULER = 0.5772156649015329


class Draws(NamedTuple):
    """Random numbers of a posterior's sample."""

    normals: Tensor  # standard, (B, P, ·)
    uniforms: Tensor  # in (0, 1), (B, P, ·)


class Posterior(Protocol):
    """What a posterior must offer; it is made from the encoder's output (B, P, num_outputs), of any float dtype."""

    on_sphere: ClassVar[bool]  # whether its latents have norm √C by themselves
    takes_sigma: ClassVar[bool]  # whether the config's sigma goes with the encoder's output

    def __init__(self, raw: Tensor, **settings: float): ...

    @staticmethod
    def num_outputs(latent_dim: int) -> int:
        """Numbers that the encoder gives per token."""

    @staticmethod
    def num_draws(latent_dim: int) -> tuple[int, int]:
        """Normals and uniforms that the sample of one token takes."""

    def sample(self) -> Tensor:
        """Latents (B, P, C) from torch's global generator."""

    def sample_from(self, draws: Draws) -> Tensor:
        """Latents (B, P, C) as a function of given draws."""

    def mode(self) -> Tensor:
        """The likeliest latents (B, P, C)."""

    def kl(self) -> Tensor:
        """KL from the prior in nats, summed over C: (B, P)."""


class _Axial:
    """Directions by a law symmetric around an axis, times the radius √C; the prior is the uniform law on the sphere.

    The encoder gives the mean direction, then what becomes the concentration kappa >= 1.
    """

    on_sphere = True
    takes_sigma = False
    law_of: type[AxialDistribution]

    def __init__(self, raw: Tensor):
        raw = raw.float()
        mu = project_to_sphere(raw[..., :-1], 1.0)  # (B, P, C)
        self.law = self.law_of(mu, F.softplus(raw[..., -1]) + 1, validate_args=False)
        self.radius = mu.shape[-1] ** 0.5

    @staticmethod
    def num_outputs(latent_dim: int) -> int:
        return latent_dim + 1

    def sample(self) -> Tensor:
        return self.radius * self.law.rsample()

    def sample_from(self, draws: Draws) -> Tensor:
        return self.radius * self.law.rsample_from(*draws)

    def mode(self) -> Tensor:
        return self.radius * self.law.mu

    def kl(self) -> Tensor:
        return kl_divergence(self.law, HypersphericalUniform(self.law.dim, device=self.law.mu.device))


class PowerSphericalPosterior(_Axial):
    """The paper's."""

    law_of = PowerSpherical

    @staticmethod
    def num_draws(latent_dim: int) -> tuple[int, int]:
        return 2 * (latent_dim - 1) + GAMMA_ROUNDS, GAMMA_ROUNDS


class VonMisesFisherPosterior(_Axial):
    law_of = VonMisesFisher

    @staticmethod
    def num_draws(latent_dim: int) -> tuple[int, int]:
        return draws_per_sample(latent_dim)


class _Flat:
    """Independent normals around a mean, with deviations; the prior is N(0, 1) in every dimension."""

    on_sphere = False
    takes_sigma = False
    mean: Tensor  # (B, P, C)
    deviation: Tensor  # (B, P, C)

    @staticmethod
    def num_draws(latent_dim: int) -> tuple[int, int]:
        return latent_dim, 0

    def sample(self) -> Tensor:
        num_normals, _ = self.num_draws(self.mean.shape[-1])
        normals = torch.randn(*self.mean.shape[:-1], num_normals, device=self.mean.device)
        return self.sample_from(Draws(normals, normals[..., :0]))

    def sample_from(self, draws: Draws) -> Tensor:
        return self.mean + self.deviation * draws.normals

    def mode(self) -> Tensor:
        return self.mean

    def kl(self) -> Tensor:
        variance = self.deviation.square()
        return ((self.mean.square() + variance - 1 - variance.log()) / 2).sum(-1)


class GaussianPosterior(_Flat):
    """The usual VAE's: the encoder gives mean and log-variance of every dimension."""

    def __init__(self, raw: Tensor):
        self.mean, log_variance = raw.float().chunk(2, dim=-1)
        self.deviation = (log_variance.clamp(*LOG_VARIANCES) / 2).exp()

    @staticmethod
    def num_outputs(latent_dim: int) -> int:
        return 2 * latent_dim


class FixedSigmaPosterior(_Flat):
    """The σ-VAE's: the encoder gives means, the deviation is the same everywhere."""

    takes_sigma = True

    def __init__(self, raw: Tensor, sigma: float):
        self.mean = raw.float()
        self.deviation = torch.full_like(self.mean[..., :1], sigma).expand_as(self.mean)

    @staticmethod
    def num_outputs(latent_dim: int) -> int:
        return latent_dim


class RandomSigmaPosterior(_Flat):
    """LatentLM's σ-VAE: every image draws one deviation, a normal number whose size is sigma on average.

    The KL is the mean over deviations. Sun et al., arXiv 2412.08635.
    """

    takes_sigma = True

    def __init__(self, raw: Tensor, sigma: float):
        self.mean = raw.float()
        self.spread = sigma * (math.pi / 2) ** 0.5  # of the deviations: E|N(0, s²)| = s √(2 / π)

    @staticmethod
    def num_outputs(latent_dim: int) -> int:
        return latent_dim

    @staticmethod
    def num_draws(latent_dim: int) -> tuple[int, int]:
        return latent_dim + 1, 0  # the last of an image's first token is for its deviation, those of others for none

    def sample_from(self, draws: Draws) -> Tensor:
        deviation = self.spread * draws.normals[:, :1, -1:]  # (B, 1, 1)
        return self.mean + deviation * draws.normals[..., :-1]

    def kl(self) -> Tensor:
        mean_log_variance = 2 * math.log(self.spread) - EULER - math.log(2)  # E log χ² with one degree of freedom
        return ((self.mean.square() + self.spread**2 - 1 - mean_log_variance) / 2).sum(-1)


POSTERIORS: dict[str, type[Posterior]] = {
    "power-spherical": PowerSphericalPosterior,
    "vmf": VonMisesFisherPosterior,
    "gaussian": GaussianPosterior,
    "fixed-sigma": FixedSigmaPosterior,
    "random-sigma": RandomSigmaPosterior,
}
