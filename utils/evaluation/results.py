"""Where an evaluation goes: the numbers in SAMPLE.txt, what made them in SAMPLE.json, a file of statistics."""

import json
import os
from pathlib import Path

import numpy as np

from utils.evaluation.feature_cache import beside, cache_path
from utils.evaluation.metrics import METRICS
from utils.files import atomic_file, read_json, write_json


def lines(result: dict) -> str:
    """The five lines of the published evaluator, and MIND's; beside a number its interval and floor, where known."""
    reasons = {"Inception Score": 'these weights have no classifier; "--inception download" fetches the original'}
    unavailable = "the reference file has no such data"
    return "".join(
        f"{name}: {f'not available ({reasons.get(name, unavailable)})' if value is None else value}"
        f"{interval(name, result)}{floor(name, result)}\n"
        for name, value in result["metrics"].items()
    )


def interval(name: str, result: dict) -> str:
    """Such as " ± 1.53 (95%)", and of FID the value at infinitely many samples."""
    found = result.get("intervals", {})
    width, infinite = found.get("half_widths", {}).get(name), found.get("FID at infinitely many samples")
    text = "" if width is None else f" ± {width:.3g} ({found['level']:.0%})"
    return text + (f"; {infinite:.6g} at infinitely many samples" if name == "FID" and infinite is not None else "")


def floor(name: str, result: dict) -> str:
    """Such as "; real images 20.9012 (250 against 250)"."""
    found = result.get("floor", {})
    value = found.get("metrics", {}).get(name)
    if value is None:
        return ""
    return f"; real images {value:.6g} ({found['images']} against {found['reference_images'] or 'statistics'})"


def outputs(samples: Path) -> tuple[Path, Path]:
    """SAMPLE.txt and SAMPLE.json."""
    return beside(samples, ".txt"), beside(samples, ".json")


def recorded(path: Path) -> dict:
    """What SAMPLE.json holds already."""
    return read_json(path, "move it away to let the evaluation be recorded") if path.exists() else {}


def check_outputs(
    reference: Path, samples: Path, *others: Path, caches: bool = False, statistics: Path | None = None
) -> None:
    """Raise ValueError, before anything is computed, where the results could not be written or would replace a file.

    What is not ours stays: an input, and a SAMPLE.txt that holds something else than results; a file of statistics
    (--save-statistics) is never replaced. `caches`: features are kept beside each input.
    """
    if statistics and statistics.exists():
        raise ValueError(f"--save-statistics {statistics}: exists; take it as the reference, or another name")
    if statistics and not (statistics.parent.is_dir() and os.access(statistics.parent, os.W_OK)):
        raise ValueError(f"--save-statistics {statistics}: {statistics.parent} is no folder that can be written to")
    inputs = reference, samples, *others
    kept = [cache_path(path) for path in inputs] if caches else []
    if statistics in (*outputs(samples), *kept):
        raise ValueError(f"--save-statistics {statistics}: results go there; give another name")
    for path in (*outputs(samples), *kept):
        if any(path == given or (path.exists() and path.samefile(given)) for given in inputs):
            what = "features" if path in kept else "results"
            raise ValueError(f"{path}: the {what} would be written over it; give it another name, ending in .npz")
    numbers, record = outputs(samples)
    if not os.access(numbers.parent, os.W_OK):
        raise ValueError(
            f"{numbers.parent}: cannot be written to, but the results go there; link the samples elsewhere"
        )
    known = tuple(f"{name}:" for name in METRICS)
    if numbers.exists() and not (
        numbers.is_file() and all(line.startswith(known) for line in numbers.read_bytes().decode("latin1").splitlines())
    ):
        raise ValueError(f"{numbers} is no result of an evaluation: move it away to let one be written")
    recorded(record)


def write(result: dict, samples: Path) -> None:
    """SAMPLE.txt, and the key "evaluation" of SAMPLE.json: what sample_ddp.py wrote there stays."""
    numbers, record = outputs(samples)
    with atomic_file(numbers) as file:
        file.write(lines(result).encode())
    write_json(record, {**recorded(record), "evaluation": result})


def write_statistics(path: Path, statistics: dict[str, np.ndarray], result: dict) -> None:
    """An .npz that is a reference by itself: statistics of the reference, and in `record` (JSON) what made them."""
    names = "reference", "weights", "backend", "device", "batch_size", "versions", "commit"
    record = json.dumps({name: result[name] for name in names}).encode()
    with atomic_file(path) as file:
        np.savez(file, **statistics, record=np.frombuffer(record, np.uint8))
