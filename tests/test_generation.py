"""Generation: tokens on the sphere, whose noise is asked for when, what watchers see, settings that cannot be."""

from dataclasses import replace

import pytest
import torch

from models import Phases, SamplingSettings, SphereAR, decode, encode, generate_tokens, project_to_sphere
from models.samplers import SAMPLERS
from tests.helpers.nano import NANO, seeded_noise, stirred_nano
from utils.sampling.draws import image_noise

FEW = SamplingSettings(cfg_scale=2.0, num_sampling_steps=2)


@pytest.fixture(scope="module")
def nano():
    return stirred_nano()


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"cfg_scale": 0.5}, "cfg_scale 0.5"),
        ({"cfg_scale": float("inf")}, "cfg_scale inf"),
        ({"cfg_scale": float("nan")}, "cfg_scale nan"),
        ({"cfg_scale": 2.0, "cfg_schedule": "cosine"}, "cosine"),
        ({"sampler": "dpm"}, "dpm"),
        ({"num_sampling_steps": 0}, "num_sampling_steps 0"),
        ({"num_sampling_steps": (50, 0)}, r"num_sampling_steps \(50, 0\)"),
        ({"projection": "twice"}, "projection 'twice'"),
        ({"last_step_size": 1.0}, "last_step_size 1.0"),
    ],
)
def test_bad_settings_are_refused(settings, word):
    with pytest.raises(ValueError, match=word):
        SamplingSettings(**settings)


def test_the_defaults_are_the_published_settings():
    settings = SamplingSettings()
    assert (settings.cfg_scale, settings.cfg_schedule, settings.sampler) == (4.5, "linear", "sde")
    assert len(settings.times) == settings.num_noise == 101
    assert settings.times[-1] == pytest.approx(0.96)


def test_generated_tokens_are_on_the_sphere(nano):
    settings = SamplingSettings(cfg_scale=3.0, num_sampling_steps=4)
    tokens = generate_tokens(nano, torch.tensor([0, 9, 3]), settings, seeded_noise(settings))
    assert tokens.shape == (3, 16, 8)
    assert torch.allclose(tokens.norm(dim=-1), torch.tensor(NANO.radius))
    images = torch.cat(list(decode(nano, tokens)))
    assert images.shape == (3, 3, 32, 32) and torch.equal(images, nano.vae.decode(tokens))


def test_images_are_decoded_a_few_at_a_time(nano, monkeypatch):
    monkeypatch.setattr("models.generation.PIXELS_AT_ONCE", {"cpu": 2 * 32 * 32})
    tokens = project_to_sphere(torch.randn(5, 16, 8), NANO.radius)
    parts = list(decode(nano, tokens))
    assert [len(part) for part in parts] == [2, 2, 1]
    assert torch.allclose(torch.cat(parts), nano.vae.decode(tokens), atol=1e-5)


@pytest.mark.parametrize("schedule, first_rows", [("linear", 4), ("constant", 2)])
def test_null_rows_draw_their_own_first_token_only_where_unguided(nano, schedule, first_rows):
    asked, settings = [], replace(FEW, cfg_schedule=schedule)

    def noise(token, rows):
        asked.append(rows)
        return seeded_noise(settings)(token, rows)

    generate_tokens(nano, torch.tensor([1, 2]), settings, noise)
    assert asked == [first_rows] + [2] * 15


def test_a_watcher_sees_every_token_before_and_after_its_projection(nano):
    seen, labels = [], torch.tensor([1, 2])
    tokens = generate_tokens(nano, labels, FEW, seeded_noise(FEW), observe=lambda *values: seen.append(values))
    assert [position for position, _, _ in seen] == list(range(16))
    for position, raw, token in seen:
        assert torch.equal(project_to_sphere(raw, NANO.radius), token)
        assert not torch.allclose(raw.norm(dim=-1), torch.tensor(NANO.radius), rtol=1e-3)
        assert torch.equal(token[:2], tokens[:, position])


@pytest.mark.parametrize(
    "trained, asked, on_sphere", [("all", "none", False), ("none", None, False), ("none", "all", True)]
)
def test_the_projection_is_the_models_unless_another_is_asked_for(nano, trained, asked, on_sphere):
    posterior = "power-spherical" if trained == "all" else "gaussian"
    model = SphereAR(replace(NANO, svae=replace(NANO.svae, posterior=posterior, projection=trained))).eval()
    state = {name: value for name, value in nano.state_dict().items() if "quant_proj" not in name}
    model.load_state_dict(state, strict=False)
    settings = replace(FEW, projection=asked)
    tokens = generate_tokens(model, torch.tensor([1, 2]), settings, seeded_noise(settings))
    assert torch.allclose(tokens.norm(dim=-1), torch.tensor(NANO.radius), rtol=1e-3) == on_sphere


