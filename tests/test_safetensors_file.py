"""Weights as .safetensors: what was written is read, with its config; damage is never silent."""

import random
import sys

import pytest
import safetensors.torch
import torch

from utils import checkpoint_file
from utils.safetensors_file import weights_sha256, write

STATE = {"a": torch.arange(12.0).view(3, 4).t(), "b": torch.tensor(2.5), "c": torch.ones(5, dtype=torch.bfloat16)}
CONFIG = {"width": 8, "svae": {"stem_channels": (1, 2)}}


@pytest.fixture
def path(tmp_path):
    write(STATE, CONFIG, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_what_was_written_is_read(path):
    link = path.with_name("blob")  # as in the hub's cache: no ending
    link.symlink_to(path)
    for verify in (True, False):
        checkpoint = checkpoint_file.read(link, verify=verify)
        assert checkpoint["config"] == {"width": 8, "svae": {"stem_channels": [1, 2]}}
        assert checkpoint["model"].keys() == STATE.keys()
        assert all(torch.equal(checkpoint["model"][name], value) for name, value in STATE.items())
    assert checkpoint_file.load_examined(checkpoint_file.examine(link), lambda c: c["model"]["b"]) == 2.5


def test_files_of_others_have_no_config_and_no_checksum(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    checkpoint = checkpoint_file.read(tmp_path / "x.safetensors", verify=True)
    assert checkpoint.keys() == {"model"} and torch.equal(checkpoint["model"]["a"], torch.ones(2))


def test_flipped_bytes_are_never_silently_wrong(path):
    content, draws = path.read_bytes(), random.Random(0)
    for offset in (*range(0, 60), *range(len(content) - 74, len(content)), *draws.sample(range(len(content)), 60)):
        damaged = bytearray(content)
        damaged[offset] ^= draws.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            checkpoint = checkpoint_file.read(path, verify=True)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:  # in the metadata: a name that nobody reads
            assert weights_sha256(checkpoint["model"]) == weights_sha256(STATE)


@pytest.mark.parametrize("cut", [9, 100, -1])
def test_a_file_that_is_cut_short_is_named(path, cut):
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable .safetensors: damaged or cut short"):
        checkpoint_file.read(path)


def test_the_hash_is_of_names_types_shapes_and_values():
    same = {name: STATE[name].clone(memory_format=torch.contiguous_format) for name in reversed(STATE)}
    changed = [
        {"d" if name == "a" else name: value for name, value in STATE.items()},
        {**STATE, "b": torch.tensor([2.5])},
        {**STATE, "b": torch.tensor(2.5, dtype=torch.float64)},
        {**STATE, "b": torch.tensor(2.6)},
    ]
    assert weights_sha256(same) == weights_sha256(STATE)
    assert len({weights_sha256(STATE), *map(weights_sha256, changed)}) == 5


def test_without_the_package_one_line_says_what_to_install(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ValueError, match="needs the package safetensors; run pip install safetensors"):
        checkpoint_file.read(path)
