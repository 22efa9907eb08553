"""Read every image of a data set and say what is in it: python -m dataset.check TAR [--num-classes N].

Exit code 0: usable (at most 0.1 % bad images, which training replaces); 1: more than that; 2: no usable data set.
"""

import argparse
import sys
from collections import Counter

from torch.utils.data import Dataset
from tqdm import tqdm

from dataset.decode import BadImage, decode
from dataset.imagenet import MAX_BAD_SHARE, ImageDataset, open_source
from dataset.loader import MAX_WORKERS, read_batches
from utils.files import printable


class _Facts(Dataset):
    """(width, height, reason or "") of every image."""

    def __init__(self, source):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, int, str]:
        try:
            _, height, width = decode(self.source.read(index), self.source.file_name(index)).shape
        except BadImage as error:
            return 0, 0, str(error)
        return width, height, ""


def check(data_path: str, num_classes: int | None = None, num_workers: int = 0) -> int:
    """Print what the data set holds, and return the exit code. ValueError or OSError where it cannot be used at all."""
    source = open_source(data_path, num_classes)
    dataset = ImageDataset(source, image_size=1, seed=0)
    sizes, bad = [], []
    one_by_one = ([index] for index in range(len(source)))
    facts = tqdm(read_batches(_Facts(source), one_by_one, num_workers), total=len(source), unit="images", disable=None)
    for index, ((width,), (height,), (reason,)) in enumerate(facts):
        if reason:
            bad.append(f"{dataset.name(index)}: {reason}")
        else:
            sizes.append((int(width), int(height)))
    counts = Counter(dataset.label(index) for index in range(len(dataset)))
    print(f"{data_path}: {len(source)} images of {len(source.classes)} classes")
    print(f"images per class: {min(counts.values())} to {max(counts.values())}")
    if sizes:
        print(f"shorter side: {min(map(min, sizes))} to {max(map(min, sizes))} pixels, longest {max(map(max, sizes))}")
    print(f"bad images: {len(bad)} ({len(bad) / len(source):.3%})", *bad, sep="\n  ")
    return 1 if len(bad) > max(1, MAX_BAD_SHARE * len(source)) else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Read every image of a data set and say what is in it.")
    parser.add_argument("data_path", help="tar of class tars, or folder of class folders")
    parser.add_argument("--num-classes", type=int, help="number of classes to expect (default: any)")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that decode beside this one")
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # names may have letters that the terminal has not
    try:
        if not 0 <= args.num_workers <= MAX_WORKERS:
            raise ValueError(f"--num-workers {args.num_workers} must lie in [0, {MAX_WORKERS}]")
        return check(args.data_path, args.num_classes, args.num_workers)
    except (ValueError, OSError) as error:
        print(f"dataset.check: error: {printable(str(error))}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
