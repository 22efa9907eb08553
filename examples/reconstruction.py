"""How well an S-VAE gives images back, and how much its decoder forgives: rFID, PSNR, SSIM, LPIPS.

    python -m examples.reconstruction VAE.pt DATA --out reconstruction.json

DATA: a tar or folder of classes as for training (exact centre crops), an .npz, or a folder of PNGs. Then the same after
noise on the tokens, as a generator's mistakes would be: every token turned by an angle in a random direction along its
sphere; where tokens are not kept on one, Gaussian noise of the same energy. Reconstruction alone certifies nothing:
decoders of better rFID have given a worse gFID.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import models
from dataset.imagenet import ImageDataset, open_source
from models import SVAE, SphereAR
from models.lpips import LPIPS, vgg_weights
from utils import checkpoint_file, distributed, script
from utils.evaluation.batches import Batches
from utils.evaluation.extraction import NETWORK_BATCH, Extraction, Settings
from utils.evaluation.features import exact_arithmetic
from utils.evaluation.inputs import open_images
from utils.evaluation.metrics import Reference, as_reference, distances
from utils.evaluation.reconstruction import psnr, ssim
from utils.files import write_json
from utils.images import to_float, to_uint8
from utils.provenance import provenance

BATCH_SIZE = 32  # images of the S-VAE


def turned(tokens: Tensor, angle: float, noise: Tensor) -> Tensor:
    """Tokens (B, P, C), each turned by `angle` (radians) towards `noise` (B, P, C): their norms stay."""
    norms = tokens.norm(dim=-1, keepdim=True)
    along = tokens / norms
    across = torch.nn.functional.normalize(noise - (noise * along).sum(-1, keepdim=True) * along, dim=-1)
    return norms * (math.cos(angle) * along + math.sin(angle) * across)


def disturbed(vae: SVAE, tokens: Tensor, angle: float, noise: Tensor) -> Tensor:
    """Tokens (B, P, C) with a mistake of ‖token‖² · 2(1 − cos angle), the square of a turn's chord.

    Flat tokens have a mean square of 1 per dimension once their scale is measured.
    """
    if not vae.config.is_flat:
        return turned(tokens, angle, noise)
    size = 1.0 if vae.config.latent_scale is not None else tokens.square().mean().sqrt()
    return tokens + math.sqrt(2 * (1 - math.cos(angle))) * size * noise


def open_data(path: str, image_size: int, count: int) -> list[Callable[[], np.ndarray]]:
    """At most `count` images, spread evenly, each read when it is called for: uint8 (S, S, 3). ValueError: no fit."""
    if Path(path).suffix == ".npz" or (Path(path).is_dir() and any(Path(path).glob("*.png"))):
        images = open_images(path)
        total, read = images.count, lambda i: images.read(i, i + 1)[0]
        if {images.height, images.width} != {image_size}:
            raise ValueError(f"{path}: images are {images.height} x {images.width}, the S-VAE's {image_size} wide")
    else:
        data = ImageDataset(open_source(path), image_size, seed=0)
        total, read = len(data), lambda i: data[i].image.permute(1, 2, 0).numpy()
    if total < 2:
        raise ValueError(f"{path}: has {total} images; rFID needs at least 2")
    return [partial(read, i) for i in np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()]


class Measurement:
    """An S-VAE's images against their originals, `batch_size` at a time. Legend: n images, S their side."""

    def __init__(self, vae: SVAE, images: list[Callable[[], np.ndarray]], lpips: LPIPS | None, seed: int):
        self.vae, self.images, self.lpips, self.seed = vae, images, lpips, seed
        self.device = vae.post_quant_proj.weight.device

    def originals(self) -> Iterator[np.ndarray]:
        """All images in batches, uint8 (n, S, S, 3)."""
        for start in range(0, len(self.images), BATCH_SIZE):
            yield np.stack([read() for read in self.images[start : start + BATCH_SIZE]])

    def reconstructions(self, angle: float, found: dict[str, list[Tensor]]) -> Iterator[np.ndarray]:
        """Their reconstructions from disturbed tokens; what is `found` about each goes under its metric's name."""
        generator = torch.Generator().manual_seed(self.seed)
        for originals in self.originals():
            images = to_float(torch.from_numpy(originals).permute(0, 3, 1, 2)).to(self.device)
            tokens = models.encode(self.vae, images)
            noise = torch.randn(tokens.shape, generator=generator).to(self.device)
            tokens = disturbed(self.vae, tokens, angle, noise) if angle else tokens
            made = torch.cat(list(models.decode(self.vae, tokens)))
            found["PSNR"].append(psnr(to_uint8(made), originals))
            found["SSIM"].append(ssim(to_uint8(made), originals))
            if self.lpips:
                found["LPIPS"].append(self.lpips(made.clamp(-1, 1), images))
            yield to_uint8(made)

    def at(self, angle: float, extraction: Extraction, reference: Reference) -> dict[str, float]:
        """rFID and the means of PSNR, SSIM and perhaps LPIPS; angle 0: tokens as they are."""
        found = {name: [] for name in ("PSNR", "SSIM", *(["LPIPS"] if self.lpips else []))}
        features = extraction(Batches(self.reconstructions(angle, found))).features
        means = {name: torch.cat(values).double().mean().item() for name, values in found.items()}
        return {"rFID": distances(features, reference)["FID"], **means}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = script.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("vae", metavar="VAE", help="a checkpoint of an S-VAE, or a SphereAR one, which holds its own")
    add("data", metavar="DATA", help="tar or folder of classes, .npz, or folder of PNGs")
    add("--out", type=Path, default="reconstruction.json", help="(default: %(default)s)")
    add("--angles", type=script.within(0.0, math.pi), nargs="+", default=[0.1, 0.2, 0.4], help="radians")
    add("--num-images", type=script.at_least(2), default=5000, help="at most (default: %(default)s)")
    add("--global-seed", type=script.SEED, default=0)
    add("--vgg-weights", help="torchvision's vgg16-397923af.pth for LPIPS; without it and a download there is no LPIPS")
    return parser.parse_args(argv)


