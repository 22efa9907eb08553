"""Images in finished shards -> one .npz, in constant memory. Shards are named by the image indices they hold."""

import os
import re
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np

from utils.files import atomic_file

Range = tuple[int, int]  # image indices start <= i < stop
COPY_BYTES = 1 << 22
SHARD_NAME = re.compile(r"(\d{8,})-(\d{8,})\.npy")


def write_shard(folder: Path, start: int, images: np.ndarray) -> None:
    """Store images start, start + 1, ... (uint8, N H W 3) durably."""
    images = np.ascontiguousarray(images)
    with atomic_file(folder / f"{start:08d}-{start + len(images):08d}.npy") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(images))
        file.write(images.data)  # np.save would not say why a write failed


def finished_shards(folder: Path, image_size: int) -> dict[Range, Path]:
    """The whole shards in `folder`, in index order. Files of another name, or size than it promises, are left out."""
    shards = {}
    for path in sorted(folder.glob("*.npy")):
        name = SHARD_NAME.fullmatch(path.name)
        if not name:
            continue
        start, stop = map(int, name.groups())
        with open(path, "rb") as file:
            try:
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            except ValueError:  # not the start of an array: cut short by a power cut
                continue
            whole = path.stat().st_size == file.tell() + np.prod(shape)
        if whole and dtype == np.uint8 and shape == (stop - start, image_size, image_size, 3):
            shards[start, stop] = path
    return shards


def missing_ranges(finished: list[Range], total: int) -> list[Range]:
    """What of 0 <= i < total no finished range covers."""
    missing, position = [], 0
    for start, stop in [*sorted(finished), (total, total)]:
        if start > position:
            missing.append((position, min(start, total)))
        position = max(position, stop)
    return missing


def batches_of(missing: list[Range], batch_size: int, rank: int, world_size: int) -> list[Range]:
    """A process's batches: runs of at most batch_size neighbouring images, dealt out in turn."""
    batches = [(at, min(at + batch_size, stop)) for start, stop in missing for at in range(start, stop, batch_size)]
    return batches[rank::world_size]


def wait_for_shards(folder: Path, image_size: int, total: int) -> dict[Range, Path]:
    """The shards of all processes, once they cover every image. Polls the folder: signals get through, unlike in a
    collective; when another process fails, torchrun ends this one."""
    while missing_ranges(list(shards := finished_shards(folder, image_size)), total):
        time.sleep(0.5)
    return shards


def read_image(shards: dict[Range, Path], index: int) -> np.ndarray:
    """Image `index` (uint8, H W 3) from the shard that holds it."""
    start, path = next((start, path) for (start, stop), path in shards.items() if start <= index < stop)
    return np.array(np.load(path, mmap_mode="r", allow_pickle=False)[index - start])


def assemble(path: str | Path, shards: dict[Range, Path], labels: np.ndarray, image_size: int) -> None:
    """Stream shards that cover every index of `labels` into one .npz: arr_0 uint8 (N, H, W, 3), arr_1 labels (N,).

    Memory is one copy buffer, whatever N. Equal images give equal bytes: members carry no date. Raises ValueError
    when an index is in no shard.
    """
    missing = missing_ranges(list(shards), len(labels))
    if missing:
        raise ValueError(
            f"{path}: images {missing[0][0]} to {missing[0][1] - 1} are in no shard; run the sampler again"
        )
    image_bytes = image_size * image_size * 3
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), image_size, image_size, 3)}
    with atomic_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            position = 0
            for (_, stop), shard in sorted(shards.items()):
                if stop <= position:
                    continue
                with open(shard, "rb") as source:
                    source.seek((position - stop) * image_bytes, os.SEEK_END)
                    shutil.copyfileobj(source, member, COPY_BYTES)
                position = stop
        with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
            np.lib.format.write_array(member, np.ascontiguousarray(labels), allow_pickle=False)