def test_phases_handed_in_are_the_ones_that_are_called(nano):
    own, calls = Phases.of(nano, FEW), []

    def sample_token(*args, **times):
        calls.append("sample")
        return own.sample_token(*args, **times)

    def decode_step(*args):
        calls.append("decode")
        return own.decode_step(*args)

    phases = replace(own, sample_token=sample_token, decode_step=decode_step)
    tokens = generate_tokens(nano, torch.tensor([3]), FEW, seeded_noise(FEW), phases)
    assert torch.equal(tokens, generate_tokens(nano, torch.tensor([3]), FEW, seeded_noise(FEW)))
    assert calls == ["sample", "decode"] * 15 + ["sample"]


def test_generation_under_bfloat16_autocast_keeps_a_bfloat16_cache(nano):
    made, own = [], Phases.of(nano, FEW)
    phases = replace(own, new_cache=lambda *args: made.append(own.new_cache(*args)) or made[-1])
    with torch.autocast("cpu", torch.bfloat16):
        tokens = generate_tokens(nano, torch.tensor([1, 2]), FEW, seeded_noise(FEW), phases)
    assert made[0].keys.dtype == made[0].values.dtype == torch.bfloat16
    assert tokens.dtype == torch.float32 and tokens.isfinite().all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_annealed_steps_give_every_token_its_own_times_and_the_noise_of_its_address(nano, sampler):
    """The tokens of the first stair are those of its number of steps: noise depends on token and step alone."""
    settings = SamplingSettings(cfg_scale=2.0, num_sampling_steps=(5, 2), sampler=sampler)
    own, asked = Phases.of(nano, settings), []

    def sample_token(condition, noise, time_embedding, scale, times):
        asked.append((times, len(noise)))
        assert len(time_embedding) == len(times)
        return own.sample_token(condition, noise, time_embedding, scale, times=times)

    labels, noise = torch.tensor([1, 2]), image_noise(0, torch.arange(2), settings.num_noise, NANO.latent_dim)
    tokens = generate_tokens(nano, labels, settings, noise, replace(own, sample_token=sample_token))
    counts = {steps: replace(settings, num_sampling_steps=steps) for steps in (5, 4, 3, 2)}
    assert asked == [(counts[steps].times, counts[steps].num_noise) for steps in (5, 4, 3, 2) for _ in range(4)]
    five = counts[5]
    noise = image_noise(0, torch.arange(2), five.num_noise, NANO.latent_dim)
    alike = (generate_tokens(nano, labels, five, noise) == tokens).all(-1).all(0)
    assert alike.tolist() == [True] * 4 + [False] * 12


def test_equal_annealed_steps_are_the_single_number(nano):
    labels, one = torch.tensor([1, 2]), SamplingSettings(cfg_scale=2.0, num_sampling_steps=3)
    two = replace(one, num_sampling_steps=(3, 3))
    assert one.num_noise == two.num_noise
    assert torch.equal(*(generate_tokens(nano, labels, settings, seeded_noise(settings)) for settings in (one, two)))


def test_a_prompt_is_continued_from_its_tokens(nano):
    """Its tokens stand where they were, the head is not asked for them, and what follows is as when it drew them."""
    labels, own, asked = torch.tensor([1, 2]), Phases.of(nano, FEW), []
    phases = replace(own, sample_token=lambda *args, **times: asked.append(1) or own.sample_token(*args, **times))
    whole = generate_tokens(nano, labels, FEW, seeded_noise(FEW))
    assert torch.equal(generate_tokens(nano, labels, FEW, seeded_noise(FEW), prompt=whole[:, :0]), whole)
    other = project_to_sphere(torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(5)), NANO.radius)
    tokens = generate_tokens(nano, labels, FEW, seeded_noise(FEW), phases, prompt=other[:, :5])
    assert torch.equal(tokens[:, :5], other[:, :5]) and len(asked) == 11
    assert not torch.isclose(tokens[:, 5:], whole[:, 5:]).all(-1).any()  # they follow from another beginning
    again = generate_tokens(nano, labels, FEW, seeded_noise(FEW), prompt=tokens[:, :9])
    assert torch.equal(again, tokens)
    assert torch.equal(generate_tokens(nano, labels, FEW, seeded_noise(FEW), prompt=other), other)


def test_encoding_is_the_posteriors_mode_a_few_images_at_a_time(nano, monkeypatch):
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = nano.vae.encode(images).mode()
    monkeypatch.setattr("models.generation.PIXELS_AT_ONCE", {"cpu": 2 * 32 * 32})
    for model in (nano, nano.vae):
        assert torch.allclose(encode(model, images), expected, atol=1e-5)
    assert torch.allclose(torch.cat(list(decode(nano.vae, expected))), nano.vae.decode(expected), atol=1e-5)
