"""ADM's crops and the flip: pure functions of the image and of explicit draws.

Shape letters: S side of the result, h and w of the image. `short_side` is what the shorter side is resized to.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from dataset.draws import CropDraws

MIN_CROP, MAX_CROP = 0.8, 1.0  # share of the resized shorter side that a random crop keeps


class Window(NamedTuple):
    """Resize the shorter side to `short_side` (giving width x height), keep the S x S window at (top, left)."""

    short_side: int
    width: int
    height: int
    top: int
    left: int


def random_window(draws: CropDraws, size: int, width: int, height: int) -> Window:
    """The window of a random crop (ADM's random_crop_arr) of an image of width x height."""
    low, high = math.ceil(size / MAX_CROP), math.ceil(size / MIN_CROP)
    short_side = low + int(draws.scale * (high - low + 1))
    width, height = _resized(width, height, short_side)
    top, left = int(draws.top * (height - size + 1)), int(draws.left * (width - size + 1))
    return Window(short_side, width, height, top, left)


def center_window(size: int, width: int, height: int) -> Window:
    """The window of the centre crop (ADM's center_crop_arr) of an image of width x height."""
    width, height = _resized(width, height, size)
    return Window(size, width, height, (height - size) // 2, (width - size) // 2)


def crop_exact(image: Image.Image, size: int, window: Window) -> Image.Image:
    """ADM's pixels: BOX halvings while the shorter side is at least twice the goal, BICUBIC, window.

    The two passes of Pillow's resize are called one by one, so that the second sees the window's columns only.
    """
    image = _halved(image, window.short_side)
    image = image.resize((window.width, image.height), Image.Resampling.BICUBIC)
    image = image.crop((window.left, 0, window.left + size, image.height))
    image = image.resize((size, window.height), Image.Resampling.BICUBIC)
    return image.crop((0, window.top, size, window.top + size))


def crop_fast(image: torch.Tensor, size: int, window: Window) -> torch.Tensor:
    """The same crop of a uint8 tensor (C, h, w) as (C, S, S) by torch's antialiased bicubic.

    Some 0.4 % of the values differ from `crop_exact`, by at most 2 of 255. Images to be halved go to Pillow for that.
    """
    if min(image.shape[1:]) >= 2 * window.short_side:
        pixels = image.permute(1, 2, 0).squeeze(2).numpy()
        halved = np.array(_halved(Image.fromarray(pixels), window.short_side))
        image = torch.from_numpy(halved.reshape(*halved.shape[:2], -1)).permute(2, 0, 1)
    resized = F.interpolate(image[None], (window.height, window.width), mode="bicubic", antialias=True)[0]
    return resized[:, window.top : window.top + size, window.left : window.left + size]


def _resized(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Size after the halvings and the bicubic resize; the scale is taken from the halved sides."""
    while min(width, height) >= 2 * short_side:
        width, height = width // 2, height // 2
    scale = short_side / min(width, height)
    return round(width * scale), round(height * scale)


def _halved(image: Image.Image, short_side: int) -> Image.Image:
    while min(image.size) >= 2 * short_side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image
