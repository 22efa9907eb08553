"""Inception Score, FID, sFID, precision and recall of samples against a reference, as the ADM evaluator computes them.

    python evaluator.py REF.npz SAMPLE.npz
    torchrun --nproc_per_node=8 evaluator.py REF.npz SAMPLE.npz     (the same numbers)

Prints the five numbers, writes them to SAMPLE.txt and, with everything that made them, to the key "evaluation" of
SAMPLE.json. Exit status, without torchrun: 0, 2 for an input that cannot be evaluated (one line says why), 130 when
interrupted.
"""

import argparse
import ctypes
import importlib.metadata
import os
import platform
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from utils import distributed
from utils.evaluation.features import load_features, save_features
from utils.evaluation.frechet import INCEPTION_SCORE_BLOCK, InceptionScore, Moments, frechet_distance
from utils.evaluation.inception import POOL_DIM, SPATIAL_DIM, Inception
from utils.evaluation.inception_tensorflow import TensorFlowInception
from utils.evaluation.inception_weights import ORIGINAL_KIND, find_weights, read_weights
from utils.evaluation.npz_reader import NpzReader
from utils.evaluation.precision_recall import precision_recall
from utils.files import atomic_file
from utils.sampling.run_folder import read_json, write_json

Network = Callable[[Tensor], tuple[Tensor, Tensor]]
FLOAT16_NORM = 15_000  # squared norms up to this keep all squared distances below float16's largest, 65,504
SEGMENTS = 64  # a file is cut into about so many pieces, taken in turns by the processes, whatever their number
FEWEST = 4  # images: each needs three neighbours
PUBLISHED_COUNT = 50_000
FEATURES_VERSION = 1  # of our network and statistics; a new number makes feature caches void
METRICS = ("Inception Score", "FID", "sFID", "Precision", "Recall")


@dataclass
class Features:
    """Pool features (N, 2048) float32 or float16 in file order; moments of pool and spatial ones, Inception Score."""

    pool: Tensor
    statistics: dict[str, np.ndarray]  # mu, sigma, mu_s, sigma_s; score where the weights have a classifier
    from_cache: bool = False


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ref_batch", metavar="REF.npz", help="reference images and / or their statistics")
    parser.add_argument("sample_batch", metavar="SAMPLE.npz", help="samples: arr_0 uint8 N x H x W x 3")
    parser.add_argument("--inception", metavar="FILE", help='weights of any known kind, or "download" for the original')
    parser.add_argument("--backend", choices=("torch", "tensorflow"), default="torch", help="tensorflow: needs the .pb")
    parser.add_argument("--batch-size", type=int, help="images per network call (64 on a GPU, 2 on a CPU)")
    parser.add_argument("--pr-dtype", choices=("float16", "float32"), default="float16", help="distances of P and R")
    parser.add_argument("--tf32", action="store_true", help="TF32 convolutions, as TensorFlow on Ampere and later")
    parser.add_argument("--cache-features", action="store_true", help="keep features beside each file for the next run")
    args = parser.parse_args(arguments)
    if args.batch_size is not None and args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size} must be at least 1")
    if args.tf32 and (args.backend == "tensorflow" or not torch.cuda.is_available()):
        raise ValueError("--tf32 needs --backend torch and a CUDA GPU; leave it out")
    return args


class Batches:
    """A network on any number of images: in batches of `batch_size`, on a CPU several at once, each on one core.

    On a CPU this is faster than one batch on all cores, above all on a busy machine, and the features do not depend
    on the number of cores.
    """

    def __init__(self, network: Network, batch_size: int, device: torch.device):
        self.network, self.batch_size, self.device = network, batch_size, device
        own_threads = device.type != "cpu" or isinstance(network, TensorFlowInception)
        self.workers = 1 if own_threads else torch.get_num_threads()
        options = {} if own_threads else {"initializer": torch.set_num_threads, "initargs": (1,)}
        self.pool = ThreadPoolExecutor(self.workers, **options)

    def run(self, images: Tensor) -> Tensor:
        with torch.inference_mode():
            return torch.cat(self.network(images.to(self.device)), dim=1)

    def __call__(self, images: Tensor) -> Tensor:
        """Images (n, H, W, 3) to pool and spatial features side by side (n, 2048 + 2023)."""
        return torch.cat(list(self.pool.map(self.run, images.split(self.batch_size))))


