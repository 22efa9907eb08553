"""The metrics of samples against a reference; how far they may be trusted, and what real images would get.

Every function is called on all processes and gives the same numbers on each of them, whatever their number.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils import distributed
from utils.evaluation import frechet
from utils.evaluation.extraction import Evaluated
from utils.evaluation.features import Features, statistics_of
from utils.evaluation.intervals import LEVEL, extrapolate, half_widths
from utils.evaluation.mind import mind
from utils.evaluation.precision_recall import NEIGHBOUR, precision_recall, radii

METRICS = "Inception Score", "FID", "sFID", "Precision", "Recall", "MIND"  # the published five, and one of ours
SEED = 2020  # of MIND, torch-fidelity's; of the halves too
FEWEST_FOR_INFINITY, SIZES = 5_000, 15  # FID-infinity's subsets, as Chong & Forsyth have them


class Reference(NamedTuple):
    """What samples are measured against."""

    name: str  # for messages
    statistics: dict[str, np.ndarray]  # mu, sigma, mu_s, sigma_s as far as known
    pool: Tensor | None  # (M, 2048), where it has images


def as_reference(reference: Evaluated, device: torch.device) -> Reference:
    pool = reference.features.pool.to(device) if reference.features else None
    return Reference(str(reference.file.path), reference.statistics, pool)


def all_metrics(samples: Features, reference: Reference, *, half: bool) -> dict[str, float | None]:
    """METRICS by name; None: no classifier, or no such data in the reference. `half`: as precision_recall has it."""
    found = dict.fromkeys(METRICS)
    if "score" in samples.statistics:
        found["Inception Score"] = samples.statistics["score"].item()
    found |= distances(samples, reference)
    if reference.pool is not None:
        pool = samples.pool.to(reference.pool.device)
        found["Precision"], found["Recall"] = precision_recall(reference.pool, pool, half=half)
    return found


def distances(samples: Features, reference: Reference) -> dict[str, float]:
    """FID, sFID and MIND, as far as the reference has what they need."""

    def on_main() -> dict[str, float]:
        found = {}
        for name, mu, sigma in (("FID", "mu", "sigma"), ("sFID", "mu_s", "sigma_s")):
            if mu in reference.statistics and mu in samples.statistics:
                ours, theirs = samples.statistics, reference.statistics
                found[name] = frechet.frechet_distance(ours[mu], ours[sigma], theirs[mu], theirs[sigma])
                if not np.isfinite(found[name]):
                    raise ValueError(f"{name} is {found[name]}: are {mu} and {sigma} of {reference.name} right?")
        if reference.pool is not None:
            found["MIND"] = mind(samples.pool.to(reference.pool.device), reference.pool, seed=SEED)
        return found

    return distributed.from_main(on_main)


def floor(count: int, reference: Evaluated, real: Evaluated | None, device: torch.device) -> dict:
    """FID, sFID and MIND of real images in the place of `count` samples: what no model can be expected to beat.

    Without `real` they are `count` images of one random half of the reference, against all of its other half. Spatial
    features must have been kept of the set that is cut.
    """
    source = real or reference
    order = torch.randperm(source.file.count, generator=torch.Generator().manual_seed(SEED))
    half = source.file.count // 2
    n = min(count, source.file.count if real else half)
    if real:
        against, others = as_reference(reference, device), reference.file.count
    else:
        rest = reference.features.subset(order[half:])
        against, others = Reference(str(reference.file.path), rest.statistics, rest.pool.to(device)), len(rest.pool)
    return {
        "real": "one half of the reference, against the other" if real is None else real.record(),
        "images": n,
        "reference_images": others,
        "metrics": distances(source.features.subset(order[:n]), against),
        "seed": SEED,
    }


def intervals(samples: Features, reference: Reference, *, resamples: int, half: bool) -> dict:
    """Half-widths of 95% intervals of FID, precision, recall and MIND; FID at infinitely many samples, or None.

    The extrapolation follows Chong & Forsyth, arXiv:1911.07023: a line through FIDs of random subsets, here of 15 sizes
    from 5,000 on, so that twice as many samples are needed. The reference is held fixed, and so is its own bias.
    """
    check_halves(len(samples.pool))
    pool = samples.pool if reference.pool is None else samples.pool.to(reference.pool.device)
    reference_radii = None if reference.pool is None else radii(reference.pool, half)

    def of_half(some: Tensor) -> dict[str, float]:
        found = distances(on_main_only(some), reference)
        if reference.pool is not None:
            found["Precision"], found["Recall"] = precision_recall(
                reference.pool, some, half=half, reference_radii=reference_radii
            )
        return found

    return {
        "level": LEVEL,
        "resamples": resamples,
        "half_widths": half_widths(of_half, pool, seed=SEED, resamples=resamples),
        "FID at infinitely many samples": fid_at_infinity(pool, reference),
        "seed": SEED,
    }


def check_halves(count: int) -> None:
    """Raise ValueError where samples are too few for intervals."""
    if count < 2 * (NEIGHBOUR + 1):
        raise ValueError(f"{count} samples: intervals are taken from halves of them, and need {2 * (NEIGHBOUR + 1)}")


def fid_at_infinity(pool: Tensor, reference: Reference) -> float | None:
    """FID extrapolated from subsets of pool features (N, 2048); None where N is below 10,000."""
    if len(pool) < 2 * FEWEST_FOR_INFINITY or "mu" not in reference.statistics:
        return None
    generator = torch.Generator().manual_seed(SEED)
    counts = np.linspace(FEWEST_FOR_INFINITY, len(pool), SIZES).round().astype(int).tolist()
    subsets = (pool[torch.randperm(len(pool), generator=generator)[:count].to(pool.device)] for count in counts)
    only_fid = reference._replace(pool=None)
    return extrapolate(counts, [distances(on_main_only(some), only_fid)["FID"] for some in subsets])


def on_main_only(pool: Tensor) -> Features:
    """Pool features, with statistics where `distances` computes: processes that share cores need not all do it."""
    return Features(pool, statistics_of(pool) if distributed.is_main() else {})
