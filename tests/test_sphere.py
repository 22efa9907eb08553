"""The Power Spherical law against numerical integrals, scipy's laws and analytic gradients."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch.distributions import kl_divergence

from models import HypersphericalUniform, PowerSpherical, project_to_sphere
from models.sphere import GAMMA_ROUNDS, _GammaFromDraws

KAPPAS = [1e-3, 0.5, 1.0, 30.0, 1e3, 1e4]
DIMS = [2, 3, 8, 16, 64]


def axis(dim, sign=1.0):
    return torch.cat([torch.tensor([sign]), torch.zeros(dim - 1)])


def law(mu, kappa, count):
    return PowerSpherical(mu.expand(count, -1), torch.full((count,), kappa))


def draws(count, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normals = torch.randn(count, 2 * (dim - 1) + GAMMA_ROUNDS, generator=generator)
    return normals, torch.rand(count, GAMMA_ROUNDS, generator=generator).clamp_min(1e-7)


def random_direction(dim, seed=0):
    return project_to_sphere(torch.randn(dim, generator=torch.Generator().manual_seed(seed)), 1.0)


def test_projection_keeps_direction_and_sets_the_norm():
    z = torch.randn(5, 7, 16)
    projected = project_to_sphere(z, 4.0)
    assert torch.allclose(projected.norm(dim=-1), torch.tensor(4.0))
    assert torch.allclose(projected / 4, z / z.norm(dim=-1, keepdim=True))
    assert torch.equal(project_to_sphere(torch.zeros(3), 4.0), torch.zeros(3))
    assert project_to_sphere(z.bfloat16(), 4.0).dtype == torch.float32


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kappa", KAPPAS)
def test_log_density_and_entropy_against_integrals(kappa, dim):
    """The cosine's density is exp(log_prob) times the area of the slice sphere: it integrates to 1, −log to entropy."""
    dist = PowerSpherical(axis(dim), torch.tensor(kappa))
    end = min(math.pi - 1e-6, 24 * math.sqrt(dim / (kappa + dim)))
    angle = torch.linspace(1e-6, end, 200_001, dtype=torch.float64)
    points = torch.zeros(len(angle), dim, dtype=torch.float64)
    points[:, 0], points[:, 1] = angle.cos(), angle.sin()
    log_prob = PowerSpherical(axis(dim).double(), torch.tensor(kappa, dtype=torch.float64)).log_prob(points)
    log_slice = math.log(2) + (dim - 1) / 2 * math.log(math.pi) - math.lgamma((dim - 1) / 2)  # area of S^{dim-2}
    density = (log_prob + log_slice + (dim - 2) * angle.sin().clamp_min(1e-300).log()).exp()
    assert torch.trapezoid(density, angle).item() == pytest.approx(1, abs=2e-4)
    entropy = -torch.trapezoid(density * log_prob, angle).item()
    assert dist.entropy().item() == pytest.approx(entropy, abs=2e-3 * max(1, abs(entropy)))


@pytest.mark.parametrize("dim", DIMS)
def test_kl_to_uniform(dim):
    kl = kl_divergence(PowerSpherical(axis(dim).expand(6, -1), torch.tensor(KAPPAS)), HypersphericalUniform(dim))
    assert kl.shape == (6,)
    assert kl[0].abs() < 1e-4  # nearly uniform
    assert (kl.diff() > 0).all()
    uniform = HypersphericalUniform(dim)
    samples = uniform.rsample((20_000,))
    assert torch.allclose(samples.norm(dim=-1), torch.tensor(1.0))
    assert torch.allclose(uniform.log_prob(samples), -uniform.entropy())


# the S-VAE's kappa is at least 1, and addressed draws are for it
LAWS = [("rsample", 1e-3), *((how, kappa) for how in ("rsample", "rsample_from") for kappa in (1.0, 40.0, 1e4))]


@pytest.mark.parametrize("how, kappa", LAWS)
@pytest.mark.parametrize("dim", [2, 3, 16, 64])
def test_samples_have_the_law(how, kappa, dim):
    torch.manual_seed(1)
    count, mu = 20_000, random_direction(dim)
    dist = law(mu, kappa, count)
    x = dist.rsample() if how == "rsample" else dist.rsample_from(*draws(count, dim))
    assert torch.allclose(x.norm(dim=-1), torch.tensor(1.0), atol=1e-5)
    b = (dim - 1) / 2
    cosine = (x @ mu).double().clamp(-1, 1)
    if kappa < 1e4:  # there float32 cosines crowd at 1
        assert scipy.stats.kstest((1 + cosine) / 2, scipy.stats.beta(kappa + b, b).cdf).pvalue > 1e-4
    standard_error = x.std(0) / math.sqrt(count)
    assert ((x.mean(0) - dist.mean[0]).abs() < 5 * standard_error + 1e-6).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("nudge", [0.0, 1e-7, 1e-5, 1e-3])
