"""The whole model at a toy size against arrays measured on the reference implementation (tests/data/golden_small.npz).

Weights and inputs are functions of names: see `parameter`, `normal` and `uniform`. Tolerance 1e-4 of the largest value.
"""

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import kl_divergence

from models import (
    Phases,
    SamplingSettings,
    SphereAR,
    SphereARConfig,
    SVAEConfig,
    checkpoint_state,
    generate_tokens,
    project_to_sphere,
)
from models.sphere import HypersphericalUniform

SVAE_TOY = SVAEConfig(
    image_size=64, width=64, num_heads=1, encoder_layers=2, decoder_layers=2, stem_channels=(64, 32, 32, 48, 64)
)
TOY = SphereARConfig(
    num_layers=2, num_heads=4, width=64, head_blocks=4, head_width=48, head_adaln_sets=2,
    svae=SVAE_TOY, num_classes=10, num_class_tokens=4,
)  # fmt: skip


def random_state(tag):
    return np.random.RandomState(zlib.crc32(tag.encode()))


def normal(tag, *shape):
    return torch.from_numpy(np.asarray(random_state(tag).randn(*shape), dtype=np.float32))


def uniform(tag, *shape):
    return torch.from_numpy(np.asarray(random_state(tag).rand(*shape), dtype=np.float32))


def parameter(name, shape):
    a = random_state(name).randn(*shape).astype(np.float32)
    if len(shape) == 1:
        return 0.1 * a + (1 if name.endswith("weight") else 0)
    if name.endswith("token.weight") or "embedding" in name or "pos_for_diff" in name:
        return 0.5 * a
    return a / np.sqrt(np.prod(shape[1:]))


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent / "data" / "golden_small.npz", allow_pickle=False) as arrays:
        return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}


@pytest.fixture(scope="module")
def model():
    model = SphereAR(TOY).eval().requires_grad_(False)
    for name, value in model.named_parameters():
        value.copy_(torch.from_numpy(np.asarray(parameter(name, tuple(value.shape)), dtype=np.float32)))
    return model


@pytest.fixture(scope="module")
def images():
    return normal("small/images", 2, 3, 64, 64).tanh()


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_encoder(model, images, golden):
    assert_close(model.vae.encoder(images), golden["encoder_out"])


def test_posterior(model, images, golden):
    posterior = model.vae.encode(images).law
    assert_close(posterior.mu, golden["mu"])
    assert_close(posterior.kappa, golden["kappa"])
    assert_close(kl_divergence(posterior, HypersphericalUniform(16)), golden["kl"])
    assert_close(posterior.entropy(), golden["entropy"])
    direction = project_to_sphere(normal("small/dir", *posterior.mu.shape), 1.0)
    assert_close(posterior.log_prob(direction), golden["log_prob_at_dir"])
    beta = 0.98 * uniform("small/beta", *posterior.kappa.shape) + 0.01
    assert_close(4 * posterior.place(beta, normal("small/tangent", 2, 16, 15)), golden["posterior_sample"])


def test_projection(golden):
    assert_close(project_to_sphere(3 * normal("small/raw", 2, 5, 16), 4.0), golden["normalize"])


def test_decoder(model, golden):
    assert_close(model.vae.decode(golden["posterior_sample"]), golden["decoded"])


def test_conditions(model, golden):
    assert_close(model.condition(golden["posterior_sample"], torch.tensor([1, 10])), golden["ar_hidden"])


def test_head_velocity(model, golden):
    x, t, condition = normal("small/xt", 6, 16), uniform("small/t", 6), normal("small/cond", 6, 64)
    assert_close(model.head.velocity(x, t, condition), golden["head_velocity"])


def test_ar_loss(model, golden):
    rows = 4 * 2 * 16
    t = normal("small/tlogit", rows).sigmoid().view(4, 2, 16)
    noise = normal("small/noise", rows, 16).view(4, 2, 16, 16)
    loss = model(golden["posterior_sample"], torch.tensor([1, 10]), t, noise)
    assert_close(loss, golden["ar_loss"])


def noise_in_asking_order(tag, steps):
    asked = 0

    def noise(token, rows):
        nonlocal asked
        draws = torch.stack([normal(f"{tag}/{asked + k}", rows, 16) for k in range(steps + 1)])
        asked += steps + 1
        return draws

    return noise


def generate_beside(model, golden_tokens, tag, **settings):
    """Real generation, except that what the transformer reads next is the golden token, not ours a rounding away.

    Left alone, this toy model multiplies a rounding error by up to 2.6 per token: the golden guided tokens are 0.17
    from the same computation in float64, and runs with 1 and 2 threads differ by 0.02 in the last token.
    """
    settings = SamplingSettings(num_sampling_steps=5, **settings)
    own = Phases.of(model, settings)

    def forced(token, position, cache):
        token = token.clone()
        shared = torch.equal(token[:2], token[-2:])
        token[:2] = golden_tokens[:, position]
        if shared:
            token[-2:] = golden_tokens[:, position]
        return own.decode_step(token, position, cache)

    phases = replace(own, decode_step=forced)
    return generate_tokens(model, torch.tensor([3, 7]), settings, noise_in_asking_order(tag, 5), phases)


def test_generation_with_guidance(model, golden):
    tokens = generate_beside(model, golden["sampled_tokens"], "small/sampler", cfg_scale=3.2)
    assert_close(tokens, golden["sampled_tokens"])


def test_generation_without_guidance(model, golden):
    tokens = generate_beside(model, golden["sampled_tokens_nocfg"], "small/sampler1", cfg_scale=1.0)
    assert_close(tokens, golden["sampled_tokens_nocfg"])


@pytest.mark.parametrize(
    "name, tag, scale", [("sampled_tokens", "small/sampler", 3.2), ("sampled_tokens_nocfg", "small/sampler1", 1.0)]
)
def test_free_generation_until_rounding_grows(model, golden, name, tag, scale):
    settings = SamplingSettings(cfg_scale=scale, num_sampling_steps=5)
    tokens = generate_tokens(model, torch.tensor([3, 7]), settings, noise_in_asking_order(tag, 5))
    assert_close(tokens[:, :8], golden[name][:, :8])
    assert (tokens - golden[name]).abs().max() < 0.3


def test_generated_image_is_the_decoded_tokens(model, golden):
    assert_close(model.vae.decode(golden["sampled_tokens"]), golden["sampled_image"])
    settings = SamplingSettings(cfg_scale=3.2, num_sampling_steps=5)
    tokens = generate_tokens(model, torch.tensor([3, 7]), settings, noise_in_asking_order("small/sampler", 5))
    image = model.vae.decode(tokens)
    assert (image - golden["sampled_image"]).abs().mean() < 0.02 * golden["sampled_image"].abs().max()


def test_toy_names_are_the_released_ones(model):
    names = set(checkpoint_state(model))
    assert {"vae.encoder.freqs_cis", "cls_embedding.weight", "head.net.final_layer.linear.bias"} <= names
    assert "rope" not in names
