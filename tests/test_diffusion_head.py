"""The diffusion head: a velocity depends on (x, time, condition), never on the order of calls."""

import pytest
import torch

from models.samplers import SAMPLERS
from tests.helpers.nano import NANO, stirred_nano


@pytest.mark.parametrize("scale", [None, 3.0])
def test_velocities_asked_for_out_of_order_are_those_of_their_times(scale, monkeypatch):
    """Steps back across the borders of the chunks in which adaLN parameters are computed."""
    head, rows = stirred_nano().head, 4 if scale is None else 8
    monkeypatch.setattr("models.diffusion_head.MODULATION_ROWS", 3 * rows)  # three times at once
    torch.manual_seed(0)
    times = [0.1 * k for k in range(8)]
    x, condition = torch.randn(4, NANO.latent_dim), torch.randn(rows, NANO.width)
    order, found = [0, 5, 2, 7, 3, 2, 6, 0], []

    def walk(step, noise, times):
        found.extend(step(k, noise[0], lambda velocity: velocity) for k in order)
        return noise[0]

    sampler = SAMPLERS["ode"]._replace(walk=walk)
    head.sample(condition, x[None], head.embed_times(times), scale, times=times, sampler=sampler)
    for k, velocity in zip(order, found, strict=True):
        rows_of_x = x if scale is None else torch.cat([x, x])
        expected = head.velocity(rows_of_x, torch.full((rows,), times[k]), condition)
        if scale is not None:
            cond, null = expected.chunk(2)
            expected = null + scale * (cond - null)
        assert torch.allclose(velocity, expected, atol=1e-5)