@pytest.mark.parametrize("dim", [2, 16])
def test_at_and_near_the_poles(sign, nudge, dim):
    torch.manual_seed(0)
    raw = axis(dim, sign) + nudge * torch.ones(dim)
    mu = project_to_sphere(raw, 1.0).requires_grad_()
    kappa = torch.tensor(1e4, requires_grad=True)
    dist = PowerSpherical(mu.expand(4000, -1), kappa.expand(4000))
    x = dist.rsample()
    squared_distance = (x - mu).square().sum(-1)  # = 2 (1 − cosine), without cancellation
    expected = 2 * (1 - 1e4 / (1e4 + dim - 1))
    assert squared_distance.mean().item() == pytest.approx(expected, rel=0.15)
    x.sum().backward()
    assert mu.grad.isfinite().all() and kappa.grad.isfinite()


@pytest.mark.parametrize("how", ["rsample", "rsample_from"])
@pytest.mark.parametrize("dim, kappa", [(2, 1.0), (3, 5.0), (16, 1.0), (16, 50.0), (64, 1000.0)])
def test_gradients_of_expectations(how, dim, kappa):
    """E[x] = κ/(κ + C − 1)·mu: pathwise gradients average to its derivatives by kappa and along the sphere by mu."""
    torch.manual_seed(2)
    count = 100_000
    mu = random_direction(dim, 3).expand(count, -1).clone().requires_grad_()
    k = torch.full((count,), kappa, requires_grad=True)
    dist = PowerSpherical(mu, k)
    x = dist.rsample() if how == "rsample" else dist.rsample_from(*draws(count, dim, 4))
    weights = random_direction(dim, 5)
    (x @ weights).sum().backward()

    mean_length = kappa / (kappa + dim - 1)
    slope = (dim - 1) / (kappa + dim - 1) ** 2 * (mu[0] @ weights)
    assert (k.grad.mean() - slope).abs() < 5 * k.grad.std() / math.sqrt(count) + 1e-7

    tangent = torch.eye(dim) - torch.outer(mu[0], mu[0]).detach()
    gradient = mu.grad @ tangent
    expected = mean_length * tangent @ weights
    assert ((gradient.mean(0) - expected).abs() < 5 * gradient.std(0) / math.sqrt(count) + 1e-6).all()


def test_gamma_from_draws_gradient_is_the_implicit_one():
    """dx/da at a fixed probability, against scipy's inverse of the incomplete gamma function."""
    a = torch.tensor([1.0, 1.5, 8.5, 40.0, 1e4], dtype=torch.float64).repeat_interleave(50).requires_grad_()
    normals, uniforms = torch.randn(250, GAMMA_ROUNDS), torch.rand(250, GAMMA_ROUNDS)
    x = _GammaFromDraws.apply(a, normals.double(), uniforms.double())
    x.sum().backward()
    shape, value = a.detach().numpy(), x.detach().numpy()
    p = scipy.special.gammainc(shape, value)
    inside = (p > 1e-3) & (p < 1 - 1e-3)
    h = 1e-3 * np.sqrt(shape)
    slope = (scipy.special.gammaincinv(shape + h, p) - scipy.special.gammaincinv(shape - h, p)) / (2 * h)
    assert inside.sum() > 240
    np.testing.assert_allclose(a.grad.numpy()[inside], slope[inside], rtol=1e-4)


def test_float32_under_autocast_and_from_bfloat16():
    mu = project_to_sphere(torch.randn(4, 16), 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        dist = PowerSpherical(mu.bfloat16(), torch.ones(4).bfloat16(), validate_args=False)
        values = [dist.rsample(), dist.log_prob(mu), dist.entropy(), dist.mean]
        values.append(kl_divergence(dist, HypersphericalUniform(16)))
    assert all(value.dtype == torch.float32 for value in values)


def test_bad_parameters_are_refused():
    with pytest.raises(ValueError, match="mu"):
        PowerSpherical(torch.ones(2, 16), torch.ones(2))
    with pytest.raises(ValueError, match="kappa"):
        PowerSpherical(axis(16), torch.tensor(-1.0))
    with pytest.raises(ValueError, match="shape"):
        PowerSpherical(axis(16), torch.ones(3))


def test_kl_is_the_integral_over_the_cosine():
    """Closed form on S^7 by integration of the density along mu."""
    kappa = torch.rand(()) * 30 + 1
    law = PowerSpherical(torch.nn.functional.normalize(torch.randn(8), dim=-1), kappa)
    cosine = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    density = (1 + cosine) ** kappa.double() * (1 - cosine**2) ** 2.5
    density = density / torch.trapezoid(density, cosine)
    uniform = (1 - cosine**2) ** 2.5
    uniform = uniform / torch.trapezoid(uniform, cosine)
    ratio = torch.where(density > 0, density / uniform.clamp_min(1e-300), 1.0)
    integral = torch.trapezoid(density * ratio.clamp_min(1e-300).log(), cosine)
    assert kl_divergence(law, HypersphericalUniform(8)).item() == pytest.approx(integral.item(), rel=1e-3)