def open_lpips(file: str | None) -> LPIPS | None:
    """The distance, or None where nothing is known of VGG16. A file that was asked for must do."""
    try:
        return LPIPS(vgg_weights(file))
    except ValueError as error:
        if file is not None:
            raise
        script.warn(f"no LPIPS: {error}")
        return None


def run(args: argparse.Namespace) -> int:
    if not args.out.parent.is_dir():
        raise ValueError(f"--out {args.out}: there is no folder {args.out.parent}")
    if os.path.lexists(args.out):
        raise ValueError(f"--out {args.out}: is there already; remove it, or choose another name")
    device = distributed.init()
    if distributed.world_size() > 1:
        raise ValueError("examples.reconstruction runs on one process; leave torchrun out")
    file = checkpoint_file.examine(args.vae)
    model = checkpoint_file.load_examined(file, models.from_checkpoint)
    vae = (model.vae if isinstance(model, SphereAR) else model).to(device)
    images = open_data(args.data, vae.config.image_size, args.num_images)
    lpips = open_lpips(args.vgg_weights)
    measurement = Measurement(vae, images, lpips.to(device) if lpips else None, args.global_seed)
    workers = torch.get_num_threads() if device.type == "cpu" else 1
    with exact_arithmetic(), Extraction(Settings(), device, NETWORK_BATCH[device.type], workers) as net:
        reference = as_reference(net(Batches(measurement.originals())), device)
        rows = {angle: measurement.at(angle, net, reference) for angle in (0.0, *args.angles)}
        weights = net.weights
    names = list(rows[0.0])
    print(f"{len(images)} images\n\n| noise | {' | '.join(names)} |\n|---{'|---' * len(names)}|")
    for angle, values in rows.items():
        print(f"| {angle:g} | {' | '.join(f'{values[name]:.4g}' for name in names)} |")
    record = {
        "checkpoint": {"path": file.path, "sha256": file.sha256},
        "noise": "Gaussian of equal energy" if vae.config.is_flat else "tangential",
        "reconstruction": [{"angle": angle, **values} for angle, values in rows.items()],
        "images": len(images),
        "seed": args.global_seed,
        "inception": weights,
        **provenance(device),
    }
    write_json(args.out, record, new=True)
    return script.DONE


def main(argv: list[str] | None = None) -> int:
    return script.run(
        "examples.reconstruction", parse_args, run, argv,
        when_stopped="nothing was written", out_of_memory="Take smaller images, or a machine with more memory.",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
