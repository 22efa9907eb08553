"""Improved precision and recall on Inception features, with the float16 distances of the published evaluator.

Legend: N features, D channels. Source: Kynkäänniemi et al., arXiv:1904.06991; the third neighbour, squared Euclidean
distances and float16 as in the protocol of Dhariwal & Nichol, arXiv:2105.05233.

The published evaluator computes distances in float16 on whatever device it runs, block by block, and a block with a
value that is not finite again in float32. Rounding to float16 moves the result by 1e-3 to 5e-3.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from utils import distributed

NEIGHBOUR = 3  # number 0 is the feature itself
BLOCK = 10_000  # rows and columns of one distance matrix of the published evaluator
STRIP, TILE = 1_000, 2_000  # rows and columns computed at once; strips of rows are what processes share out


def precision_recall(
    reference: Tensor, samples: Tensor, *, half: bool = True, reference_radii: Tensor | None = None
) -> tuple[float, float]:
    """Precision: the share of samples inside any reference ball. Recall: of references inside any sample ball.

    Features (N, D) float32, or already rounded to float16, the same on every process; a ball reaches to the third
    neighbour of its own set, border included. `half` rounds distances as the published evaluator does. Equal on any
    number of processes. reference_radii: radii(reference, half), where they are known already. Raises ValueError for
    fewer than 4 features.
    """
    for name, features in (("reference", reference), ("sample", samples)):
        if len(features) <= NEIGHBOUR:
            raise ValueError(f"precision and recall need at least {NEIGHBOUR + 1} {name} images, got {len(features)}")
    if reference_radii is None:
        reference_radii = radii(reference, half)
    sample_radii = radii(samples, half)
    reference_inside = torch.zeros(len(reference), device=reference.device)
    samples_inside = torch.zeros(len(samples), device=samples.device)
    for rows, columns, distances in distance_tiles(reference, samples, half):
        reference_inside[rows] += (distances <= sample_radii[columns]).any(dim=1)
        samples_inside[columns] += (distances <= reference_radii[rows, None]).any(dim=0)
    precision = (distributed.reduce_sum(samples_inside) > 0).double().mean()
    recall = (distributed.reduce_sum(reference_inside) > 0).double().mean()
    return precision.item(), recall.item()


def radii(features: Tensor, half: bool) -> Tensor:
    """Squared distance (N,) of every feature to its third neighbour."""
    nearest = torch.full((len(features), NEIGHBOUR + 1), torch.inf, device=features.device)
    mine = torch.zeros(len(features), device=features.device)
    for rows, _, distances in distance_tiles(features, features, half):
        candidates = torch.cat([nearest[rows], distances], dim=1)
        nearest[rows] = candidates.topk(NEIGHBOUR + 1, largest=False).values
        mine[rows] = 1
    return distributed.reduce_sum(torch.where(mine > 0, nearest.amax(dim=1), 0))


def distance_tiles(u: Tensor, v: Tensor, half: bool) -> Iterator[tuple[slice, slice, Tensor]]:
    """This process's share of the squared distances between u (N, D) and v (M, D), as (rows, columns, tile)."""
    for block_u in pieces(slice(0, len(u)), BLOCK):
        for block_v in pieces(slice(0, len(v)), BLOCK):
            in_half = half and all_finite(u[block_u], v[block_v])
            for rows in pieces(block_u, STRIP):
                if rows.start // STRIP % distributed.world_size() == distributed.rank():
                    for columns in pieces(block_v, TILE):
                        yield rows, columns, squared_distances(u[rows], v[columns], in_half)


def pieces(whole: slice, length: int) -> list[slice]:
    """`whole` cut into slices of `length`, the last one shorter."""
    return [slice(start, min(start + length, whole.stop)) for start in range(whole.start, whole.stop, length)]


def all_finite(u: Tensor, v: Tensor) -> bool:
    """Whether float16 holds all distances between u and v."""
    norm_u, norm_v = (torch.linalg.vector_norm(x, dim=1).max().float() for x in (u, v))
    if (norm_u + norm_v).square() < 60_000:  # far below the largest float16: no need to look
        return True
    return all(
        squared_distances(u[rows], v[columns], True).isfinite().all()
        for rows in pieces(slice(0, len(u)), STRIP)
        for columns in pieces(slice(0, len(v)), TILE)
    )


def squared_distances(u: Tensor, v: Tensor, half: bool) -> Tensor:
    """|u|^2 - 2 uv + |v|^2, at least 0, between u (n, D) and v (m, D), as float32.

    With `half` every operand and result is rounded to float16 as TensorFlow on a CPU does: products are summed in
    float32, norms in float16.
    """
    if half:
        u, v = u.half(), v.half()
        products = (u.float() @ v.float().T).half()
        norm_u, norm_v = squared_norms_in_half(u), squared_norms_in_half(v)
    else:
        u, v = u.float(), v.float()
        products, norm_u, norm_v = u @ v.T, u.square().sum(dim=1), v.square().sum(dim=1)
    return (norm_u[:, None] - products.mul_(2)).add_(norm_v).clamp_(min=0).float()


def squared_norms_in_half(x: Tensor) -> Tensor:
    """|x|^2 of x (n, D), float16, for D = 2048 bit for bit TensorFlow's on a CPU (of any x86-64 kind).

    The squares are cut into two halves; of each, 32 float16 sums run side by side, are added up in float16 to 8, and
    these in float32.
    """
    squares = torch.nn.functional.pad(x, (0, -x.shape[1] % 64)).square().unflatten(1, (2, -1, 4, 8))
    sums = squares[:, :, 0].clone()
    for some in squares.unbind(dim=2)[1:]:
        sums += some
    lanes = (sums[:, :, 0] + sums[:, :, 1] + sums[:, :, 2] + sums[:, :, 3]).float()  # (n, 2, 8)
    while lanes.shape[2] > 1:
        left, right = lanes.chunk(2, dim=2)
        lanes = left + right
    first, second = lanes.squeeze(2).half().unbind(dim=1)
    return first + second
