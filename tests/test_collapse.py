"""The picture of the collapse, at its smallest."""

import json

import pytest
import torch

from examples import collapse
from models import checkpoint_state, config_to_dict
from tests.helpers.nano import NANO, stirred_nano


@pytest.fixture
def ckpt(tmp_path):
    torch.save({"model": checkpoint_state(stirred_nano()), "config": config_to_dict(NANO)}, tmp_path / "nano.pt")
    return tmp_path / "nano.pt"


def run(ckpt, *flags):
    return collapse.main(["--ckpt", str(ckpt), "--num-images", "3", "--num-sampling-steps", "2", *map(str, flags)])


def test_a_record_per_guidance_scale_and_projection_and_a_picture(ckpt, tmp_path):
    assert run(ckpt, "--cfg-scales", 1, 4, "--out", tmp_path / "out") == 0
    records = json.loads((tmp_path / "out.json").read_text())["tokens"]
    assert [(record["cfg_scale"], record["projection"]) for record in records] == [
        (1.0, "all"), (1.0, "none"), (4.0, "all"), (4.0, "none"),
    ]  # fmt: skip
    assert len(records[0]["norm"]) == NANO.num_tokens
    assert records[0]["norm"][0] == records[1]["norm"][0]  # the first token is drawn before any projection
    assert records[0]["norm"][-1] != records[1]["norm"][-1]
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"


def test_mistakes_are_one_line_before_anything_is_computed(ckpt, tmp_path, capsys):
    assert run(ckpt, "--out", tmp_path / "nowhere" / "out") == 2
    assert "there is no folder" in capsys.readouterr().err
    assert run(ckpt, "--num-images", 1) == 2
    assert "--num-images: 1 must be at least 2" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["out.json", "out.png"])
def test_a_file_that_is_there_is_not_replaced(ckpt, tmp_path, capsys, name):
    (tmp_path / name).write_bytes(b"mine")
    assert run(ckpt, "--out", tmp_path / "out") == 2
    assert f"{name} is there already" in capsys.readouterr().err and (tmp_path / name).read_bytes() == b"mine"
