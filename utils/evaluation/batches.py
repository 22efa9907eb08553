"""Images that somebody hands out batch by batch, such as a generator of samples: what an .npz is, without a file."""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class Batches:
    """An iterable of uint8 batches (n, H, W, 3), numpy or torch, checked as they come.

    Has what an NpzReader has: `path` is only a name, `count` grows as batches are taken and is this process's, `height`
    and `width` are those of the first batch (0 where there is none); no labels, no statistics.
    Raises ValueError for a batch that holds anything else, or images of another size.
    """

    def __init__(self, batches: Iterable[np.ndarray | Tensor], name: str = "images"):
        self.path, self.labels, self.statistics = Path(name), None, {}
        self.count = self.height = self.width = 0
        self._batches = iter(batches)
        first = next(self._batches, None)
        if first is not None:
            self._check(first)
            self.height, self.width = first.shape[1:3]
            self._batches = chain([first], self._batches)

    def __iter__(self) -> Iterator[np.ndarray | Tensor]:
        for batch in self._batches:
            self._check(batch)
            self.count += len(batch)
            if len(batch):
                yield batch

    def _check(self, batch: np.ndarray | Tensor) -> None:
        shape = tuple(getattr(batch, "shape", ()))
        is_uint8 = getattr(batch, "dtype", None) in (np.uint8, torch.uint8)
        if not is_uint8 or shape[3:] != (3,) or 0 in shape[1:]:
            given = f"{batch.dtype} {shape}" if hasattr(batch, "dtype") else type(batch).__name__
            raise ValueError(f"{self.path}: a batch is {given}, but batches are uint8 (n, H, W, 3), H and W at least 1")
        if self.height and shape[1:3] != (self.height, self.width):
            raise ValueError(
                f"{self.path}: a batch has images of {shape[1]} x {shape[2]}, others are {self.height} x {self.width}"
            )

    def close(self) -> None:
        """Nothing is held open."""

    def sha256(self, abandoned: object = None) -> None:
        """There is no file to take a checksum of."""
