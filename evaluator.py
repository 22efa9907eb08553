"""Inception Score, FID, sFID, precision and recall of samples against a reference as the ADM evaluator has them; MIND.

    python evaluator.py REF.npz SAMPLE.npz
    torchrun --nproc_per_node=8 evaluator.py REF.npz SAMPLE.npz     (the same numbers)

Either may be a folder of PNGs. Prints the numbers, writes them to SAMPLE.txt and, with everything that made them, to
the key "evaluation" of SAMPLE.json. Exit status: 0, 2 for an input that cannot be evaluated (one line says why), 128 +
signal when stopped. In Python, for images without a file:

    from evaluator import evaluate
    metrics = evaluate("REF.npz", batches_of_uint8_images)
"""

if __name__ == "__main__":
    from utils.early import end_when_told

    end_when_told()

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from utils import distributed, provenance, script
from utils.evaluation import inception_weights, metrics, results
from utils.evaluation.batches import Batches
from utils.evaluation.extraction import NETWORK_BATCH, Evaluated, Extraction, Settings, choose_workers
from utils.evaluation.features import exact_arithmetic, hand_back_memory
from utils.evaluation.inputs import Images, check_inputs, inspect, open_images
from utils.evaluation.intervals import RESAMPLES
from utils.files import printable

__all__ = ["evaluate", "main"]


class Inputs(NamedTuple):
    """What is evaluated, open and checked: the reference, the samples, perhaps a second real set for the floor."""

    reference: Images
    samples: Images | Batches
    real: Images | None


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
    parser.add_argument(
        "--floor", metavar="FILE", nargs="?", const=True, default=False, type=file_name,
        help="FID, sFID, MIND of real images too: of FILE, or of halves",
    )  # fmt: skip
    parser.add_argument(
        "--intervals", metavar="N", nargs="?", const=RESAMPLES, default=0, type=script.at_least(2),
        help="95%% intervals of FID, precision, recall, MIND, from N random halves of the samples (100)",
    )  # fmt: skip
    parser.add_argument("--save-statistics", metavar="FILE", type=Path, help="keep those of the reference, as .npz")
    args = parser.parse_args(argv)
    if args.tf32 and (args.backend == "tensorflow" or not torch.cuda.is_available()):
        raise ValueError("--tf32 needs --backend torch and a CUDA GPU; leave it out")
    return args


def file_name(word: str) -> str:
    """A flag's `type`: not the nothing that an unset variable of the shell leaves, which would be the folder here."""
    if not word:
        raise argparse.ArgumentTypeError("has an empty name; name a file, or leave the name out")
    return word


def evaluate(
    reference: str | Path,
    images: str | Path | Iterable[np.ndarray | torch.Tensor],
    *,
    floor: bool | str | Path = False,
    intervals: int = 0,
    **settings: object,
) -> dict:
    """Metrics by name of images against a reference; None: not available. The numbers of the command line.

    reference: an .npz of images and / or statistics, or a folder of PNGs; images: the same, or any iterable of uint8
    batches (n, H, W, 3), numpy or torch. On several processes all call this, and each hands out its share of batches.
    floor: True or a second real file; the floor is then under "floor". intervals: from how many halves, 100 give the
    width to 7%; then under "intervals". settings: inception, backend, batch_size, pr_dtype, tf32, cache_features, as
    the flags of these names. No result is written. Raises ValueError for what cannot be evaluated, and for settings
    that the command line refuses.
    """
    args = parse_args(["-", "-", *as_flags({**Settings(**settings)._asdict(), "floor": floor, "intervals": intervals})])
    settings, device, real = prepare(args)
    result, _ = measure(open_inputs(reference, images, real), settings, device, bool(args.floor), args.intervals)
    return {**result["metrics"], **{name: result[name] for name in ("floor", "intervals") if name in result}}


def as_flags(settings: dict[str, object]) -> list[str]:
    """Settings as words of the command line, whose checks are then theirs; defaults are left out."""
    words, defaults = [], {**Settings._field_defaults, "floor": False, "intervals": 0}
    for name, value in settings.items():
        flag, is_number = f"--{name.replace('_', '-')}", name in ("batch_size", "intervals")
        if value is True and not is_number:
            words.append(flag)
        elif value != defaults[name] and (name, value) != ("floor", None):
            words.append(f"{flag}={value!r}" if is_number and isinstance(value, str) else f"{flag}={value}")
    return words


def prepare(args: argparse.Namespace) -> tuple[Settings, torch.device, str | None]:
    """The settings of the features, where they are computed, and the second real file."""
    settings = Settings(*(getattr(args, name) for name in Settings._fields))
    device = distributed.init(cpu=args.backend == "tensorflow")
    return settings, device, None if args.floor in (False, True) else args.floor


