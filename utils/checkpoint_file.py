"""Checkpoint files: read without running a stranger's code, or copying what is not used; written whole or not at all.

A file is what torch.save writes: a zip whose members carry CRC32s.
"""

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from utils.files import atomic_file

T = TypeVar("T")
ZIP = b"PK\x03\x04"  # how a zip begins


def read(path: str | Path, *, verify: bool = False) -> dict:
    """The dict in a checkpoint file; tensors lie on the CPU, in the file itself until they are used (mmap).

    Holds tensors, plain values and Namespaces only: nothing in the file is executed. `verify` first holds every byte
    against its checksum. Raises ValueError that names the file and what is wrong, whatever the damage.
    """
    try:
        if verify:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"checksum of {damaged} does not match")
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about pickles that are none
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint") from None
    except Exception as error:  # zipfile and torch raise a dozen kinds for damaged or hostile files
        raise ValueError(f"{path}: not a readable checkpoint: {_reason(path, error)}") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        raise ValueError(f"{path}: not a SphereAR checkpoint: no state dict under 'model'")
    return checkpoint


def load(path: str | Path, build: Callable[[dict], T]) -> T:
    """`build` of the checkpoint in a file; its ValueErrors name the file."""
    checkpoint = read(path)
    try:
        return build(checkpoint)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write(state: dict, path: str | Path) -> None:
    """Put `state` at `path` completely or not at all, on the disk when this returns. Raises OSError or RuntimeError."""
    with atomic_file(path) as file:
        torch.save(state, file)


def _is_zip(path: str | Path) -> bool:
    """Whether it is torch.save's format since 1.6, which alone can be mapped."""
    with open(path, "rb") as file:
        return file.read(len(ZIP)) == ZIP


def _reason(path: str | Path, error: Exception) -> str:
    """What is wrong with a file that torch cannot read, in one line; never torch's advice to trust it."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    with open(path, "rb") as file:
        start = file.read(256)
    if not start:
        return "the file is empty"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself; get that with git lfs pull, or download it"
    if start.lstrip()[:1] == b"<":
        return "an HTML page, as a failed download leaves; download it again"
    foreign = re.search(r"(?:GLOBAL|global:?|class) ([\w.]+\.\w+)", str(error))
    if foreign and isinstance(error, pickle.UnpicklingError):
        return f"holds {foreign[1]}, which is not run, not only weights"
    if not start.startswith(ZIP):
        return "damaged, or not torch's"
    first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return "damaged: " + "".join(letter if letter.isprintable() else "?" for letter in first)
