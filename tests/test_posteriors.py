"""Posteriors: every row of POSTERIORS keeps to what the S-VAE asks of it."""

import pytest
import torch

from models import HypersphericalUniform, PowerSpherical
from models.posteriors import POSTERIORS, Draws
from models.sphere import kl_divergence

C = 8


def made(name, raw):
    return POSTERIORS[name](raw, 0.3) if POSTERIORS[name].takes_sigma else POSTERIORS[name](raw)


def raw_and_draws(posterior, rows=64):
    torch.manual_seed(0)
    normals, uniforms = posterior.num_draws(C)
    draws = Draws(torch.randn(2, rows, normals), torch.rand(2, rows, uniforms))
    return torch.randn(2, rows, posterior.num_outputs(C)), draws


@pytest.mark.parametrize("name", list(POSTERIORS))
def test_what_the_svae_asks_of_a_posterior(name):
    raw, draws = raw_and_draws(POSTERIORS[name])
    posterior = made(name, raw.requires_grad_())
    tokens = posterior.sample_from(draws)
    assert tokens.shape == posterior.sample().shape == posterior.mode().shape == (2, 64, C)
    assert tokens.dtype == torch.float32 and torch.equal(tokens, posterior.sample_from(draws))
    assert posterior.kl().shape == (2, 64) and (posterior.kl() >= 0).all()
    (tokens.sum() + posterior.kl().sum()).backward()
    assert raw.grad.isfinite().all() and (raw.grad.flatten(0, 1).abs().sum(0) > 0).all()


def test_power_spherical_tokens_lie_on_the_sphere_around_their_mode():
    raw, draws = raw_and_draws(POSTERIORS["power-spherical"])
    raw[..., -1] = 1e4
    posterior = POSTERIORS["power-spherical"](raw.bfloat16())
    assert torch.allclose(posterior.sample_from(draws).norm(dim=-1), torch.tensor(C**0.5))
    assert torch.allclose(posterior.sample_from(draws), posterior.mode(), atol=0.2)
    law = posterior.law
    assert isinstance(law, PowerSpherical) and law.kappa.dtype == torch.float32
    assert torch.equal(posterior.kl(), kl_divergence(law, HypersphericalUniform(C)))


@pytest.mark.parametrize("name", ["gaussian", "fixed-sigma"])
def test_flat_posteriors_are_normals_with_their_kl(name):
    raw, _ = raw_and_draws(POSTERIORS[name], rows=1)
    posterior = made(name, raw)
    law = torch.distributions.Normal(posterior.mean, posterior.deviation)
    prior = torch.distributions.Normal(torch.zeros(C), torch.ones(C))
    torch.testing.assert_close(posterior.kl(), torch.distributions.kl_divergence(law, prior).sum(-1))
    normals = torch.randn(20_000, 1, 1, C)
    latents = posterior.sample_from(Draws(normals, normals[..., :0]))
    torch.testing.assert_close(latents.mean(0), posterior.mean, atol=0.05, rtol=0)
    torch.testing.assert_close(latents.std(0), posterior.deviation, atol=0, rtol=0.03)


def test_a_random_sigma_is_one_of_each_image_and_of_the_asked_size_on_average():
    raw, _ = raw_and_draws(POSTERIORS["random-sigma"], rows=1)
    posterior = made("random-sigma", raw[:1].expand(20_000, 4, -1))
    normals = torch.randn(20_000, 4, C + 1)
    noise = posterior.sample_from(Draws(normals, normals[..., :0])) - posterior.mean
    deviations = (noise / normals[..., :-1]).flatten(1)  # (B, P·C)
    torch.testing.assert_close(deviations, deviations[:, :1].expand_as(deviations), atol=1e-3, rtol=1e-2)
    assert deviations[:, 0].abs().mean().item() == pytest.approx(0.3, rel=0.02)
    assert deviations[:, 0].mean().item() == pytest.approx(0, abs=0.01)

    laws = torch.distributions.Normal(posterior.mean[:, 0], deviations[:, :1].abs())
    kl = torch.distributions.kl_divergence(laws, torch.distributions.Normal(torch.zeros(C), torch.ones(C))).sum(-1)
    assert posterior.kl()[0, 0].item() == pytest.approx(kl.mean().item(), abs=0.3)


def test_the_gaussians_log_variance_is_clamped():
    raw = torch.tensor([0.0] * C + [1e4] * (C // 2) + [-1e4] * (C // 2)).view(1, 1, -1).requires_grad_()
    posterior = POSTERIORS["gaussian"](raw)
    assert posterior.kl().isfinite().all() and posterior.deviation.min() > 0


def spread_around_the_axis(name, kappa_or_sd):
    """Standard deviations of directions along two axes that are at right angles to the mean direction."""
    torch.manual_seed(0)
    mean = torch.zeros(C)
    mean[0] = C**0.5
    if name == "gaussian":
        raw = torch.cat([mean, 2 * torch.tensor(kappa_or_sd).log()])
    else:
        raw = torch.cat([mean, torch.tensor([kappa_or_sd])])
    posterior = POSTERIORS[name](raw.expand(1, 50_000, -1))
    normals, uniforms = POSTERIORS[name].num_draws(C)
    latents = posterior.sample_from(Draws(torch.randn(1, 50_000, normals), torch.rand(1, 50_000, uniforms)))
    directions = torch.nn.functional.normalize(latents, dim=-1)[0]
    return directions[:, 1].std(), directions[:, 2].std()


@pytest.mark.parametrize("name", ["power-spherical", "vmf"])
def test_spherical_posteriors_are_symmetric_around_their_axis(name):
    a, b = spread_around_the_axis(name, 20.0)
    assert abs(a / b - 1) < 0.02


def test_a_normalised_gaussian_is_not_symmetric_around_its_mean():
    a, b = spread_around_the_axis("gaussian", [0.2, 0.6, 0.1, 0.2, 0.2, 0.2, 0.2, 0.2])
    assert a / b > 3
