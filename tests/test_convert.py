"""Weights from file to file: nothing changes but the file."""

import re
from itertools import pairwise

import pytest
import torch

from examples import convert
from models import SVAE, checkpoint_state, config_to_dict, from_checkpoint
from tests.helpers.nano import NANO, stirred_nano
from utils import checkpoint_file


def run(capsys, *words):
    """What is printed about the weights."""
    assert convert.main([str(word) for word in words]) == 0
    return capsys.readouterr().out.partition(": ")[2]


def test_to_safetensors_and_back_gives_the_same_weights(tmp_path, capsys):
    model = stirred_nano()
    averaged = {name: value + 1 for name, value in checkpoint_state(model).items()}
    checkpoint_file.write({"model": checkpoint_state(model), "ema": averaged, "step": 3}, tmp_path / "published.pt")
    files = [tmp_path / name for name in ("published.pt", "a.safetensors", "b.pt", "c.safetensors")]
    told = {run(capsys, *pair) for pair in pairwise(files)}
    assert len(told) == 1
    count = sum(value.numel() for value in model.parameters())
    assert re.fullmatch(rf"SphereAR-Nano, {count:,} parameters, sha256 of the weights [0-9a-f]{{64}}\n", told.pop())
    for file in files:
        loaded = checkpoint_file.load(file, from_checkpoint)
        assert loaded.config == NANO
        assert all(torch.equal(value, averaged[name]) for name, value in checkpoint_state(loaded).items())
    assert checkpoint_file.read(files[2]).keys() == {"model", "config"}
    run(capsys, files[0], tmp_path / "raw.safetensors", "--no-ema")
    raw = checkpoint_file.load(tmp_path / "raw.safetensors", from_checkpoint)
    assert torch.equal(raw.proj_in.weight, model.proj_in.weight)


def test_an_svae_alone(tmp_path, capsys):
    vae = stirred_nano().vae
    checkpoint_file.write({"model": checkpoint_state(vae), "config": config_to_dict(vae.config)}, tmp_path / "vae.pt")
    assert run(capsys, tmp_path / "vae.pt", tmp_path / "vae.safetensors").startswith("S-VAE, ")
    assert isinstance(checkpoint_file.load(tmp_path / "vae.safetensors", from_checkpoint), SVAE)


@pytest.mark.parametrize(
    "source, target, message",
    [
        ("nano.pt", "nano.bin", r"nano.bin: its name must end in .pt or .safetensors"),
        ("nano.pt", "nowhere/nano.pt", "nano.pt: there is no such folder"),
        ("nano.pt", "nano.pt", "nano.pt: is there already"),
        ("missing.pt", "new.pt", "missing.pt: no such checkpoint"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, source, target, message):
    (tmp_path / "nano.pt").write_bytes(b"x")
    assert convert.main([str(tmp_path / source), str(tmp_path / target)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["nano.pt"]


def test_a_link_that_leads_nowhere_is_not_replaced(tmp_path, capsys):
    (tmp_path / "new.pt").symlink_to(tmp_path / "nowhere")
    assert convert.main([str(tmp_path / "nano.pt"), str(tmp_path / "new.pt")]) == 2
    assert "new.pt: is there already" in capsys.readouterr().err and (tmp_path / "new.pt").is_symlink()
