"""Images in finished shards -> one .npz, in constant memory.

A shard is an .npy of images (uint8, N H W 3), named by the indices it holds, with a checksum behind: the CRC32 of the
images' bytes, begun with the run's key, as 8 hexadecimal digits. So a changed shard, or another run's, is recognised.
"""

import io
import os
import re
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from utils.files import atomic_file, remove_leftovers
from utils.script import warn

Range = tuple[int, int]  # image indices start <= i < stop
BLOCK_BYTES = 1 << 22
CHECKSUM_BYTES = 8
SHARD_PATTERN = r"(\d{8,})-(\d{8,})\.npy"


def write_shard(folder: Path, start: int, images: np.ndarray, key: int) -> None:
    """Store images start, start + 1, ... (uint8, N H W 3) of the run with this key durably."""
    images = np.ascontiguousarray(images)
    with atomic_file(folder / f"{start:08d}-{start + len(images):08d}.npy") as file:
        file.write(_header(*images.shape[:2]))
        file.write(images.data)  # np.save would not say why a write failed
        file.write(_checksum(zlib.crc32(images.data, key)))


class Writer:
    """Writes a batch in a thread of its own while the next one is made: one at a time, so one waits in memory.

    A context manager: nothing is under way behind its block, however that ends. An error of a write is raised by the
    next `call` or at the end of the block; a block that ends by another error says it on stderr.
    """

    def __init__(self):
        self.thread, self.under_way = ThreadPoolExecutor(max_workers=1), None

    def call(self, write: Callable[..., None], *args: object) -> None:
        """write(*args), once the write before has ended."""
        self._wait()
        self.under_way = self.thread.submit(write, *args)

    def _wait(self) -> None:
        before, self.under_way = self.under_way, None
        if before is not None:
            before.result()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.thread.shutdown(wait=True)
        try:
            self._wait()
        except Exception as error:
            if kind is None:
                raise
            warn(f"a batch was not written: {error}")


def finished_shards(folder: Path, image_size: int, total: int) -> dict[Range, Path]:
    """The whole shards of images below `total`, in index order. Files of another name or size are left out."""
    shards = {}
    for path, (start, stop) in _named_as_shards(folder):
        if not start < stop <= total or not path.is_file():
            continue
        header = _header(stop - start, image_size)
        with open(path, "rb") as file:
            is_ours = file.read(len(header)) == header
        if is_ours and path.stat().st_size == len(header) + (stop - start) * image_size**2 * 3 + CHECKSUM_BYTES:
            shards[start, stop] = path
    return shards


def verified_shards(folder: Path, image_size: int, total: int, key: int) -> tuple[dict[Range, Path], list[Path]]:
    """The finished shards whose every byte is as the run with this key wrote it; and those that were set aside.

    All others with a shard's name are renamed to NAME.rejected: damaged, of another run, or beyond `total`.
    """
    shards, rejected = finished_shards(folder, image_size, total), []
    for path, where in _named_as_shards(folder):
        try:
            if where not in shards:
                raise ValueError
            for _ in _blocks(path, *where, image_size, key):
                pass
        except ValueError:
            shards.pop(where, None)
            rejected.append(path.rename(path.with_name(path.name + ".rejected")))
    return shards, rejected


def has_shards(folder: Path) -> bool:
    return any(_named_as_shards(folder))


def remove_shards(folder: Path) -> None:
    """Remove all shards, and the folder if nothing else is in it."""
    for path, _ in _named_as_shards(folder):
        path.unlink()
    remove_leftovers(folder, SHARD_PATTERN)
    with suppress(OSError):  # not empty, or gone
        folder.rmdir()


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


