"""Checkpoint files: read without executing anything in them, or copying what is not used; damage is never silent."""

import random

import torch

from tests.helpers.states import is_whole, state
from utils import checkpoint_file
from utils.checkpoint_file import read


def test_flipped_bytes_are_never_silently_wrong(tmp_path):
    path, good = tmp_path / "good.pt", state(3)
    checkpoint_file.write(good, path)
    content, draws, refused = path.read_bytes(), random.Random(0), 0
    offsets = [*draws.sample(range(len(content)), 150), *range(len(content) - 60, len(content))]
    for offset in offsets:
        damaged = bytearray(content)
        damaged[offset] ^= draws.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            saved = read(path, verify=True)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
        else:  # padding between members, time stamps: nothing that is read
            assert is_whole(saved) and saved["step"] == 3 and torch.equal(saved["model"]["b"], good["model"]["b"])
            assert saved["args"] == good["args"] and saved["config"] == good["config"]
    assert refused > len(offsets) / 2
