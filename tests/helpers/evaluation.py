"""What the tests of the evaluator share: small files, an instant network, and the protocol's formulas as published."""

import types
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F

import evaluator
from utils.evaluation import inception_weights
from utils.files import read_json


def random_images(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """Smooth random images, uint8 (count, size, size, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 3, 6, 6)).astype(np.float32)
    fine = F.interpolate(torch.from_numpy(coarse), size=size, mode="bicubic").clamp(0, 255).byte()
    return fine.permute(0, 2, 3, 1).contiguous()


def write_files(folder: Path) -> Path:
    """reference.npz: 16 images, deflated; samples.npz: 12 of another size, stored, with sorted labels. The folder."""
    np.savez_compressed(folder / "reference.npz", random_images(16, 32).numpy())
    np.savez(folder / "samples.npz", random_images(12, 48, seed=1).numpy(), np.arange(12) // 4)
    return folder


def run(*arguments: object) -> int:
    return evaluator.main([str(argument) for argument in arguments])


def evaluation(samples: Path) -> dict:
    """What evaluator.py recorded beside the samples."""
    return read_json(samples.with_suffix(".json"), "")["evaluation"]


class Instant:
    """A network in no time: pool and spatial features are random projections of the mean colours of a 4 x 4 grid."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.pool = torch.randn(48, 2048, generator=generator) / 48
        self.spatial = torch.randn(48, 2023, generator=generator) / 48
        self.batches = []

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.batches.append(len(images))
        cells = images.float().unflatten(1, (4, -1)).unflatten(3, (4, -1)).mean(dim=(2, 4)).flatten(1)
        return (cells @ self.pool).relu(), (cells @ self.spatial).relu()

    def to(self, _device: torch.device) -> "Instant":
        return self

    def pack(self, _batch_size: int) -> "Instant":
        return self

    @property
    def images(self) -> int:
        """How many it has seen."""
        return sum(self.batches)


def use_instant(monkeypatch, network: Instant, sha256: str = "0") -> None:
    """evaluator.py takes this network, from weights without a classifier."""
    path = Path("-")
    weights = types.SimpleNamespace(network=lambda: network, classifier=None, kind="-", path=path, sha256=sha256)
    monkeypatch.setattr(inception_weights, "find_weights", lambda file: path)
    monkeypatch.setattr(inception_weights, "read_weights", lambda path: weights)


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """A copy of `data` with a few bytes changed, taken out, put in or cut off, mostly near the two ends."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        near = rng.integers(0, min(len(data), 1500)) if rng.random() < 0.7 else rng.integers(0, len(data))
        place = int(near if rng.random() < 0.6 else len(data) - 1 - near)
        kind = rng.integers(0, 4)
        if kind == 0:
            data[place] = rng.integers(0, 256)
        elif kind == 1:
            del data[place : place + int(rng.integers(1, 20))]
        elif kind == 2:
            data[place:place] = rng.bytes(int(rng.integers(1, 20)))
        else:
            data[place] ^= 1 << int(rng.integers(0, 8))
        if rng.random() < 0.05:
            del data[place:]
        if not data:
            break
    return bytes(data)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# ---- features, and the formulas of the published evaluator ---------------------------------------------------------


def features(count: int, dim: int, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    """Rectified correlated Gaussians, float32 (count, dim), of the size of Inception's pool features."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(dim, dim)) / np.sqrt(dim) * np.exp(-np.arange(dim) / dim * 3)
    return np.maximum(rng.normal(size=(count, dim)) @ mixing.T + 0.3 + shift, 0).astype(np.float32)


def statistics(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.astype(np.float64).mean(axis=0), np.cov(x.astype(np.float64), rowvar=False)


def published_frechet(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    return np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root).real


def published_score(logits: torch.Tensor, block: int) -> float:
    p = torch.softmax(logits.double(), dim=1).numpy()
    parts = [p[start : start + block] for start in range(0, len(p), block)]
    return np.mean([np.exp((q * (np.log(q) - np.log(q.mean(axis=0)))).sum(axis=1).mean()) for q in parts])


def brute_force(reference: np.ndarray, samples: np.ndarray) -> tuple[float, float]:
    """Precision and recall by definition, in float64."""
    x, y = reference.astype(np.float64), samples.astype(np.float64)

    def distances(a, b):
        return np.square(a[:, None] - b[None]).sum(axis=2)

    balls_x, balls_y = np.sort(distances(x, x), axis=1)[:, 3], np.sort(distances(y, y), axis=1)[:, 3]
    between = distances(x, y)
    return (between <= balls_x[:, None]).any(axis=0).mean(), (between <= balls_y).any(axis=1).mean()
