"""The von Mises–Fisher law against 50-digit arithmetic, numerical integrals and the derivatives of its moments."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from torch.autograd import gradcheck
from torch.distributions import kl_divergence

from models import HypersphericalUniform, PowerSpherical, VonMisesFisher, project_to_sphere
from models.sphere import GAMMA_ROUNDS, log_area
from models.von_mises_fisher import _angle_slope, _log_bessel, draws_per_sample

DIMS = [2, 3, 4, 5, 8, 16, 17, 32, 64, 100, 128]
KAPPAS = [1e-3, 1e-2, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 70.0, 100.0, 300.0, 1e3, 1e4, 3e4, 1e5]


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def axis(dim, sign=1.0):
    return torch.cat([f64(sign), torch.zeros(dim - 1, dtype=torch.float64)])


def random_direction(dim, seed=0):
    return project_to_sphere(torch.randn(dim, generator=torch.Generator().manual_seed(seed)).double(), 1.0)


def law(mu, kappa, *batch):
    return VonMisesFisher(mu.expand(*batch, -1), torch.full(batch, kappa, dtype=mu.dtype))


def draws(dim, *batch, seed=0, dtype=torch.float64):
    generator, (normals, uniforms) = torch.Generator().manual_seed(seed), draws_per_sample(dim)
    options = dict(generator=generator, dtype=dtype)
    return torch.randn(*batch, normals, **options), torch.rand(*batch, uniforms, **options)


def angle_law(dim, kappa, points=100_001):
    """Angles from 0 on and the density there, by the trapezoid rule; the start of the range holds all of the law."""
    end = min(math.pi, 12 * math.sqrt(dim / kappa))
    angle = np.linspace(0, end, points)
    density = np.exp(-2 * kappa * np.sin(angle / 2) ** 2) * np.sin(angle) ** (dim - 2)
    return angle, density / scipy.integrate.trapezoid(density, angle)


@pytest.mark.parametrize("dim", DIMS)
def test_against_50_digits(dim):
    """All to 1e-10 of their value, for kappa 1e-3 to 1e5; the entropy, which crosses 0, to 1e-10 of max(1, itself)."""
    mp = pytest.importorskip("mpmath")
    kappa = f64(*KAPPAS)
    p = VonMisesFisher(axis(dim).expand(len(kappa), -1), kappa)
    ours = [*_log_bessel(kappa, dim), kl_divergence(p, HypersphericalUniform(dim)), p.entropy(), p.log_prob(p.mu)]
    with mp.workdps(50):
        v, log_surface = mp.mpf(dim) / 2 - 1, mp.log(2 * mp.pi ** (mp.mpf(dim) / 2) / mp.gamma(mp.mpf(dim) / 2))
        for row, k in zip(torch.stack(ours, 1).tolist(), map(mp.mpf, KAPPAS), strict=True):
            bessel = mp.besseli(v, k)
            log_m = mp.loggamma(v + 1) + v * mp.log(2 / k) + mp.log(bessel)
            ratio = mp.besseli(v + 1, k) / bessel
            kl = k * ratio - log_m
            expected = [log_m, ratio, 1 - ratio**2 - (dim - 1) * ratio / k, kl]
            relative = [abs(got / value - 1) for got, value in zip(row, expected)]
            for got, value in zip(row[4:], [log_surface - kl, k - log_m - log_surface], strict=True):
                relative.append(abs(got - value) / max(1, abs(value)))
            assert max(relative) < 1e-10, (float(k), [float(error) for error in relative])


def test_closed_forms_in_three_dimensions():
    kappa = f64(0.01, 1, 30, 300)
    log_m, ratio, slope = _log_bessel(kappa, 3)
    assert torch.allclose(log_m, (kappa.sinh() / kappa).log(), rtol=1e-10, atol=0)
    assert torch.allclose(ratio, 1 / kappa.tanh() - 1 / kappa, rtol=1e-10, atol=0)
    assert torch.allclose(slope, 1 / kappa.square() - 1 / kappa.sinh().square(), rtol=1e-8, atol=0)


@pytest.mark.parametrize("dim", [2, 3, 16, 128])
def test_limits(dim):
    """KL is kappa²/2C near the uniform law and that of a Gaussian on the tangent plane near a point."""
    p = VonMisesFisher(axis(dim).expand(2, -1), f64(1e-6, 1e8))
    small, large = kl_divergence(p, HypersphericalUniform(dim)).tolist()
    assert small == pytest.approx(1e-12 / (2 * dim), rel=1e-6)
    assert large == pytest.approx(log_area(dim) - (dim - 1) / 2 * math.log(2 * math.pi * math.e / 1e8), rel=1e-5)
    assert p.entropy()[0].item() == pytest.approx(log_area(dim), rel=1e-10)
    kappa = torch.logspace(-3, 5, 200, dtype=torch.float64)
    p = VonMisesFisher(axis(dim).expand(200, -1), kappa)
    assert (kl_divergence(p, HypersphericalUniform(dim)).diff() > 0).all()


@pytest.mark.parametrize("dim", [2, 3, 16, 64])
def test_density_against_scipy(dim):
    for kappa in (0.5, 30.0, 1e3):
        x = law(random_direction(dim), kappa, 50).rsample()
        expected = scipy.stats.vonmises_fisher(random_direction(dim).numpy(), kappa).logpdf(x.numpy())
        np.testing.assert_allclose(law(random_direction(dim), kappa, 50).log_prob(x), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dim, kappa", [(2, 1.0), (5, 2.0), (16, 50.0), (64, 1e4)])
def test_kl_is_the_mean_of_the_log_ratio(dim, kappa):
    torch.manual_seed(0)
    p, uniform = law(random_direction(dim), kappa, 20_000), HypersphericalUniform(dim)
    x = p.rsample()
    ratio = p.log_prob(x) - uniform.log_prob(x)
    assert (ratio.mean() - kl_divergence(p, uniform)[0]).abs() < 5 * ratio.std() / math.sqrt(len(x))


@pytest.mark.parametrize("how", ["rsample", "rsample_from"])
@pytest.mark.parametrize("kappa", [1e-3, 1.0, 40.0, 1e4])
@pytest.mark.parametrize("dim", [2, 3, 16, 64])
def test_samples_have_the_law(dim, kappa, how):
    torch.manual_seed(1)
    count, mu = 8_000, random_direction(dim, 1)
    p = law(mu, kappa, count)
    x = p.rsample() if how == "rsample" else p.rsample_from(*draws(dim, count))
    assert torch.allclose(x.norm(dim=-1), torch.ones_like(x[:, 0]))
    angle, density = angle_law(dim, kappa)
    cdf = scipy.integrate.cumulative_trapezoid(density, angle, initial=0)
    sampled = 2 * ((x - mu).norm(dim=-1) / 2).clamp_max(1).asin()
    assert scipy.stats.kstest(sampled, lambda a: np.interp(a, angle, cdf)).pvalue > 1e-4
    standard_error = x.std(0) / math.sqrt(count)
    assert ((x.mean(0) - p.mean[0]).abs() < 5 * standard_error).all()


@pytest.mark.parametrize("dim, kappa", [(3, 2.0), (6, 10.0)])
def test_samples_are_symmetric_around_the_axis(dim, kappa):
    """Directions around mu are uniform (mean 0, covariance of the tangent plane) and independent of the cosine."""
    count, mu = 40_000, random_direction(dim, 2)
    x = law(mu, kappa, count).rsample_from(*draws(dim, count, seed=3))
    cosine = x @ mu
    around = project_to_sphere(x - cosine.unsqueeze(-1) * mu, 1.0)
    plane = torch.eye(dim, dtype=torch.float64) - torch.outer(mu, mu)
    centred = cosine - cosine.mean()
    second = around.unsqueeze(-1) * around.unsqueeze(-2) - plane / (dim - 1)
    for moments in (around, second.flatten(1), centred.unsqueeze(-1) * around):
        assert (moments.mean(0).abs() < 5 * moments.std(0) / math.sqrt(count) + 1e-12).all()


@pytest.mark.parametrize("dim", [2, 3, 5, 16, 128])
@pytest.mark.parametrize("kappa", [1e-3, 1.0, 20.0, 1e3, 1e5])
def test_angle_slope_is_the_derivative_of_the_quantile(dim, kappa):
    """−(∂F/∂kappa)/p by central differences of the trapezoid rule's F, between the quantiles 0.0001 and 0.9999."""
    h = 1e-4 * max(kappa, 1)
    tables = []
    for k in (kappa - h, kappa, kappa + h):
        angle, _ = angle_law(dim, kappa, 400_001)
        density = np.exp(-2 * k * np.sin(angle / 2) ** 2) * np.sin(angle) ** (dim - 2)
        cdf = scipy.integrate.cumulative_trapezoid(density, angle, initial=0)
        tables.append((density / cdf[-1], cdf / cdf[-1]))
    (_, below), (density, cdf), (_, above) = tables
    at = np.searchsorted(cdf, [1e-4, 0.01, 0.2, 0.5, 0.8, 0.99, 0.9999])
    expected = -(above - below)[at] / (2 * h) / density[at]
    slope = _angle_slope(torch.from_numpy(angle[at]), torch.full((len(at),), kappa, dtype=torch.float64), dim)
    np.testing.assert_allclose(slope, expected, rtol=1e-4)


