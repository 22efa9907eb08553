"""Monge Inception Distance: a sliced Wasserstein distance between two sets of Inception features.

Legend: N features, D channels (2048 pool). Source: Berthet et al., arXiv:2605.06797. The random draws are those of
torch-fidelity (metric_mind.py, commit a51aa64), so that the same features and seed give its number.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

DIRECTIONS_AT_ONCE, ROWS_AT_ONCE = 100, 1_000  # 20 MB of projections of 50,000 features


def mind(features: Tensor, reference: Tensor, *, seed: int, num_projections: int = 1000) -> float:
    """3 D times the mean over random directions of the squared Wasserstein distance of projections; Berthet et al.

    Features (N, D) of any float dtype and device; of the larger set a random subset as large as the other counts. The
    distance has an upward bias that shrinks with N: compare only values of equal N and seed. Where the means differ,
    another seed, that is other directions, moves it by about (2 / num_projections)^(1/2) of itself: 4% at 1000.
    """
    for name, x in (("features", features), ("reference", reference)):
        if x.ndim != 2 or not len(x):
            raise ValueError(f"{name} of shape {tuple(x.shape)}: must be (N, D) with N at least 1")
    (n, dim), (m, reference_dim) = features.shape, reference.shape
    if dim != reference_dim:
        raise ValueError(f"features have {dim} channels, reference {reference_dim}: take both from the same layer")
    if num_projections < 1:
        raise ValueError(f"num_projections {num_projections} must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    if n > m:
        features = features[torch.randperm(n, generator=generator)[:m]]
    if m > n:
        reference = reference[torch.randperm(m, generator=generator)[:n]]
    directions = normalize(torch.randn(num_projections, dim, generator=generator, dtype=torch.float32))
    total = 0.0
    for some in directions.split(DIRECTIONS_AT_ONCE):
        difference = sorted_projections(features, some) - sorted_projections(reference, some).to(features.device)
        total += difference.double().square().mean(dim=1).sum().item()
    value = 3 * dim * total / num_projections
    if not value < float("inf"):
        raise ValueError(f"MIND is {value}: the features or the reference hold values that are not finite")
    return value


def sorted_projections(features: Tensor, directions: Tensor) -> Tensor:
    """Of features (N, D) on each of the directions (M, D): (M, N) float32, each row ascending."""
    directions = directions.to(features.device)
    return torch.cat([directions @ rows.float().T for rows in features.split(ROWS_AT_ONCE)], dim=1).sort(dim=1).values
