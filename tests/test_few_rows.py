"""Linear layers with few rows: every way gives the product, the fastest is taken, a model's tokens stay the same."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from models import SamplingSettings, generate_tokens
from tests.helpers.sampling import calm_nano, noise_of
from utils.sampling import few_rows
from utils.sampling.few_rows import WAYS, FewRowLinear, choose_ways, fastest_way, use_ways


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("way", list(WAYS))
def test_every_way_gives_the_product(way, dtype, tolerance, bias):
    torch.manual_seed(0)
    linear = nn.Linear(48, 80, bias, dtype=dtype).requires_grad_(False)
    if way == "prepacked-mkl" and dtype != torch.float32:
        with pytest.raises(few_rows.MISSING):
            FewRowLinear.of(linear, 4, way)
        return
    fast = FewRowLinear.of(linear, 4, way)
    assert {name: value.data_ptr() for name, value in fast.state_dict().items()} == {
        name: value.data_ptr() for name, value in linear.state_dict().items()
    }
    for shape in [(4, 48), (2, 2, 48), (4, 1, 48), (3, 48)]:
        x = torch.randn(shape).to(dtype)
        out = fast(x)
        assert out.shape == (*shape[:-1], 80) and out.dtype == dtype
        assert torch.allclose(out.float(), F.linear(x, linear.weight, linear.bias).float(), atol=tolerance)


def test_the_fastest_way_is_taken(monkeypatch):
    linears = [nn.Linear(16, 16).requires_grad_(False) for _ in range(2)]
    monkeypatch.setattr(few_rows, "TRIAL_SECONDS", 0.001)

    def slow(weight, bias, rows):
        return lambda x: torch.sin(torch.ones(300_000)).sum() * 0 + F.linear(x, weight, bias)

    def lacking(weight, bias, rows):
        raise NotImplementedError

    def wrong(weight, bias, rows):
        return lambda x: x * 0

    monkeypatch.setattr(
        few_rows, "WAYS", {"plain": slow, "columns": few_rows._plain, "lacking": lacking, "wrong": wrong}
    )
    way, seconds = fastest_way(linears, 2)
    assert way == "columns" and set(seconds) == {"plain", "columns"}
    assert choose_ways(nn.Sequential(*linears, nn.Linear(16, 3)), 2).keys() >= {"16 x 16 + bias"}
    monkeypatch.setattr(few_rows, "WAYS", {"plain": few_rows._plain, "columns": slow})
    assert fastest_way(linears, 2)[0] == "plain"
    assert choose_ways(nn.Sequential(*linears), 2) == {}


def test_a_model_with_faster_linears_gives_the_same_tokens(monkeypatch):
    settings = SamplingSettings(cfg_scale=2.0, num_sampling_steps=3)
    generate = lambda model: generate_tokens(model, torch.arange(3), settings, noise_of(settings))  # noqa: E731
    expected, model = generate(calm_nano()), calm_nano()
    names = list(model.state_dict())
    trunk = nn.ModuleList([model.layers, model.head])
    shapes = {few_rows._shape(linear) for _, _, linear in few_rows._linears(trunk)}
    use_ways(trunk, dict(zip(sorted(shapes), ["columns", "prepacked", "prepacked-mkl"] * len(shapes))), rows=6)
    assert sum(type(module) is FewRowLinear for module in model.modules()) == 4 * 6 + 2 + 1 + 1 + 2 * 3 + 1 + 2
    assert list(model.state_dict()) == names
    assert torch.allclose(generate(model), expected, atol=1e-4)
