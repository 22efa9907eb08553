"""From images to what is known of them: which network, which settings, the cache beside a file, its checksum."""

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch

from utils import distributed, provenance
from utils.evaluation import inception_weights
from utils.evaluation.batches import Batches
from utils.evaluation.feature_cache import cached
from utils.evaluation.features import Extractor, Features, extract, hand_back_memory, read_parts, workers_within_memory
from utils.evaluation.inception import Inception
from utils.evaluation.inception_tensorflow import TensorFlowInception
from utils.evaluation.inputs import Images

PARTS = 64  # a file is cut into about so many, taken in turns by the processes, whatever their number
NETWORK_BATCH = {"cuda": 64, "cpu": 2}  # images per call of the network
BATCHES_AT_ONCE = 256  # images that a process takes in a turn where nobody knows how many there are


class Settings(NamedTuple):
    """How features are made, as the flags of the same names have it."""

    inception: str | None = None
    backend: str = "torch"
    batch_size: int | None = None
    pr_dtype: str = "float16"
    tf32: bool = False
    cache_features: bool = False

    @property
    def half(self) -> bool:
        """Whether precision and recall round to float16, and pool features are kept so."""
        return self.pr_dtype == "float16"


class Evaluated(NamedTuple):
    """One of the sets of images: what it holds, the features of its images (None: it has none), its checksum."""

    file: Images | Batches
    features: Features | None
    sha256: str | None
    from_cache: bool = False

    @property
    def statistics(self) -> dict[str, np.ndarray]:
        """mu, sigma, mu_s, sigma_s: those that the file brings along count before those of its images."""
        computed = self.features.statistics if self.features else {}
        return {name: values for name, values in {**computed, **self.file.statistics}.items() if name != "score"}

    def record(self) -> dict:
        return {
            "path": str(self.file.path),
            "sha256": self.sha256,
            "images": self.file.count,
            "height": self.file.height,
            "width": self.file.width,
            "statistics": sorted(self.file.statistics),
            "features_from_cache": self.from_cache,
        }


class Extraction:
    """The Inception network at work, on all processes: images go in, an Evaluated comes out. Leave it to free both.

    `weights` records which they are. Raises ValueError, on all processes, for weights that cannot be used.
    """

    def __init__(self, settings: Settings, device: torch.device, batch_size: int, workers: int, *, shows: bool = True):
        self.settings, self.batch_size, self.workers, self.shows = settings, batch_size, workers, shows
        path = distributed.from_main(lambda: inception_weights.find_weights(settings.inception))
        with distributed.all_or_none():
            weights = inception_weights.read_weights(path)
            network = load_network(weights, settings.backend, device, batch_size)
        hand_back_memory()
        self.weights = {"path": str(weights.path), "kind": weights.kind, "sha256": weights.sha256}
        self.to_logits = network.logits if weights.classifier is not None else None
        self.cache_key = {
            settings.backend: provenance.versions(settings.backend)[settings.backend],
            "weights": weights.sha256,
            "device": provenance.device_name(device),
            "tf32": settings.tf32,
            "batch_size": batch_size,
            "pr_dtype": settings.pr_dtype,
        }
        self._abandoned = threading.Event()
        with ExitStack() as stack:
            self._background = stack.enter_context(ThreadPoolExecutor(1))
            self._extractor = stack.enter_context(Extractor(network, batch_size, device, workers))
            stack.callback(self._abandoned.set)
            self._stack = stack.pop_all()

    def __enter__(self) -> "Extraction":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)
        del self._extractor, self.to_logits

    def __call__(self, file: Images | Batches, *, keep_spatial: bool = False) -> Evaluated:
        """Features from the cache beside the file, where settings have one, or of its images; None where it has none.

        keep_spatial: spatial features are kept too, so that subsets can be measured.
        """
        if isinstance(file, Batches):
            features, checksum = self._compute(file, keep_spatial)
            file.count = len(features.pool)  # of all processes
            found = Evaluated(file, features, checksum)
        elif not file.count:
            found = Evaluated(file, None, file.sha256())
        elif self.settings.cache_features:
            names = {"pool", "mu", "sigma", "mu_s", "sigma_s"}
            names |= ({"score"} if self.to_logits else set()) | ({"spatial"} if keep_spatial else set())
            found = Evaluated(file, *cached(file, self.cache_key, names, lambda: self._compute(file, keep_spatial)))
        else:
            found = Evaluated(file, *self._compute(file, keep_spatial))
        hand_back_memory()
        return found

    def _compute(self, file: Images | Batches, keep_spatial: bool) -> tuple[Features, str | None]:
        checksum = self._background.submit(file.sha256, self._abandoned) if distributed.is_main() else None
        if isinstance(file, Batches):
            batches, count, length = file, None, self.batch_size * -(-BATCHES_AT_ONCE // self.batch_size)
        else:
            count, length = file.count, self.batch_size * -(-file.count // (self.batch_size * PARTS))
            batches = while_good(read_parts(file, length, at_once=4 * self.workers * self.batch_size), checksum)
        features = self.extract(batches, count, length, str(file.path), keep_spatial)
        file.close()
        return features, distributed.from_main(lambda: checksum.result())

    def extract(
        self, batches: Iterable, count: int | None, length: int, name: str, keep_spatial: bool = False
    ) -> Features:
        """features.extract with this network: of batches that the processes hold between them in parts of `length`."""
        return extract(
            batches, self._extractor, count, length, name=name, half=self.settings.half, to_logits=self.to_logits,
            keep_spatial=keep_spatial, shows=self.shows,
        )  # fmt: skip


def while_good(batches: Iterable[np.ndarray], checksum: Future | None) -> Iterator[np.ndarray]:
    """The batches, until the checksum that is made meanwhile finds the file damaged: then its ValueError."""
    for batch in batches:
        if checksum is not None and checksum.done():
            checksum.result()
        yield batch


def load_network(
    weights: inception_weights.Weights, backend: str, device: torch.device, batch_size: int
) -> Inception | TensorFlowInception:
    """The network of a backend, with these weights."""
    if backend == "torch":
        network = weights.network().to(device)
        return network.pack(batch_size) if device.type == "cpu" else network
    if weights.kind != inception_weights.ORIGINAL_KIND:
        raise ValueError(
            f"--backend tensorflow executes the original graph; {weights.path} is of the kind {weights.kind!r}"
        )
    return TensorFlowInception(weights.path)


def choose_workers(settings: Settings, device: torch.device, batch_size: int, files: list[Images | Batches]) -> int:
    """How many batches of any file's images may be in work at once. Raises ValueError for images that are too large."""
    cores, fit = torch.get_num_threads() if device.type == "cpu" and settings.backend == "torch" else 1, []
    for file in files:
        try:
            fit.append(workers_within_memory(cores, batch_size, file.height, file.width) if file.height else cores)
        except ValueError as error:
            raise ValueError(f"{file.path}: {error}") from None
    return min(fit)
