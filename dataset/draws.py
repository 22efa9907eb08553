"""The random streams of the data: order, crops and replacements; every draw is addressed by what it is for.

Counter-based (numpy's Philox4x64): the key is (seed, stream), the counter says which draw; there is no state, so
workers, processes and the point of resumption change nothing.
"""

from enum import IntEnum
from typing import NamedTuple

import numpy as np


class Stream(IntEnum):
    """What a draw is for: different streams never overlap. Values are for ever: they define results."""

    ORDER = 0
    CROP = 1
    REPLACEMENT = 2


class CropDraws(NamedTuple):
    """Everything random about one training image; the four numbers lie in [0, 1)."""

    choice: float  # random crop when below the augmentation probability, else centre crop
    scale: float  # -> short_side
    top: float  # -> first row of the window
    left: float  # -> first column of the window
    flip: bool


def epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    """The permutation of an epoch, int64 (length,): the ranks of random keys."""
    return np.argsort(_words(seed, Stream.ORDER, [0, 0, 0, epoch], length), kind="stable")


def crop_draws(seed: int, epoch: int, index: int) -> CropDraws:
    """The draws of image `index` in `epoch`; no two images share any."""
    words = _words(seed, Stream.CROP, [0, 0, epoch, index], 5)
    choice, scale, top, left, flip = (words >> np.uint64(11)) * 2.0**-53
    return CropDraws(choice, scale, top, left, bool(flip < 0.5))


def replacement(seed: int, epoch: int, index: int, attempt: int, length: int) -> int:
    """Which of `length` images to try in place of image `index`; `attempt` counts from 1."""
    (word,) = _words(seed, Stream.REPLACEMENT, [0, attempt, epoch, index], 1)
    return int(word) % length


def _words(seed: int, stream: Stream, counter: list[int], count: int) -> np.ndarray:
    """Random 64-bit words, uint64 (count,)."""
    key = np.array([seed, stream], np.uint64)  # of a plain list, numpy would round seeds from 2^63 on
    return np.random.Philox(key=key, counter=counter).random_raw(count)
