"""Inception Score, FID, sFID, precision and recall of samples against a reference as the ADM evaluator has them; MIND.

    python evaluator.py REF.npz SAMPLE.npz
    torchrun --nproc_per_node=8 evaluator.py REF.npz SAMPLE.npz     (the same numbers)

Either may be a folder of PNGs. Prints the numbers, writes them to SAMPLE.txt and, with everything that made them, to
the key "evaluation" of SAMPLE.json. Exit status: 0, 2 for an input that cannot be evaluated (one line says why), 128 +
signal when stopped.
"""

if __name__ == "__main__":
    from utils.early import end_when_told

    end_when_told()

import argparse
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from utils import distributed, provenance, script
from utils.evaluation import frechet, inception_weights, results
from utils.evaluation.feature_cache import cached
from utils.evaluation.features import Extractor, Features, extract, hand_back_memory, read_parts, workers_within_memory
from utils.evaluation.inception import Inception
from utils.evaluation.inception_tensorflow import TensorFlowInception
from utils.evaluation.inputs import Images, check_inputs, inspect, open_images
from utils.evaluation.mind import mind
from utils.evaluation.precision_recall import precision_recall
from utils.files import printable

PARTS = 64  # a file is cut into about so many, taken in turns by the processes, whatever their number
MIND_SEED = 2020  # torch-fidelity's


class Evaluated(NamedTuple):
    """One of the two files: what it holds, the features of its images (None: it has none), its checksum."""

    file: Images
    features: Features | None
    sha256: str
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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = script.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("ref_batch", metavar="REF.npz", help="reference images or statistics; a folder of PNGs")
    parser.add_argument(
        "sample_batch", metavar="SAMPLE.npz", help="samples: arr_0 uint8 N x H x W x 3; a folder of PNGs"
    )
    parser.add_argument("--inception", metavar="FILE", help='weights of any known kind, or "download" for the original')
    parser.add_argument("--backend", choices=("torch", "tensorflow"), default="torch", help="tensorflow: needs the .pb")
    parser.add_argument("--batch-size", type=script.at_least(1), help="images per network call (GPU 64, CPU 2)")
    parser.add_argument("--pr-dtype", choices=("float16", "float32"), default="float16", help="distances of P and R")
    parser.add_argument("--tf32", action="store_true", help="TF32 convolutions, as TensorFlow on Ampere and later")
    parser.add_argument("--cache-features", action="store_true", help="keep features beside each file for the next run")
    parser.add_argument("--save-statistics", metavar="FILE", type=Path, help="keep those of the reference, as .npz")
    args = parser.parse_args(argv)
    if args.tf32 and (args.backend == "tensorflow" or not torch.cuda.is_available()):
        raise ValueError("--tf32 needs --backend torch and a CUDA GPU; leave it out")
    return args


def evaluate(args: argparse.Namespace) -> int:
    """The whole evaluation, from two files to the report."""
    device = distributed.init(cpu=args.backend == "tensorflow")
    script.allow_tf32(products=False, convolutions=args.tf32)
    torch.backends.cudnn.deterministic = True
    with torch.inference_mode():
        result, reference = measure(args, device)
    distributed.print0(results.lines(result["metrics"]), end="")
    distributed.from_main(lambda: results.write(result, Path(args.sample_batch)))
    if args.save_statistics:
        distributed.from_main(lambda: results.write_statistics(args.save_statistics, reference.statistics, result))
    return script.DONE


def measure(args: argparse.Namespace, device: torch.device) -> tuple[dict, Evaluated]:
    """`metrics` by name (None: not available) and everything that made them; the reference."""
    started = time.monotonic()
    with distributed.all_or_none():
        files = open_images(args.ref_batch), open_images(args.sample_batch)
        check_inputs(*files)
    paths = [file.path for file in files]
    distributed.from_main(lambda: results.check_outputs(*paths, args.cache_features, args.save_statistics))
    weights_path = distributed.from_main(lambda: inception_weights.find_weights(args.inception))
    notes = inspect(*files)
    for note in notes:
        distributed.print0(f"warning: {printable(note)}", file=sys.stderr)
    batch_size = min(args.batch_size or (2 if device.type == "cpu" else 64), max(file.count for file in files))
    with distributed.all_or_none():
        workers = min(choose_workers(args, device, batch_size, file) for file in files if file.count)
    (reference, samples), weights = extract_all(args, device, files, weights_path, batch_size, workers)
    hand_back_memory()
    extracted = time.monotonic()

    metrics = dict.fromkeys(results.METRICS)
    if "score" in samples.features.statistics:
        metrics["Inception Score"] = samples.features.statistics["score"].item()
    metrics |= distributed.from_main(lambda: distances(reference, samples))
    if reference.features:
        pools = reference.features.pool.to(device), samples.features.pool.to(device)
        metrics["Precision"], metrics["Recall"] = precision_recall(*pools, half=args.pr_dtype == "float16")
        metrics["MIND"] = distributed.from_main(lambda: mind(pools[1], pools[0], seed=MIND_SEED))
    made_by = provenance.provenance(device)
    if args.backend == "tensorflow":
        made_by["versions"] = provenance.versions("tensorflow")
    result = {
        "metrics": metrics,
        "reference": reference.record(),
        "samples": samples.record(),
        "weights": weights,
        "backend": args.backend,
        "processes": distributed.world_size(),
        "batch_size": batch_size,
        "dtypes": {
            "network": "tf32" if args.tf32 else "float32",
            "precision and recall": args.pr_dtype,  # and the features that MIND takes
            "statistics": "float64",
        },
        **made_by,
        "seeds": {"MIND": MIND_SEED},
        "warnings": notes,
        "seconds": {"features": extracted - started, "metrics": time.monotonic() - extracted},
    }
    return result, reference


