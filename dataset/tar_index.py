"""Where every image of a tar of class tars lies, found from the headers alone and kept in a small file.

The archive (ILSVRC2012_img_train.tar: a tar of 1,000 tars named by synset) is never unpacked. Building walks the
512-byte headers with os.pread; the result is an .npz next to the tar, or in $SPHEREAR_CACHE (default
~/.cache/spherear) where that folder is read-only, and is rebuilt when the tar changed or the file is damaged.
"""

import fcntl
import hashlib
import os
import zipfile
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.files import NPZ_FAULTS, atomic_file, begins_with, cache_folder, printable

BLOCK = 512  # bytes: a header, and the unit to which payloads are padded
RECORD_BYTES = 1 << 20  # the most that a record about a member, such as its long name, may have
MAX_SIZE = 2**32 - 1  # what a recorded size can be; no image comes near it
VERSION = 2  # of the index file; another number means "rebuild"
IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


class TarIndex(NamedTuple):
    """N images of K classes; images are ordered by class, then as in the tar. 12 bytes per image."""

    classes: list[str]  # K names, sorted: the position is the label
    ends: np.ndarray  # (K,) int64: images of class k are ends[k-1] .. ends[k]-1
    offsets: np.ndarray  # (N,) int64: first byte of the image in the outer tar
    sizes: np.ndarray  # (N,) uint32: bytes; MAX_SIZE stands for all above it


def load_index(tar_path: str | Path) -> TarIndex:
    """The index of a tar of class tars, from its file where that is good, else built and stored.

    Safe with any number of processes starting at once: the one that gets the lock builds, the others wait and load.
    Raises ValueError for a flat, empty, truncated or otherwise broken tar, and when the index can be stored nowhere.
    """
    path = Path(tar_path).resolve()
    stat = path.stat()
    index = _load_stored(path, stat)
    if index is None:
        with _only_builder(path):
            index = _load_stored(path, stat)
            if index is None:
                index = build_index(path)
                _store(index, path, stat)
    return index