@pytest.mark.parametrize("dim", [2, 3, 16, 128])
def test_angle_slope_at_both_ends(dim):
    """Near 0 it is −angle·(1 − A)/(C−1) and near π the mirror image: over the other tail no digit would be left."""
    kappa, angle = torch.full((3,), 5.0, dtype=torch.float64), f64(1e-12, 1e-8, 1e-5)
    _, mean_cosine, _ = _log_bessel(kappa, dim)
    near_0, near_pi = _angle_slope(angle, kappa, dim), _angle_slope(math.pi - angle[1:], kappa[1:], dim)
    torch.testing.assert_close(near_0, -angle * (1 - mean_cosine) / (dim - 1), rtol=1e-6, atol=0)
    torch.testing.assert_close(near_pi, -angle[1:] * (1 + mean_cosine[1:]) / (dim - 1), rtol=1e-6, atol=0)


def cosine_slopes(kind, dim, kappa, count=40_000, how="rsample_from"):
    """d(mu·x)/dkappa of each sample."""
    k = torch.full((count,), kappa, dtype=torch.float64, requires_grad=True)
    p = kind(axis(dim).expand(count, -1), k)
    if how == "rsample":
        x = p.rsample()
    elif kind is VonMisesFisher:
        x = p.rsample_from(*draws(dim, count, seed=5))
    else:
        normals, uniforms = torch.randn(count, 2 * (dim - 1) + GAMMA_ROUNDS).double(), torch.rand(count, GAMMA_ROUNDS)
        x = p.rsample_from(normals, uniforms.double())
    return torch.autograd.grad(x[:, 0].sum(), k)[0]