def from_command_line(args: argparse.Namespace) -> int:
    """The whole evaluation, from two files to the report."""
    settings, device, real = prepare(args)
    inputs = open_inputs(args.ref_batch, args.sample_batch, real)
    paths, caches = [file.path for file in inputs if file], args.cache_features
    distributed.from_main(lambda: results.check_outputs(*paths, caches=caches, statistics=args.save_statistics))
    result, reference = measure(inputs, settings, device, bool(args.floor), args.intervals)
    distributed.print0(results.lines(result), end="")
    distributed.from_main(lambda: results.write(result, inputs.samples.path))
    if args.save_statistics:
        distributed.from_main(lambda: results.write_statistics(args.save_statistics, reference.statistics, result))
    return script.DONE


def open_inputs(reference: str | Path, images: object, real: str | Path | None) -> Inputs:
    """Everything that is evaluated. Raises ValueError, on all processes, for what cannot be read or compared."""
    with distributed.all_or_none():
        inputs = Inputs(
            open_images(reference),
            open_images(images) if isinstance(images, str | Path) else Batches(images),
            open_images(real) if real else None,
        )
        if not isinstance(inputs.samples, Batches):
            check_inputs(inputs.reference, inputs.samples)
        if real and inputs.real.count < 2:
            raise ValueError(f"--floor {real}: has {inputs.real.count} images; a floor needs 2")
    return inputs


def measure(
    inputs: Inputs, settings: Settings, device: torch.device, floor: bool, resamples: int
) -> tuple[dict, Evaluated]:
    """`metrics` by name (None: not available) and everything that made them; the reference."""
    started = time.monotonic()
    reference, samples, real = inputs
    counted = not isinstance(samples, Batches)  # before they are taken
    with distributed.all_or_none():
        if floor and not (reference.count or real):
            raise ValueError(
                f"{reference.path}: has statistics only; a floor needs real images: name some by --floor FILE"
            )
        if resamples and counted:
            metrics.check_halves(samples.count)
    weights = distributed.from_main(lambda: inception_weights.find_weights(settings.inception))
    settings = settings._replace(inception=str(weights))  # found before anything is said about the images
    batch_size = settings.batch_size or NETWORK_BATCH[device.type]
    if counted:
        batch_size = min(batch_size, max(reference.count, samples.count))
        notes = tell(inspect(reference, samples))
    with exact_arithmetic(tf32=settings.tf32):
        (reference, samples, real), weights = extract_all(inputs, settings, device, batch_size, floor)
        if not counted:
            check_inputs(inputs.reference, inputs.samples)
            notes = tell(inspect(inputs.reference, inputs.samples))
        extracted = time.monotonic()
        against = metrics.as_reference(reference, device)
        found, spread = metrics.all_metrics(samples.features, against, half=settings.half), {}
        if floor:
            spread["floor"] = metrics.floor(samples.file.count, reference, real, device)
            if (images := spread["floor"]["images"]) < samples.file.count:
                notes += tell([f"the floor is that of {images} real images for want of more: it is too high"])
        if resamples:
            spread["intervals"] = metrics.intervals(samples.features, against, resamples=resamples, half=settings.half)
    made_by = provenance.provenance(device)
    if settings.backend == "tensorflow":
        made_by["versions"] = provenance.versions("tensorflow")
    result = {
        "metrics": found,
        **spread,
        "reference": reference.record(),
        "samples": samples.record(),
        "weights": weights,
        "backend": settings.backend,
        "processes": distributed.world_size(),
        "batch_size": batch_size,
        "dtypes": {
            "network": "tf32" if settings.tf32 else "float32",
            "precision and recall": settings.pr_dtype,  # and the features that MIND takes
            "statistics": "float64",
        },
        **made_by,
        "seeds": {"MIND": metrics.SEED},
        "warnings": notes,
        "seconds": {"features": extracted - started, "metrics": time.monotonic() - extracted},
    }
    return result, reference


def tell(notes: list[str]) -> list[str]:
    """Notes, once they have been said."""
    for note in notes:
        distributed.print0(f"warning: {printable(note)}", file=sys.stderr)
    return notes


def extract_all(
    inputs: Inputs, settings: Settings, device: torch.device, batch_size: int, floor: bool
) -> tuple[list[Evaluated | None], dict]:
    """Reference, samples and second real set evaluated, and the record of the weights. The network lives here only."""
    with distributed.all_or_none():
        with_images = [file for file in inputs if file and (file.count or isinstance(file, Batches))]
        workers = choose_workers(settings, device, batch_size, with_images)
    with Extraction(settings, device, batch_size, workers) as extraction:
        found = [
            extraction(inputs.reference, keep_spatial=floor and not inputs.real),
            extraction(inputs.samples),
            extraction(inputs.real, keep_spatial=True) if inputs.real else None,
        ]
        weights = extraction.weights
    del extraction
    hand_back_memory()
    return found, weights


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    return script.run(
        "evaluator.py", parse_args, from_command_line, argv,
        when_stopped="no numbers were written", out_of_memory="Lower --batch-size.",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
