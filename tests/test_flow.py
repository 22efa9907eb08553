"""The flow's path, score and guidance."""

import torch

from models.flow import guidance_at, guide, interpolate, score


def test_flow_identities():
    torch.manual_seed(0)
    noise, target, t = torch.randn(5, 3), torch.randn(5, 3), torch.rand(5, 1) * 0.9
    x, v = interpolate(noise, target, t), target - noise
    assert torch.allclose(score(v, x, t), -noise / (1 - t), atol=1e-5)  # score of N(t·target, (1−t)²) at x
    assert torch.allclose(v + (1 - t) * score(v, x, t), (1 + t) * v - x, atol=1e-5)  # the drift of the sde
    assert torch.equal(guide(v, noise, 1.0), noise + (v - noise))
    assert [guidance_at(i, 4, 5.0, "linear") for i in range(4)] == [1, 2, 3, 4]
    assert guidance_at(2, 4, 5.0, "constant") == 5.0