def slopes_through_the_accepted_proposal(dim, kappa, count=40_000):
    """The estimator found in public code: Wood's accepted proposal differentiated as if acceptance had no slope."""
    k = torch.full((count, 1), kappa, dtype=torch.float64, requires_grad=True)
    b = (-2 * k + (4 * k**2 + (dim - 1) ** 2).sqrt()) / (dim - 1)
    beta = torch.distributions.Beta(f64((dim - 1) / 2), f64((dim - 1) / 2)).sample((count, 24)).squeeze(-1)
    w = (1 - (1 + b) * beta) / (1 - (1 - b) * beta)
    x0 = (1 - b) / (1 + b)
    log_ratio = k * (w - x0) + (dim - 1) * ((1 - x0 * w) / (1 - x0**2)).log()
    first = (torch.rand(count, 24).log() < log_ratio).int().argmax(-1, keepdim=True)
    return torch.autograd.grad(w.gather(-1, first).sum(), k)[0].squeeze(-1)


def off_by(slopes, expected):
    """(relative bias, the same in standard errors)."""
    difference = slopes.mean() - expected
    return (difference / expected).item(), (difference / slopes.std() * math.sqrt(len(slopes))).item()


def slope_of_mean(dim, kappa):
    return _log_bessel(f64(kappa), dim)[2].item()


