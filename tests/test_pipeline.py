"""The quickstart's chain at its smallest, each script under torchrun with two processes: digits to metrics."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from dataset.toy import class_agreement, write_toy
from models import SVAE, SphereAR, load_checkpoint

ROOT = Path(__file__).resolve().parent.parent


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
    vae = load_checkpoint(svae / "checkpoints" / "last.pt")
    assert isinstance(vae, SVAE)

    torchrun(*recipe, "--results-dir", ar, "--trained-vae", svae / "checkpoints" / "last.pt", "--ema", 0.5)
    model = load_checkpoint(ar / "checkpoints" / "last.pt")
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