def extract_all(
    args: argparse.Namespace,
    device: torch.device,
    files: tuple[Images, ...],
    weights_path: Path,
    batch_size: int,
    workers: int,
) -> tuple[list[Evaluated], dict]:
    """Both files evaluated, and the record of the weights. The network lives here only."""
    with distributed.all_or_none():
        weights = inception_weights.read_weights(weights_path)
        network = load_network(weights, args.backend, device, batch_size)
    hand_back_memory()
    weights_record = {"path": str(weights.path), "kind": weights.kind, "sha256": weights.sha256}
    to_logits = network.logits if weights.classifier is not None else None
    del weights
    key = {
        args.backend: provenance.versions(args.backend)[args.backend],
        "weights": weights_record["sha256"],
        "device": provenance.device_name(device),
        "tf32": args.tf32,
        "batch_size": batch_size,
        "pr_dtype": args.pr_dtype,
    }
    names = {"pool", "mu", "sigma", "mu_s", "sigma_s"} | ({"score"} if to_logits else set())
    abandoned = threading.Event()
    with ExitStack() as stack:
        background = stack.enter_context(ThreadPoolExecutor(1))
        extractor = stack.enter_context(Extractor(network, batch_size, device, workers))
        stack.callback(abandoned.set)

        def compute(file: Images) -> tuple[Features, str]:
            checksum = background.submit(file.sha256, abandoned) if distributed.is_main() else None
            length = batch_size * -(-file.count // (batch_size * PARTS))
            batches = read_parts(file, length, at_once=4 * workers * batch_size)
            features = extract(
                while_good(batches, checksum), extractor, file.count, length,
                name=str(file.path), half=args.pr_dtype == "float16", to_logits=to_logits,
            )  # fmt: skip
            file.close()
            return features, distributed.from_main(lambda: checksum.result())

        found = []
        for file in files:
            if not file.count:
                found.append(Evaluated(file, None, file.sha256()))
            elif args.cache_features:
                found.append(Evaluated(file, *cached(file, key, names, lambda file=file: compute(file))))
            else:
                found.append(Evaluated(file, *compute(file)))
            hand_back_memory()
    return found, weights_record


def while_good(batches: Iterable[np.ndarray], checksum: Future | None) -> Iterator[np.ndarray]:
    """The batches, until the checksum that is made meanwhile finds the file damaged: then its ValueError."""
    for batch in batches:
        if checksum is not None and checksum.done():
            checksum.result()
        yield batch


def choose_workers(args: argparse.Namespace, device: torch.device, batch_size: int, file: Images) -> int:
    """How many batches of a file's images are in work at once."""
    cores = torch.get_num_threads() if device.type == "cpu" and args.backend == "torch" else 1
    try:
        return workers_within_memory(cores, batch_size, file.height, file.width)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None


def load_network(
    weights: inception_weights.Weights, backend: str, device: torch.device, batch_size: int
) -> Inception | TensorFlowInception:
    """The network that --backend names, with these weights."""
    if backend == "torch":
        network = weights.network().to(device)
        return network.pack(batch_size) if device.type == "cpu" else network
    if weights.kind != inception_weights.ORIGINAL_KIND:
        raise ValueError(
            f"--backend tensorflow executes the original graph; {weights.path} is of the kind {weights.kind!r}"
        )
    return TensorFlowInception(weights.path)


def distances(reference: Evaluated, samples: Evaluated) -> dict[str, float]:
    """FID and sFID, as far as the reference has statistics."""
    ours, theirs, found = samples.features.statistics, reference.statistics, {}
    for name, mu, sigma in (("FID", "mu", "sigma"), ("sFID", "mu_s", "sigma_s")):
        if mu in theirs:
            found[name] = frechet.frechet_distance(ours[mu], ours[sigma], theirs[mu], theirs[sigma])
            if not np.isfinite(found[name]):
                raise ValueError(f"{name} is {found[name]}: are {mu} and {sigma} of {reference.file.path} right?")
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    return script.run(
        "evaluator.py", parse_args, evaluate, argv,
        when_stopped="no numbers were written", out_of_memory="Lower --batch-size.",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
