"""Names and shapes of the released checkpoints, presets, causality, caching, attention dispatch, loading."""

import argparse
import ast
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import models.layers
from models import (
    PRESETS,
    SVAE,
    SphereAR,
    SphereARConfig,
    SVAEConfig,
    build,
    checkpoint_state,
    config_from_dict,
    config_to_dict,
    load_checkpoint,
    stem_channels_for,
)
from models.flow import guidance_at, guide, integrate, interpolate, score

ROOT = Path(__file__).parent.parent
NANO = PRESETS["SphereAR-Nano"]
RELEASED = json.loads((Path(__file__).parent / "data" / "state_dicts.json").read_text())


@pytest.fixture(scope="module")
def nano():
    torch.manual_seed(0)
    model = SphereAR(NANO).eval().requires_grad_(False)
    for value in model.parameters():  # the head starts at zero: stir it, so that tokens depend on conditions
        value.add_(0.05 * torch.randn_like(value))
    return model


def tokens_of(config, batch, seed=0):
    noise = torch.randn(batch, config.num_tokens, config.latent_dim, generator=torch.Generator().manual_seed(seed))
    return models.project_to_sphere(noise, config.radius)


# ---- names, sizes, configs


@pytest.mark.parametrize("name", ["SphereAR-B", "SphereAR-L", "SphereAR-H", "S-VAE"])
def test_state_dict_names_and_shapes(name):
    config = SVAEConfig() if name == "S-VAE" else PRESETS[name]
    with torch.device("meta"):
        state = checkpoint_state(build(config))
    assert {key: list(value.shape) for key, value in state.items()} == RELEASED[name]


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


@pytest.mark.parametrize("patch_size, stages", [(4, 2), (8, 3), (16, 4)])
def test_patch_size_sets_the_number_of_stem_stages(patch_size, stages):
    channels = stem_channels_for(patch_size, 64)
    config = SVAEConfig(32, patch_size, 8, 64, 1, 1, 1, stem_channels=channels)
    svae = SVAE(config)
    assert len(svae.encoder.patchify[0].net) == len(svae.decoder.unpatchify[1].net) == stages
    reconstruction, posterior = svae(torch.zeros(2, 3, 32, 32))
    assert reconstruction.shape == (2, 3, 32, 32)
    assert posterior.mu.shape == (2, (32 // patch_size) ** 2, 8)
    assert stem_channels_for(16, 512) == SVAEConfig().stem_channels


@pytest.mark.parametrize(
    "bad, word",
    [
        ({"patch_size": 8}, "patch_size 8"),
        ({"image_size": 250}, "image_size 250"),
        ({"latent_dim": 1}, "latent_dim 1"),
        ({"num_heads": 7}, "num_heads"),
        ({"width": 256}, "width 256"),
    ],
)
def test_impossible_configs_are_refused(bad, word):
    with pytest.raises(ValueError, match=word):
        SVAEConfig(**bad)


def test_wrong_image_and_token_shapes_are_refused(nano):
    with pytest.raises(ValueError, match="image_size"):
        nano.vae.encode(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"must be \(B, 16, 8\)"):
        nano.vae.decode(torch.zeros(1, 16, 16))


# ---- flow


def test_flow_identities():
    torch.manual_seed(0)
    noise, target, t = torch.randn(5, 3), torch.randn(5, 3), torch.rand(5, 1) * 0.9
    x, v = interpolate(noise, target, t), target - noise
    assert torch.allclose(score(v, x, t), -noise / (1 - t), atol=1e-5)  # score of N(t·target, (1−t)²) at x
    assert torch.allclose(v + (1 - t) * score(v, x, t), (1 + t) * v - x, atol=1e-5)  # the drift used in `integrate`
    assert torch.equal(guide(v, noise, 1.0), noise + (v - noise))
    assert [guidance_at(i, 4, 5.0, "linear") for i in range(4)] == [1, 2, 3, 4]
    assert guidance_at(2, 4, 5.0, "constant") == 5.0


@pytest.mark.parametrize("sampler", ["sde", "ode"])
def test_samplers_reach_a_known_law(sampler):
    """Data N(m, s²): the exact velocity is known, and samples must have that mean and deviation."""
    torch.manual_seed(0)
    m, s, steps = 2.0, 0.5, 200
    times = [k * 0.96 / steps for k in range(steps + 1)]

    def velocity(x, k):
        t = times[k]
        variance = (1 - t) ** 2 + (t * s) ** 2
        data = m + t * s**2 / variance * (x - t * m)  # E[data | x]
        return (data - x) / (1 - t)

    x = integrate(velocity, torch.randn(steps + 1, 20_000, 1), 0.04, sampler)
    assert x.mean().item() == pytest.approx(m, abs=0.02)
    assert x.std().item() == pytest.approx(s, abs=0.02)


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"cfg_scale": 0.5}, "cfg_scale 0.5"),
        ({"cfg_scale": 2.0, "cfg_schedule": "cosine"}, "cosine"),
        ({"sampler": "heun"}, "heun"),
        ({"num_sampling_steps": 0}, "num_sampling_steps 0"),
    ],
)
def test_bad_generation_settings_are_refused(nano, settings, word):
    with pytest.raises(ValueError, match=word):
        nano.generate_tokens(torch.tensor([1]), **settings)


