"""Images out of a folder of PNGs, one at a time. Every fault is a ValueError of one line that names the file."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from utils.evaluation.npz_reader import CHANGED
from utils.files import BLOCK_BYTES, identity

LOSSY = ".jpg", ".jpeg", ".webp"


class PngFolder:
    """The PNGs of a folder in the order of their names, shorter ones first: 9.png comes before 10.png.

    All are 8-bit RGB of one size. Has what an NpzReader has: `count`, `height`, `width`; no labels, no statistics. As
    there, a file that has changed since is refused.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.labels, self.statistics = None, {}
        try:
            entries = sorted(self.path.iterdir(), key=lambda entry: (len(entry.name), entry.name))
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read ({error.strerror})") from None
        self.files = [entry for entry in entries if entry.suffix.lower() == ".png"]
        lossy = next((entry for entry in entries if entry.suffix.lower() in LOSSY), None)
        if lossy is not None:
            raise ValueError(f"{lossy}: a lossy format; its damage would be measured too: save the images as PNG")
        if not self.files:
            raise ValueError(f"{self.path}: is a folder without PNG files")
        self.count = len(self.files)
        self._identities = {file: identity(file) for file in self.files}
        self.height = self.width = 0
        with self._open(self.files[0]) as image:
            self.width, self.height = image.size

    def _open(self, file: Path) -> Image.Image:
        """A file of which only the header is read so far; of the first one's size, when that is known."""
        if not file.is_file():
            raise ValueError(f"{file}: is no file; move it away")
        try:
            image = Image.open(file, formats=["PNG"])
        except Exception as error:  # Pillow raises a dozen kinds
            raise ValueError(f"{file}: no PNG, or a damaged one ({type(error).__name__})") from None
        if image.mode != "RGB":
            raise ValueError(f"{file}: its mode is {image.mode}, but images are 8-bit RGB: convert them")
        if self.width and image.size != (self.width, self.height):
            raise ValueError(
                f"{file}: is {image.size[1]} x {image.size[0]}, but {self.files[0].name} is "
                f"{self.height} x {self.width}: one size is needed"
            )
        return image

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images start <= i < stop, uint8 (n, H, W, 3)."""
        images = np.empty((stop - start, self.height, self.width, 3), np.uint8)
        for target, file in zip(images, self.files[start:stop]):
            with self._open(file) as image, self._damage(file):
                target[:] = np.asarray(image)
            self._require_unchanged(file)
        return images

    @contextmanager
    def _damage(self, file: Path) -> Iterator[None]:
        """Every fault of a file's contents as a ValueError that names it."""
        try:
            yield
        except Exception as error:  # Pillow raises a dozen kinds
            raise ValueError(f"{file}: a damaged PNG ({type(error).__name__})") from None

    def _require_unchanged(self, file: Path) -> None:
        if identity(file) != self._identities[file]:
            raise ValueError(f"{file}: {CHANGED}")

    def close(self) -> None:
        """Nothing is held open."""

    def fingerprint(self) -> dict[str, str]:
        """A checksum of the names, sizes and dates of all files."""
        digest = hashlib.sha256()
        for file in self.files:
            status = file.stat()
            digest.update(repr((file.name, status.st_size, status.st_mtime_ns)).encode())
        return {"listing": digest.hexdigest()}

    def sha256(self, abandoned: threading.Event | None = None) -> str:
        """Checksum of the names and contents of all files. On the way every PNG is held against its own checksums.

        Once `abandoned` is set it ends early, with any result.
        """
        digest = hashlib.sha256()
        for file in self.files:
            if abandoned and abandoned.is_set():
                break
            with self._open(file) as image, self._damage(file):
                image.verify()
            digest.update(repr((file.name, file.stat().st_size)).encode())
            with open(file, "rb") as content:
                while block := content.read(BLOCK_BYTES):
                    digest.update(block)
            self._require_unchanged(file)
        return digest.hexdigest()
