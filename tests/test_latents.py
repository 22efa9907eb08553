"""The scale of flat latents against plain formulas over all of them at once."""

import pytest
import torch

from utils.training.latents import measure_scale


def test_batches_give_what_all_at_once_would():
    torch.manual_seed(0)
    latents = torch.randn(100, 6, 4) * torch.tensor([0.1, 1.0, 2.0, 5.0]) + 3
    found, exact = measure_scale(latents.split(33)), latents.double()
    assert found.shift == pytest.approx(exact.mean().item())
    assert found.scale == pytest.approx(exact.std(correction=0).item())
    torch.testing.assert_close(found.by_dimension, exact.std((0, 1), correction=0))
    torch.testing.assert_close(found.by_token, exact.std((0, 2), correction=0))
    assert f"of single dimensions {found.by_dimension[0]:.3g} to {found.by_dimension[3]:.3g}" in str(found)
