"""Inception features of any iterable of images, the same on every process and for every number of processes.

An .npz is one source (`read_parts`), a generator of samples or reconstructions another: whatever hands out uint8
batches can be measured. Legend: N images, H x W their size.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from utils import distributed
from utils.distributed import my_parts
from utils.evaluation.frechet import InceptionScore, Moments
from utils.evaluation.inception import POOL_DIM, SPATIAL_DIM
from utils.files import printable

FLOAT16_NORM = 15_000  # squared norms up to this keep all squared distances below float16's largest, 65,504
MEMORY = 2**30  # bytes of images in work at once, as float32; the process peaks at about three times this


@dataclass
class Features:
    """Pool features (N, 2048) float32 or float16 in their order; moments of pool and spatial ones, Inception Score."""

    pool: Tensor
    statistics: dict[str, np.ndarray]  # mu, sigma, mu_s, sigma_s; score where there are logits


class Extractor:
    """A network on any number of images: batches of `batch_size`, `workers` of them at once.

    On a CPU several batches at once, each on one core, are faster than one on all cores, above all on a busy machine,
    and the features do not depend on the number of cores. A network that spreads over all cores by itself takes one.
    """

    def __init__(
        self, network: Callable[[Tensor], tuple[Tensor, Tensor]], batch_size: int, device: torch.device, workers: int
    ):
        self.network, self.batch_size, self.device, self.workers = network, batch_size, device, workers
        options = {"initializer": torch.set_num_threads, "initargs": (1,)} if workers > 1 else {}
        self.pool = ThreadPoolExecutor(workers, **options)

    def run(self, images: Tensor) -> Tensor:
        with torch.inference_mode():
            return torch.cat(self.network(images.to(self.device)), dim=1)

    def __call__(self, images: Tensor) -> Tensor:
        """Images (n, H, W, 3) to pool and spatial features side by side (n, 2048 + 2023)."""
        return torch.cat(list(self.pool.map(self.run, images.split(self.batch_size))))

    def __enter__(self) -> "Extractor":
        return self

    def __exit__(self, *_) -> None:
        self.pool.shutdown()


def workers_within_memory(cores: int, batch_size: int, height: int, width: int) -> int:
    """How many batches may be in work at once, at most `cores`. Raises ValueError where MEMORY does not hold one."""
    fits = MEMORY // (4 * 3 * height * width)
    if fits < batch_size:
        remedy = f"take --batch-size {fits}" if fits else "scale them down first, the network sees 299 x 299 pixels"
        raise ValueError(f"images of {height} x {width} pixels are too large for batches of {batch_size}: {remedy}")
    return min(cores, fits // batch_size)


class Source(Protocol):
    """Images that can be read by number, such as an NpzReader's."""

    count: int

    def read(self, start: int, stop: int) -> np.ndarray: ...


def read_parts(source: Source, length: int, at_once: int) -> Iterator[np.ndarray]:
    """The images of this process's parts of a source, uint8 (n, H, W, 3) with n at most `at_once`."""
    for part in my_parts(source.count, length):
        for start in part[::at_once]:
            yield source.read(start, min(start + at_once, part.stop))


def extract(
    batches: Iterable[np.ndarray],
    extractor: Extractor,
    count: int,
    length: int,
    *,
    name: str,
    half: bool = False,
    to_logits: Callable[[Tensor], Tensor] | None = None,
    shows: bool = True,
) -> Features:
    """Features of `count` images, which the processes hold between them in parts of `length`.

    `batches`: the images of this process's parts (`my_parts`) in order, uint8 (n, H, W, 3); no batch reaches over the
    end of its part. When parts, and batches within them, do not depend on the number of processes, neither do the
    numbers: every process adds up all parts in their order.
    `name` is what messages call the images. `half` keeps pool features in the float16 that precision and recall round
    them to: all but features so large that their distances would not fit. With `to_logits` (n, 2048) -> (n, classes)
    there is an Inception Score; `shows`: with a progress bar. Raises ValueError, on all processes, for whatever is
    wrong with any image.
    """
    batches, rank, world = iter(batches), distributed.rank(), distributed.world_size()
    pool_features = torch.empty(
        count, POOL_DIM, device=extractor.device, dtype=torch.float16 if half else torch.float32
    )
    score = InceptionScore()
    moments = {"": Moments.zeros(POOL_DIM, extractor.device), "_s": Moments.zeros(SPATIAL_DIM, extractor.device)}
    label = printable(os.path.basename(name))
    bar = tqdm(total=count, unit="img", desc=label, disable=not (shows and distributed.is_main()), mininterval=1)
    with bar:
        for turn, part in enumerate(my_parts(count, length)):
            features = torch.zeros(world, length, POOL_DIM + SPATIAL_DIM, device=extractor.device)
            with distributed.all_or_none():
                filled = 0
                while filled < len(part):
                    images = next(batches)
                    assert 0 < len(images) <= len(part) - filled, "a batch is empty, or reaches over its part's end"
                    features[rank, filled : filled + len(images)] = extractor(torch.from_numpy(images))
                    filled += len(images)
                    bar.update(len(images))
                if not features[rank].isfinite().all():
                    raise ValueError(
                        f"{name}: features of images {part.start} to {part.stop - 1} are not finite: damaged weights?"
                    )
            starts = range(turn * world * length, count, length)
            for start, segment in zip(starts, distributed.reduce_sum(features) if world > 1 else features):
                segment = segment[: count - start]
                pool, spatial = segment.split((POOL_DIM, SPATIAL_DIM), dim=1)
                if pool.square().sum(dim=1).max() > FLOAT16_NORM:
                    pool_features = pool_features.float()
                pool_features[start : start + length] = pool
                if to_logits:
                    score.add(to_logits(pool))
                moments[""].add(pool)
                moments["_s"].add(spatial)
            bar.update(min((turn + 1) * world * length, count) - bar.n)  # the others' images
    statistics = {"score": np.array(score.value())} if to_logits else {}
    for suffix in ("", "_s"):  # one at a time: 33 MB each
        statistics[f"mu{suffix}"], statistics[f"sigma{suffix}"] = moments.pop(suffix).mean_and_covariance()
    return Features(pool_features, statistics)


def hand_back_memory() -> None:
    """Give freed memory back to the system, which glibc otherwise keeps: several hundred MB after the network."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
