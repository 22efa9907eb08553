"""How large flat latents are: one shift and one scale bring them to the AR model, whatever their heterogeneity.

Letters: B images · P tokens · C latent channels.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from utils.distributed import reduce_sum


class LatentScale(NamedTuple):
    """Mean and standard deviation of all latents; of single dimensions (C,) and tokens (P,) the standard deviations."""

    shift: float
    scale: float
    by_dimension: Tensor
    by_token: Tensor

    def __str__(self) -> str:
        spread = [
            f"of single {name} {values.min():.3g} to {values.max():.3g}"
            for name, values in (("dimensions", self.by_dimension), ("tokens", self.by_token))
        ]
        return f"latents: mean {self.shift:.4g}, standard deviation {self.scale:.4g}, {', '.join(spread)}"


def measure_scale(latents: Iterable[Tensor]) -> LatentScale:
    """Of latents (B, P, C) that the processes hold between them, at least one batch each."""
    moments = 0.0
    for batch in latents:
        batch = batch.double()
        moments = moments + torch.stack([torch.ones_like(batch), batch, batch.square()]).sum(1)
    moments = reduce_sum(moments)  # (3, P, C): counts, sums, sums of squares

    def mean_and_deviation(over: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        count, total, squares = moments.sum(over)
        mean = total / count
        return mean, (squares / count - mean.square()).sqrt()

    shift, scale = mean_and_deviation((1, 2))
    (_, by_dimension), (_, by_token) = mean_and_deviation((1,)), mean_and_deviation((2,))
    return LatentScale(shift.item(), scale.item(), by_dimension, by_token)
