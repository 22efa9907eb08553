"""The von Mises–Fisher law on the sphere: normaliser, entropy, KL and samples, with gradients to mu and kappa.

Letters: C ambient dimension, v = C/2 − 1, I_v the modified Bessel function, A = I_{v+1}/I_v (kappa) the mean of
w = mu·x. M = Γ(v+1) (2/kappa)^v I_v(kappa) is the mean of exp(kappa·w) under the uniform law: log M is kappa²/2C for
small kappa, and all that follows is a sum of terms of the size of the result, whatever kappa. Computed in float64.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import register_kl

from models.sphere import AxialDistribution, HypersphericalUniform, log_area

__all__ = ["PROPOSALS", "VonMisesFisher", "draws_per_sample"]

PROPOSALS = 24  # each is accepted with probability > 0.65 (0.70 at C = 16), so all fail once in 10^11 (10^12)
NODES = 48  # of the Gauss–Legendre rule of the samples' gradient: it is right to 1e-11 from 32 on
DEBYE_ORDER, DEBYE_TERMS = 20, 8  # the expansion of Bessel functions of large order serves from this order on


def draws_per_sample(dim: int) -> tuple[int, int]:
    """Standard normals and uniforms that one sample of `rsample_from` takes: 63 and 24 at C = 16."""
    return dim - 1 + 2 * PROPOSALS, PROPOSALS


class VonMisesFisher(AxialDistribution):
    """The law on S^{C-1} with density proportional to exp(kappa mu·x)."""

    @property
    def mean(self) -> Tensor:
        _, mean_cosine = _LogBessel.apply(self.kappa.double(), self.dim)
        return self.mu * mean_cosine.to(self.mu.dtype).unsqueeze(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at unit vectors `value` (..., C) with respect to the sphere's area.

        The cosine is 1 − |value − mu|²/2, which float32 holds better than mu·value near 1.
        """
        kappa = self.kappa.double()
        log_m, _ = _LogBessel.apply(kappa, self.dim)
        far = (value.double() - self.mu.double()).square().sum(-1) / 2
        return (kappa - log_m - kappa * far - log_area(self.dim)).to(self.kappa.dtype)

    def _kl_to_uniform(self) -> Tensor:
        """kappa·A − log M, in nats, shape of kappa, float64; its slope is kappa·A'."""
        kappa = self.kappa.double()
        log_m, mean_cosine = _LogBessel.apply(kappa, self.dim)
        return kappa * mean_cosine - log_m

    def entropy(self) -> Tensor:
        """Differential entropy in nats, shape of kappa."""
        return (log_area(self.dim) - self._kl_to_uniform()).to(self.kappa.dtype)

    def rsample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """Unit vectors of shape sample_shape + mu.shape, from torch's global generator."""
        shape, options = (*sample_shape, *self.kappa.shape), dict(dtype=self.mu.dtype, device=self.mu.device)
        normals, uniforms = draws_per_sample(self.dim)
        return self.rsample_from(torch.randn(*shape, normals, **options), torch.rand(*shape, uniforms, **options))

    def rsample_from(self, normals: Tensor, uniforms: Tensor) -> Tensor:
        """Unit vectors (..., C) as a function of given draws, which may have axes before those of kappa.

        normals: (..., C-1 + 2·PROPOSALS) standard; uniforms: (..., PROPOSALS) in (0, 1).
        """
        tangent, pairs = normals.split([self.dim - 1, 2 * PROPOSALS], dim=-1)
        kappa = self.kappa.double().expand(tangent.shape[:-1])
        angle = _AngleFromDraws.apply(kappa, pairs.unflatten(-1, (2, PROPOSALS)), uniforms, self.dim)
        return self._around_mu(angle.cos().to(self.mu.dtype), angle.sin().to(self.mu.dtype), tangent.to(self.mu.dtype))


