"""The images as a map-style data set: a tar of class tars (never unpacked), or a folder of class folders.

`data[CropKey(epoch, index, p)]` is a training image, the same whoever asks for it and when;
`data[index]` is an evaluation image: exact centre crop, no flip.
"""

import errno
import os
import stat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from dataset.decode import MAX_BYTES, BadImage, as_pillow, decode
from dataset.draws import crop_draws, replacement
from dataset.tar_index import IMAGE_SUFFIXES, load_index, member_name
from dataset.transforms import Window, center_window, crop_exact, crop_fast, random_window
from utils.files import printable

MAX_BAD_SHARE = 0.001  # of the images; more bad ones are an error
MAX_REPLACEMENTS = 16  # bad images in a row
OURS = errno.EMFILE, errno.ENFILE, errno.ENOMEM  # errors of reading that are no fault of the file's


class CropKey(NamedTuple):
    """Address of one training image: its crop and flip are a function of (seed, epoch, index)."""

    epoch: int
    index: int
    crop_probability: float  # of a random crop instead of the centre crop


class Sample(NamedTuple):
    """One image; torch's default_collate turns a list of them into one Sample of batches."""

    image: torch.Tensor  # uint8 (3, S, S)    batch: (b, 3, S, S)
    label: int  #                             batch: int64 (b,)
    index: int  # place in the data set       batch: int64 (b,)
    bad: str  # "" or "NAME: reason" of the image that this one replaces; batch: tuple of str


class TarSource:
    """Images of a tar of class tars; reads are os.pread, which no other process can disturb."""

    def __init__(self, path: Path):
        self.path = path
        self.classes, self.ends, self.offsets, self.sizes = load_index(path)
        self._open()

    def _open(self) -> None:
        self._fd = os.open(self.path, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_fd"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._open()

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, index: int) -> bytes:
        """The bytes of an image's file. BadImage where they are too many, or the disk cannot read them; OSError where
        the tar has changed."""
        size = int(self.sizes[index])
        _require_sane(size)
        try:
            data = os.pread(self._fd, size, int(self.offsets[index]))
        except OSError as error:
            if error.errno != errno.EIO:
                raise OSError(error.errno, error.strerror, str(self.path)) from None
            raise BadImage(f"cannot be read: {error.strerror}") from None
        if len(data) != size:
            raise OSError(
                f"{self.path} was cut while in use: image {index} has {len(data)} of {size} bytes; copy it again"
            )
        return data

    def file_name(self, index: int) -> str:
        offset = int(self.offsets[index])
        try:
            return member_name(self._fd, offset)
        except OSError:  # where the image cannot be read, nor can its name
            return f"at byte {offset}"


class FolderSource:
    """Images of a folder of class folders; names are kept as one byte string, some 30 bytes per image."""

    def __init__(self, path: Path):
        self.path = path
        entries = sorted(os.scandir(path), key=lambda entry: os.fsencode(entry.name))  # the same in any locale
        entries = [entry for entry in entries if entry.name[0] != "."]
        self.classes = [entry.name for entry in entries if entry.is_dir()]
        if not self.classes:
            tars = [printable(entry.name) for entry in entries if entry.name.lower().endswith(".tar")]
            raise ValueError(
                f"{path}: a folder without class folders; "
                + (
                    f"it holds tars: give the tar itself ({tars[0]}), or unpack class tars into folders"
                    if tars
                    else "expected one folder per class"
                )
            )
        names, counts = [], []
        for name in self.classes:
            files = sorted(
                entry.name
                for entry in os.scandir(path / name)
                if entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.name[0] != "."
            )
            if not files:
                raise ValueError(f"{path}: class folder {printable(name)} holds no images; remove or fill it")
            names += [os.fsencode(file) for file in files]
            counts.append(len(files))
        self.ends = np.cumsum(counts)
        self._names = b"".join(names)
        self._name_ends = np.cumsum([0] + [len(name) for name in names])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, index: int) -> bytes:
        """The bytes of an image's file. BadImage where it cannot be read, OSError where its class folder is gone."""
        label = int(np.searchsorted(self.ends, index, side="right"))
        path = self.path / self.classes[label] / self.file_name(index)
        try:
            with open(path, "rb", opener=_open_at_once) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise BadImage("no regular file")
                _require_sane(status.st_size)
                return file.read(MAX_BYTES)
        except OSError as error:
            if error.errno in OURS:
                raise
            if not path.parent.is_dir():
                raise OSError(f"the class folder {path.parent} has gone while in use; put it back") from None
            raise BadImage(f"cannot be read: {error.strerror}") from None

    def file_name(self, index: int) -> str:
        return os.fsdecode(self._names[self._name_ends[index] : self._name_ends[index + 1]])


