"""sample_ddp.py on a small random checkpoint: in this process, or as processes of its own."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import sample_ddp
from models import SphereAR, checkpoint_state, config_to_dict
from tests.helpers.nano import NANO
from utils.sampling.draws import image_noise

ROOT = Path(__file__).resolve().parents[2]
BRIEF = "--num-sampling-steps", "3", "--cfg-scale", "1.5", "--class-ids", "1,8,3"


def calm_nano() -> SphereAR:
    """A random SphereAR-Nano that does not multiply rounding from token to token, as stirred_nano does."""
    torch.manual_seed(0)
    model = SphereAR(NANO).eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():  # a fresh head is exactly 0
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def write_checkpoint(path: Path, **more: object) -> Path:
    """A checkpoint of that model; `more` replaces or adds entries."""
    torch.save({"model": checkpoint_state(calm_nano()), "config": config_to_dict(NANO), **more}, path)
    return path


def noise_of(settings, images=(0, 1, 2)):
    """The noise that sample_ddp.py gives to `generate_tokens` for these images."""
    return image_noise(0, torch.tensor(images), settings.num_noise, NANO.latent_dim)


def sample_here(ckpt: Path, folder: Path, *flags: object) -> int:
    """The script in this process; its exit code."""
    return sample_ddp.main(["--ckpt", str(ckpt), "--sample-dir", str(folder), *BRIEF, *map(str, flags)])


def start(ckpt: Path, folder: Path, *flags: object, processes: int = 0) -> subprocess.Popen:
    """The script as a process, or as torchrun's processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    return subprocess.Popen(
        [sys.executable, *launcher, "sample_ddp.py", "--ckpt", ckpt, "--sample-dir", folder, *BRIEF, *map(str, flags)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip


def wait_for_first_shard(folder: Path, process: subprocess.Popen) -> None:
    while not list((folder / "shards").glob("*.npy")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def load_images(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a run's .npz."""
    with np.load(folder / "samples.npz", allow_pickle=False) as archive:
        return archive["arr_0"], archive["arr_1"]