class _LogBessel(torch.autograd.Function):
    """(log M, A) of kappa, float64; the derivatives are A and A'."""

    @staticmethod
    def forward(ctx, kappa: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        log_m, ratio, slope = _log_bessel(kappa, dim)
        ctx.save_for_backward(ratio, slope)
        return log_m, ratio

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_log_m: Tensor, grad_ratio: Tensor) -> tuple[Tensor, None]:
        ratio, slope = ctx.saved_tensors
        return grad_log_m * ratio + grad_ratio * slope, None


def _log_bessel(kappa: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """(log M, A, A') of float64 kappa (...) above 0: Debye's expansion, brought down to order C/2 − 1 by recurrence.

    With r_j = I_{j+1}/I_j: r_{j-1} = 1/(2j/kappa + r_j) and M_{j-1} = M_j (1 + kappa r_j / 2j). A' is the derivative of
    the same steps rather than 1 − A² − (C−1)A/kappa, which cancels at large kappa and at small.
    """
    order = dim / 2 - 1
    raised = max(0, math.ceil(DEBYE_ORDER - order))
    log_m, ratio, slope = _debye(kappa, order + raised)
    for step in range(raised, 0, -1):
        twice = 2 * (order + step)
        log_m = log_m + torch.log1p(kappa * ratio / twice)
        below = 1 / (twice / kappa + ratio)
        ratio, slope = below, below.square() * (twice / kappa.square() - slope)
    return log_m, ratio, slope


def _debye(kappa: Tensor, order: float) -> tuple[Tensor, Tensor, Tensor]:
    """log M of a large order V and its first two derivatives by kappa, from DLMF 10.41.3 term by term.

    With z = kappa/V, s = sqrt(1+z²), p = 1/s, S(p) = Σ u_k(p)/V^k:
    log M = V (s − 1 − log((1+s)/2)) − log(s)/2 + log(S(p)/S(1)), where S(1) stands for Stirling's series of Γ(V+1).
    """
    z = kappa / order
    s = (1 + z.square()).sqrt()
    p, above_one = 1 / s, z.square() / (1 + s)  # above_one = s − 1
    series = _debye_series(order)
    quotient, q1, q2 = _polynomial([sum(series[n:]) for n in range(1, len(series))], p)  # (S(p) − S(1)) / (p − 1)
    change = -above_one * p * quotient
    total = sum(series) + change
    first, second = (quotient - above_one * p * q1) / total, (2 * q1 - above_one * p * q2) / total  # S'/S and S''/S
    log_m = order * (above_one - torch.log1p(above_one / 2)) - torch.log1p(z.square()) / 4
    ratio = z / (1 + s) - z * p.square() * (1 / 2 + p * first) / order
    slope = p / (1 + s) - p.square() * (p.square() - 1 / 2) / order
    slope = slope - p**3 * (first - (1 - p.square()) * (3 * first + p * (second - first.square()))) / order
    return log_m + torch.log1p(change / sum(series)), ratio, slope / order


def _debye_series(order: float) -> list[float]:
    """Coefficients of S(p) by power of p, from u_{k+1} = p²(1−p²)u_k'/2 + ∫(1−5t²)u_k dt/8 (DLMF 10.41.9)."""
    u, total = [1.0], [1.0] + [0.0] * (3 * DEBYE_TERMS)
    for _ in range(DEBYE_TERMS):
        following = [0.0] * (len(u) + 3)
        for n, c in enumerate(u):
            following[n + 1] += c / order * (n / 2 + 1 / (8 * (n + 1)))
            following[n + 3] -= c / order * (n / 2 + 5 / (8 * (n + 3)))
        u = following
        for n, c in enumerate(u):
            total[n] += c
    return total


def _polynomial(coefficients: list[float], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The polynomial with coefficients by power, and its first two derivatives, at x."""
    value = first = second = torch.zeros_like(x)
    for coefficient in reversed(coefficients):
        value, first, second = value * x + coefficient, first * x + value, second * x + 2 * first
    return value, first, second


class _AngleFromDraws(torch.autograd.Function):
    """The angle to mu, float64 (...), for kappa (...) from normals (..., 2, PROPOSALS) and uniforms (..., PROPOSALS).

    Wood's rejection (1994), in half = (1 − cosine)/2, which keeps its digits where the cosine is near 1. The proposal
    is b·odds/(1 + b·odds) of the odds of a Beta((C−1)/2, (C−1)/2), which is (1+t)/2 of the first coordinate t of a
    uniform direction; t is cos(φ)·sqrt(1 − U^{2/(C−2)}), where (φ, U) come from one pair of normals by Box & Muller.
    """

    @staticmethod
    def forward(ctx, kappa: Tensor, normals: Tensor, uniforms: Tensor, dim: int) -> Tensor:
        k, (n, m) = kappa.unsqueeze(-1), normals.double().unbind(-2)
        b = (dim - 1) / (2 * k + (4 * k.square() + (dim - 1) ** 2).sqrt())
        square = (n.square() + m.square()).clamp_min(1e-300)
        rest = torch.exp(-square / (dim - 2)) if dim > 2 else torch.zeros_like(square)  # U^{2/(C−2)}
        t = n * ((1 - rest) / square).sqrt()
        half = b * (1 + t) / (1 - t + b * (1 + t))
        touch = b / (1 + b)  # where the envelope touches the density
        log_ratio = 2 * k * (touch - half)
        log_ratio += (dim - 1) * torch.log((half + touch - 2 * half * touch) / (2 * touch * (1 - touch)))
        first = (uniforms.double().log() < log_ratio).int().argmax(-1, keepdim=True)  # the first proposal if all fail
        angle = 2 * half.gather(-1, first).squeeze(-1).clamp(1e-30, 1).sqrt().asin()
        ctx.dim = dim
        ctx.save_for_backward(kappa, angle)
        return angle

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        kappa, angle = ctx.saved_tensors
        return grad * _angle_slope(angle, kappa, ctx.dim), None, None, None


def _angle_slope(angle: Tensor, kappa: Tensor, dim: int) -> Tensor:
    """The angle's derivative by kappa at a fixed value of its distribution function, float64 (...).

    The implicit gradient (Figurnov et al., 2018), −(∂F/∂kappa)/p(angle), is ∫(cos φ − A) p(φ)/p(angle) dφ from the
    angle to the end of its tail: 0 where the cosine is above its mean, π elsewhere, so that the integrand keeps its
    sign. No normaliser enters. At `tail` beyond the angle the density has fallen by exp(−37) (the bound of Gamma laws
    by Laurent & Massart, 2000), and the integral stops there.
    """
    _, mean_cosine, _ = _log_bessel(kappa, dim)
    tail = (37 + math.sqrt(37 * (dim - 1))) / kappa
    far_end = 2 * ((angle / 2).sin().square() + tail / 2).clamp_max(1).sqrt().asin()
    end = torch.where(angle.cos() > mean_cosine, torch.zeros_like(angle), far_end)
    nodes, weights = (values.to(angle.device) for values in _LEGENDRE)
    at = angle.unsqueeze(-1)
    phi = at + (end.unsqueeze(-1) - at) * nodes
    log_ratio = -2 * kappa.unsqueeze(-1) * ((phi + at) / 2).sin() * ((phi - at) / 2).sin()
    log_ratio += (dim - 2) * (phi.sin() / at.sin()).log()
    return (end - angle) * ((phi.cos() - mean_cosine.unsqueeze(-1)) * log_ratio.exp() * weights).sum(-1)


def _legendre(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the Gauss–Legendre rule on (0, 1), by eigenvectors (Golub & Welsch, 1969)."""
    k = torch.arange(1, count, dtype=torch.float64, device="cpu")
    beside = k / (4 * k.square() - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(beside.diag(1) + beside.diag(-1))
    return (nodes + 1) / 2, vectors[0].square()


_LEGENDRE = _legendre(NODES)


@register_kl(VonMisesFisher, HypersphericalUniform)
def _kl_von_mises_fisher_uniform(p: VonMisesFisher, q: HypersphericalUniform) -> Tensor:
    return p._kl_to_uniform().to(p.kappa.dtype)
