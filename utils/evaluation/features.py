"""Inception features kept beside an .npz, so that the next evaluation of the same file need not compute them."""

import json
import zipfile
from pathlib import Path

import numpy as np

from utils.evaluation.npz_reader import DAMAGE
from utils.files import atomic_file


def cache_path(images: Path) -> Path:
    """samples.npz keeps its features in samples.features.npz."""
    return images.with_suffix(".features.npz")


def load_features(images: Path, key: dict, names: set[str]) -> tuple[dict[str, np.ndarray], str] | None:
    """Arrays `names` and the sha256 of `images` as saved under an equal key; None: no cache, another key, damaged."""
    try:
        with np.load(cache_path(images), allow_pickle=False) as archive:
            record = json.loads(bytes(archive["record"]))
            if record["key"] != key:
                return None
            return {name: archive[name] for name in names}, record["sha256"]
    except (*DAMAGE, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None


def save_features(images: Path, key: dict, sha256: str, arrays: dict[str, np.ndarray]) -> None:
    """Save arrays under what they depend on (`key`, plain values), atomically."""
    record = np.frombuffer(json.dumps({"key": key, "sha256": sha256}).encode(), np.uint8)
    with atomic_file(cache_path(images)) as file:
        np.savez(file, record=record, **arrays)
