"""The hypersphere: projection, the Power Spherical law, the uniform law, and the KL between them.

De Cao & Aziz, "The Power Spherical distribution", 2020 (arXiv 2006.04437); SphereAR, arXiv 2509.24335, section 3.
Letters: C ambient dimension, so the sphere is S^{C-1}; mu unit mean direction (..., C); kappa concentration (...).
Everything here runs in float32 (float64 stays float64), whatever the autocast dtype.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Beta, Distribution, constraints, kl_divergence, register_kl

__all__ = [
    "GAMMA_ROUNDS",
    "AxialDistribution",
    "HypersphericalUniform",
    "PowerSpherical",
    "kl_divergence",
    "log_area",
    "project_to_sphere",
]

GAMMA_ROUNDS = 4  # proposals per Gamma draw: each is accepted with probability > 0.98, so all fail once in 10^7


def project_to_sphere(z: Tensor, radius: float) -> Tensor:
    """Scale `z` (..., C) to norm `radius` along the last axis; vectors shorter than 1e-7 stay short."""
    z = _at_least_float32(z)
    return radius * z / z.norm(dim=-1, keepdim=True).clamp_min(1e-7)


def log_area(dim: int) -> float:
    """log of the area of S^{dim-1}."""
    return math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)


class HypersphericalUniform(Distribution):
    """The uniform law on S^{dim-1}."""

    arg_constraints = {}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, dim: int, batch_shape: tuple[int, ...] = (), device: torch.device | str | None = None):
        self.dim, self.device = dim, device
        super().__init__(torch.Size(batch_shape), torch.Size([dim]), validate_args=False)

    def rsample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        return F.normalize(torch.randn(self._extended_shape(torch.Size(sample_shape)), device=self.device), dim=-1)

    def entropy(self) -> Tensor:
        """log of the sphere's area."""
        return torch.full(self.batch_shape, log_area(self.dim), device=self.device)

    def log_prob(self, value: Tensor) -> Tensor:
        return -self.entropy().expand(value.shape[:-1])


class _UnitVector(constraints.Constraint):
    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return (value.norm(dim=-1) - 1).abs() < 1e-3


class AxialDistribution(Distribution):
    """A law on S^{C-1} symmetric around the axis mu: what its kinds share, which is all but the law of mu·x.

    mu: (..., C) of unit length; kappa: (...) above 0. Samples are unit vectors (..., C); gradients reach both.
    """

    arg_constraints = {"mu": _UnitVector(), "kappa": constraints.positive}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, mu: Tensor, kappa: Tensor, validate_args: bool = True):
        self.mu, self.kappa = _at_least_float32(mu), _at_least_float32(kappa)
        if self.mu.shape[:-1] != self.kappa.shape:
            raise ValueError(
                f"mu {tuple(mu.shape)} needs kappa of shape {tuple(mu.shape[:-1])}, not {tuple(kappa.shape)}"
            )
        self.dim = mu.shape[-1]
        super().__init__(self.kappa.shape, self.mu.shape[-1:], validate_args=validate_args)

    def _around_mu(self, cosine: Tensor, sine: Tensor, tangent: Tensor) -> Tensor:
        """The unit vector at this cosine and sine (...) to mu, in the direction of `tangent` (..., C-1) around it.

        The tangent is normalised here. Built around e1, then reflected onto mu.
        """
        around_e1 = torch.cat([cosine.unsqueeze(-1), sine.unsqueeze(-1) * F.normalize(tangent, dim=-1)], -1)
        return _reflect_e1_to(self.mu, around_e1)