# ---- transformer


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


def test_generated_tokens_are_on_the_sphere(nano):
    torch.manual_seed(0)
    tokens = nano.generate_tokens(torch.tensor([0, 9, 3]), cfg_scale=3.0, num_sampling_steps=4)
    assert tokens.shape == (3, 16, 8)
    assert torch.allclose(tokens.norm(dim=-1), torch.tensor(NANO.radius))
    assert nano.generate(torch.tensor([0]), num_sampling_steps=2).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("schedule, first_rows", [("linear", 4), ("constant", 2)])
def test_null_rows_draw_their_own_first_token_only_where_unguided(nano, schedule, first_rows):
    asked = []

    def noise(token, rows):
        asked.append(rows)
        return torch.randn(3, rows, 8, generator=torch.Generator().manual_seed(token))

    nano.generate_tokens(torch.tensor([1, 2]), cfg_scale=2.0, cfg_schedule=schedule, num_sampling_steps=2, noise=noise)
    assert asked == [first_rows] + [2] * 15


def test_generation_under_bfloat16_autocast_keeps_a_bfloat16_cache(nano, monkeypatch):
    made = []
    new_cache = nano.new_cache
    monkeypatch.setattr(nano, "new_cache", lambda *args: made.append(new_cache(*args)) or made[-1], raising=False)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = nano.generate_tokens(torch.tensor([1, 2]), cfg_scale=2.0, num_sampling_steps=2)
    assert made[0].keys.dtype == made[0].values.dtype == torch.bfloat16
    assert tokens.dtype == torch.float32 and tokens.isfinite().all()


def test_gradient_checkpointing_changes_nothing():
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


# ---- attention dispatch


class CudaLike:
    """What the dispatch asks of a tensor, without a GPU."""

    def __init__(self, dtype, is_cuda=True):
        self.dtype, self.is_cuda = dtype, is_cuda


@pytest.fixture
def flash_stand_in(monkeypatch):
    """A function of flash_attn_func's signature and (B, L, H, K) layout."""
    calls = []

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        calls.append((q, k, v, causal))
        return "flash"

    monkeypatch.setattr(models.layers, "flash_attn_func", flash_attn_func)
    return calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_cuda_goes_to_flash_attention(flash_stand_in, dtype):
    q, k, v = (CudaLike(dtype) for _ in range(3))
    assert models.layers.attention(q, k, v, causal=True) == "flash"
    assert flash_stand_in == [(q, k, v, True)]


def test_everything_else_goes_to_sdpa(flash_stand_in):
    q = torch.randn(2, 5, 3, 8)
    out = models.layers.attention(q, q, q, causal=True)
    assert out.shape == q.shape and not flash_stand_in
    weights = torch.einsum("blhk,bmhk->bhlm", q, q) / 8**0.5
    weights = weights.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1)
    assert torch.allclose(out, torch.einsum("bhlm,bmhk->blhk", weights, q), atol=1e-5)
    with pytest.raises(AttributeError):  # float32 on CUDA falls through to SDPA, which our stand-in tensor cannot do
        models.layers.attention(*[CudaLike(torch.float32)] * 3)
    assert not flash_stand_in


def test_the_package_is_taken_when_importable_and_never_needed(monkeypatch):
    class FlashAttn:
        flash_attn_func = "the package's"

    for package, expected in ((FlashAttn, "the package's"), (None, None)):
        monkeypatch.setitem(sys.modules, "flash_attn", package)
        spec = importlib.util.spec_from_file_location("layers_again", models.layers.__file__)
        layers = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(layers)
        assert layers.flash_attn_func == expected


