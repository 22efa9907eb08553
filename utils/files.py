"""Files that are complete and on the disk, or not there; JSON, checksums, and the folder for what can be made again."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import struct
import threading
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

BLOCK_BYTES = 1 << 22
JSON_BYTES = 1 << 26  # the most that a JSON object of ours has
NPZ_FAULTS = (  # what zipfile, zlib and numpy raise on damaged or hostile .npz files
    OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, MemoryError,
    RuntimeError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error, struct.error,
)  # fmt: skip
LOCKED_BY = "process "  # how the text in a lock begins
MISTAKEN = {  # how a file begins that is often saved in the place of another -> what it is, and the remedy
    b"<": "is a web page: download the file itself",
    b"version https://git-lfs": "is a Git-LFS pointer: run git lfs pull",
}


@contextmanager
def atomic_file(path: str | Path, *, new: bool = False) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` complete and durable, or not at all (temporary name, fsync, rename).

    With `new`, FileExistsError where something is there, or has come there meanwhile. An OSError names `path`, and the
    free space when that was what was missing.
    """
    path = Path(path)
    if new:
        _require_absent(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if new:
            _require_absent(path)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        free = f" ({shutil.disk_usage(path.parent).free / 1e6:.0f} MB free)" if error.errno == errno.ENOSPC else ""
        raise OSError(error.errno, error.strerror + free, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def _require_absent(path: Path) -> None:
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "is there already; remove it, or choose another name", str(path))


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove what a killed atomic_file left of files whose names match the regular expression `name`, and no other.

    Only for a folder that is locked: another process could be writing one.
    """
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(rf"\.({name})\.\d+-\d+\.tmp", path.name):
            path.unlink(missing_ok=True)


def lock(folder: Path, stack: ExitStack, flag: str) -> bool:
    """Lock the folder until `stack` closes, or its process ends; False on a file system without locks.

    The lock is the kernel's, on folder/.lock, which says who holds it. ValueError (of `flag`) names who has it.
    """
    path = folder / ".lock"
    while True:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise ValueError(f"{path}: is no lock of ours; move it away, or choose another {flag}")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        file = stack.enter_context(os.fdopen(descriptor, "r+", errors="replace"))
        if file.read(len(LOCKED_BY)) not in ("", LOCKED_BY):
            raise ValueError(f"{path}: is no lock of ours; move it away, or choose another {flag}")
        os.register_at_fork(after_in_child=file.close)  # a loader's worker may live on for a moment
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another run"
            raise ValueError(f"{flag} {folder} is in use by {holder}; wait for it, end it, or choose another") from None
        except OSError:
            return False
        if os.fstat(file.fileno()).st_nlink:  # else its last holder removed it between our two lines
            break
    stack.callback(path.unlink, missing_ok=True)  # before the lock is given up
    holder = f"{LOCKED_BY}{os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}\n"
    with suppress(OSError):  # a full disk; what `file` holds back would be tried again when it is closed
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, holder.encode(), 0)
    return True


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path, remedy: str) -> dict:
    """The object that write_json wrote. ValueError names a file that holds something else, and the remedy."""
    try:
        is_json = path.is_file() and path.stat().st_size <= JSON_BYTES  # a pipe would wait for ever
        values = json.loads(path.read_text(encoding="utf-8")) if is_json else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged, no JSON object: {remedy}")
    return values


def write_json(path: Path, values: dict, *, new: bool = False) -> None:
    with atomic_file(path, new=new) as file:
        file.write(json.dumps(values, indent=2).encode() + b"\n")


def sha256(path: str | Path) -> str:
    """Checksum of a whole file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def mistaken(path: str | Path) -> str | None:
    """What a file is that was saved in the place of another, and the remedy; None for all others."""
    with open(path, "rb") as file:
        start = file.read(512).lstrip().lower()
    if not start:
        return "is empty: copy or download it again"
    return next((what for beginning, what in MISTAKEN.items() if start.startswith(beginning)), None)


def begins_with(path: Path, member: str) -> bool:
    """Whether a file begins as an .npz whose first array is `member`, damaged behind that or not.

    Only a file of our own kind is ever replaced.
    """
    name = f"{member}.npy".encode()
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        start = file.read(30 + len(name))
    return start[:4] == b"PK\x03\x04" and start[30:] == name


def cache_folder() -> Path:
    """Where tar indices and downloaded weights are kept: $SPHEREAR_CACHE, or ~/.cache/spherear."""
    return Path(os.environ.get("SPHEREAR_CACHE") or "~/.cache/spherear").expanduser()


def identity(path: str | Path) -> tuple[int, int, int] | None:
    """Numbers that change when a file is replaced or written to: inode, size, date in ns. None: it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def printable(text: str) -> str:
    """Text as one line, with everything escaped that a terminal would obey or cannot show: file names hold anything."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
