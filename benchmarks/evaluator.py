"""Speed and memory of evaluator.py: features against TensorFlow, linear algebra against sqrtm, and the peak at 50,000.

    python -m benchmarks.evaluator            (about five minutes on 2 cores)

Writes benchmarks/results/evaluator.json. Each measurement runs in a process of its own, TensorFlow and torch in
turns, on one graph of the original's form with random weights.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import scipy.linalg
import torch

import evaluator
from tests.helpers.graph_def import inception_graph
from utils.evaluation import inception_weights
from utils.evaluation.features import Extractor
from utils.evaluation.frechet import frechet_distance
from utils.evaluation.inception import Inception
from utils.evaluation.npz_reader import NpzReader
from utils.files import write_json
from utils.provenance import provenance

RESULT = Path(__file__).parent / "results" / "evaluator.json"


def measure_features(backend: str, graph: Path, images: int, size: int) -> dict:
    """Images/s and images per second of CPU time, which other processes disturb less, by batch size; peak in MB."""
    from utils.evaluation.inception_tensorflow import TensorFlowInception
    from utils.evaluation.inception_weights import read_weights

    device = torch.device("cuda" if torch.cuda.is_available() and backend == "torch" else "cpu")
    network = TensorFlowInception(graph) if backend == "tensorflow" else read_weights(graph).network().to(device)
    if backend == "torch" and device.type == "cpu":
        network.pack(2)
    data = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (64, size, size, 3), dtype=np.uint8))
    workers = torch.get_num_threads() if backend == "torch" and device.type == "cpu" else 1
    speeds, per_cpu_second = {}, {}
    for batch in (2, 8, 32) if device.type == "cpu" else (32, 64):
        with Extractor(network, batch, device, workers) as extractor:
            extractor(data)
            started, cpu, done = time.perf_counter(), time.process_time(), 0
            while done < images:
                extractor(data).cpu()
                done += len(data)
            speeds[batch] = done / (time.perf_counter() - started)
            per_cpu_second[batch] = done / (time.process_time() - cpu)
    result = {"images_per_second": speeds, "images_per_cpu_second": per_cpu_second}
    return {**result, "peak_mb": peak_mb(), "device": str(device)}


def measure_linear_algebra(count: int = 3000, dim: int = 2048) -> dict:
    """Seconds of one Fréchet distance, of full rank and not, against scipy.linalg.sqrtm on the same covariances."""
    rng, result = np.random.default_rng(0), {}
    mixing = np.linalg.qr(rng.normal(size=(dim, dim)))[0] * np.exp(-np.arange(dim) / dim * 5)
    for name, images in (("full rank", count), ("1000 images", 1000)):
        x, y = (np.maximum(rng.normal(size=(images, dim)) @ mixing.T + 0.3 + 0.02 * i, 0) for i in range(2))
        means, covariances = (x.mean(axis=0), y.mean(axis=0)), (np.cov(x, rowvar=False), np.cov(y, rowvar=False))
        started = time.perf_counter()
        ours = frechet_distance(means[0], covariances[0], means[1], covariances[1])
        seconds = time.perf_counter() - started
        started = time.perf_counter()
        root = np.trace(scipy.linalg.sqrtm(covariances[0] @ covariances[1])).real
        theirs = np.square(means[0] - means[1]).sum() + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * root
        sqrtm = time.perf_counter() - started
        result[name] = {"seconds": seconds, "sqrtm_seconds": sqrtm, "relative_difference": abs(ours / theirs - 1)}
    return result


class Mostly(Inception):
    """The real network, with all it allocates, on 64 of 10,000 images; on the others a projection, to save hours."""

    def pack(self, batch_size: int) -> "Mostly":
        self.weight, self.calls = torch.randn(192, 2048 + 2023, generator=torch.Generator().manual_seed(0)) / 3840, 0
        return super().pack(batch_size)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += len(images)
        if self.calls % 10_000 <= 64:
            pool, spatial = super().forward(images)
            return pool * (20 / pool.norm(dim=1, keepdim=True)), spatial  # as large as genuine ones
        cells = images[:, ::32, ::32].float().flatten(1) @ self.weight
        return cells[:, :2048].relu(), cells[:, 2048:].relu()


def measure_peak(folder: Path, pr_dtype: str, samples: int = 50_000, references: int = 10_000, size: int = 256) -> dict:
    """Peak memory of the whole command, on files of zeros with sparse storage; seconds without most of the network."""
    for name, count in (("reference", references), ("samples", samples)):
        write_sparse(folder / f"{name}.npz", count, size)
    inception_weights.Inception = Mostly
    read, rng = NpzReader.read, np.random.default_rng(0)

    def noise(reader: NpzReader, start: int, stop: int) -> np.ndarray:
        images = read(reader, start, stop).copy()
        images[:, ::32, ::32] = rng.integers(0, 256, images[:, ::32, ::32].shape)
        return images

    NpzReader.read = noise
    started = time.perf_counter()
    files = [str(folder / name) for name in ("reference.npz", "samples.npz")]
    status = evaluator.main([*files, "--inception", str(folder / "graph.pb"), "--pr-dtype", pr_dtype])
    seconds = json.loads((folder / "samples.json").read_text())["evaluation"]["seconds"]
    return {"status": status, "samples": samples, "references": references, "peak_mb": peak_mb(),
            "total_seconds": time.perf_counter() - started, "seconds": seconds}  # fmt: skip


def write_sparse(path: Path, count: int, size: int) -> None:
    """A stored .npz of `count` black images that takes no room on the disk."""
    import struct
    import zlib

    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({count}, {size}, {size}, 3), }}".encode()
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + header.ljust(117) + b"\n"
    length, name = len(header) + count * size * size * 3, b"arr_0.npy"
    extra = struct.pack("<HHQQ", 1, 16, length, length)
    crc = zlib.crc32(header)
    for _ in range(count):
        crc = zlib.crc32(bytes(size * size * 3), crc)
    local = struct.pack("<4s5H3I2H", b"PK\3\4", 45, 0, 0, 0, 33, crc, 2**32 - 1, 2**32 - 1, 9, 20) + name + extra
    directory = struct.pack(
        "<4s6H3I5H2I", b"PK\1\2", 45, 45, 0, 0, 0, 33, crc, 2**32 - 1, 2**32 - 1, 9, 20, 0, 0, 0, 0, 0
    )
    directory += name + extra
    with open(path, "wb") as file:
        file.write(local + header)
        file.seek(len(local) + length)
        start = file.tell()
        file.write(directory)
        file.write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, len(directory), start))
        file.write(struct.pack("<4sIQI", b"PK\6\7", 0, start + len(directory), 1))
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(directory), 2**32 - 1, 0))


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def machine() -> dict:
    """Where and with what this was measured."""
    return {**provenance(torch.device("cuda" if torch.cuda.is_available() else "cpu")), "load": os.getloadavg()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64, help="timed images per backend, batch size and turn")
    parser.add_argument("--turns", type=int, default=2, help="turns of torch and TensorFlow")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # one measurement, in a process of its own
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        if args.part in ("torch", "tensorflow"):
            result = measure_features(args.part, args.folder / "graph.pb", args.images, 256)
        elif args.part == "linear algebra":
            result = measure_linear_algebra()
        else:
            result = measure_peak(args.folder, args.part)
        (args.folder / "result.json").write_text(json.dumps(result))
        return

    def part(name: str) -> dict:
        command = [sys.executable, "-m", "benchmarks.evaluator", "--part", name, "--folder", folder]
        subprocess.run([*command, "--images", str(args.images)], check=True, stderr=subprocess.DEVNULL)
        found = json.loads((Path(folder) / "result.json").read_text())
        print(name, json.dumps(found), flush=True)
        return found

    result = {"machine at start": machine(), "features, 256 px": {"torch": [], "tensorflow": []}}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "graph.pb").write_bytes(inception_graph())
        for _ in range(args.turns):
            for backend, runs in result["features, 256 px"].items():
                runs.append(part(backend))
        for measure in ("images_per_second", "images_per_cpu_second"):
            best = {
                backend: max(max(run[measure].values()) for run in runs)
                for backend, runs in result["features, 256 px"].items()
            }
            result[f"torch / tensorflow, best of each, {measure}"] = best["torch"] / best["tensorflow"]
        result["linear algebra, 2048 dimensions"] = part("linear algebra")
        whole = {pr_dtype: part(pr_dtype) for pr_dtype in ("float16", "float32")}
        result["whole command, 50,000 against 10,000 at 256 px, by --pr-dtype"] = whole
    result["machine at end"] = machine()
    write_json(RESULT, result)


if __name__ == "__main__":
    main()
