"""Names and shapes of the released checkpoints; dicts as models and back."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models import (
    PRESETS,
    SVAE,
    SphereAR,
    SVAEConfig,
    build,
    checkpoint_state,
    config_from_dict,
    config_to_dict,
    from_checkpoint,
    preset_of,
)
from models.checkpoint import infer_config
from tests.helpers.nano import NANO, stirred_nano

RELEASED = json.loads((Path(__file__).parent / "data" / "state_dicts.json").read_text())


@pytest.mark.parametrize("name", ["SphereAR-B", "SphereAR-L", "SphereAR-H", "S-VAE"])
def test_state_dict_names_and_shapes(name):
    config = SVAEConfig() if name == "S-VAE" else PRESETS[name]
    with torch.device("meta"):
        state = checkpoint_state(build(config))
    assert {key: list(value.shape) for key, value in state.items()} == RELEASED[name]


def checkpoint(model, **more) -> dict:
    return {"model": checkpoint_state(model), **more}


def test_checkpoint_with_config_round_trips():
    nano = stirred_nano()
    ema = {name: value + 1 for name, value in checkpoint_state(nano).items()}
    saved = checkpoint(nano, ema=ema, epochs=3, config=config_to_dict(NANO))
    loaded = from_checkpoint(saved)
    assert loaded.config == NANO and not loaded.training
    assert torch.equal(loaded.proj_in.weight, nano.proj_in.weight + 1)
    assert torch.equal(from_checkpoint(saved, ema=False).proj_in.weight, nano.proj_in.weight)
    assert torch.allclose(loaded.rope, nano.rope)
    loaded.proj_in.weight.add_(1)
    assert torch.equal(ema["proj_in.weight"], nano.proj_in.weight + 1)  # the model's weights are copies


def test_configs_from_before_a_field_was_added_are_read():
    config = config_to_dict(NANO)
    del config["svae"]["posterior"]
    assert config_from_dict(config) == NANO


@pytest.mark.parametrize("name", ["SphereAR-B", "SphereAR-L", "SphereAR-H", "S-VAE"])
def test_published_checkpoints_are_recognised_from_their_shapes(name):
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in RELEASED[name].items()}
    assert infer_config(state) == (SVAEConfig() if name == "S-VAE" else PRESETS[name])


def test_published_form_loads_strictly():
    """A file as released: no config, an argparse.Namespace inside; a preset's size with other classes and S-VAE."""
    svae = SVAEConfig(32, 16, 16, 64, 1, 1, 1, stem_channels=(8, 8, 16, 32, 64))
    config = replace(NANO, num_classes=7, num_class_tokens=2, svae=svae)
    model = SphereAR(config)
    loaded = from_checkpoint(checkpoint(model, args=argparse.Namespace(model="SphereAR-B"), epochs=400))
    assert loaded.config == config
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
    svae = from_checkpoint(checkpoint(model.vae))
    assert isinstance(svae, SVAE) and svae.config == config.svae


def test_every_preset_has_a_size_of_its_own():
    assert [preset_of(config) for config in PRESETS.values()] == list(PRESETS)


def test_without_a_config_a_size_of_no_preset_is_refused():
    """The number of attention heads is in no shape."""
    config = replace(NANO, num_layers=2)
    assert preset_of(config) is None and preset_of(replace(NANO, num_classes=3)) == "SphereAR-Nano"
    saved = checkpoint(SphereAR(config))
    with pytest.raises(ValueError, match=r"of no preset's size \(num_layers 2, width 192, .*number of attention heads"):
        from_checkpoint(saved)
    assert from_checkpoint({**saved, "config": config_to_dict(config)}).config == config


def test_foreign_weights_are_refused():
    with pytest.raises(ValueError, match="the weights are not SphereAR's"):
        from_checkpoint({"model": {"fc.weight": torch.zeros(3)}})


def test_config_from_dict_refuses_unknown_fields():
    assert config_from_dict(config_to_dict(NANO)) == NANO
    with pytest.raises(ValueError, match="config"):
        config_from_dict({**config_to_dict(NANO), "surprise": 1})


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 10**9}, {"num_layers": 10**5}, {"num_heads": 0}, {"head_adaln_sets": 0}, {"width": None},
        {"width": [64]}, {"width": 64.0}, {"num_classes": True}, {"class_dropout_prob": "x"}, {"svae": 3},
        {"svae": None}, {"svae": {**config_to_dict(NANO.svae), "stem_channels": [[1]]}},
        {"svae": {**config_to_dict(NANO.svae), "stem_channels": None}},
        {"svae": {**config_to_dict(NANO.svae), "encoder_layers": 10**5}},
        {"svae": {**config_to_dict(NANO.svae), "latent_shift": "0"}}, {"svae": config_to_dict(NANO)},
        {"svae": {**config_to_dict(NANO.svae), "image_size": 2**15}}, {"num_class_tokens": 2**20},
        {"svae": {**config_to_dict(NANO.svae), "image_size": 2**20, "num_heads": 1}},
        {"svae": {**config_to_dict(NANO.svae), "num_registers": 2**20}},
        {"class_dropout_prob": float("nan")}, {"class_dropout_prob": 10**400},
    ],
)  # fmt: skip
def test_malformed_configs_are_refused_at_once(change):
    saved = checkpoint(stirred_nano(), config={**config_to_dict(NANO), **change})
    with pytest.raises(ValueError, match="config"):
        from_checkpoint(saved)


@pytest.mark.parametrize("config", [None, 3, [], "x"])
def test_what_is_no_config_is_refused(config):
    with pytest.raises(ValueError, match="config"):
        from_checkpoint(checkpoint(stirred_nano(), config=config))


@pytest.mark.parametrize(
    "weight", [None, 3, torch.zeros(3, dtype=torch.int64), torch.zeros(3, device="meta"), torch.eye(3).to_sparse()]
)
def test_weights_that_are_no_plain_tensors_are_refused(weight):
    saved = checkpoint(stirred_nano(), config=config_to_dict(NANO))
    saved["model"]["norm.weight"] = weight
    with pytest.raises(ValueError, match=r"norm.weight is "):
        from_checkpoint(saved)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_floats_become_float32(dtype):
    model = stirred_nano()
    state = {name: value.to(dtype) for name, value in checkpoint_state(model).items()}
    loaded = from_checkpoint({"model": state, "config": config_to_dict(NANO)})
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}


def test_weights_of_another_architecture_are_told_in_one_line():
    saved = checkpoint(stirred_nano(), config={**config_to_dict(NANO), "num_classes": 9})
    with pytest.raises(ValueError, match=r"do not fit the architecture: 1 of another shape \(cls_embedding.weight\)$"):
        from_checkpoint(saved)
    del saved["model"]["norm.weight"]
    with pytest.raises(ValueError, match=r"1 missing \(norm.weight\); 1 of another shape"):
        from_checkpoint(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"latent_shift": float("nan"), "projection": "none", "posterior": "gaussian", "latent_scale": 1.0},
        {"latent_shift": 1.0}, {"latent_shift": 1.0, "projection": "none", "posterior": "gaussian"},
        {"latent_scale": float("inf"), "projection": "none", "posterior": "gaussian"},
        {"sigma": float("inf"), "projection": "none", "posterior": "fixed-sigma"},
    ],
)  # fmt: skip
def test_shifts_and_scales_that_make_no_sense_are_refused(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}"):
        config_from_dict({**config_to_dict(NANO.svae), **change})
