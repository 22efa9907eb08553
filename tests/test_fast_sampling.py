"""The fast paths of sampling give the same numbers. No GPU here: its path is tested up to the launch of graphs."""

import json
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import sample_ddp
from models import PRESETS, SphereAR, checkpoint_state, config_to_dict
from utils.noise import Purpose, normals
from utils.sampling import few_rows
from utils.sampling.few_rows import WAYS, FewRowLinear, choose_ways, fastest_way, use_ways
from utils.sampling.graphs import Graphed, cast_weights, make_static
from utils.sampling.shards import write_shard

STEPS = 3
SETTINGS = {"cfg_scale": 2.0, "num_sampling_steps": STEPS}


def make_model():
    torch.manual_seed(0)
    model = SphereAR(PRESETS["SphereAR-Nano"]).eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model


def generate(model, images=(0, 1, 2), **settings):
    noise = sample_ddp.image_noise(0, torch.tensor(images), STEPS, model.config.latent_dim)
    labels = torch.tensor(images) % model.config.num_classes
    return model.generate_tokens(labels, noise=noise, **{**SETTINGS, **settings})


@pytest.fixture
def eager_tracing(monkeypatch):
    """torch.compile without code generation: the same tracing, guards and recompilations, in seconds."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    return torch._dynamo.utils.counters["stats"]


@pytest.mark.parametrize("settings", [{}, {"cfg_schedule": "constant"}, {"cfg_scale": 1.0}, {"sampler": "ode"}])
def test_static_shapes_give_the_same_tokens(settings):
    expected = generate(make_model(), **settings)
    model = make_model()
    make_static(model, compile=False)
    assert torch.allclose(generate(model, **settings), expected, atol=1e-5)
    assert torch.allclose(generate(model, **settings), expected, atol=1e-5)  # the cache now holds the batch before


def test_static_and_sliced_cache_agree_at_every_position():
    sliced, static = make_model(), make_model()
    make_static(static, compile=False)
    labels, tokens = torch.tensor([3, 10]), generate(sliced, (5, 6))
    caches = [model.new_cache(2, torch.float32, torch.device("cpu")) for model in (sliced, static)]
    lengths = set()
    first, caches[1].first = caches[1].first, lambda length: lengths.add(length) or first(length)
    for model, cache in zip((sliced, static), caches):
        model.prefill(labels, cache)
    for position in range(sliced.config.num_tokens - 1):
        conditions = [m.decode_step(tokens[:, position], position, c) for m, c in zip((sliced, static), caches)]
        assert torch.allclose(*conditions, atol=1e-5)
    assert lengths == {8, 16, 24}  # 4 class tokens and 15 positions, by quarters, in multiples of 8


def test_adaln_parameters_in_parts_are_the_same(monkeypatch):
    expected = generate(make_model())
    monkeypatch.setattr("models.diffusion_head.MODULATION_ROWS", 3 * 6)  # three of four evaluations at a time
    assert torch.allclose(generate(make_model()), expected, atol=1e-5)


def test_compiled_generation_traces_one_block_for_all_layers_and_positions(eager_tracing):
    expected, model = generate(make_model()), make_model()
    make_static(model)
    assert torch.allclose(generate(model), expected, atol=1e-5)
    graphs = eager_tracing["unique_graphs"]
    assert graphs == 7  # block: prefill and three lengths; velocity network; update: own first token of null rows, rest
    generate(model, (7, 8, 9), cfg_scale=3.0)
    assert eager_tracing["unique_graphs"] == graphs


def test_compiled_noise_is_the_same_bit_for_bit(eager_tracing):
    draw = torch.compile(normals, dynamic=False)
    images = torch.tensor([4, 2**40])
    for token in range(3):
        address = 3, Purpose.SAMPLING, images, torch.arange(5)[:, None], torch.tensor(token)
        assert torch.equal(draw(*address, count=7), normals(*address, count=7))
    assert eager_tracing["unique_graphs"] == 1


def test_bfloat16_weights_are_what_autocast_would_use():
    plain, cast = make_model(), make_model()
    cast_weights(cast, torch.bfloat16)
    assert cast.head.net.cond_embed.bias.dtype == cast.layers[0].attention.wo.weight.dtype == torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        tokens = generate(plain)
        assert torch.equal(generate(cast), tokens)
        assert torch.equal(cast.vae.decode(tokens), plain.vae.decode(tokens))


def test_a_graph_copies_its_inputs_and_replays(monkeypatch):
    """Graphed with CUDA's parts stood in for: capture once, then copy in and replay."""

    class FakeGraph:
        def replay(self):
            graphed.output.copy_(graphed.function(*graphed.inputs))

    class FakeCapture:
        def __init__(self, graph, pool, capture_error_mode):
            assert isinstance(graph, FakeGraph) and pool == "pool"

        __enter__ = __exit__ = lambda self, *_: None

    class FakeStream:
        wait_stream = lambda self, other: None  # noqa: E731
        __enter__ = __exit__ = lambda self, *_: None

    class OnCuda(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", FakeCapture)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    calls = []
    graphed = Graphed(lambda x, y: calls.append(1) or x * y, "pool")
    for a, b in [(2.0, 3.0), (4.0, 5.0)]:
        x, y = torch.full((2,), a).as_subclass(OnCuda), torch.full((2,), b)
        assert graphed(x, y).tolist() == [a * b, a * b]
    assert len(calls) == 2 + 1 + 2  # warm-ups, capture, replays
    assert graphed.inputs[1] is not y


# ---- the script


@pytest.fixture
def script(tmp_path, monkeypatch):
    """script(folder, flags...) -> images, by sample_ddp.py in this process with a random SphereAR-Nano."""
    monkeypatch.setattr(sample_ddp, "raise_on_signals", lambda: None)
    model = make_model()
    torch.save({"model": checkpoint_state(model), "config": config_to_dict(model.config)}, tmp_path / "nano.pt")

    def run(folder, *flags):
        argv = ["--ckpt", tmp_path / "nano.pt", "--sample-dir", tmp_path / folder, "--num-sampling-steps", STEPS]
        argv += ["--num-fid-samples", 5, "--per-proc-batch-size", 3, "--to-npz", *flags]
        assert sample_ddp.main([str(word) for word in argv]) == 0
        with np.load(tmp_path / folder / "samples.npz", allow_pickle=False) as archive:
            return archive["arr_0"].astype(int)

    return run


def test_the_script_compiles_once_and_fills_up_the_last_batch(script, eager_tracing):
    compiled = script("compiled", "--compile")
    assert eager_tracing["unique_graphs"] == 7 + 2  # as above, noise for either purpose; none for the short last batch
    assert np.abs(compiled - script("plain", "--no-compile")).max() <= 1


def test_a_run_keeps_to_the_linear_ways_it_chose(script, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sample_ddp, "LARGE", 0)
    monkeypatch.setattr(sample_ddp, "choose_ways", lambda trunk, rows: asked.append(rows) or {"192 x 192": "columns"})
    images = script("run")
    assert asked == [6]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["linear_ways"] == {"6": {"192 x 192": "columns"}}
    (tmp_path / "run" / "samples.npz").unlink()
    (tmp_path / "run" / "shards").mkdir()
    write_shard(tmp_path / "run" / "shards", 3, images[3:])  # as if killed before the first batch
    assert (script("run") == images).all() and asked == [6]
    assert np.abs(script("plain", "--no-compile") - images).max() <= 1 and asked == [6]


# ---- few rows


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("way", list(WAYS))
def test_every_way_gives_the_product(way, dtype, tolerance, bias):
    torch.manual_seed(0)
    linear = nn.Linear(48, 80, bias, dtype=dtype).requires_grad_(False)
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
    expected, model = generate(make_model()), make_model()
    names = list(model.state_dict())
    trunk = nn.ModuleList([model.layers, model.head])
    shapes = {few_rows._shape(linear) for _, _, linear in few_rows._linears(trunk)}
    use_ways(trunk, dict(zip(sorted(shapes), ["columns", "prepacked"] * len(shapes))), rows=6)
    assert sum(type(module) is FewRowLinear for module in model.modules()) == 4 * 6 + 2 + 1 + 1 + 2 * 3 + 1 + 2
    assert list(model.state_dict()) == names
    assert torch.allclose(generate(model), expected, atol=1e-4)
