"""Posteriors: every row of POSTERIORS keeps to what the S-VAE asks of it."""

import pytest
import torch

from models import HypersphericalUniform, PowerSpherical
from models.posteriors import POSTERIORS, Draws
from models.sphere import kl_divergence

C = 8


def raw_and_draws(posterior, rows=64):
    torch.manual_seed(0)
    normals, uniforms = posterior.num_draws(C)
    draws = Draws(torch.randn(2, rows, normals), torch.rand(2, rows, uniforms))
    return torch.randn(2, rows, posterior.num_outputs(C)), draws


@pytest.mark.parametrize("name", list(POSTERIORS))
def test_what_the_svae_asks_of_a_posterior(name):
    raw, draws = raw_and_draws(POSTERIORS[name])
    posterior = POSTERIORS[name](raw.requires_grad_())
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
