"""How far a metric of N samples can be trusted: its spread over samples, and its value at infinitely many."""

from collections.abc import Callable, Sequence
from statistics import NormalDist, stdev

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from utils import distributed

RESAMPLES, LEVEL = 100, 0.95


def half_widths(
    metrics: Callable[[Tensor], dict[str, float]],
    sample: Tensor,
    *,
    seed: int,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> dict[str, float]:
    """How far metrics(sample) reach to both sides, by name, at `level`: intervals for their means over all samples of
    this size, the reference held fixed.

    Sample (N, ...), of which `metrics` must use every row. The half-width is the normal quantile times the standard
    deviation over random halves of the sample: halves drawn without replacement vary as whole samples do, as their
    variance is (2/N - 1/N) of one row's. Rows drawn with replacement would be nearer to each other than fresh ones,
    which raises distances and breaks precision and recall. The bias that a metric has at N is left in, as it is in
    published values. Coverage measured at level 95% on 400 Gaussians in 4 dimensions (250 to 500 repetitions): FID 96%,
    MIND 94%, precision 94%, recall 98%. Where the two distributions are equal it is too wide: FID 98%, MIND 100%.
    """
    if len(sample) < 2:
        raise ValueError(f"{len(sample)} row in the sample: an interval needs at least 2")
    if resamples < 2:
        raise ValueError(f"resamples {resamples} must be at least 2; 100 give the width to 7%")
    if not 0 < level < 1:
        raise ValueError(f"level {level} must be between 0 and 1, as 0.95")
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in tqdm(range(resamples), desc="intervals", unit="half", disable=not distributed.is_main(), mininterval=1):
        half = torch.randperm(len(sample), generator=generator)[: len(sample) // 2]
        found.append(metrics(sample[half.to(sample.device)]))
    quantile = NormalDist().inv_cdf((1 + level) / 2)
    return {name: quantile * stdev(values[name] for values in found) for name in found[0]}


def extrapolate(counts: Sequence[int], values: Sequence[float]) -> float:
    """The value at infinitely many samples of a metric that is `values` at `counts`: where a line over 1 / count ends.

    As FID-infinity of Chong & Forsyth, arXiv:1911.07023, of random subsets. The bias of MIND is only roughly 1 / count.
    """
    if len(counts) != len(values):
        raise ValueError(f"{len(counts)} counts but {len(values)} values: there must be one of each")
    if len(set(counts)) < 2 or min(counts) < 1:
        raise ValueError(f"counts {list(counts)}: a line needs at least 2 different ones, all at least 1")
    return np.polyfit(1 / np.array(counts), values, deg=1)[1].item()