def extract(
    reader: NpzReader, batches: Batches, device: torch.device, to_logits: Callable | None, half: bool
) -> Features:
    """Features of all images of a file, the same on every process and for every number of processes.

    Batches begin at multiples of their size, processes take segments of whole batches in turns, and every process
    adds up all segments in file order. `half` keeps pool features in the float16 that precision and recall round
    them to: all but features so large that their distances would not fit.
    """
    length = batches.batch_size * -(-reader.count // (batches.batch_size * SEGMENTS))  # of a segment, in images
    at_once = 4 * batches.workers * batches.batch_size
    starts, world = range(0, reader.count, length), distributed.world_size()
    pool_features = torch.empty(reader.count, POOL_DIM, device=device, dtype=torch.float16 if half else torch.float32)
    score = InceptionScore()
    moments = {"": Moments.zeros(POOL_DIM, device), "_s": Moments.zeros(SPATIAL_DIM, device)}
    with tqdm(
        total=reader.count, unit="img", desc=reader.path.name, disable=not distributed.is_main(), mininterval=1
    ) as bar:
        for turn in range(0, len(starts), world):
            features = torch.zeros(world, length, POOL_DIM + SPATIAL_DIM, device=device)
            mine = turn + distributed.rank()
            with agreement():
                begin, stop = mine * length, min((mine + 1) * length, reader.count)
                for start in range(begin, stop, at_once):
                    images = torch.from_numpy(reader.read(start, min(start + at_once, stop)))
                    features[distributed.rank(), start - begin :][: len(images)] = batches(images)
                    bar.update(len(images))
            for start, segment in zip(starts[turn:], distributed.reduce_sum(features) if world > 1 else features):
                segment = segment[: reader.count - start]
                if not segment.isfinite().all():
                    raise ValueError(
                        f"{reader.path}: features of images from {start} on are not finite: damaged weights?"
                    )
                pool, spatial = segment.split((POOL_DIM, SPATIAL_DIM), dim=1)
                if pool.square().sum(dim=1).max() > FLOAT16_NORM:
                    pool_features = pool_features.float()
                pool_features[start : start + length] = pool
                if to_logits:
                    score.add(to_logits(pool))
                moments[""].add(pool)
                moments["_s"].add(spatial)
            bar.update(min((turn + world) * length, reader.count) - bar.n)  # the others' images
    reader.close()
    statistics = {"score": np.array(score.value())} if to_logits else {}
    for suffix in ("", "_s"):  # one at a time: 33 MB each
        statistics[f"mu{suffix}"], statistics[f"sigma{suffix}"] = moments.pop(suffix).mean_and_covariance()
    return Features(pool_features, statistics)


@contextmanager
def agreement() -> Iterator[None]:
    """A ValueError of any process inside the block is raised on all of them, so that none is left waiting."""
    fault = None
    try:
        yield
    except ValueError as error:
        fault = str(error)
    fault = next(filter(None, distributed.gather_objects(fault)), None)
    if fault:
        raise ValueError(fault) from None


def cached(
    reader: NpzReader, key: dict, names: set[str], compute: Callable[[NpzReader], tuple[Features, str]]
) -> tuple[Features, str]:
    """Features of a file and its sha256, from the arrays `names` of the cache beside it or computed and saved there."""
    key = {**key, **reader.fingerprint()}
    found = load_features(reader.path, key, names)
    if all(distributed.gather_objects(found is not None)):
        arrays, sha256 = found
        return Features(torch.from_numpy(arrays.pop("pool")), arrays, from_cache=True), sha256
    features, sha256 = compute(reader)
    if distributed.is_main():
        try:
            save_features(reader.path, key, sha256, {"pool": features.pool.cpu().numpy(), **features.statistics})
        except OSError as error:
            print(f"warning: --cache-features: {error}; going on without", file=sys.stderr)
    return features, sha256


def inspect(reference: NpzReader, samples: NpzReader) -> list[str]:
    """What about the two files makes their numbers differ from published ones, a line each."""
    notes = []
    if samples.count != PUBLISHED_COUNT:
        notes.append(f"{samples.count} samples; published numbers use {PUBLISHED_COUNT}")
    for reader, counts in ((samples, True), (reference, "mu" not in reference.statistics)):
        if counts and 0 < reader.count < POOL_DIM:
            notes.append(
                f"{reader.path.name} has {reader.count} images: below {POOL_DIM}, FID is biased upwards by much"
            )
    sizes = [f"{reader.height} x {reader.width}" for reader in (reference, samples) if reader.count]
    if len(set(sizes)) > 1:
        notes.append(f"reference images are {sizes[0]}, samples {sizes[1]}: each is resized to 299 x 299 on its own")
    if reference.count and ("mu" in reference.statistics) != ("mu_s" in reference.statistics):
        notes.append(f"{reference.path.name} has statistics for one of FID and sFID; the other is of its images")
    if samples.count > INCEPTION_SCORE_BLOCK and samples.labels is not None and looks_sorted(samples.labels):
        notes.append("labels look sorted: the Inception Score of such a file is too small; shuffle images and labels")
    return notes


def looks_sorted(labels: np.ndarray) -> bool:
    """Whether neighbours share their label far more often than chance has it."""
    if len(labels) < 2:
        return False
    chance = np.square(np.unique(labels, return_counts=True)[1] / len(labels)).sum()
    return chance < 1 and (labels[1:] == labels[:-1]).mean() > (1 + chance) / 2


def load_network(args: argparse.Namespace, device: torch.device) -> tuple[Inception | TensorFlowInception, dict, bool]:
    """The network of --backend, the record of its weights, and whether they have the classifier."""
    with distributed.main_first():
        path = find_weights(args.inception, say=distributed.print0)
    weights = read_weights(path)
    record = {"path": str(path), "kind": weights.kind, "sha256": weights.sha256}
    if args.backend == "torch":
        return weights.network().to(device), record, weights.classifier is not None
    if weights.kind != ORIGINAL_KIND:
        raise ValueError(f"--backend tensorflow executes the original graph; {path} is of the kind {weights.kind!r}")
    return TensorFlowInception(path), record, weights.classifier is not None


def name_of(device: torch.device) -> str:
    """What the record says of a device: a GPU's own name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def hand_back() -> None:
    """Give freed memory back to the system, which glibc otherwise keeps: several hundred MB after the network."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def extract_all(args: argparse.Namespace, device: torch.device, readers: list[NpzReader], batch_size: int):
    """Of both files the features (None without images) and sha256, and the weights' record.

    The network lives here only.
    """
    with agreement():
        network, weights, classifies = load_network(args, device)
        if isinstance(network, Inception) and device.type == "cpu":
            network.pack(batch_size)
    hand_back()
    key = {
        "version": FEATURES_VERSION,
        args.backend: importlib.metadata.version(args.backend),
        "weights": weights["sha256"],
        "device": name_of(device),
        "tf32": args.tf32,
        "batch_size": batch_size,
        "pr_dtype": args.pr_dtype,
    }
    batches = Batches(network, batch_size, device)
    to_logits = network.logits if classifies else None
    half = args.pr_dtype == "float16"
    names = {"pool", "mu", "sigma", "mu_s", "sigma_s"} | ({"score"} if classifies else set())
    abandoned = threading.Event()
    with ExitStack() as stack:
        background = stack.enter_context(ThreadPoolExecutor(1))
        stack.enter_context(batches.pool)
        stack.callback(abandoned.set)

        def compute(reader: NpzReader) -> tuple[Features, str]:
            checksum = background.submit(reader.sha256, abandoned) if distributed.is_main() else None
            features = extract(reader, batches, device, to_logits, half)
            with agreement():
                return features, checksum.result() if checksum else ""

        found = []
        for reader in readers:
            if not reader.count:
                found.append((None, reader.sha256()))
            else:
                found.append(cached(reader, key, names, compute) if args.cache_features else compute(reader))
            hand_back()
    return *found, weights


def evaluate(args: argparse.Namespace, device: torch.device) -> dict:
    """The whole evaluation: on the main process, `metrics` by name (None: not available) and what made them."""
    started = time.monotonic()
    with agreement():
        reference, samples = NpzReader(args.ref_batch), NpzReader(args.sample_batch)
        if not samples.count:
            raise ValueError(f"{samples.path}: has statistics only; samples need images (arr_0)")
        for reader in (reference, samples):
            if reference.count and reader.count < FEWEST:
                raise ValueError(f"{reader.path}: has {reader.count} images; precision and recall need {FEWEST}")
        if distributed.is_main():
            check_outputs(reference.path, samples.path)
    notes = inspect(reference, samples)
    for note in notes:
        distributed.print0(f"warning: {note}", file=sys.stderr)
    batch_size = min(args.batch_size or (2 if device.type == "cpu" else 64), max(reference.count, samples.count))
    (of_reference, reference_sha256), (of_samples, samples_sha256), weights = extract_all(
        args, device, [reference, samples], batch_size
    )
    hand_back()
    extracted = time.monotonic()

    metrics = dict.fromkeys(METRICS)
    with agreement():
        if distributed.is_main():
            if "score" in of_samples.statistics:
                metrics["Inception Score"] = of_samples.statistics["score"].item()
            statistics = {**(of_reference.statistics if of_reference else {}), **reference.statistics}
            for name, mu, sigma in (("FID", "mu", "sigma"), ("sFID", "mu_s", "sigma_s")):
                if mu in statistics:
                    mine = of_samples.statistics
                    metrics[name] = frechet_distance(mine[mu], mine[sigma], statistics[mu], statistics[sigma])
                    if not np.isfinite(metrics[name]):
                        raise ValueError(f"{name} is {metrics[name]}: are {mu} and {sigma} of {reference.path} right?")
    if of_reference:
        pools = of_reference.pool.to(device), of_samples.pool.to(device)
        metrics["Precision"], metrics["Recall"] = precision_recall(*pools, half=args.pr_dtype == "float16")

    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "scipy")}
    if args.backend == "tensorflow":
        versions["tensorflow"] = importlib.metadata.version("tensorflow")
    return {
        "metrics": metrics,
        "reference": describe(reference, of_reference, reference_sha256),
        "samples": describe(samples, of_samples, samples_sha256),
        "weights": weights,
        "backend": args.backend,
        "device": name_of(device),
        "threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
        "batch_size": batch_size,
        "dtypes": {
            "network": "tf32" if args.tf32 else "float32",
            "precision and recall": args.pr_dtype,
            "statistics": "float64",
        },
        "versions": {"python": platform.python_version(), **versions},
        "warnings": notes,
        "seconds": {"features": extracted - started, "metrics": time.monotonic() - extracted},
    }


