"""Images and statistics out of an .npz as the ADM evaluator takes it, a batch at a time and never the whole file.

`arr_0` uint8 (N, H, W, 3); perhaps `arr_1` labels (N,); perhaps `mu, sigma, mu_s, sigma_s`: statistics of a whole
data set, (2048,), (2048, 2048), (2023,), (2023, 2023). Stored members are read in place, deflated ones streamed.
Nothing is unpickled. Every fault of a file is a ValueError of one line that begins with its path.
"""

import hashlib
import re
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from utils.files import identity, mistaken

NPY_MAGIC = b"\x93NUMPY"
NPY_HEADER = re.compile(rb"\{'descr': '([<>|=]?\w+)', 'fortran_order': (True|False), 'shape': \(([\d, ]*)\),? *\}\s*")
STATISTICS = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}
CHUNK = 1 << 22
CHANGED = "is no longer the file that was opened: leave it as it is until the run ends, and start again"
MAX_IMAGES = 1_000_000  # of one file: their features take 4 GB
# What zipfile and zlib raise on damaged files, besides ValueError and BadZipFile.
DAMAGE = (
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    OverflowError,
    NotImplementedError,
    RuntimeError,
    MemoryError,
)


class NpzReader:
    """An .npz of images and / or statistics.

    `count`, `height`, `width` describe arr_0 (count 0: there is none), `labels` is arr_1 or None, `statistics` maps
    those of mu, sigma, mu_s, sigma_s that the file has to float64 arrays. What is read and what has the checksum is the
    file that was opened: once it has changed, both are refused.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.count = self.height = self.width = 0
        self.labels: np.ndarray | None = None
        self.statistics: dict[str, np.ndarray] = {}
        self._stream: BinaryIO | None = None
        self._position = 0  # image index at which _stream stands
        if self.path.exists() and not self.path.is_file():  # a pipe would be waited for, for ever
            raise ValueError(f"{self.path}: is no file")
        self._identity = identity(self.path)
        with self._faults(), zipfile.ZipFile(self.path) as archive:
            names = set(archive.namelist())
            if "arr_0.npy" in names:
                self._open_images(archive.getinfo("arr_0.npy"))
            for pair in (("mu", "sigma"), ("mu_s", "sigma_s")):
                if (f"{pair[0]}.npy" in names) != (f"{pair[1]}.npy" in names):
                    raise ValueError(f"has only one of {pair[0]} and {pair[1]}; both or none are needed")
            for name, shape in STATISTICS.items():
                if f"{name}.npy" in names:
                    values = read_member(archive, f"{name}.npy", shape)
                    if values.dtype.kind != "f" or not np.isfinite(values).all():
                        raise ValueError(f"{name} is not an array of finite floats")
                    if values.ndim == 2 and not is_covariance(values):
                        raise ValueError(f"{name} is no covariance: not symmetric, or a variance below 0 or above 1e12")
                    self.statistics[name] = values.astype(np.float64)
            if self.count and "arr_1.npy" in names:
                self.labels = read_labels(archive, self.count)
            if not self.count and "mu" not in self.statistics:
                raise ValueError(f"has neither images (arr_0) nor statistics (mu, sigma), only {sorted(names)[:5]}")

    def _open_images(self, info: zipfile.ZipInfo) -> None:
        with zipfile.ZipFile(self.path) as archive, archive.open(info) as member:
            dtype, shape, header = read_header(member, "arr_0")
        if dtype != np.uint8:
            raise ValueError(f"arr_0 is {dtype}, but images are uint8 in 0..255 (convert: (x * 255).round())")
        if len(shape) != 4 or shape[3] != 3:
            raise ValueError(f"arr_0 has shape {shape}, but images are N x H x W x 3")
        if 0 in shape:
            raise ValueError(f"arr_0 has shape {shape}: there are no images in it")
        if shape[0] > MAX_IMAGES:
            raise ValueError(f"arr_0 has {shape[0]} images; {MAX_IMAGES} at most fit into memory: take fewer")
        self._info, self._header = info, header
        self._image_bytes = int(np.prod(shape[1:], dtype=object))
        if header + shape[0] * self._image_bytes != info.file_size:
            raise ValueError(f"arr_0 has {info.file_size - header} bytes, not those of shape {shape}: a damaged file")
        if info.compress_type == zipfile.ZIP_STORED:
            with open(self.path, "rb") as file:
                file.seek(info.header_offset)
                local = file.read(30)
                if local[:4] != b"PK\x03\x04":
                    raise ValueError("arr_0 is not where the directory says: a damaged file")
                self._data = info.header_offset + 30 + sum(struct.unpack("<HH", local[26:])) + header
                if self._data + shape[0] * self._image_bytes > self.path.stat().st_size:
                    raise ValueError("is cut short: arr_0 reaches beyond its end")
        self.count, self.height, self.width = shape[:3]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images start <= i < stop, uint8 (n, H, W, 3). Deflated files are cheap to read forward only."""
        with self._faults():
            if self._stream is None or start < self._position:
                self._rewind()
            if self._info.compress_type == zipfile.ZIP_STORED:
                self._stream.seek(self._data + start * self._image_bytes)
            else:
                skip = (start - self._position) * self._image_bytes
                while skip:
                    skip -= len(self._exactly(min(skip, CHUNK)))
            data = self._exactly((stop - start) * self._image_bytes)
            self._position = stop
            return np.frombuffer(data, np.uint8).reshape(stop - start, self.height, self.width, 3)

    def _rewind(self) -> None:
        self.close()
        if self._info.compress_type == zipfile.ZIP_STORED:
            self._stream = open(self.path, "rb")  # noqa: SIM115 (held until close)
        else:
            with zipfile.ZipFile(self.path) as archive:
                self._stream = archive.open(self._info)  # holds the file open by itself
            self._exactly(self._header)
        self._position = 0

    def _exactly(self, size: int) -> bytearray:
        """`size` bytes of the stream, writable."""
        data = bytearray(size)
        view, filled = memoryview(data), 0
        while filled < size:
            got = self._stream.readinto(view[filled : filled + CHUNK])
            if not got:
                raise ValueError("is cut short: arr_0 ends before its last image")
            filled += got
        return data

    def close(self) -> None:
        """Close the file; reading opens it again."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def fingerprint(self) -> dict[str, int]:
        """Numbers that change with the file, at no cost: its size and date, and the zip's checksum of arr_0."""
        status = self.path.stat()
        return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "crc": self._info.CRC}

    def sha256(self, abandoned: threading.Event | None = None) -> str:
        """Checksum of the whole file. On the way a stored arr_0 is held against its own; zlib does that for others.

        Once `abandoned` is set it ends early, with any result.
        """
        digest, crc, position = hashlib.sha256(), 0, 0
        stored = self.count > 0 and self._info.compress_type == zipfile.ZIP_STORED
        first = self._data - self._header if stored else 0
        stop = first + self._info.file_size if stored else 0
        with self._faults():
            with open(self.path, "rb") as file:
                while (chunk := file.read(CHUNK)) and not (abandoned and abandoned.is_set()):
                    digest.update(chunk)
                    part = memoryview(chunk)[max(0, first - position) : max(0, stop - position)]
                    crc, position = zlib.crc32(part, crc), position + len(chunk)
            if stored and crc != self._info.CRC:
                raise ValueError("arr_0 does not agree with its checksum: a damaged file")
        return digest.hexdigest()

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """Every fault as a ValueError that names the file; that it is another one by now comes first."""
        try:
            yield
        except FileNotFoundError:
            raise ValueError(f"{self.path}: there is no such file") from None
        except zipfile.BadZipFile as error:
            what = mistaken(self.path)
            reason = f"it {what}" if what else " ".join(str(error).split())
            raise ValueError(f"{self.path}: no .npz file, or one that was cut short or damaged ({reason})") from None
        except ValueError as error:
            raise ValueError(f"{self.path}: {' '.join(str(error).split())}") from None
        except DAMAGE as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{self.path}: cannot be read; damaged? ({reason})") from None
        finally:
            if identity(self.path) != self._identity:
                raise ValueError(f"{self.path}: {CHANGED}") from None


