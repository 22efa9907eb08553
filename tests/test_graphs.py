"""Generation with static shapes gives the same numbers. No GPU here: its path is tested up to the launch of graphs."""

import gc
import weakref
from functools import partial

import pytest
import torch

from models import PRESETS, Phases, SamplingSettings, SphereAR, decode, generate_tokens
from models.samplers import SAMPLERS
from tests.helpers.nano import tokens_of
from tests.helpers.sampling import calm_nano, noise_of
from utils.sampling.graphs import Graphed, Throttle, batch_that_fits, cast_weights, compile_pieces, static_phases

GUIDED = SamplingSettings(cfg_scale=2.0, num_sampling_steps=3)


def generate(model, settings=GUIDED, phases=None, images=(0, 1, 2)):
    return generate_tokens(model, torch.tensor(images), settings, noise_of(settings, images), phases)


def static(model, settings=GUIDED, step=None):
    return static_phases(Phases.of(model, settings, step), model.config.num_class_tokens, cuda_graphs=False)


@pytest.fixture
def eager_tracing(monkeypatch):
    """torch.compile without code generation: the same tracing, guards and recompilations, in seconds."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    return torch._dynamo.utils.counters["stats"]


@pytest.mark.parametrize(
    "changed",
    [{}, {"cfg_schedule": "constant"}, {"cfg_scale": 1.0}, {"sampler": "ode"}, {"num_sampling_steps": (4, 1)}],
)
def test_static_shapes_give_the_same_tokens(changed):
    settings = SamplingSettings(**{"cfg_scale": 2.0, "num_sampling_steps": 3, **changed})
    model = calm_nano()
    expected, phases = generate(model, settings), static(model, settings)
    assert torch.allclose(generate(model, settings, phases), expected, atol=1e-5)
    assert torch.allclose(generate(model, settings, phases), expected, atol=1e-5)  # the cache holds the batch before
    assert torch.equal(generate(model, settings), expected)  # the model itself is as it was


def test_static_shapes_continue_a_prompt_to_the_same_tokens():
    model, labels, noise = calm_nano(), torch.tensor([0, 1, 2]), noise_of(GUIDED)
    prompt = tokens_of(model.config, 3)[:, :5]
    expected = generate_tokens(model, labels, GUIDED, noise, prompt=prompt)
    continued = generate_tokens(model, labels, GUIDED, noise, static(model), prompt=prompt)
    assert torch.allclose(continued, expected, atol=1e-5) and torch.equal(continued[:, :5], prompt)


def test_static_and_sliced_cache_agree_at_every_position():
    model = calm_nano()
    labels, tokens = torch.tensor([3, 10]), tokens_of(model.config, 2)
    sliced, fixed = Phases.of(model, GUIDED), static(model)
    caches = [phases.new_cache(2, torch.float32, torch.device("cpu")) for phases in (sliced, fixed)]
    lengths = set()
    first, caches[1].first = caches[1].first, lambda length: lengths.add(length) or first(length)
    for phases, cache in zip((sliced, fixed), caches):
        phases.prefill(labels, cache)
    for position in range(model.config.num_tokens - 1):
        conditions = [p.decode_step(tokens[:, position], position, c) for p, c in zip((sliced, fixed), caches)]
        assert torch.allclose(*conditions, atol=1e-5)
    assert lengths == {8, 16, 24}  # 4 class tokens and 15 positions, by quarters, in multiples of 8


def test_compiled_generation_traces_one_block_for_all_layers_and_positions(eager_tracing):
    expected, model = generate(calm_nano()), calm_nano()
    phases = static(model, GUIDED, compile_pieces(model))
    assert torch.allclose(generate(model, GUIDED, phases), expected, atol=1e-5)
    graphs = eager_tracing["unique_graphs"]
    assert graphs == 8  # block: prefill and three lengths; step and last step: unguided first token, guided others
    stronger = SamplingSettings(cfg_scale=3.0, num_sampling_steps=3)
    generate(model, stronger, phases, images=(7, 8, 9))
    prompt = tokens_of(model.config, 3)[:, :5]
    generate_tokens(model, torch.tensor([0, 1, 2]), GUIDED, noise_of(GUIDED), phases, prompt=prompt)
    assert eager_tracing["unique_graphs"] == graphs


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_compiled_step_is_the_step(eager_tracing, sampler):
    settings = SamplingSettings(cfg_scale=2.0, num_sampling_steps=(9, 2), sampler=sampler)
    model = calm_nano()
    expected = generate(model, settings)
    compiled = static(model, settings, compile_pieces(model))
    assert torch.allclose(generate(model, settings, compiled), expected, atol=1e-5)


def test_bfloat16_weights_are_what_autocast_would_use():
    plain, cast = calm_nano(), calm_nano()
    cast_weights(cast, torch.bfloat16)
    assert cast.head.net.cond_embed.bias.dtype == cast.layers[0].attention.wo.weight.dtype == torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        tokens = generate(plain)
        assert torch.equal(generate(cast), tokens)
        assert torch.equal(*(torch.cat(list(decode(model, tokens))) for model in (plain, cast)))


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

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", FakeCapture)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    calls = []
    graphed = Graphed(lambda x, y: calls.append(1) or x * y, "pool")
    for a, b in [(2.0, 3.0), (4.0, 5.0)]:
        x, y = torch.full((2,), a), torch.full((2,), b)
        assert graphed(x, y).tolist() == [a * b, a * b]
    assert len(calls) == 2 + 1 + 2  # warm-ups, capture, replays
    assert graphed.inputs[1] is not y


def test_at_most_two_tokens_are_in_the_queue(monkeypatch):
    said = []

    class Event:
        def __init__(self):
            self.number = len([word for word in said if word.startswith("record")])

        def record(self):
            said.append(f"record {self.number}")

        def synchronize(self):
            said.append(f"wait for {self.number}")

    throttle = Throttle()
    throttle()  # without a GPU: nothing
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for _ in range(3):
        throttle()
    assert said == ["record 0", "wait for 0", "record 1", "wait for 1", "record 2"]


def test_one_kv_cache_is_kept_and_no_other(monkeypatch):
    """The next batch of the same kind gets the same memory; one of another kind new memory, and the old is free."""
    phases, kind = static(calm_nano()), (2, torch.float32, torch.device("cpu"))
    kv_cache = phases.new_cache(*kind)
    assert phases.new_cache(*kind) is kv_cache
    phases.prefill(torch.tensor([3, 10]), kv_cache)
    phases.decode_step(tokens_of(calm_nano().config, 2)[:, 0], 0, kv_cache)
    gone = weakref.ref(kv_cache)
    del kv_cache
    assert gone() is not None
    phases.new_cache(3, *kind[1:])
    gc.collect()
    assert gone() is None


def test_a_graph_is_not_replayed_for_other_steps_shapes_or_autocast(monkeypatch):
    """What would be captured, once per kind of call."""
    captured = []

    class OneGraph:
        def __init__(self, function, pool):
            self.function = function
            captured.append(self)

        def __call__(self, *inputs):
            return self.function(*inputs)

    monkeypatch.setattr("utils.sampling.graphs.Graphed", OneGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    model = calm_nano()
    phases = static_phases(Phases.of(model, GUIDED), model.config.num_class_tokens, cuda_graphs=True)

    def sample(rows=4, times=GUIDED.times, scale=2.0):
        noise = torch.randn(len(times), rows // 2, model.config.latent_dim)
        embedding = model.head.embed_times(times)
        phases.sample_token(torch.randn(rows, model.config.width), noise, embedding, scale, times=times)
        return len(captured)

    assert [sample(), sample(), sample(scale=3.0)] == [1, 1, 1]
    assert sample(times=SamplingSettings(num_sampling_steps=4).times) == 2
    assert sample(rows=6) == 3
    with torch.autocast("cpu", torch.bfloat16):
        assert [sample(), sample()] == [4, 4]
    assert sample() == 4


@pytest.mark.parametrize("name, batch, gib", [("B", 1024, 9.6), ("L", 512, 17.0), ("H", 512, 26.6)])
def test_the_batch_that_fits_on_80_gb(name, batch, gib):
    config = PRESETS[f"SphereAR-{name}"]
    assert config.cache_bytes(2 * 256, torch.bfloat16) / 2**30 == pytest.approx(gib, abs=0.05)
    free = 79 * 2**30 - 2 * sum(p.numel() for p in meta_model(config).parameters())
    assert batch_that_fits(config.cache_bytes(2, torch.bfloat16), free) == batch
    assert batch_that_fits(config.cache_bytes(2, torch.bfloat16), 0) == 1


def meta_model(config):
    with torch.device("meta"):
        return SphereAR(config)
