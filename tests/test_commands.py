"""The three scripts as commands: the quickstart's chain at its smallest, the published lines, the README."""

import contextlib
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluator
import sample_ddp
import train
from dataset.toy import class_agreement, write_toy
from models import SVAE, SphereAR, from_checkpoint
from utils import checkpoint_file

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
GUIDES = {path: path.read_text() for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]}
SCRIPTS = {"train.py": train.main, "sample_ddp.py": sample_ddp.main, "evaluator.py": evaluator.main}
OTHERS = {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port", "--rdzv_backend",
          "--rdzv_endpoint", "--rdzv_id", "--logdir", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--signal",
          "--requeue", "--open-mode", "--batch", "--no-decoder", "--turns", "--images", "--index-url",
          "--no-build-isolation", "--no-deps", "--constraint",
          "--precision", "--what", "--models"}  # fmt: skip
# torchrun, TensorBoard, SLURM, benchmarks, pip; those of python -m … are asked for as the scripts' are
MODULES = (
    "dataset.toy", "dataset.check", "dataset.reference", "examples.collapse", "examples.sweep",
    "examples.reconstruction", "examples.convert", "examples.report", "benchmarks.ablation",
)  # fmt: skip


def torchrun(*command: object) -> str:
    """Run a script on two processes; its output."""
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, command)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    return result.stdout


def test_from_digits_to_metrics(tmp_path):
    tar, reference = write_toy(tmp_path / "data", count=100)
    recipe = [
        "train.py", "--model", "SphereAR-Nano", "--data-path", tar, "--global-batch-size", 8, "--warmup-steps", -1,
        "--decay-start", -1, "--lr", 1e-3, "--num-workers", 0, "--max-steps", 3, "--sample-every", 0,
    ]  # fmt: skip
    svae, ar, samples = tmp_path / "svae", tmp_path / "ar", tmp_path / "samples"
    torchrun(*recipe, "--vae-only", "--results-dir", svae, "--perceptual-weight", 0, "--disc-weight", 0)
    vae = checkpoint_file.load(svae / "checkpoints" / "last.pt", from_checkpoint)
    assert isinstance(vae, SVAE)

    torchrun(*recipe, "--results-dir", ar, "--trained-vae", svae / "checkpoints" / "last.pt", "--ema", 0.5)
    model = checkpoint_file.load(ar / "checkpoints" / "last.pt", from_checkpoint)
    assert isinstance(model, SphereAR)
    assert torch.equal(model.vae.quant_proj.weight, vae.quant_proj.weight)

    torchrun(
        "sample_ddp.py", "--model", "SphereAR-Nano", "--ckpt", ar / "checkpoints" / "last.pt", "--num-fid-samples", 20,
        "--labels", "balanced", "--num-sampling-steps", 2, "--cfg-scale", 1.5, "--per-proc-batch-size", 8,
        "--sample-dir", samples, "--to-npz",
    )  # fmt: skip
    with np.load(samples / "samples.npz", allow_pickle=False) as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert images.shape == (20, 32, 32, 3) and images.dtype == np.uint8
    assert np.bincount(labels, minlength=10).tolist() == [2] * 10
    assert (samples / "contact_sheet.png").stat().st_size > 0

    few = tmp_path / "few.npz"
    with np.load(reference, allow_pickle=False) as arrays:
        np.savez(few, arr_0=arrays["arr_0"][:20])
    torchrun("evaluator.py", few, samples / "samples.npz")
    record = json.loads((samples / "samples.json").read_text())
    assert record["settings"]["--labels"] == "balanced"  # the sampler's receipt
    assert record["evaluation"]["metrics"]["FID"] > 0
    assert class_agreement(str(tar), str(samples / "samples.npz")) <= 1


# ---- the README and the guides


def test_links_lead_somewhere():
    for path, text in GUIDES.items():
        for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text):
            assert (path.parent / target).exists(), f"{path}: {target}"


def test_the_tree_names_what_is_there():
    """Every file of the product, and no other: FILE.py under its folder, and a wing's rooms without their ending."""
    tree = (ROOT / "CONTRIBUTING.md").read_text().partition("## The tree")[2].partition("```\n")[2].partition("```")[0]
    folder, wing, named = ROOT, None, set()
    for line in tree.splitlines():
        first, _, rest = line.strip().partition(" ")
        if line[0] != " ":
            folder, wing = ROOT / first if first.endswith("/") else ROOT, None
        elif first.endswith("/"):
            wing = folder / first
        elif not line.startswith(" " * 10):
            wing = None
        for name in re.findall(r"\b\w+\.py\b", line):
            if (folder / name).exists() or line.startswith("  "):
                named.add(folder / name)
        if wing:
            rooms = (rest if first.endswith("/") else line).strip(" ,").split(", ")
            named |= {path for room in rooms for path in wing.glob(f"{room.strip()}.py")}
    missing = [path for path in named if not path.is_file()]
    product = {path for name in ("models", "dataset", "utils") for path in (ROOT / name).rglob("*.py")}
    product = {path for path in product if path.name != "__init__.py"}
    assert missing == [] and product - named == set()


def help_of(main: Callable[[list[str]], int], capsys) -> str:
    with contextlib.suppress(SystemExit):
        main(["--help"])
    return capsys.readouterr().out


def test_every_flag_exists(capsys):
    mains = [*SCRIPTS.values(), *(importlib.import_module(name).main for name in MODULES)]
    known = "".join(help_of(main, capsys) for main in mains)
    for flag in set(re.findall(r"--[a-z][a-z0-9_-]+", "".join(GUIDES.values()))) - OTHERS:
        assert flag in known, flag


def published() -> list[list[str]]:
    """The words of each published command, from the script's name on, as they stand in the README."""
    text = README.partition("## The published commands")[2].partition("\n## ")[0]
    blocks = [shlex.split(block.replace("\\\n", " ")) for block in re.findall(r"```\n(.*?)```", text, re.DOTALL)]
    return [block[next(i for i, word in enumerate(block) if word in SCRIPTS) :] for block in blocks]


@pytest.mark.parametrize("command", published(), ids=lambda command: " ".join(command[:3]))
def test_published_commands_are_understood(command, tmp_path, monkeypatch, capsys):
    """They come as far as the first of their files, which is not here."""
    monkeypatch.chdir(tmp_path)
    assert SCRIPTS[command[0]](command[1:]) == 2
    error = capsys.readouterr().err
    assert re.search(r"\$data_path|\$vae_ckpt|\$ckpt|VIRTUAL_imagenet256_labeled", error), error
    assert "unrecognized" not in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.txt")), ids=lambda path: path.stem)
def test_recipes_are_understood(recipe, tmp_path, capsys):
    """They come as far as the data or the S-VAE, which are not here."""
    svae = [] if "svae" in recipe.stem else ["--trained-vae", "nowhere.pt"]
    command = [f"@{recipe}", "--data-path", "nowhere.tar", "--results-dir", tmp_path, *svae]
    assert train.main([str(word) for word in command]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_there_are_four_published_commands():
    assert sorted(command[0] for command in published()) == ["evaluator.py", "sample_ddp.py", "train.py", "train.py"]