def describe(reader: NpzReader, features: Features | None, sha256: str) -> dict:
    """The record of one file."""
    return {
        "path": str(reader.path),
        "sha256": sha256,
        "images": reader.count,
        "height": reader.height,
        "width": reader.width,
        "statistics": sorted(reader.statistics),
        "features_from_cache": features is not None and features.from_cache,
    }


def report(result: dict) -> str:
    """The five lines of the published evaluator."""
    reasons = {"Inception Score": 'these weights have no classifier; "--inception download" fetches the original'}
    unavailable = "the reference file has no such data"
    return "".join(
        f"{name}: {f'not available ({reasons.get(name, unavailable)})' if value is None else value}\n"
        for name, value in result["metrics"].items()
    )


def outputs(samples: Path) -> tuple[Path, Path]:
    """SAMPLE.txt and SAMPLE.json."""
    return samples.with_suffix(".txt"), samples.with_suffix(".json")


def recorded(path: Path) -> dict:
    """What SAMPLE.json holds already."""
    return read_json(path, "move it away to let the evaluation be recorded") if path.exists() else {}


def check_outputs(reference: Path, samples: Path) -> None:
    """Raise ValueError, before anything is computed, where the results could not be written."""
    for path in outputs(samples):
        if path in (reference, samples):
            raise ValueError(f"{path}: the results would be written over it; name it .npz")
    if not os.access(samples.parent, os.W_OK):
        raise ValueError(
            f"{samples.parent}: cannot be written to, but the results go there; link the samples elsewhere"
        )
    recorded(outputs(samples)[1])


def write(result: dict, samples: Path) -> None:
    """SAMPLE.txt, and the key "evaluation" of SAMPLE.json: what sample_ddp.py wrote there stays."""
    numbers, record = outputs(samples)
    with atomic_file(numbers) as file:
        file.write(report(result).encode())
    write_json(record, {**recorded(record), "evaluation": result})


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    try:
        args = parse_args(arguments)
        device = distributed.init(cpu=args.backend == "tensorflow")
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, args.tf32
        torch.backends.cudnn.deterministic = True
        with torch.inference_mode():
            result = evaluate(args, device)
        distributed.print0(report(result), end="")
        if distributed.is_main():
            write(result, Path(args.sample_batch))
        return 0
    except (ValueError, OSError) as error:
        distributed.print0(f"evaluator.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        distributed.print0("evaluator.py: stopped; no numbers were written", file=sys.stderr)
        return 130
    finally:
        distributed.cleanup()


if __name__ == "__main__":
    sys.exit(main())
