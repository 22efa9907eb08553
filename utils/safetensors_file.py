"""Weights as .safetensors: one state dict under the released names, its config as JSON in the file's metadata.

The format has no checksums, so that ours carries one of all weights, which `read` compares when it is asked to.
"""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from utils.files import atomic_file

MAX_HEADER = 100_000_000  # bytes, of the format


def is_safetensors(path: str | Path) -> bool:
    """Whether a file begins like one: the length of its header, then JSON. By content: caches keep no endings."""
    with open(path, "rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER


def read(path: str | Path, *, verify: bool = False) -> dict:
    """{"model": state dict, "config": dict}, the config where the file has one; tensors lie in the file (mmap).

    `verify` compares the weights with their checksum, where the file has one. ValueError names the file and its fault.
    """
    safetensors = _library(path)
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            checkpoint = {"model": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118 (no dict)
            if "config" in metadata:
                checkpoint["config"] = json.loads(metadata["config"])
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not a readable .safetensors: damaged or cut short ({reason})") from None
    if verify and metadata.get("sha256", "") not in ("", weights_sha256(checkpoint["model"])):
        raise ValueError(f"{path}: not a readable .safetensors: the checksum of its weights does not match")
    return checkpoint


def write(state: dict[str, Tensor], config: dict, path: str | Path) -> None:
    """Put weights and config at `path` completely or not at all."""
    safetensors = _library(path)
    state = {name: value.contiguous() for name, value in state.items()}
    metadata = {"format": "pt", "config": json.dumps(config), "sha256": weights_sha256(state)}
    with atomic_file(path) as file:
        file.write(safetensors.torch.save(state, metadata))


def weights_sha256(state: dict[str, Tensor]) -> str:
    """Checksum of names, types, shapes and values: of the weights, whatever file they are in."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _library(path: str | Path):
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise ValueError(f"{path}: needs the package safetensors; run pip install safetensors") from None
    return safetensors