def _require_sane(size: int) -> None:
    """BadImage for a file of so many bytes that it is not read: it may be sparse, and have more than the memory."""
    if size > MAX_BYTES:
        raise BadImage(f"more than {MAX_BYTES} bytes")


def _open_at_once(path: str, flags: int) -> int:
    """Opens also a FIFO without waiting for its writer."""
    return os.open(path, flags | os.O_NONBLOCK)


class ImageDataset(Dataset):
    """uint8 images of S x S and labels; `fast` chooses the resizer of training images."""

    def __init__(
        self, source: TarSource | FolderSource, image_size: int, seed: int, fast: bool = True, flip: bool = True
    ):
        self.source = source
        self.image_size = image_size
        self.seed = seed
        self.fast = fast
        self.flip = flip

    @property
    def classes(self) -> list[str]:
        return self.source.classes

    def __len__(self) -> int:
        return len(self.source)

    def label(self, index: int) -> int:
        return int(np.searchsorted(self.source.ends, index, side="right"))

    def name(self, index: int) -> str:
        """CLASS/FILE of an image, for messages."""
        return printable(f"{self.classes[self.label(index)]}/{self.source.file_name(index)}")

    def __getitem__(self, key: CropKey | int) -> Sample:
        """The image, or another one of the data set in place of a bad one, chosen by (seed, epoch, index).

        Raises ValueError when 16 in a row are bad, OSError when the disk fails.
        """
        epoch, index = (key.epoch, key.index) if isinstance(key, CropKey) else (0, range(len(self))[key])
        bad = ""
        for attempt in range(MAX_REPLACEMENTS):
            chosen = index if attempt == 0 else replacement(self.seed, epoch, index, attempt, len(self))
            try:
                image = self._training_view(key, chosen) if isinstance(key, CropKey) else self._centre_view(chosen)
            except BadImage as error:
                bad = bad or f"{self.name(index)}: {error}"
            else:
                return Sample(image, self.label(chosen), index, bad)
        raise ValueError(f"{MAX_REPLACEMENTS} bad images in a row, the first {bad}; run python -m dataset.check")

    def _training_view(self, key: CropKey, chosen: int) -> torch.Tensor:
        draws = crop_draws(self.seed, key.epoch, key.index)
        data = self.source.read(chosen)
        name = "" if data[:2] == b"\xff\xd8" else self.source.file_name(chosen)
        image = decode(data, name)
        height, width = image.shape[1:]
        if draws.choice < key.crop_probability:
            window = random_window(draws, self.image_size, width, height)
        else:
            window = center_window(self.image_size, width, height)
        pixels = crop_fast(image, self.image_size, window) if self.fast else _exact(image, self.image_size, window)
        pixels = pixels.flip(-1) if self.flip and draws.flip else pixels
        return pixels.expand(3, -1, -1).contiguous()

    def _centre_view(self, chosen: int) -> torch.Tensor:
        image = decode(self.source.read(chosen), self.source.file_name(chosen))
        height, width = image.shape[1:]
        return _exact(image, self.image_size, center_window(self.image_size, width, height)).contiguous()


def _exact(image: torch.Tensor, size: int, window: Window) -> torch.Tensor:
    """ADM's pixels of a window, uint8 (3, S, S)."""
    return torch.from_numpy(np.array(crop_exact(as_pillow(image), size, window))).permute(2, 0, 1)


def build_dataset(
    data_path: str | Path, image_size: int, *, num_classes: int, seed: int, fast: bool = True, flip: bool = True
) -> ImageDataset:
    """The data set at `data_path`, a tar of class tars or a folder of class folders; labels are sorted-name ranks.

    `fast` resizes training images by torch (else pixel-equal to ADM's chain).
    ValueError where the data are missing, of another form or of another number of classes.
    """
    return ImageDataset(open_source(data_path, num_classes), image_size, seed, fast, flip)


def open_source(data_path: str | Path, num_classes: int | None = None) -> TarSource | FolderSource:
    """The images at `data_path`; see `build_dataset` for the errors. `num_classes` None: any number of classes."""
    path = Path(os.path.realpath(os.path.expanduser(data_path)))
    try:
        if not path.exists():
            raise ValueError(f"{data_path}: no such file or folder")
        if not path.is_dir() and not path.is_file():
            raise ValueError(f"{data_path}: neither a file nor a folder")
        source = FolderSource(path) if path.is_dir() else TarSource(path)
    except OSError as error:
        raise ValueError(f"{data_path}: cannot be read: {error.strerror} ({error.filename or path})") from None
    if num_classes is not None and len(source.classes) != num_classes:
        found, first, last = len(source.classes), printable(source.classes[0]), printable(source.classes[-1])
        raise ValueError(
            f"--num-classes {num_classes}, but {data_path} holds {found} classes ({first} ... {last}); "
            f"set --num-classes {found}"
        )
    return source