class PowerSpherical(AxialDistribution):
    """The law on S^{C-1} with density proportional to (1 + mu·x)^kappa (De Cao & Aziz, eq. 8)."""

    @property
    def _beta_parameters(self) -> tuple[Tensor, float]:
        """(a, b) of the Beta law of (1 + mu·x) / 2."""
        b = (self.dim - 1) / 2
        return self.kappa + b, b

    @property
    def mean(self) -> Tensor:
        a, b = self._beta_parameters
        return self.mu * ((a - b) / (a + b)).unsqueeze(-1)

    def _log_normaliser(self) -> Tensor:
        """In float64: the two lgamma cancel to all but 0.005 in float32 at kappa = 1e4."""
        a, b = self._beta_parameters
        a = a.double()
        return -((a + b) * math.log(2) + b * math.log(math.pi) + torch.lgamma(a) - torch.lgamma(a + b))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at unit vectors `value` (..., C) with respect to the sphere's area."""
        cosine = (self.mu * _at_least_float32(value)).sum(-1).clamp_min(-1)
        return (self._log_normaliser() + self.kappa * torch.log1p(cosine)).to(self.kappa.dtype)

    def entropy(self) -> Tensor:
        """Differential entropy in nats, shape of kappa (De Cao & Aziz, eq. 17)."""
        a, b = self._beta_parameters
        a = a.double()
        expected_log = math.log(2) + torch.digamma(a) - torch.digamma(a + b)
        return -(self._log_normaliser() + self.kappa * expected_log).to(self.kappa.dtype)

    def rsample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """Unit vectors of shape sample_shape + mu.shape, from torch's global generator."""
        a, b = self._beta_parameters
        beta = Beta(a, torch.full_like(a, b), validate_args=False).rsample(torch.Size(sample_shape))
        tangent = torch.randn(*beta.shape, self.dim - 1, dtype=beta.dtype, device=beta.device)
        return self.place(beta, tangent)

    def rsample_from(self, normals: Tensor, uniforms: Tensor) -> Tensor:
        """Unit vectors (..., C) as a function of given draws: the same law as `rsample` where kappa >= 1.

        normals: (..., 2(C-1) + GAMMA_ROUNDS) standard; uniforms: (..., GAMMA_ROUNDS) in (0, 1).
        The Beta draw is G_a / (G_a + G_b) of two Gammas; 2 G_b is a chi-square of C-1 degrees.
        """
        a, _ = self._beta_parameters
        tangent, chi, proposals = normals.split([self.dim - 1, self.dim - 1, GAMMA_ROUNDS], dim=-1)
        gamma_a = _GammaFromDraws.apply(a, proposals, uniforms)
        gamma_b = chi.square().sum(-1) / 2
        return self.place(gamma_a / (gamma_a + gamma_b), tangent)

    def place(self, beta: Tensor, tangent: Tensor) -> Tensor:
        """The unit vector whose cosine to mu is 2·beta − 1, in the direction of `tangent` around mu.

        beta: (...) in (0, 1); tangent: (..., C-1).
        """
        beta = beta.clamp(1e-7, 1 - 1e-7)  # sqrt below has an infinite slope at 0 and 1
        sine = 2 * (beta * (1 - beta)).sqrt()
        return self._around_mu(2 * beta - 1, sine, tangent)


def _reflect_e1_to(mu: Tensor, y: Tensor) -> Tensor:
    """Householder reflection that takes e1 to mu, applied to y (..., C); the identity where mu is e1."""
    difference = F.pad(torch.ones_like(mu[..., :1]), (0, mu.shape[-1] - 1)) - mu
    at_e1 = difference.detach().abs().sum(-1, keepdim=True) < 1e-6
    u = F.normalize(torch.where(at_e1, torch.ones_like(difference), difference), dim=-1)
    return torch.where(at_e1, y, y - 2 * (y * u).sum(-1, keepdim=True) * u)


class _GammaFromDraws(torch.autograd.Function):
    """Gamma(a, 1) for a >= 1 from given normals and uniforms (..., GAMMA_ROUNDS): Marsaglia & Tsang, 2000.

    The gradient is the implicit one, dx/da = −(∂P(a, x)/∂a) / p(x; a) (Figurnov et al., 2018), P being the regularised
    lower incomplete gamma function, differentiated centrally in float64.
    """

    @staticmethod
    def forward(ctx, a: Tensor, normals: Tensor, uniforms: Tensor) -> Tensor:
        d = (a - 1 / 3).unsqueeze(-1)
        v = (1 + normals / (9 * d).sqrt()) ** 3
        log_v = v.clamp_min(1e-30).log()
        accepted = (v > 0) & (uniforms.log() < normals.square() / 2 + d * (1 - v + log_v))
        first = accepted.int().argmax(-1, keepdim=True)
        v = torch.where(accepted.any(-1, keepdim=True), v.gather(-1, first), torch.ones_like(d))
        x = (d * v).squeeze(-1)
        ctx.save_for_backward(a, x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        a, x = (value.double() for value in ctx.saved_tensors)
        h = 1e-4 * a.sqrt()
        slope = (torch.special.gammainc(a + h, x) - torch.special.gammainc(a - h, x)) / (2 * h)
        log_density = (a - 1) * x.log() - x - torch.lgamma(a)
        return (-slope / log_density.exp() * grad).to(grad.dtype), None, None


@register_kl(PowerSpherical, HypersphericalUniform)
def _kl_power_spherical_uniform(p: PowerSpherical, q: HypersphericalUniform) -> Tensor:
    return q.entropy() - p.entropy()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
