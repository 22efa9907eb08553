"""Bytes of an image file -> pixels; what is not a plain 8-bit RGB or grey image raises BadImage.

Ordinary JPEGs are decoded by libjpeg-turbo directly. Everything else, and what it gives up on, goes to Pillow, the
arbiter of what is bad; both give the same pixels. (Of 127,000 randomly damaged JPEGs the two disagreed about two.)

A JPEG is damaged, too, where libjpeg decodes it but warns: its data end early, go on too long or are no Huffman code.
Such images are partly grey or shifted. JPEGs have no checksums: damage that still decodes to the end is not noticed.
"""

import io
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.io import decode_jpeg

from utils.files import printable

MAX_PIXELS = 100_000_000  # more is a damaged header or an attack; ImageNet's largest has 61 million
MAX_BYTES = 3 * MAX_PIXELS + 2**20  # of a file: so many pixels uncompressed, and something about them
MAX_ASPECT = 100  # longer side / shorter side; beyond it the resized image would not fit in memory
FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF")
DAMAGE = re.compile(rb"(?:Corrupt JPEG data: |(?=Premature end of JPEG))(.*)\n")  # libjpeg's warnings about that
ONE_AT_A_TIME = threading.Lock()  # there is only one stderr


class BadImage(ValueError):
    """The image cannot be used; the text says why."""


def decode(data: bytes, name: str = "") -> torch.Tensor:
    """The pixels, uint8 (3 or 1, H, W); `name` tells which format the file promises to be.

    Raises BadImage: empty, corrupt, truncated, damaged, not 8-bit RGB or grey, not the format of its name, too large.
    """
    if _is_ordinary_jpeg(data):
        try:
            return _decode_jpeg(data)
        except RuntimeError:
            pass  # Pillow, below, says what is wrong with it
    return torch.from_numpy(np.array(_decode_others(data, name))).permute(2, 0, 1)


def as_pillow(pixels: torch.Tensor) -> Image.Image:
    """Pixels of `decode` as a Pillow image of mode RGB."""
    image = Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy())
    return image if image.mode == "RGB" else image.convert("RGB")


def _decode_jpeg(data: bytes) -> torch.Tensor:
    """Pixels of an ordinary JPEG. BadImage where libjpeg warns of damage, RuntimeError where it gives up."""
    with _caught_stderr() as said:
        pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    if damage := DAMAGE.search(said):
        raise BadImage(f"damaged: {damage[1].decode()}")
    return pixels


@contextmanager
def _caught_stderr() -> Iterator[bytearray]:
    """What libjpeg writes to stderr inside the block; what other threads write meanwhile is passed on after it."""
    said = bytearray()
    with ONE_AT_A_TIME:
        reader, writer = _pipe(os.getpid())
        stderr = os.dup(2)
        os.dup2(writer, 2)
        try:
            yield said
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            with suppress(BlockingIOError):  # nothing was written: the usual case
                said += os.read(reader, 1 << 16)
                os.write(2, DAMAGE.sub(b"", said))


@cache
def _pipe(process: int) -> tuple[int, int]:
    """A pipe of this process: a forked worker must not read its siblings' warnings."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    return reader, writer


def _decode_others(data: bytes, name: str) -> Image.Image:
    """The image as Pillow decodes it, of mode RGB; BadImage where it does not, or where it is none of ours."""
    if not data:
        raise BadImage("empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        reason = _unwanted(image, data, name)
        if reason is None:
            return image.convert("RGB")  # loads; no copy where it is RGB already
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise BadImage("corrupt: not the beginning of any image format") from None
    except Exception as error:  # Pillow's decoders raise nearly every kind on damaged files
        raise BadImage(f"corrupt or truncated: {printable(str(error))[:200]}") from error
    raise BadImage(reason)


def _unwanted(image: Image.Image, data: bytes, name: str) -> str | None:
    width, height = image.size
    if (image.format == "PNG" and data[24] == 16) or image.mode.startswith("I;16"):
        return f"16 bits per channel ({image.format} of mode {image.mode})"
    if image.mode not in ("RGB", "L"):
        return f"mode {image.mode} instead of RGB or grey"
    if name.lower().endswith((".jpeg", ".jpg")) and image.format not in ("JPEG", "MPO"):
        return f"{image.format} named as a JPEG"
    if width * height > MAX_PIXELS or max(image.size) > MAX_ASPECT * min(image.size):
        return f"{width}x{height} pixels"
    return None


def _is_ordinary_jpeg(data: bytes) -> bool:
    """Whether it starts as a JPEG whose frame header promises 8-bit grey or colour of sane size."""
    if data[:2] != b"\xff\xd8":
        return False
    position = 2
    while data[position : position + 1] == b"\xff" and position + 10 < len(data):
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            bits, channels = data[position + 4], data[position + 9]
            height = int.from_bytes(data[position + 5 : position + 7], "big")
            width = int.from_bytes(data[position + 7 : position + 9], "big")
            shorter, longer = sorted((height, width))
            return bits == 8 and channels in (1, 3) and width * height <= MAX_PIXELS and longer <= MAX_ASPECT * shorter
        position += 2 + length
    return False
