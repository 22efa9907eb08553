"""The README's links lead somewhere, its flags exist, and nothing in it waits to be filled in."""

import re
from pathlib import Path

import pytest

import evaluator
import sample_ddp
from models import PRESETS
from utils.training import options as flags

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
OTHERS = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id", "--logdir",
          "--nodes", "--ntasks-per-node", "--gpus-per-node", "--signal", "--requeue", "--open-mode",
          "--batch", "--no-decoder", "--turns", "--images"}  # fmt: skip  # torchrun, SLURM, TensorBoard, benchmarks


def test_links_and_placeholders():
    assert "@@" not in README
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def help_text(parse, capsys):
    with pytest.raises(SystemExit):
        parse()
    return capsys.readouterr().out


def test_every_flag_exists(capsys):
    known = help_text(lambda: flags.parse_args(["--help"], "", list(PRESETS)), capsys)
    known += help_text(lambda: sample_ddp.parse_args(["--help"]), capsys)
    known += help_text(lambda: evaluator.parse_args(["--help"]), capsys)
    for flag in set(re.findall(r"--[a-z][a-z0-9_-]+", README)) - OTHERS:
        assert flag in known, flag
