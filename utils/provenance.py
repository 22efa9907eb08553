"""What made a number: machine, versions, commit. For receipts, records, checkpoints and benchmarks."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = "torchvision", "numpy", "pillow", "scipy"


def provenance(device: torch.device) -> dict:
    """Device, cores, versions and commit, as plain values for JSON or a checkpoint."""
    return {
        "device": device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
    }


def device_name(device: torch.device) -> str:
    """A GPU's own name, or the CPU's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The CPU's model where Linux tells it, else its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def versions(*more: str) -> dict[str, str]:
    """Versions of Python, of the packages that numbers depend on, and of `more`; those not installed are left out."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}  # which names its CUDA build
    for package in (*PACKAGES, *more):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of this checkout, with "+" where files were changed since; None outside a checkout."""
    if shutil.which("git") is None:
        return None
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "") if head.returncode == 0 else None