def read_header(member: BinaryIO, name: str) -> tuple[np.dtype, tuple[int, ...], int]:
    """dtype, shape and length in bytes of the .npy header at the start of `member`; only plain C-ordered arrays."""
    start = member.read(8)
    if start[:6] != NPY_MAGIC or start[6:] not in (b"\x01\x00", b"\x02\x00"):
        raise ValueError(f"{name} is no .npy array of version 1 or 2")
    size_bytes = 2 if start[6] == 1 else 4
    size = int.from_bytes(member.read(size_bytes), "little")
    if size > 4096:
        raise ValueError(f"{name} has a header of {size} bytes: a damaged file")
    header = member.read(size)
    match = NPY_HEADER.fullmatch(header)
    if b"'descr': '|O'" in header:
        raise ValueError(f"{name} is a pickled array of objects, which is never read: save plain uint8 images")
    if match is None:
        raise ValueError(f"{name} has an unreadable .npy header")
    descr, fortran, shape = (text.decode() for text in match.groups())
    if fortran == "True":
        raise ValueError(f"{name} is in Fortran order; save np.ascontiguousarray of it")
    try:
        dtype = np.dtype(descr)
    except TypeError:
        raise ValueError(f"{name} has the unknown type {descr!r}") from None
    shape = tuple(int(size) for size in shape.replace(" ", "").split(",") if size)
    return dtype, shape, 8 + size_bytes + size


def read_member(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A small array that must have `shape`; its checksum is verified."""
    with archive.open(name) as member:
        dtype, found, _ = read_header(member, name.removesuffix(".npy"))
        if found != shape or dtype.kind not in "fiub":
            raise ValueError(f"{name.removesuffix('.npy')} is {dtype} of shape {found}, not a number array of {shape}")
        size = int(np.prod(shape)) * dtype.itemsize
        data = member.read(size)
        if len(data) != size or member.read(1):
            raise ValueError(f"{name.removesuffix('.npy')} does not have the bytes of its shape: a damaged file")
        return np.frombuffer(data, dtype).reshape(shape)


def is_covariance(values: np.ndarray) -> bool:
    """Whether values (D, D) are symmetric and have no negative eigenvalue, to rounding, and variances below 1e12.

    Rounding: 1e-6 of the sum of variances for eigenvalues; a covariance saved in float32 had -2e-10.
    """
    variances = values.diagonal().astype(np.float64)
    if not (
        (variances >= 0).all()
        and (variances < 1e12).all()
        and np.allclose(values, values.T, rtol=1e-4, atol=1e-6 * variances.max())
    ):
        return False
    if not values.any():
        return True
    try:
        np.linalg.cholesky(values + np.diag(np.full(len(values), 1e-6 * variances.sum())))
    except np.linalg.LinAlgError:
        return False
    return True


def read_labels(archive: zipfile.ZipFile, count: int) -> np.ndarray | None:
    """arr_1 where it is one integer per image; other files keep other things there."""
    try:
        labels = read_member(archive, "arr_1.npy", (count,))
    except ValueError:
        return None
    return labels if labels.dtype.kind in "iu" else None