@pytest.mark.parametrize("dim, kappa", [(2, 1.0), (5, 2.0), (16, 1.0), (16, 5.0), (16, 100.0), (64, 1e4)])
def test_slopes_of_the_cosine_average_to_that_of_its_mean(dim, kappa):
    _, errors = off_by(cosine_slopes(VonMisesFisher, dim, kappa), slope_of_mean(dim, kappa))
    assert abs(errors) < 4.5


@pytest.mark.parametrize("dim, kappa, bias", [(5, 2.0, -0.13), (16, 5.0, -0.03)])
def test_the_same_identity_finds_the_bias_of_the_accepted_proposal(dim, kappa, bias):
    torch.manual_seed(6)
    relative, errors = off_by(slopes_through_the_accepted_proposal(dim, kappa), slope_of_mean(dim, kappa))
    assert errors < -10
    assert relative == pytest.approx(bias, abs=0.01)


@pytest.mark.parametrize("how", ["rsample", "rsample_from"])
@pytest.mark.parametrize("dim, kappa", [(2, 1.0), (16, 1.0), (16, 100.0)])
def test_power_spherical_passes_the_same_identity(dim, kappa, how):
    torch.manual_seed(7)
    slopes = cosine_slopes(PowerSpherical, dim, kappa, how=how)
    _, errors = off_by(slopes, (dim - 1) / (kappa + dim - 1) ** 2)
    assert abs(errors) < 4.5


@pytest.mark.parametrize("dim", [2, 5, 32])
def test_gradcheck(dim):
    kappa = f64(1e-2, 5.0, 400.0).requires_grad_()
    mu = torch.stack([random_direction(dim, seed) for seed in range(3)]).requires_grad_()
    x = torch.stack([random_direction(dim, seed) for seed in range(3, 6)]).requires_grad_()

    def law(mu, kappa):
        return VonMisesFisher(mu, kappa, validate_args=False)

    uniform = HypersphericalUniform(dim)
    assert gradcheck(lambda mu, kappa: kl_divergence(law(mu.detach(), kappa), uniform), (mu, kappa))
    assert gradcheck(lambda mu, kappa: law(mu.detach(), kappa).entropy(), (mu, kappa))
    assert gradcheck(lambda mu, kappa: law(mu, kappa).mean, (mu, kappa))
    assert gradcheck(lambda mu, kappa, x: law(mu, kappa).log_prob(x), (mu, kappa, x))
    fixed = draws(dim, 3)
    assert gradcheck(lambda mu: law(mu, kappa.detach()).rsample_from(*fixed), (mu,))


def test_kl_slope_at_both_ends():
    """kappa·A' keeps its digits: kappa/C near 0 and (C−1)/2kappa at 1e8, where 1 − A² − (C−1)A/kappa has lost all."""
    kappa = f64(1e-6, 1e8).requires_grad_()
    kl_divergence(VonMisesFisher(axis(16).expand(2, -1), kappa), HypersphericalUniform(16)).sum().backward()
    np.testing.assert_allclose(kappa.grad, [1e-6 / 16, 15 / 2e8], rtol=1e-6)


