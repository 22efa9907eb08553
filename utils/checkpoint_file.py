"""Checkpoint files: read without running a stranger's code, or copying what is not used; written whole or not at all.

A file is what torch.save writes: a zip whose members are not compressed and carry CRC32s.
"""

import argparse
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from utils import hub, safetensors_file
from utils.files import atomic_file, identity, mistaken, sha256

T = TypeVar("T")
MAX_SHARING = 4  # times that tensors may share their memory, as EMA weights do that equal the model's


def read(path: str | Path, *, verify: bool = False) -> dict:
    """The dict in a checkpoint file; tensors lie on the CPU, in the file itself until they are used (mmap).

    Holds tensors, plain values and Namespaces only: nothing in the file is executed. `verify` first holds every byte
    against its checksum. Raises ValueError that names the file and what is wrong, whatever the damage. The path may be
    an address of the hub (utils.hub), the file a .safetensors.
    """
    path = hub.local(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path}: is no file")
    if os.path.exists(path) and safetensors_file.is_safetensors(path):
        return safetensors_file.read(path, verify=verify)
    try:
        if _is_zip(path):
            with zipfile.ZipFile(path) as archive:
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise ValueError("compressed, which torch.save never does")  # it may inflate to any size
                damaged = archive.testzip() if verify else None
            if damaged is not None:
                raise ValueError(f"checksum of {damaged} does not match")
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint") from None
    except Exception as error:  # zipfile and torch raise a dozen kinds for damaged or hostile files
        raise ValueError(f"{path}: {_what_is_wrong(path, error)}") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        raise ValueError(f"{path}: not a SphereAR checkpoint: no state dict under 'model'")
    held, claimed = os.path.getsize(path), _tensor_bytes(checkpoint)
    if claimed > MAX_SHARING * held:
        raise ValueError(f"{path}: its tensors claim {claimed / 1e9:.3g} GB, the file has {held / 1e9:.3g}")
    return checkpoint


def _tensor_bytes(checkpoint: dict) -> int:
    """Memory that copies of all tensors in nested dicts, lists and tuples would take, each object counted once."""
    total, seen, left = 0, set(), [checkpoint]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta:
            total += value.numel() * value.element_size()
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value
    return total


def load(path: str | Path, build: Callable[[dict], T]) -> T:
    """`build` of the checkpoint in a file; its ValueErrors name the file."""
    checkpoint = read(path)
    try:
        return build(checkpoint)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class Examined(NamedTuple):
    """A checkpoint file that was read to its last byte."""

    path: str  # of the file itself: a link to it may move on; or its address in the hub
    sha256: str
    stamp: tuple[int, int, int] | None


def examine(path: str | Path) -> Examined:
    """Hold every byte of a checkpoint against its checksum. Raises ValueError as `read` does."""
    file = os.path.realpath(hub.local(path))
    stamp = identity(file)
    read(file, verify=True)
    return Examined(str(path) if hub.is_address(path) else file, sha256(file), stamp)


def load_examined(file: Examined, build: Callable[[dict], T]) -> T:
    """As `load`, on any process: ValueError where this is not, or no longer, the file that was examined."""
    path = hub.local(file.path)
    built = load(path, build)
    if identity(path) != file.stamp and sha256(path) != file.sha256:  # copies are welcome
        raise ValueError(f"{file.path}: is being written, or is another file here than on process 0; run again")
    return built


def write(state: dict, path: str | Path) -> None:
    """Put `state` at `path` completely or not at all, on the disk when this returns. Raises OSError or RuntimeError."""
    with atomic_file(path) as file:
        torch.save(state, file)


def _is_zip(path: str | Path) -> bool:
    """Whether it is torch.save's format since 1.6, which alone can be mapped."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _what_is_wrong(path: str | Path, error: Exception) -> str:
    """Why a file could not be read, in one line. torch's own advice, to read it unprotected, is never repeated."""
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or _first_line(error)}"
    if what := mistaken(path):
        return what
    foreign = re.search(r"(?:GLOBAL|global:?|class) ([\w.]+\.\w+)", str(error))
    if foreign and isinstance(error, pickle.UnpicklingError):
        return f"not a readable checkpoint: holds {foreign[1]}, which is not run, not only weights"
    if not _is_zip(path):
        return "not a readable checkpoint: no file of torch.save, or damaged"
    if isinstance(error, zipfile.BadZipFile):
        return "not a readable checkpoint: damaged or cut short"
    return f"not a readable checkpoint: damaged ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    """Of an error's text; what cannot be printed, as "?"."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return "".join(letter if letter.isprintable() else "?" for letter in first)