def test_a_compiled_block_is_one_graph(nano):
    block, x = nano.layers[0], torch.randn(2, 5, 192)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x, nano.rope[:5], causal=True), block(x, nano.rope[:5], causal=True))


# ---- checkpoints


def save(path, model, **more):
    torch.save({"model": checkpoint_state(model), **more}, path)
    return path


def test_checkpoint_with_config_round_trips(nano, tmp_path):
    ema = {name: value + 1 for name, value in checkpoint_state(nano).items()}
    args = argparse.Namespace(model="SphereAR-Nano", lr=1e-3)
    path = save(tmp_path / "nano.pt", nano, ema=ema, args=args, epochs=3, config=config_to_dict(NANO))
    loaded = load_checkpoint(path)
    assert loaded.config == NANO and not loaded.training
    assert torch.equal(loaded.proj_in.weight, nano.proj_in.weight + 1)
    assert torch.equal(load_checkpoint(path, ema=False).proj_in.weight, nano.proj_in.weight)
    assert torch.allclose(loaded.rope, nano.rope)


@pytest.mark.parametrize("name", ["SphereAR-B", "SphereAR-L", "SphereAR-H", "S-VAE"])
def test_published_checkpoints_are_recognised_from_their_shapes(name):
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in RELEASED[name].items()}
    assert models.checkpoint.infer_config(state) == (SVAEConfig() if name == "S-VAE" else PRESETS[name])


def test_published_form_loads_strictly(tmp_path):
    """A file as released: no config, an argparse.Namespace inside."""
    config = SphereARConfig(
        num_layers=1, num_heads=1, width=64, head_blocks=2, head_width=32, head_adaln_sets=1, num_class_tokens=2,
        svae=SVAEConfig(32, 16, 16, 64, 1, 1, 1, stem_channels=(8, 8, 16, 32, 64)), num_classes=10,
    )  # fmt: skip
    model = SphereAR(config)
    path = save(tmp_path / "published.pt", model, args=argparse.Namespace(model="SphereAR-B"), epochs=400)
    loaded = load_checkpoint(path)
    assert loaded.config == config
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
    svae = load_checkpoint(save(tmp_path / "vae.pt", model.vae))
    assert isinstance(svae, SVAE) and svae.config == config.svae


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_hostile_damaged_and_foreign_files_are_refused(nano, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "args": Malicious()}, "hostile.pt")
    with pytest.raises(ValueError, match=r"hostile\.pt: not a readable checkpoint"):
        load_checkpoint("hostile.pt")
    assert not Path("executed").exists()
    Path("short.pt").write_bytes(save(tmp_path / "good.pt", nano).read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"short\.pt"):
        load_checkpoint("short.pt")
    with pytest.raises(ValueError, match=r"missing\.pt: no such checkpoint"):
        load_checkpoint("missing.pt")
    torch.save({"state_dict": {}}, "foreign.pt")
    with pytest.raises(ValueError, match="no state dict under 'model'"):
        load_checkpoint("foreign.pt")
    torch.save({"model": {"fc.weight": torch.zeros(3)}}, "resnet.pt")
    with pytest.raises(ValueError, match=r"resnet\.pt: the weights are not SphereAR's"):
        load_checkpoint("resnet.pt")


def test_config_from_dict_refuses_unknown_fields():
    assert config_from_dict(config_to_dict(NANO)) == NANO
    with pytest.raises(ValueError, match="config"):
        config_from_dict({**config_to_dict(NANO), "surprise": 1})


# ---- who may import whom (design.md)


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


FORBIDDEN = {
    "models": ("utils", "dataset", "argparse", "torch.distributed", "train", "sample_ddp", "evaluator"),
    "utils": ("models", "dataset", "train", "sample_ddp", "evaluator"),
    "dataset": ("models", "utils", "train", "sample_ddp", "evaluator"),
    ".": ("train", "sample_ddp", "evaluator"),
}
ALLOWED = {("pretrained.py", "argparse")}  # for the one class that a checkpoint may hold, Namespace


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_keep_to_the_design(folder):
    for path in sorted((ROOT / folder).glob("*.py")):
        for name in imported_modules(path):
            for forbidden in FORBIDDEN[folder]:
                if (path.name, name) in ALLOWED:
                    continue
                assert name != forbidden and not name.startswith(forbidden + "."), f"{path.name} imports {name}"