def test_second_derivatives_are_refused():
    kappa = f64(1.0).requires_grad_()
    value = kl_divergence(VonMisesFisher(axis(16).unsqueeze(0), kappa), HypersphericalUniform(16)).sum()
    (slope,) = torch.autograd.grad(value, kappa, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("dim, kappa", [(2, 1.0), (16, 50.0)])
def test_gradients_of_expectations(dim, kappa):
    """E[x] = A·mu in float32: pathwise gradients average to its derivatives by kappa and along the sphere by mu."""
    count, weights = 40_000, random_direction(dim, 5).float()
    mu = random_direction(dim, 3).float().expand(count, -1).clone().requires_grad_()
    k = torch.full((count,), kappa, requires_grad=True)
    p = VonMisesFisher(mu, k)
    (p.rsample_from(*draws(dim, count, seed=4, dtype=torch.float32)) @ weights).sum().backward()
    assert abs(off_by(k.grad, slope_of_mean(dim, kappa) * (mu[0] @ weights).detach())[1]) < 4.5
    tangent = torch.eye(dim) - torch.outer(mu[0], mu[0]).detach()
    gradient, mean_cosine = mu.grad @ tangent, _log_bessel(f64(kappa), dim)[1].item()
    standard_error = gradient.std(0) / math.sqrt(count)
    assert ((gradient.mean(0) - mean_cosine * tangent @ weights).abs() < 5 * standard_error + 1e-6).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dim", [2, 16])
def test_at_the_poles(dim, sign):
    torch.manual_seed(0)
    mu = axis(dim, sign).float().requires_grad_()
    kappa = torch.tensor(1e5, requires_grad=True)
    x = VonMisesFisher(mu, kappa).rsample((4000,))
    expected = 2 * (1 - _log_bessel(f64(1e5), dim)[1].item())
    assert (x - mu).square().sum(-1).mean().item() == pytest.approx(expected, rel=0.15)
    x.sum().backward()
    assert mu.grad.isfinite().all() and kappa.grad.isfinite()


def test_shapes_and_draws():
    """Samples keep their draws' addresses: a batch gives what its elements give, draws may have axes in front."""
    assert draws_per_sample(16) == (63, 24)
    mu = torch.stack([random_direction(16, seed) for seed in range(6)]).view(2, 3, 16)
    p = VonMisesFisher(mu, torch.linspace(1, 50, 6, dtype=torch.float64).view(2, 3).requires_grad_())
    assert p.rsample().shape == p.mean.shape == (2, 3, 16)
    assert p.rsample((4, 5)).shape == (4, 5, 2, 3, 16)
    assert p.entropy().shape == kl_divergence(p, HypersphericalUniform(16)).shape == (2, 3)
    normals, uniforms = draws(16, 4, 2, 3)
    x = p.rsample_from(normals, uniforms)
    assert p.log_prob(x).shape == (4, 2, 3)
    assert torch.equal(p.rsample_from(normals[1], uniforms[1]), x[1])
    one = VonMisesFisher(p.mu[1, 2], p.kappa[1, 2])
    assert torch.allclose(one.rsample_from(normals[3, 1, 2], uniforms[3, 1, 2]), x[3, 1, 2], rtol=0, atol=1e-14)
    x.sum().backward()
    with pytest.raises(RuntimeError, match="split"):
        p.rsample_from(normals[..., 1:], uniforms)


def test_draws_at_their_ends_give_finite_samples_and_gradients():
    """No proposal accepted, normals of 0 (cosine 0 of the envelope), a cosine of exactly 1 and −1 where C = 2."""
    for dim in (2, 16):
        normals, uniforms = draws(dim, 4)
        uniforms[0] = 1
        normals[1, dim - 1 :] = 0
        pairs = normals[:, dim - 1 :].unflatten(-1, (2, -1))
        pairs[2:, 1] = 0
        pairs[2, 0], pairs[3, 0] = -1e-3, 1e-3
        kappa = torch.full((4,), 2.0, dtype=torch.float64, requires_grad=True)
        x = VonMisesFisher(random_direction(dim).expand(4, -1), kappa).rsample_from(normals, uniforms)
        x.sum().backward()
        assert torch.allclose(x.norm(dim=-1), f64(1.0)) and kappa.grad.isfinite().all()


def test_float32_under_autocast_and_from_bfloat16():
    mu = project_to_sphere(torch.randn(4, 16), 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        p = VonMisesFisher(mu.bfloat16(), torch.ones(4).bfloat16(), validate_args=False)
        values = [p.rsample(), p.rsample_from(*draws(16, 4)), p.log_prob(mu), p.entropy(), p.mean]
        values.append(kl_divergence(p, HypersphericalUniform(16)))
    assert all(value.dtype == torch.float32 for value in values)


def test_bad_parameters_are_refused():
    with pytest.raises(ValueError, match="mu"):
        VonMisesFisher(torch.ones(2, 16), torch.ones(2))
    with pytest.raises(ValueError, match="kappa"):
        VonMisesFisher(axis(16), f64(-1.0)[0])
    with pytest.raises(ValueError, match="shape"):
        VonMisesFisher(axis(16), torch.ones(3))