def wait_for_shards(folder: Path, image_size: int, total: int, patience: float) -> dict[Range, Path]:
    """The shards of all processes, once they cover every image.

    Polls the folder: signals get through, unlike in a collective. When another process fails, torchrun ends this one;
    TimeoutError where nothing ends it, but no shard was added for `patience` seconds.
    """
    before, since = {}, time.monotonic()
    while missing := missing_ranges(list(shards := finished_shards(folder, image_size, total)), total):
        if shards.keys() != before.keys():
            before, since = shards, time.monotonic()
        if time.monotonic() - since > patience:
            raise TimeoutError(
                f"{folder}: image {missing[0][0]} and others do not come, for {patience / 60:.0f} minutes: the process "
                "that was to make them has ended; the same command continues"
            )
        time.sleep(0.5)
    return shards


def read_image(shards: dict[Range, Path], index: int) -> np.ndarray:
    """Image `index` (uint8, H W 3) from the shard that holds it."""
    start, path = next((start, path) for (start, stop), path in shards.items() if start <= index < stop)
    return np.array(np.load(path, mmap_mode="r", allow_pickle=False)[index - start])  # its header was compared


# ---- the .npz ----------------------------------------------------------------------------------------------------


def assemble(
    path: Path,
    shards: dict[Range, Path],
    labels: np.ndarray,
    image_size: int,
    key: int,
    record: Callable[[dict], None],
) -> None:
    """Stream shards that cover every index of `labels` into one .npz: arr_0 uint8 (N, H, W, 3), arr_1 labels (N,).

    Memory is one block, whatever N. Equal images give equal bytes: members carry no date. Before the file appears,
    `record` gets {"samples.npz": checksums of its members} (see `check_npz`). Raises ValueError when an index is in no
    shard, or a shard is not as the run with this key wrote it.
    """
    missing = missing_ranges(list(shards), len(labels))
    if missing:
        raise ValueError(
            f"{path}: images {missing[0][0]} to {missing[0][1] - 1} are in no shard; run the sampler again"
        )
    with atomic_file(path) as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
                member.write(_header(len(labels), image_size))
                position = 0
                for (start, stop), shard in sorted(shards.items()):
                    if stop <= position:
                        continue
                    skip = (position - start) * image_size**2 * 3  # images that an earlier shard had too
                    for block in _blocks(shard, start, stop, image_size, key):
                        member.write(block[skip:])
                        skip = max(0, skip - len(block))
                    position = stop
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
                np.lib.format.write_array(member, np.ascontiguousarray(labels), allow_pickle=False)
        record({path.name: _member_checksums(archive)})


def check_npz(path: Path, recorded: dict | None) -> None:
    """ValueError unless every byte of the .npz is as `assemble` wrote it when it recorded these checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            ours = _member_checksums(archive) == recorded and archive.testzip() is None
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError):
        ours = False
    if not ours:
        raise ValueError(f"{path} is damaged, or this run did not make it; move it away, and the same command makes it")


def _member_checksums(archive: zipfile.ZipFile) -> dict[str, int]:
    return {member.filename: member.CRC for member in archive.infolist()}


# ---- the bytes of a shard ----------------------------------------------------------------------------------------


def _named_as_shards(folder: Path) -> Iterator[tuple[Path, Range]]:
    for path in sorted(folder.glob("*.npy")):
        if name := re.fullmatch(SHARD_PATTERN, path.name):
            yield path, (int(name[1]), int(name[2]))


def _header(count: int, image_size: int) -> bytes:
    """The .npy header of so many images: a shard with another one is not ours, and its header is never parsed."""
    file = io.BytesIO()
    shape = count, image_size, image_size, 3
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


def _blocks(path: Path, start: int, stop: int, image_size: int, key: int) -> Iterator[bytes]:
    """The bytes of a shard's images, some at a time; behind the last, ValueError if they are not what the run wrote."""
    left, checksum = (stop - start) * image_size**2 * 3, key
    with open(path, "rb") as file:
        file.seek(-left - CHECKSUM_BYTES, os.SEEK_END)
        while block := file.read(min(left, BLOCK_BYTES)):
            left, checksum = left - len(block), zlib.crc32(block, checksum)
            yield block
        if file.read() != _checksum(checksum):
            raise ValueError(f"{path} is damaged or of another run; the same command makes its images again")


def _checksum(value: int) -> bytes:
    return b"%08x" % value
