"""The AR transformer: sizes, causality, caching, gradient checkpointing, initialisation."""

from dataclasses import replace

import pytest
import torch

from models import PRESETS, SphereAR, SVAEConfig, checkpoint_state
from tests.helpers.nano import NANO, stirred_nano, tokens_of


@pytest.fixture(scope="module")
def nano():
    return stirred_nano()


@pytest.mark.parametrize(
    "name, without_vae, total",
    [
        ("SphereAR-B", 204_499_216, 279_892_513),
        ("SphereAR-L", 476_380_176, 551_773_473),
        ("SphereAR-H", 943_854_096, 1_019_247_393),
    ],
)
def test_parameter_counts(name, without_vae, total):
    with torch.device("meta"):
        model = SphereAR(PRESETS[name])
    count = lambda module: sum(value.numel() for value in module.parameters())  # noqa: E731
    assert count(model.vae) == 75_393_297
    assert (count(model) - count(model.vae), count(model)) == (without_vae, total)


@pytest.mark.parametrize("name", ["SphereAR-B", "SphereAR-L"])
def test_512_pixels(name):
    config = replace(PRESETS[name], svae=SVAEConfig(image_size=512))
    with torch.device("meta"):
        state = checkpoint_state(SphereAR(config))
    assert state["vae.encoder.freqs_cis"].shape == (4 + 1024, 32, 2)
    assert state["pos_for_diff.weight"].shape == (1024, 768 if name == "SphereAR-B" else 1024)


def test_conditions_are_causal(nano):
    tokens = tokens_of(NANO, 1).requires_grad_()
    conditions = nano.condition(tokens, torch.tensor([3]))
    for position in (0, 5, 15):
        (gradient,) = torch.autograd.grad(conditions[0, position].sum(), tokens, retain_graph=True)
        seen = gradient[0].abs().sum(-1) > 0
        assert seen.tolist() == [i < position for i in range(NANO.num_tokens)]


@pytest.mark.parametrize("static", [False, True])
def test_cached_decoding_equals_the_full_pass(nano, static):
    tokens, labels = tokens_of(NANO, 2), torch.tensor([4, NANO.null_class])
    expected = nano.condition(tokens, labels)
    cache = nano.new_cache(2, torch.float32, "cpu")
    conditions = [nano.prefill(labels, cache)]
    for i in range(NANO.num_tokens - 1):
        position = torch.tensor(i) if static else i
        conditions.append(nano.decode_step(tokens[:, i], position, cache))
    assert torch.allclose(torch.stack(conditions, dim=1), expected, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(monkeypatch):
    monkeypatch.setattr(torch, "get_rng_state", None)  # nothing draws inside: no state is kept for every block
    torch.manual_seed(0)
    model = SphereAR(NANO)
    for value in model.head.parameters():
        value.data.add_(0.05 * torch.randn_like(value))
    t, noise = torch.rand(4, 2, 16), torch.randn(4, 2, 16, 8)
    gradients = []
    for model.grad_checkpointing in (False, True):
        model.zero_grad()
        model(tokens_of(NANO, 2), torch.tensor([1, 2]), t, noise).backward()
        gradients.append(model.cls_embedding.weight.grad.clone())
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)


def test_initialisation():
    model = SphereAR(NANO)
    net = model.head.net
    for linear in (*net.ada_ln_blocks, net.final_layer.ada_ln_modulation, net.final_layer.linear):
        assert not linear.weight.any() and not linear.bias.any()
    assert net.time_embed.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.1)
    for weight in (model.cls_embedding.weight, model.layers[0].attention.wqkv.weight, model.vae.encoder.layers[0].feed_forward.w1.weight):  # fmt: skip  # noqa: E501
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    default = (3 * NANO.svae.width) ** -0.5  # PyTorch's own Linear init is uniform within ±width^-½
    assert model.vae.quant_proj.weight.std().item() == pytest.approx(default, rel=0.1)
    assert model.vae.encoder.output.weight.std().item() == pytest.approx(default, rel=0.1)
