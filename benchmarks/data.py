"""Images per CPU second of one core: the straightforward chain, the exact one and the fast one; and the index.

    python benchmarks/data.py [--images 64] [--rounds 7]

The straightforward chain is kept here: Pillow decode, resizes of the whole image, crop, float32, collate. Images
are generated, 500 x 375, of ImageNet's usual 110 KB. Results go to benchmarks/results/data.json.
"""

import argparse
import io
import json
import math
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from dataset import CropKey, ImageDataset, build_dataset  # noqa: E402
from dataset.tar_index import build_index, load_index  # noqa: E402
from tests.helpers.dataset_tars import class_tars  # noqa: E402
from utils.provenance import provenance  # noqa: E402

SIZE, WIDTH, HEIGHT = 256, 500, 375


def photograph(seed: int) -> bytes:
    """A JPEG with a photograph's statistics: 1/f noise, some flat shapes with sharp edges, sensor noise."""
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(HEIGHT)[:, None], np.fft.fftfreq(WIDTH)[None]
    frequency = np.maximum(np.hypot(fx, fy), 1 / WIDTH)[..., None]
    mix = np.eye(3) * 0.4 + 0.6  # channels are alike
    spectrum = np.fft.fft2(rng.standard_normal((HEIGHT, WIDTH, 3)) @ mix, axes=(0, 1)) / frequency
    pixels = np.fft.ifft2(spectrum, axes=(0, 1)).real
    pixels = 128 + 50 * (pixels - pixels.mean()) / pixels.std()
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    for _ in range(6):
        cy, cx, radius = rng.uniform(0, HEIGHT), rng.uniform(0, WIDTH), rng.uniform(15, 80)
        inside = np.hypot(y - cy, x - cx) < radius
        pixels[inside] = 0.5 * pixels[inside] + 0.5 * rng.uniform(0, 255, 3)
    pixels += 6 * rng.standard_normal((HEIGHT, WIDTH, 1))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
    return file.getvalue()


def straightforward(data: bytes) -> torch.Tensor:
    """What training scripts of this field do per image: float32 (3, S, S) in [-1, 1]."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    short_side = random.randint(SIZE, math.ceil(SIZE / 0.8))
    while min(image.size) >= 2 * short_side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = short_side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    pixels = np.array(image)
    top, left = random.randrange(pixels.shape[0] - SIZE + 1), random.randrange(pixels.shape[1] - SIZE + 1)
    pixels = pixels[top : top + SIZE, left : left + SIZE]
    if random.random() < 0.5:
        pixels = pixels[:, ::-1]
    tensor = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float() / 255
    return (tensor - 0.5) / 0.5


def seconds_of_round(dataset: ImageDataset, chain: str, epoch: int, batch_size: int) -> float:
    """CPU seconds (one thread): what a core gives, whoever else uses the machine."""
    start = time.process_time()
    for first in range(0, len(dataset), batch_size):
        indices = range(first, min(first + batch_size, len(dataset)))
        if chain == "straightforward":
            default_collate([(straightforward(dataset.source.read(i)), dataset.label(i)) for i in indices])
        else:
            dataset.fast = chain == "fast"
            default_collate([dataset[CropKey(epoch, i, 1.0)] for i in indices])
    return time.process_time() - start


def differences(dataset: ImageDataset) -> dict[str, float]:
    """Largest difference in grey levels, and share of values that differ, between the fast and the exact crops."""
    largest = differing = 0
    for index in range(len(dataset)):
        dataset.fast = True
        fast = dataset[CropKey(0, index, 1.0)].image.int()
        dataset.fast = False
        gap = (fast - dataset[CropKey(0, index, 1.0)].image).abs()
        largest, differing = max(largest, int(gap.max())), differing + int((gap > 0).sum())
    return {"max_grey_levels": largest, "share_of_values": differing / len(dataset) / gap.numel()}


def index_costs(folder: Path, classes: int = 100, images: int = 1300) -> dict[str, float]:
    """CPU microseconds per image to build the index of many small members (headers cached), seconds to load it."""
    path = folder / "many.tar"
    class_tars(path, {f"n{k:08d}": {f"{i}.JPEG": bytes(700) for i in range(images)} for k in range(classes)})
    build = []
    for _ in range(3):
        start = time.process_time()
        build_index(path)
        build.append(time.process_time() - start)
    load_index(path)
    start = time.perf_counter()
    index = load_index(path)
    load = time.perf_counter() - start
    size = path.with_name("many.tar.index.npz").stat().st_size
    scale = 1_281_167 / len(index.offsets)
    return {
        "images": len(index.offsets),
        "build_us_per_image": min(build) / len(index.offsets) * 1e6,
        "load_seconds_for_1.28M": load * scale,
        "file_mb_for_1.28M": size * scale / 1e6,
        "memory_mb_for_1.28M": (index.offsets.nbytes + index.sizes.nbytes) * scale / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64, help="generated 500x375 JPEGs (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="the chains take turns this often (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="images per collated batch (default: %(default)s)")
    parser.add_argument("--out", default=str(ROOT / "benchmarks/results/data.json"), help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chains = ("straightforward", "exact", "fast")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = [photograph(seed) for seed in range(args.images)]
        class_tars(folder / "train.tar", {"n00000000": {f"{i}.JPEG": file for i, file in enumerate(images)}})
        dataset = build_dataset(folder / "train.tar", SIZE, num_classes=1, seed=0)
        for chain in chains:
            seconds_of_round(dataset, chain, 0, args.batch_size)
        rounds = {chain: [] for chain in chains}
        for epoch in range(args.rounds):
            for chain in chains:
                rounds[chain].append(seconds_of_round(dataset, chain, epoch, args.batch_size) / args.images)
        gaps = differences(dataset)
        index = index_costs(folder)
    median = {chain: float(np.median(rounds[chain])) for chain in chains}
    ratios = {chain: [a / b for a, b in zip(rounds["straightforward"], rounds[chain])] for chain in ("exact", "fast")}
    result = {
        **provenance(torch.device("cpu")),
        "date": time.strftime("%Y-%m-%d"),
        "images": args.images,
        "kilobytes_per_image": sum(map(len, images)) / len(images) / 1000,
        "images_per_second_per_core": {chain: 1 / median[chain] for chain in chains},
        "milliseconds_per_image": {chain: 1000 * median[chain] for chain in chains},
        "speedup": {chain: float(np.median(values)) for chain, values in ratios.items()},
        "speedup_range": {chain: [min(values), max(values)] for chain, values in ratios.items()},
        "fast_versus_exact": gaps,
        "index": index,
    }
    text = json.dumps(result, indent=2)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