def build_index(tar_path: str | Path) -> TarIndex:
    """Walk the headers of a tar of class tars; no payload is read. Raises ValueError naming what is wrong."""
    fd = os.open(tar_path, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # else read-ahead fetches the payloads too
        members = _walk(fd, 0, os.fstat(fd).st_size, str(tar_path))
        tars = sorted(
            (Path(name).stem, start, size) for name, start, size in zip(*members) if name.lower().endswith(".tar")
        )
        classes = [name for name, _, _ in tars]
        if not tars:
            raise ValueError(
                f"{tar_path}: "
                + (f"a flat tar ({printable(members[0][0])} lies directly in it)" if members[0] else "an empty tar")
                + "; expected a tar of class tars (as ILSVRC2012_img_train.tar), or give a folder of class folders"
            )
        for name in {name for name in classes if classes.count(name) > 1}:
            raise ValueError(f"{tar_path}: two class tars are named {printable(name)}; expected one tar per class")
        offsets, sizes, counts = [], [], []
        for name, start, size in tars:
            where = f"{tar_path}, class {printable(name)}"
            found = _walk(fd, start, start + size, where, IMAGE_SUFFIXES)
            if not found[0]:
                raise ValueError(f"{where} holds no images; remove it or repair the tar")
            offsets.append(np.array(found[1], np.int64))
            sizes.append(np.minimum(found[2], MAX_SIZE).astype(np.uint32))
            counts.append(len(found[0]))
        return TarIndex(classes, np.cumsum(counts), np.concatenate(offsets), np.concatenate(sizes))
    finally:
        os.close(fd)


def member_name(fd: int, offset: int) -> str:
    """Name of the member whose payload starts at `offset` (its first 100 bytes, where it is a long one)."""
    return _short_name(os.pread(fd, BLOCK, offset - BLOCK))


def _walk(fd: int, start: int, end: int, where: str, suffixes: tuple[str, ...] | None = None):
    """Names, first bytes and sizes of the regular files of the tar in bytes [start, end) of `fd`.

    Only names ending in one of `suffixes` when given; hidden files (`._*` of macOS) are left out. GNU and pax long
    names and sizes are understood, links and folders skipped. Raises ValueError when the tar is cut or not a tar.
    """
    names, offsets, sizes, headers = [], [], [], []
    long_name = long_size = None
    position = start
    while True:
        header = os.pread(fd, BLOCK, position) if position + BLOCK <= end else b""
        if len(header) < BLOCK:
            what = "an empty file" if end == start else f"truncated at byte {position - start} of {end - start}"
            raise ValueError(f"{where}: {what} (no end-of-archive mark); copy it again")
        if not header[0] and not any(header):
            break
        try:
            size = _number(header[124:136]) if long_size is None else long_size
        except ValueError:
            raise _broken(where, position - start) from None
        payload, kind = position + BLOCK, header[156]
        position = payload + (size + BLOCK - 1) // BLOCK * BLOCK
        if payload + size > end:
            if not _valid(header):
                raise _broken(where, payload - BLOCK - start)
            raise ValueError(
                f"{where}: truncated: {printable(_short_name(header))} needs {size} bytes, "
                f"{end - payload} are there; copy it again"
            )
        headers.append(header)
        if kind in b"Lx" and size > RECORD_BYTES:
            raise _broken(where, payload - BLOCK - start)
        if kind == 76:  # "L": the next member's name, GNU
            long_name = os.pread(fd, size, payload).rstrip(b"\0").decode(errors="surrogateescape")
        elif kind == 120:  # "x": records about the next member, pax
            records = _pax_records(os.pread(fd, size, payload), where)
            long_name = records.get("path", long_name)
            try:
                long_size = _digits(records["size"].encode(errors="surrogateescape"), 10) if "size" in records else None
            except ValueError:
                raise ValueError(
                    f"{where}: a pax header whose size is no number: "
                    f"{printable(records['size'][:40])}; copy the tar again"
                ) from None
        elif kind not in b"Kg":  # "K" long link, "g" global records: neither belongs to a file
            if kind in b"0\0" and header[0]:
                name = _short_name(header) if long_name is None else long_name
                base = name[name.rfind("/") + 1 :]
                if base and base[0] != "." and (suffixes is None or base.lower().endswith(suffixes)):
                    names.append(name)
                    offsets.append(payload)
                    sizes.append(size)
            long_name = long_size = None
    bad = np.flatnonzero(~_valid(b"".join(headers)))
    if bad.size:
        raise ValueError(f"{where}: header {bad[0]} is damaged (checksum); copy the tar again")
    return names, offsets, sizes


def _short_name(header: bytes) -> str:
    return header[: header.index(0) if 0 in header[:100] else 100].decode(errors="surrogateescape")


def _number(field: bytes) -> int:
    """A tar number: octal digits, or base 256 when the first bit is set (GNU, over 8 GiB)."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ((1 << 8 * len(field) - 1) - 1)
    return _digits(field.strip(b"\0 ") or b"0", 8)


def _digits(text: bytes, base: int) -> int:
    """The number of plain digits. ValueError for anything else that int() would take: a sign, an underscore."""
    if not text.isdigit():
        raise ValueError
    return int(text, base)


def _valid(headers: bytes) -> np.ndarray:
    """For each 512-byte header, whether its checksum (sum of all bytes, the field itself as spaces) is right."""
    blocks = np.frombuffer(headers, np.uint8).reshape(-1, BLOCK)
    sums = blocks.sum(1, dtype=np.int64) - blocks[:, 148:156].sum(1, dtype=np.int64) + 8 * 32
    stored = np.full(len(blocks), -1, np.int64)
    for i, field in enumerate(blocks[:, 148:156]):
        with suppress(ValueError):
            stored[i] = _number(field.tobytes())
    return sums == stored


def _broken(where: str, position: int) -> ValueError:
    return ValueError(f"{where}: no tar header at byte {position}: the file is damaged, compressed or not a tar")


def _pax_records(text: bytes, where: str) -> dict[str, str]:
    """The `LENGTH KEY=VALUE` lines of a pax header."""
    records = {}
    while text:
        length, _, _ = text.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(text):
            raise ValueError(f"{where}: a damaged pax header; copy the tar again")
        key, _, value = text[len(length) + 1 : int(length) - 1].partition(b"=")
        records[key.decode(errors="replace")] = value.decode(errors="surrogateescape")
        text = text[int(length) :]
    return records


def _places(path: Path) -> list[Path]:
    """Where the index file of this tar may lie, in order of preference."""
    tag = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    return [path.with_name(path.name + ".index.npz"), cache_folder() / f"{path.name}.{tag}.index.npz"]


def _load_stored(path: Path, stat: os.stat_result) -> TarIndex | None:
    """The stored index, or None where there is none that is whole and belongs to this very tar."""
    for place in _places(path):
        if not place.is_file():
            continue
        try:
            with zipfile.ZipFile(place) as archive:
                if archive.testzip() is not None:  # CRC of every array, before anything in it is believed
                    continue
            with np.load(place, allow_pickle=False) as file:
                if file["key"].tolist() != [VERSION, stat.st_size, stat.st_mtime_ns]:
                    continue
                index = TarIndex(file["classes"].tolist(), file["ends"], file["offsets"], file["sizes"])
                headers = int(file["headers"])
            if _is_consistent(index) and headers == _checksum_of_headers(index, path):
                return index
        except NPZ_FAULTS:
            continue
    return None


def _is_consistent(index: TarIndex) -> bool:
    """Whether the parts fit each other: another program may have written the file."""
    numbers = index.ends, index.offsets, index.sizes
    return (
        all(part.ndim == 1 and part.dtype.kind in "iu" and len(part) for part in numbers)
        and len(index.ends) == len(index.classes)
        and len(index.offsets) == len(index.sizes) == index.ends[-1]
        and bool((np.diff(index.ends, prepend=0) > 0).all())
    )


def _checksum_of_headers(index: TarIndex, path: Path) -> int:
    """CRC32 of what lies before the first image of every class, and before a few others: another tar may have the same
    size and time. Those are the image's header and, as tars are mostly written, its class tar's: names, sizes, dates.
    """
    fd, checksum = os.open(path, os.O_RDONLY), 0
    try:
        firsts, others = index.ends[:-1], np.linspace(0, len(index.offsets) - 1, 64).astype(np.int64)
        for offset in index.offsets[np.unique([0, *firsts, *others])].tolist():
            checksum = zlib.crc32(os.pread(fd, 2 * BLOCK, max(0, offset - 2 * BLOCK)), checksum)
        return checksum
    finally:
        os.close(fd)


def _store(index: TarIndex, path: Path, stat: os.stat_result) -> None:
    """Write the index atomically at the first place that can be written. Another program's file is left alone."""
    key = np.array([VERSION, stat.st_size, stat.st_mtime_ns], np.int64)
    errors = []
    for place in _places(path):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(place, new=place.exists() and not begins_with(place, "key")) as file:
                np.savez(file, key=key, headers=_checksum_of_headers(index, path), **index._asdict())
            return
        except OSError as error:
            errors.append(f"{place}: {error.strerror}")
    raise ValueError(f"the index of {path} can be stored nowhere ({'; '.join(errors)}); set SPHEREAR_CACHE to a folder")


@contextmanager
def _only_builder(path: Path):
    """Hold a lock on the tar itself; where the file system has no locks, building twice does no harm."""
    fd = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
