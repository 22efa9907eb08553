"""Inception features kept beside a file, so that the next evaluation of the same file need not compute them."""

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from utils import distributed
from utils.evaluation.features import Features
from utils.evaluation.npz_reader import NpzReader
from utils.evaluation.png_folder import PngFolder
from utils.files import NPZ_FAULTS, atomic_file, begins_with

VERSION = 1  # of our network and statistics; a new number makes feature caches void


def beside(images: Path, suffix: str) -> Path:
    """samples.npz + .txt is samples.txt; a folder's whole name counts: the folder run1.5 has run1.5.txt beside it."""
    if images.is_dir():
        images = Path(os.path.abspath(images))
        return images.with_name(images.name + suffix)
    return images.with_suffix(suffix)


def cache_path(images: Path) -> Path:
    """samples.npz keeps its features in samples.features.npz."""
    return beside(images, ".features.npz")


def load_features(images: Path, key: dict, names: set[str]) -> tuple[Features, str] | None:
    """Features with the arrays `names`, and the sha256 of `images`, as saved under an equal key.

    None: there is no cache, it was saved under another key, or it is damaged.
    """
    if not cache_path(images).is_file():
        return None
    try:
        with np.load(cache_path(images), allow_pickle=False) as archive:
            record = json.loads(bytes(archive["record"]))
            if record["key"] != {"version": VERSION, **key}:
                return None
            arrays = {name: archive[name] for name in names}
            pool, spatial = torch.from_numpy(arrays.pop("pool")), arrays.pop("spatial", None)
            spatial = None if spatial is None else torch.from_numpy(spatial)
            return Features(pool, arrays, spatial), record["sha256"]
    except NPZ_FAULTS:
        return None


def save_features(images: Path, key: dict, features: Features, sha256: str) -> None:
    """Save features and the sha256 of `images` under what they depend on (`key`, plain values), atomically.

    Raises OSError where that cannot be, or a file that is no cache has its name.
    """
    path = cache_path(images)
    if path.exists() and not begins_with(path, "record"):
        raise FileExistsError(errno.EEXIST, "exists and is no feature cache", str(path))
    record = json.dumps({"key": {"version": VERSION, **key}, "sha256": sha256}).encode()
    arrays = {"pool": features.pool.cpu().numpy(), **features.statistics}
    if features.spatial is not None:
        arrays["spatial"] = features.spatial.cpu().numpy()
    with atomic_file(path) as file:
        np.savez(file, record=np.frombuffer(record, np.uint8), **arrays)


def cached(
    file: NpzReader | PngFolder, key: dict, names: set[str], compute: Callable[[], tuple[Features, str]]
) -> tuple[Features, str, bool]:
    """Features of a file, its sha256, and whether they come from the cache beside it or were computed and saved there.

    names: the arrays that a cache must have.
    """
    key = {**key, **file.fingerprint()}
    found = load_features(file.path, key, names)
    if all(distributed.gather_objects(found is not None)):
        return *found, True
    features, sha256 = compute()
    if distributed.is_main():
        try:
            save_features(file.path, key, features, sha256)
        except OSError as error:
            print(f"warning: --cache-features: {error}; going on without", file=sys.stderr)
    return features, sha256, False
