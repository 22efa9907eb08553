"""FID and MIND of images that a model makes while it trains, as evaluator.py computes them from files.

The network is read for every comparison and gone behind it: between two of them training has the machine to itself.
Numbers do not depend on the number of processes. Legend: n images, H x W their size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from utils import distributed
from utils.distributed import my_parts
from utils.evaluation import inception_weights
from utils.evaluation.features import Extractor, Features, extract, hand_back_memory, read_parts, workers_within_memory
from utils.evaluation.frechet import frechet_distance
from utils.evaluation.inputs import open_images
from utils.evaluation.mind import mind
from utils.evaluation.reconstruction import WINDOW, psnr, ssim
from utils.images import to_float, to_uint8

MADE_AT_ONCE = {"cuda": 64, "cpu": 32}  # images that a model makes, whatever the number of processes
BATCH_SIZE = {"cuda": 64, "cpu": 2}  # images per call of the network, as in evaluator.py
PARTS = 64  # of a reference, as there
MIND_SEED = 2020  # torch-fidelity's


class Comparison:
    """One reference, which any number of sets of images (of image_size) are compared with; it is measured once.

    `source`: images by number (path, count, height, width, read, sha256) and their statistics, as an NpzReader.
    """

    def __init__(self, source, image_size: int, device: torch.device):
        self.source, self.device = source, device
        self.height, self.width = max(source.height, image_size), max(source.width, image_size)
        self.batch_size, self.length = BATCH_SIZE[device.type], MADE_AT_ONCE[device.type]
        self.weights_path = distributed.from_main(lambda: inception_weights.find_weights(None))
        self.reference: Features | None = None
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
        with full_precision(self.device):
            with distributed.all_or_none():
                weights = inception_weights.read_weights(self.weights_path)
                network = weights.network().to(self.device)
                network = network.pack(self.batch_size) if self.device.type == "cpu" else network
                cores = torch.get_num_threads() if self.device.type == "cpu" else 1
                workers = workers_within_memory(cores, self.batch_size, self.height, self.width)
            if "reference" not in self.receipt:
                checksum = distributed.from_main(self.source.sha256)
                self.receipt |= {
                    "reference": {"path": str(self.source.path), "sha256": checksum, "images": self.source.count},
                    "weights": {"kind": weights.kind, "path": str(weights.path), "sha256": weights.sha256},
                    "seeds": {"MIND": MIND_SEED},
                }
            del weights
            with Extractor(network, self.batch_size, self.device, workers) as extractor:
                if self.reference is None:
                    self.reference = self._of_reference(extractor, at_once=4 * workers * self.batch_size)
                features = extract(batches, extractor, count, self.length, name="images", half=True, shows=False)
        del network, extractor
        hand_back_memory()
        return distributed.from_main(lambda: self._of(features))

    def _of_reference(self, extractor: Extractor, at_once: int) -> Features:
        source = self.source
        if not source.count:
            return Features(torch.empty(0), source.statistics)
        length = self.batch_size * -(-source.count // (self.batch_size * PARTS))
        batches = read_parts(source, length, at_once)
        found = extract(batches, extractor, source.count, length, name="reference", half=True, shows=False)
        return Features(found.pool.cpu(), {**found.statistics, **source.statistics})  # the file's before ours

    def _of(self, features: Features) -> dict[str, float]:
        ours, theirs = features.statistics, self.reference.statistics
        found = {"FID": frechet_distance(ours["mu"], ours["sigma"], theirs["mu"], theirs["sigma"])}
        if len(self.reference.pool):
            found["MIND"] = mind(features.pool, self.reference.pool.to(self.device), seed=MIND_SEED)
        return found


def compare_samples(path: str, image_size: int, device: torch.device) -> Comparison:
    """With the images or statistics of --eval-reference. Raises ValueError where they do not do."""
    with distributed.all_or_none():
        source = open_images(path)
        if source.count < 2 and "mu" not in source.statistics:
            raise ValueError(f"--eval-reference {path}: FID needs at least 2 images, or their statistics")
    return Comparison(source, image_size, device)


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
    return Comparison(source, image_size, device)


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

    def sha256(self) -> str:
        return self.source.sha256()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Float32 throughout, whatever training uses; torch's settings are put back behind it."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32, convolutions.deterministic, torch.get_num_threads()
    products.allow_tf32, convolutions.allow_tf32, convolutions.deterministic = False, False, True
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        products.allow_tf32, convolutions.allow_tf32, convolutions.deterministic = before[:3]
        torch.set_num_threads(before[3])  # the extractor's threads set theirs, and with it the count of new ones
