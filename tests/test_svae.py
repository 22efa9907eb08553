"""The S-VAE: stems, configs that cannot be, shapes at its boundary, initialisation."""

from dataclasses import replace

import pytest
import torch

from models import SVAE, SVAEConfig, project_to_sphere, stem_channels_for
from models.posteriors import Draws
from tests.helpers.nano import NANO


@pytest.mark.parametrize("patch_size, stages", [(4, 2), (8, 3), (16, 4)])
def test_patch_size_sets_the_number_of_stem_stages(patch_size, stages):
    channels = stem_channels_for(patch_size, 64)
    config = SVAEConfig(32, patch_size, 8, 64, 1, 1, 1, stem_channels=channels)
    svae = SVAE(config)
    assert len(svae.encoder.patchify[0].net) == len(svae.decoder.unpatchify[1].net) == stages
    reconstruction, kl = svae(torch.zeros(2, 3, 32, 32))
    assert reconstruction.shape == (2, 3, 32, 32) and kl.shape == ()
    assert svae.encode(torch.zeros(2, 3, 32, 32)).mode().shape == (2, (32 // patch_size) ** 2, 8)
    assert stem_channels_for(16, 512) == SVAEConfig().stem_channels


@pytest.mark.parametrize(
    "bad, word",
    [
        ({"patch_size": 8}, "patch_size 8"),
        ({"image_size": 250}, "image_size 250"),
        ({"latent_dim": 1}, "latent_dim 1"),
        ({"num_heads": 7}, "num_heads"),
        ({"width": 256}, "width 256"),
        ({"posterior": "cauchy"}, "posterior 'cauchy'"),
    ],
)
def test_impossible_configs_are_refused(bad, word):
    with pytest.raises(ValueError, match=word):
        SVAEConfig(**bad)


def test_wrong_image_and_token_shapes_are_refused():
    svae = SVAE(NANO.svae)
    with pytest.raises(ValueError, match="image_size"):
        svae.encode(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"must be \(B, 16, 8\)"):
        svae.decode(torch.zeros(1, 16, 16))


def test_kl_is_a_mean_over_batch_and_tokens():
    svae, images = SVAE(NANO.svae).eval(), torch.rand(3, 3, 32, 32) * 2 - 1
    posterior = svae.encode(images)
    assert posterior.kl().shape == (3, 16) and posterior.kl().std() > 0
    torch.testing.assert_close(svae(images)[1], posterior.kl().mean())


def flat(posterior="gaussian", **changes):
    return SVAE(replace(NANO.svae, posterior=posterior, **changes)).eval()


def test_where_the_projection_stands():
    """Rows 1 to 3 of the paper's Table 2: tokens of the AR model, and what the decoder reads."""
    latents = torch.randn(2, 16, 8)
    on_sphere = project_to_sphere(latents, NANO.svae.radius)
    for projection, tokens, read in [
        ("none", latents, latents), ("decoder", latents, on_sphere), ("all", on_sphere, on_sphere),
    ]:  # fmt: skip
        svae, seen = flat(projection=projection), []
        svae.post_quant_proj.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        torch.testing.assert_close(svae.to_tokens(latents), tokens)
        svae.decode(svae.to_tokens(latents))
        torch.testing.assert_close(seen[0], read)


@pytest.mark.parametrize("projection", ["none", "decoder"])
def test_flat_latents_are_shifted_and_scaled_for_the_ar_model_and_back_for_the_decoder(projection):
    plain, scaled = flat(projection=projection), flat(projection=projection, latent_shift=0.5, latent_scale=2.0)
    scaled.load_state_dict(plain.state_dict())
    latents = torch.randn(2, 16, 8)
    torch.testing.assert_close(scaled.to_tokens(latents), (latents - 0.5) / 2)
    torch.testing.assert_close(scaled.decode(scaled.to_tokens(latents)), plain.decode(plain.to_tokens(latents)))


@pytest.mark.parametrize(
    "bad, word",
    [
        ({"projection": "twice"}, "projection 'twice'"),
        ({"projection": "none"}, "latents of power-spherical are on the sphere"),
        ({"posterior": "vmf", "projection": "decoder"}, "latents of vmf are on the sphere"),
        ({"posterior": "fixed-sigma"}, "sigma None"),
        ({"posterior": "fixed-sigma", "sigma": 0.0}, "sigma 0.0"),
        ({"posterior": "gaussian", "sigma": 0.2}, "sigma 0.2"),
        ({"posterior": "gaussian", "projection": "none", "latent_scale": 0.0}, "latent_scale 0.0"),
        ({"latent_scale": 2.0}, "latent_scale 2.0"),
    ],
)
def test_contradictions_of_posterior_and_projection_are_refused(bad, word):
    with pytest.raises(ValueError, match=word):
        replace(NANO.svae, **bad)


def test_gradient_checkpointing_changes_nothing(monkeypatch):
    monkeypatch.setattr(torch, "get_rng_state", None)  # nothing draws inside: no state is kept for every block
    torch.manual_seed(0)
    svae, images = SVAE(NANO.svae), torch.rand(2, 3, 32, 32) * 2 - 1
    draws = Draws(torch.randn(2, 16, 18), torch.rand(2, 16, 4))
    gradients = []
    for flag in (False, True):
        svae.encoder.grad_checkpointing = svae.decoder.grad_checkpointing = flag
        svae.zero_grad()
        svae.train()(images, draws)[0].square().mean().backward()
        gradients.append(svae.encoder.conv_in.weight.grad.clone())
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)
