"""Fréchet distance and Inception Score on arrays of Inception features.

Legend: N images, D feature channels (2048 pool, 2023 spatial). Statistics are float64.
Sources: Heusel et al., arXiv:1706.08500 (FID); Nash et al., arXiv:2103.03841 (sFID); Salimans et al.,
arXiv:1606.03498 (Inception Score); in the protocol of Dhariwal & Nichol, arXiv:2105.05233.
"""

from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

ROUNDING = 1e-12  # equal files were within 2e-15
INCEPTION_SCORE_BLOCK = 5000  # the protocol's: the score is the mean over consecutive blocks


@dataclass
class Moments:
    """Running count, sum (D,) and sum of outer products (D, D), float64: all that mean and covariance need."""

    count: int
    total: Tensor
    outer: Tensor

    @classmethod
    def zeros(cls, dim: int, device: torch.device | str = "cpu") -> "Moments":
        """Of no features of D channels."""
        options = {"dtype": torch.float64, "device": device}
        return cls(0, torch.zeros(dim, **options), torch.zeros(dim, dim, **options))

    def add(self, features: Tensor) -> None:
        """Take in features (n, D). Equal calls in equal order give equal bits."""
        features = features.double()
        self.count += len(features)
        self.total += features.sum(dim=0)
        self.outer.addmm_(features.T, features)

    def mean_and_covariance(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (D,) and covariance (D, D) with N - 1, as np.cov. Raises ValueError for fewer than 2 features."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        mean = self.total / self.count
        covariance = torch.addr(self.outer, mean, mean, alpha=-self.count).div_(self.count - 1)
        return mean.cpu().numpy(), covariance.cpu().numpy()


def frechet_distance(mean1: np.ndarray, covariance1: np.ndarray, mean2: np.ndarray, covariance2: np.ndarray) -> float:
    """|mean1 - mean2|^2 + tr covariance1 + tr covariance2 - 2 tr (covariance1 covariance2)^(1/2); Heusel et al., eq. 6.

    Means (D,), covariances (D, D), float64. The last trace, which the published evaluator takes from
    scipy.linalg.sqrtm, is the sum of the roots of the eigenvalues of a symmetric matrix. Where both covariances have
    full rank (N > D) it equals sqrtm's to 1e-11; elsewhere it is the exact value, which sqrtm misses by 1e-6 of it.
    A distance is never negative: what rounding leaves of equal files, up to ROUNDING of the terms' sum below 0, is 0.
    """
    mean1, covariance1, mean2, covariance2 = map(aligned, (mean1, covariance1, mean2, covariance2))
    difference = mean1 - mean2
    root = trace_of_root(covariance1, covariance2)
    terms = (difference @ difference + covariance1.trace() + covariance2.trace()).item()
    distance = terms - 2 * root.item()
    return 0.0 if -ROUNDING * terms < distance < 0 else distance


def aligned(values: np.ndarray) -> Tensor:
    """As a float64 tensor whose memory is aligned as torch's own: equal values then give equal bits."""
    values = torch.as_tensor(values, dtype=torch.float64)
    return values if values.data_ptr() % 64 == 0 else values.clone()


def trace_of_root(covariance1: Tensor, covariance2: Tensor) -> Tensor:
    """tr (covariance1 covariance2)^(1/2) of two covariances (D, D), float64.

    With covariance1 = F F^T the product has the eigenvalues of the symmetric F^T covariance2 F.
    """
    factor, failed = torch.linalg.cholesky_ex(covariance1)
    if failed:  # not of full rank
        factor = pivoted_cholesky(covariance1)
    return torch.linalg.eigvalsh(factor.T @ covariance2 @ factor).clamp(min=0).sqrt().sum()


def pivoted_cholesky(covariance: Tensor) -> Tensor:
    """F (D, rank) with F F^T = covariance (D, D), whatever its rank."""
    lower, pivots, rank, _ = scipy.linalg.lapack.dpstrf(covariance.numpy(), lower=1)
    factor = np.empty((len(lower), rank))
    factor[pivots - 1] = np.tril(lower)[:, :rank]
    return torch.tensor(factor)


@dataclass
class InceptionScore:
    """Mean over consecutive blocks of exp(mean KL(p(class | image) | p(class in the block))); Salimans et al.

    Keeps of the current block its count, sum of p (classes,) and sum of p log p, of those before it their scores. On
    a file sorted by class the score is far smaller. A short last block counts as one.
    """

    block: int = INCEPTION_SCORE_BLOCK
    count: int = 0
    total: Tensor | float = 0.0
    negative_entropy: Tensor | float = 0.0
    scores: tuple[float, ...] = ()

    def add(self, logits: Tensor) -> None:
        """Take in logits (n, classes), in the order of the file."""
        while len(logits):
            rows, logits = logits.tensor_split([min(500, self.block - self.count)])
            log_p = torch.log_softmax(rows.double(), dim=1)  # a float32 softmax underflows at gaps of 103
            p = log_p.exp()
            self.count += len(rows)
            self.total, self.negative_entropy = self.total + p.sum(dim=0), self.negative_entropy + (p * log_p).sum()
            if self.count == self.block:
                self.scores += (self._of_block(),)
                self.count, self.total, self.negative_entropy = 0, 0.0, 0.0

    def _of_block(self) -> float:
        mean = self.total / self.count
        return (self.negative_entropy / self.count - torch.xlogy(mean, mean).sum()).exp().item()

    def value(self) -> float:
        """The score of everything taken in, at least one row."""
        scores = (*self.scores, self._of_block()) if self.count else self.scores
        return sum(scores) / len(scores)
