"""FID and MIND of images that a model makes while it trains, as evaluator.py computes them from files.

The network is read for every comparison and gone behind it: between two of them training has the machine to itself.
Numbers do not depend on the number of processes. Legend: n images, H x W their size.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from utils import distributed
from utils.distributed import my_parts
from utils.evaluation import inception_weights
from utils.evaluation.extraction import NETWORK_BATCH, Evaluated, Extraction, Settings, choose_workers
from utils.evaluation.features import exact_arithmetic, hand_back_memory
from utils.evaluation.inputs import open_images
from utils.evaluation.metrics import SEED, as_reference, distances
from utils.evaluation.reconstruction import WINDOW, psnr, ssim
from utils.images import to_float, to_uint8

MADE_AT_ONCE = {"cuda": 64, "cpu": 32}  # images that a model makes, whatever the number of processes


class Comparison:
    """One reference, which any number of sets of images are compared with; it is measured once.

    `source`: images by number (path, count, height, width, read, sha256) and their statistics, as an NpzReader.
    """

    def __init__(self, source, device: torch.device, *, cache_features: bool = False):
        self.source, self.device, self.settings = source, device, Settings(cache_features=cache_features)
        self.length = MADE_AT_ONCE[device.type]
        distributed.from_main(lambda: inception_weights.find_weights(None) and None)  # before training
        self.reference: Evaluated | None = None
        self.receipt: dict = {}  # what made the newest numbers

    def generated(self, make: Callable[[Tensor], Tensor], count: int) -> dict[str, float]:
        """FID of images 0 to count - 1, and MIND where the reference has images. make(numbers) -> (n, 3, H, W)."""

        def batches() -> Iterator[np.ndarray]:
            for part in filter(len, my_parts(count, self.length)):
                yield to_uint8(make(torch.arange(part.start, part.stop, device=self.device)))

        return self._distances(batches(), count)

    def reconstructed(self, make: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """rFID of the reference's images and the means of PSNR and SSIM; make maps (n, 3, H, W) in [-1, 1] to such."""
        count = self.source.count
        found = torch.zeros(2, count, dtype=torch.float64, device=self.device)  # every value on one process

        def batches() -> Iterator[np.ndarray]:
            for part in filter(len, my_parts(count, self.length)):
                originals = self.source.read(part.start, part.stop)
                images = to_uint8(make(to_float(torch.from_numpy(originals).to(self.device).permute(0, 3, 1, 2))))
                for row, metric in zip(found, (psnr, ssim)):
                    row[part.start : part.stop] = metric(images, originals)
                yield images

        fid = self._distances(batches(), count)["FID"]
        return {"rFID": fid, **dict(zip(("PSNR", "SSIM"), distributed.reduce_sum(found).mean(dim=1).tolist()))}

    def _distances(self, batches: Iterator[np.ndarray], count: int) -> dict[str, float]:
        """FID and MIND of `count` images, of which these are this process's parts."""
        threads, settings = torch.get_num_threads(), self.settings
        with torch.autocast(self.device.type, enabled=False), exact_arithmetic():
            workers = choose_workers(settings, self.device, NETWORK_BATCH[self.device.type], [self.source])
            with Extraction(settings, self.device, NETWORK_BATCH[self.device.type], workers, shows=False) as extraction:
                if self.reference is None:
                    self.reference = extraction(self.source)
                    if self.reference.features is not None:
                        self.reference.features.pool = self.reference.features.pool.cpu()
                features = extraction.extract(batches, count, self.length, "images")
            self.receipt |= {"reference": self.reference.record(), "weights": extraction.weights, "seed_of_MIND": SEED}
            del extraction
            hand_back_memory()
            found = distances(features, as_reference(self.reference, self.device))
        torch.set_num_threads(threads)  # the extractor's threads set theirs, and with it the count of new ones
        return {name: found[name] for name in ("FID", "MIND") if name in found}


def compare_samples(path: str, device: torch.device, *, cache_features: bool = False) -> Comparison:
    """With the images or statistics of --eval-reference. Raises ValueError where they do not do."""
    with distributed.all_or_none():
        source = open_images(path)
        if source.count < 2 and "mu" not in source.statistics:
            raise ValueError(f"--eval-reference {path}: FID needs at least 2 images, or their statistics")
    return Comparison(source, device, cache_features=cache_features)


def compare_reconstructions(
    path: str | None, left_out: object, count: int, image_size: int, device: torch.device
) -> Comparison:
    """With their originals: at most `count` images of --eval-reference, or else of those left out of training."""
    with distributed.all_or_none():
        source = Spread(left_out if path is None else open_images(path), count)
        if source.count < 2 or {source.height, source.width} != {image_size} or image_size < WINDOW:
            raise ValueError(
                f"--eval-every: {source.path} has {source.count} images of {source.height} x {source.width}; "
                f"reconstructions need at least 2 of {image_size} x {image_size}, and SSIM {WINDOW} x {WINDOW} pixels"
            )
    return Comparison(source, device)


class Spread:
    """`count` images of a source, spread evenly over it; all of them where it has no more."""

    def __init__(self, source, count: int):
        self.source, self.path, self.statistics = source, source.path, {}
        self.height, self.width = source.height, source.width
        self.numbers = np.linspace(0, source.count - 1, min(count, source.count)).round().astype(int).tolist()
        self.count = len(self.numbers)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images start <= i < stop of them, uint8 (n, H, W, 3)."""
        return np.concatenate([self.source.read(i, i + 1) for i in self.numbers[start:stop]])

    def sha256(self, abandoned: object = None) -> str | None:
        return self.source.sha256(abandoned)

    def close(self) -> None:
        self.source.close()
