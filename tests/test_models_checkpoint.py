"""Names and shapes of the released checkpoints; dicts as models and back."""

import argparse
import json
from pathlib import Path

import pytest
import torch

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
    from_checkpoint,
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
    """A file as released: no config, an argparse.Namespace inside."""
    config = SphereARConfig(
        num_layers=1, num_heads=1, width=64, head_blocks=2, head_width=32, head_adaln_sets=1, num_class_tokens=2,
        svae=SVAEConfig(32, 16, 16, 64, 1, 1, 1, stem_channels=(8, 8, 16, 32, 64)), num_classes=10,
    )  # fmt: skip
    model = SphereAR(config)
    loaded = from_checkpoint(checkpoint(model, args=argparse.Namespace(model="SphereAR-B"), epochs=400))
    assert loaded.config == config
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
    svae = from_checkpoint(checkpoint(model.vae))
    assert isinstance(svae, SVAE) and svae.config == config.svae


def test_foreign_weights_are_refused():
    with pytest.raises(ValueError, match="the weights are not SphereAR's"):
        from_checkpoint({"model": {"fc.weight": torch.zeros(3)}})


def test_config_from_dict_refuses_unknown_fields():
    assert config_from_dict(config_to_dict(NANO)) == NANO
    with pytest.raises(ValueError, match="config"):
        config_from_dict({**config_to_dict(NANO), "surprise": 1})
