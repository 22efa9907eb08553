"""A tiny data set, and training runs small enough for tests: in this process or as processes of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import train
from models import PRESETS, SVAE, checkpoint_state, config_to_dict
from tests.helpers.dataset_tars import class_tars, enlarged
from utils import checkpoint_file

ROOT = Path(__file__).resolve().parents[2]
CLASSES, PER_CLASS, BATCH = 4, 13, 8
STEPS_PER_EPOCH = CLASSES * PER_CLASS // BATCH  # 6, with 4 images left over


def write_tar(path: Path) -> Path:
    """A tar of class tars with 13 images of 32 x 40 pixels for each of 4 classes."""
    rng = np.random.default_rng(0)
    return class_tars(path, {
        f"n{label:08d}": {
            f"n{label:08d}_{i}.JPEG": enlarged(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8), 40, 32, quality=95)
            for i in range(PER_CLASS)
        }
        for label in range(CLASSES)
    })  # fmt: skip


def write_svae(path: Path) -> Path:
    """An untrained S-VAE checkpoint of the Nano preset."""
    torch.manual_seed(0)
    vae = SVAE(PRESETS["SphereAR-Nano"].svae)
    torch.save({"model": checkpoint_state(vae), "config": config_to_dict(vae.config)}, path)
    return path


def flags(data: Path, results: Path, *extra: object, svae: Path | None = None) -> list[str]:
    """A command line of either stage; `svae` makes it the AR one."""
    common = [
        "--model", "SphereAR-Nano", "--data-path", data, "--results-dir", results, "--num-classes", CLASSES,
        "--global-batch-size", BATCH, "--num-workers", 0, "--sample-every", 0, "--log-every", 1, "--lr", 1e-3,
        "--warmup-steps", 1, "--decay-start", -1,
    ]  # fmt: skip
    ar = ["--trained-vae", svae, "--ema", 0.9]
    vae_only = ["--vae-only", "--perceptual-weight", 0, "--ema", 0.9]
    vae_only += [] if "--disc-weight" in extra else ["--disc-start", 3]
    return [str(flag) for flag in (*common, *(ar if svae else vae_only), *extra)]


def run_here(*command: str) -> dict:
    """Train in this process; what last.pt then holds."""
    assert train.main(list(command)) == 0
    return last(command)


def assert_refused(capsys, message: str, command: list[str]) -> None:
    """train.py refuses a command, in this process, with one line that matches `message`."""
    capsys.readouterr()
    assert train.main(command) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and re.match(f"train.py: error: .*{message}", lines[0]), lines


def last(command: list[str]) -> dict:
    return checkpoint_file.read(Path(command[list(command).index("--results-dir") + 1], "checkpoints", "last.pt"))


def start(*command: str, processes: int = 0, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    """Start train.py as a process of its own, or under torchrun with `processes` on this machine."""
    if processes:
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, "train.py", *command], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def wait_for(process: subprocess.Popen, text: str) -> None:
    """Read a process's output up to the line that has `text`."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return
    raise AssertionError("".join(lines))


def finish(process: subprocess.Popen, seconds: float = 600) -> str:
    """The output of a process that ends well."""
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, output
    return output


def tensors(value: object, path: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a nested state by their path."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {name: tensor for key, item in items for name, tensor in tensors(item, f"{path}/{key}").items()}


def differences(a: dict, b: dict) -> list[str]:
    """Paths of the tensors that are not bit for bit equal in two checkpoints."""
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def largest_difference(a: dict, b: dict) -> float:
    """Largest difference of two state dicts, relative to the largest value of each tensor."""
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    return max(
        ((a[name] - b[name]).abs().max() / a[name].abs().max().clamp_min(1e-12)).item()
        for name in a if a[name].is_floating_point()
    )  # fmt: skip
