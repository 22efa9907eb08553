"""Inception features of any iterable of images, the same on every process and for every number of processes.

An .npz is one source (`read_parts`), a generator of samples or reconstructions another: whatever hands out uint8
batches can be measured. Legend: N images, H x W their size.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
ROWS_AT_ONCE = 1_000  # of features whose moments are taken
MEMORY = 2**30  # bytes of images in work at once, as float32; the process peaks at about three times this


@dataclass
class Features:
    """Pool features (N, 2048) float32 or float16 in their order; moments of pool and spatial ones, Inception Score."""

    pool: Tensor
    statistics: dict[str, np.ndarray]  # mu, sigma, mu_s, sigma_s; score where there are logits
    spatial: Tensor | None = None  # (N, 2023) float32, where they were asked for

    def subset(self, rows: Tensor) -> "Features":
        """Those of some images, rows (n,) int64, with statistics of their own; spatial ones are needed for it.

        Where pool features were kept in float16 the statistics are of the rounded ones.
        """
        pool, spatial = self.pool[rows.to(self.pool.device)], self.spatial[rows.to(self.spatial.device)]
        return Features(pool, {**statistics_of(pool), **statistics_of(spatial, "_s")}, spatial)


def statistics_of(features: Tensor, suffix: str = "") -> dict[str, np.ndarray]:
    """mu (D,) and sigma (D, D) of features (N, D), their names ending in `suffix`."""
    moments = Moments.zeros(features.shape[1], features.device)
    for rows in features.split(ROWS_AT_ONCE):
        moments.add(rows)
    return dict(zip((f"mu{suffix}", f"sigma{suffix}"), moments.mean_and_covariance()))


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
    batches: Iterable[np.ndarray | Tensor],
    extractor: Extractor,
    count: int | None,
    length: int,
    *,
    name: str,
    half: bool = False,
    to_logits: Callable[[Tensor], Tensor] | None = None,
    keep_spatial: bool = False,
    shows: bool = True,
) -> Features:
    """Features of all images that the processes hand out, each its own `batches` of uint8 (n, H, W, 3).

    Every process calls this; one may hand out fewer than another, or none. In every turn each takes the next `length`
    of its images, and the order of the whole is turn by turn and rank by rank: the order of a file where the processes
    have its parts (`my_parts`). When the order and `length` do not depend on the number of processes, neither do the
    numbers: every process adds up all parts in their order. An Extractor's batches begin anew with each of `batches`,
    and rounding depends on their size.
    `count`: of all images, for the progress bar, if it `shows` one; None where nobody knows. `name` is what messages
    call the images.
    `half` keeps pool features in the float16 that precision and recall round them to: all but features so large that
    their distances would not fit. With `to_logits` (n, 2048) -> (n, classes) there is an Inception Score.
    Raises ValueError, on all processes, for whatever is wrong with any image.
    """
    batches, rest, rank, world = iter(batches), (), distributed.rank(), distributed.world_size()
    pool_parts, spatial_parts, done = [], [], 0
    score = InceptionScore()
    moments = {"": Moments.zeros(POOL_DIM, extractor.device), "_s": Moments.zeros(SPATIAL_DIM, extractor.device)}
    label = printable(os.path.basename(name))
    bar = tqdm(total=count, unit="img", desc=label, disable=not (shows and distributed.is_main()), mininterval=1)
    with bar:
        while True:
            features = torch.zeros(world, length, POOL_DIM + SPATIAL_DIM, device=extractor.device)
            with distributed.all_or_none():
                filled = 0
                while filled < length and (batch := rest if len(rest) else next(batches, None)) is not None:
                    images, rest = batch[: length - filled], batch[length - filled :]
                    features[rank, filled : filled + len(images)] = extractor(torch.as_tensor(images))
                    filled += len(images)
                    bar.update(len(images))
            counts = distributed.gather_objects(filled)
            if not any(counts):
                break
            for segment, n in zip(distributed.reduce_sum(features) if world > 1 else features, counts):
                segment = segment[:n]
                if not n:
                    continue
                if not segment.isfinite().all():
                    with distributed.all_or_none():
                        raise ValueError(
                            f"{name}: features of images {done} to {done + n - 1} are not finite: damaged weights?"
                        )
                pool, spatial = segment.split((POOL_DIM, SPATIAL_DIM), dim=1)
                half = half and bool(pool.square().sum(dim=1).max() <= FLOAT16_NORM)
                pool_parts.append(pool.half() if half else pool.clone())
                if keep_spatial:
                    spatial_parts.append(spatial.clone())
                if to_logits:
                    score.add(to_logits(pool))
                moments[""].add(pool)
                moments["_s"].add(spatial)
                done += n
            bar.update(done - bar.n)  # the others' images
    statistics = {"score": np.array(score.value())} if to_logits else {}
    for suffix in ("", "_s"):  # one at a time: 33 MB each
        statistics[f"mu{suffix}"], statistics[f"sigma{suffix}"] = moments.pop(suffix).mean_and_covariance()
    spatial = joined(spatial_parts, SPATIAL_DIM, torch.float32) if keep_spatial else None
    return Features(joined(pool_parts, POOL_DIM, torch.float16 if half else torch.float32), statistics, spatial)


def joined(parts: list[Tensor], dim: int, dtype: torch.dtype) -> Tensor:
    """Parts (n, dim) as one tensor; the list is emptied on the way, so that there are never two copies."""
    whole, stop = torch.empty(sum(map(len, parts)), dim, dtype=dtype, device=parts[0].device), 0
    parts.reverse()
    while parts:
        part = parts.pop()
        start, stop = stop, stop + len(part)
        whole[start:stop] = part
    return whole


@contextmanager
def exact_arithmetic(*, tf32: bool = False) -> Iterator[None]:
    """Features that do not depend on what a training run has set: no gradients, float32 products, one algorithm.

    tf32: convolutions on a GPU may use it, as TensorFlow on Ampere and later.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = False, tf32, True, False
    try:
        with torch.inference_mode():
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before


def hand_back_memory() -> None:
    """Give freed memory back to the system, which glibc otherwise keeps: several hundred MB after the network."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
