"""Images that training leaves out, to be measured on: the same in every run and stage that asks for as many."""

import numpy as np
from torch.utils.data import default_collate

from dataset.imagenet import ImageDataset, Sample


def held_out_indices(length: int, count: int) -> np.ndarray:
    """Places of `count` of `length` images, ascending, spread evenly: data sets are sorted by class."""
    return np.linspace(0, length - 1, count).round().astype(int)


class HeldOut:
    """Exact centre crops, without flips, of the images at `indices` of a data set, numbered from 0."""

    def __init__(self, data: ImageDataset, indices: np.ndarray):
        self.data, self.indices = data, indices.tolist()
        self.count = len(self.indices)
        self.height = self.width = data.image_size
        self.path, self.statistics = f"{self.count} images left out", {}

    def batch(self, part: range) -> Sample:
        """The images of these numbers as a batch for training."""
        return default_collate([self.data[self.indices[number]] for number in part])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images start <= number < stop, uint8 (n, S, S, 3)."""
        return self.batch(range(start, stop)).image.permute(0, 2, 3, 1).contiguous().numpy()

    def sha256(self, abandoned: object = None) -> None:
        """There is no file to take a checksum of."""

    def close(self) -> None:
        """Nothing is held open."""
