"""The variance probe: what it keeps of a generation, and its numbers on tokens whose law is known."""

import pytest
import torch

from models import SamplingSettings, generate_tokens, project_to_sphere
from tests.helpers.nano import NANO, seeded_noise, stirred_nano
from utils.sampling.variance_probe import VarianceProbe, scale_of_tokens


def test_the_probe_keeps_the_images_raw_tokens():
    model, settings, probe = stirred_nano(), SamplingSettings(cfg_scale=3.0, num_sampling_steps=2), VarianceProbe(2)
    tokens = generate_tokens(model, torch.tensor([1, 2]), settings, seeded_noise(settings), observe=probe)
    assert probe.raw.shape == tokens.shape
    torch.testing.assert_close(project_to_sphere(probe.raw, NANO.radius), tokens)
    assert not torch.allclose(probe.raw, tokens)


def test_numbers_of_a_known_law():
    torch.manual_seed(0)
    deviations = torch.tensor([0.5, 1.0, 2.0, 1.0])
    raw = torch.randn(20_000, 3, 4) * deviations
    raw[:, 1] *= 3  # the second token has grown
    found = scale_of_tokens(raw, -raw)
    assert found["sd"] == pytest.approx([1.25, 3.75, 1.25], rel=0.03)
    assert found["sd_least"] == pytest.approx([0.5, 1.5, 0.5], rel=0.03)
    assert found["sd_greatest"] == pytest.approx([2.0, 6.0, 2.0], rel=0.03)
    assert found["cosine"] == pytest.approx([-1.0] * 3)
    assert found["norm"][1] == pytest.approx(3 * found["norm"][0], rel=0.03)
    assert found["norm"] == pytest.approx(raw.norm(dim=-1).mean(0).tolist())
    assert found["norm_sd"] == pytest.approx(raw.norm(dim=-1).std(0).tolist())
