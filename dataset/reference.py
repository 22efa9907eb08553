"""A data set as the reference of metrics: the exact centre crop of every image, streamed into one .npz.

python -m dataset.reference DATA --image-size 256 --out REF.npz
"""

import argparse
import os
import shutil
import signal
import sys
import zipfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataset.imagenet import MAX_BAD_SHARE, ImageDataset, open_source
from dataset.loader import MAX_WORKERS, read_batches
from utils.files import atomic_file, printable

BATCH_SIZE = 32


def write_reference(data_path: str | Path, image_size: int, out: str | Path, num_workers: int = 0) -> int:
    """Write OUT: arr_0 uint8 (N, S, S, 3) in the data set's order, arr_1 int64 (N,) labels. How many were bad.

    Memory is a few batches, whatever N; OUT appears complete or not at all. A bad image is replaced by another one, as
    in training, and named on stderr. Raises ValueError where OUT is there, has no room, or too many images are bad.
    """
    out = Path(out)
    if os.path.lexists(out):
        raise ValueError(f"--out {out} is there already; remove it, or choose another name")
    if out.suffix != ".npz":
        raise ValueError(f"--out {out} must end in .npz")
    data = ImageDataset(open_source(data_path), image_size, seed=0)
    out.parent.mkdir(parents=True, exist_ok=True)
    needed, free = len(data) * image_size**2 * 3, shutil.disk_usage(out.parent).free
    if needed > free:
        raise ValueError(f"--out {out} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free; choose another disk")
    with atomic_file(out, new=True) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:  # ZipInfo: carries no date
            shape = len(data), image_size, image_size, 3
            np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
            labels, num_bad = _write_images(member, data, num_workers)
        with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
            np.lib.format.write_array(member, labels, allow_pickle=False)
    return num_bad


def _write_images(member: zipfile.ZipExtFile, data: ImageDataset, num_workers: int) -> tuple[np.ndarray, int]:
    """Append all images; their labels, and how many images were bad."""
    keys = (range(start, min(start + BATCH_SIZE, len(data))) for start in range(0, len(data), BATCH_SIZE))
    labels, num_bad = np.empty(len(data), np.int64), 0
    with tqdm(total=len(data), unit="images", disable=None) as bar:
        for batch in read_batches(data, keys, num_workers):
            for text in filter(None, batch.bad):
                num_bad += 1
                print(f"bad image replaced ({num_bad} so far): {text}", file=sys.stderr, flush=True)
            if num_bad > max(1, int(MAX_BAD_SHARE * len(data))):
                raise ValueError(f"more than {MAX_BAD_SHARE:.1%} of the images are bad; run python -m dataset.check")
            member.write(batch.image.permute(0, 2, 3, 1).contiguous().numpy().data)
            labels[batch.index.numpy()] = batch.label.numpy()  # a list of small tensors would fragment the heap
            bar.update(len(batch.label))
    return labels, num_bad


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_path", metavar="DATA", help="tar of class tars, or folder of class folders")
    parser.add_argument("--image-size", type=int, required=True, help="side of the crops in pixels")
    parser.add_argument("--out", required=True, help="the .npz to write")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that decode beside this [%(default)s]")
    args = parser.parse_args(argv)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    sys.stdout.reconfigure(errors="backslashreplace")  # paths may have letters that the terminal has not
    try:
        for flag, value, least, most in (
            ("--image-size", args.image_size, 1, 2**13),
            ("--num-workers", args.num_workers, 0, MAX_WORKERS),
        ):
            if not least <= value <= most:
                raise ValueError(f"{flag} {value} must lie in [{least}, {most}]")
        write_reference(args.data_path, args.image_size, args.out, args.num_workers)
    except (ValueError, OSError) as error:
        print(f"dataset.reference: error: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print("\ndataset.reference: stopped; nothing was written", file=sys.stderr)
        return 128 + stopped.args[0]
    print(args.out)
    return 0


def _stop(signum: int, _frame: object) -> None:
    raise KeyboardInterrupt(signum)


if __name__ == "__main__":
    sys.exit(main())
