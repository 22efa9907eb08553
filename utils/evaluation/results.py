"""Where an evaluation goes: the published evaluator's lines in SAMPLE.txt, everything that made them in SAMPLE.json."""

import os
from pathlib import Path

from utils.evaluation.feature_cache import cache_path
from utils.files import atomic_file, read_json, write_json

METRICS = "Inception Score", "FID", "sFID", "Precision", "Recall"


def lines(metrics: dict[str, float | None]) -> str:
    """The five lines of the published evaluator."""
    reasons = {"Inception Score": 'these weights have no classifier; "--inception download" fetches the original'}
    unavailable = "the reference file has no such data"
    return "".join(
        f"{name}: {f'not available ({reasons.get(name, unavailable)})' if value is None else value}\n"
        for name, value in metrics.items()
    )


def outputs(samples: Path) -> tuple[Path, Path]:
    """SAMPLE.txt and SAMPLE.json."""
    return samples.with_suffix(".txt"), samples.with_suffix(".json")


def recorded(path: Path) -> dict:
    """What SAMPLE.json holds already."""
    return read_json(path, "move it away to let the evaluation be recorded") if path.exists() else {}


def check_outputs(reference: Path, samples: Path, *, cache_features: bool = False) -> None:
    """Raise ValueError, before anything is computed, where the results could not be written or would replace a file.

    What is not ours stays: an input, and a SAMPLE.txt that holds something else than results.
    """
    caches = [cache_path(path) for path in (reference, samples)] if cache_features else []
    for path in (*outputs(samples), *caches):
        if any(path == given or (path.exists() and path.samefile(given)) for given in (reference, samples)):
            what = "features" if path in caches else "results"
            raise ValueError(f"{path}: the {what} would be written over it; give it another name, ending in .npz")
    numbers, record = outputs(samples)
    if not os.access(samples.parent, os.W_OK):
        raise ValueError(
            f"{samples.parent}: cannot be written to, but the results go there; link the samples elsewhere"
        )
    if numbers.exists() and not all(
        line.startswith(METRICS) for line in numbers.read_bytes().decode("latin1").splitlines()
    ):
        raise ValueError(f"{numbers} is no result of an evaluation: move it away to let one be written")
    recorded(record)


def write(result: dict, samples: Path) -> None:
    """SAMPLE.txt, and the key "evaluation" of SAMPLE.json: what sample_ddp.py wrote there stays."""
    numbers, record = outputs(samples)
    with atomic_file(numbers) as file:
        file.write(lines(result["metrics"]).encode())
    write_json(record, {**recorded(record), "evaluation": result})
