"""The paper's argument about scale, seen on one checkpoint: tokens with and without the projection in the loop.

    python -m examples.collapse --ckpt results/L/checkpoints/last.pt --out collapse

The same images are generated at several guidance scales, with the projection and without it. OUT.json holds, by token,
the norm before the projection, the deviation between images and the cosine between the two runs; OUT.png shows them.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot
from tqdm import tqdm

from models import SamplingSettings, SphereAR, from_checkpoint, generate_tokens
from utils import checkpoint_file, provenance, script
from utils.files import atomic_file, sha256, write_json
from utils.sampling.draws import image_noise
from utils.sampling.variance_probe import VarianceProbe, scale_of_tokens

matplotlib.use("Agg")  # no window
PROJECTIONS = "all", "none"
PANELS = {
    "norm": "norm before the projection",
    "sd": "deviation between images",
    "cosine": "cosine between the two runs",
}


def raw_tokens(model: SphereAR, labels: torch.Tensor, settings: SamplingSettings, seed: int) -> torch.Tensor:
    """Tokens (B, P, C) before their projection."""
    probe = VarianceProbe(len(labels))
    noise = image_noise(seed, torch.arange(len(labels)), settings.num_noise, model.config.latent_dim)
    generate_tokens(model, labels, settings, noise, observe=probe)
    return probe.raw


def measure(model: SphereAR, scales: list[float], num_images: int, num_steps: int, seed: int) -> list[dict]:
    """One record per guidance scale and projection."""
    labels = torch.arange(num_images) % model.config.num_classes
    records = []
    for scale in tqdm(scales, unit="guidance scale"):
        settings = SamplingSettings(cfg_scale=scale, num_sampling_steps=num_steps)
        raw = {name: raw_tokens(model, labels, replace(settings, projection=name), seed) for name in PROJECTIONS}
        other = dict(zip(PROJECTIONS, reversed(PROJECTIONS)))
        records += [
            {"cfg_scale": scale, "projection": name, **scale_of_tokens(raw[name], raw[other[name]])}
            for name in PROJECTIONS
        ]
    return records


def draw(path: Path, records: list[dict], radius: float) -> None:
    """One panel per quantity; colours are guidance scales, dashes are runs without the projection."""
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(4.5 * len(PANELS), 3.6), layout="constrained")
    scales = sorted({record["cfg_scale"] for record in records})
    colours = dict(zip(scales, pyplot.cm.viridis(torch.linspace(0, 0.9, len(scales)).tolist())))
    for axis, (name, title) in zip(axes, PANELS.items()):
        for record in records:
            dashed = record["projection"] == "none"
            if name == "cosine" and dashed:  # the same line
                continue
            label = f"guidance {record['cfg_scale']:g}{', no projection' if dashed else ''}"
            axis.plot(record[name], "--" if dashed else "-", color=colours[record["cfg_scale"]], label=label)
        axis.set_title(title)
        axis.set_xlabel("token")
    axes[0].axhline(radius, color="grey", linewidth=0.8)
    axes[1].legend(fontsize=7)
    with atomic_file(path, new=True) as file:
        figure.savefig(file, format="png", dpi=130)
    pyplot.close(figure)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = script.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="a SphereAR checkpoint")
    parser.add_argument("--out", default="collapse", help="OUT.json and OUT.png are written (default: %(default)s)")
    parser.add_argument("--cfg-scales", type=script.at_least(1.0), nargs="+", default=[1.0, 3.0, 6.0, 9.0])
    parser.add_argument(
        "--num-images", type=script.at_least(2), default=64, help="classes in turn (default: %(default)s)"
    )
    parser.add_argument("--num-sampling-steps", type=script.at_least(1), default=SamplingSettings.num_sampling_steps)
    parser.add_argument("--global-seed", type=script.SEED, default=0)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    model = checkpoint_file.load(args.ckpt, from_checkpoint)
    if not isinstance(model, SphereAR):
        raise ValueError(f"--ckpt {args.ckpt} is an S-VAE; this needs a SphereAR checkpoint")
    if not Path(args.out).parent.is_dir():
        raise ValueError(f"--out {args.out}: there is no folder {Path(args.out).parent}")
    for path in (Path(f"{args.out}.json"), Path(f"{args.out}.png")):
        if os.path.lexists(path):
            raise ValueError(f"--out {args.out}: {path} is there already; remove it, or choose another name")
    records = measure(model, args.cfg_scales, args.num_images, args.num_sampling_steps, args.global_seed)
    record = {
        "checkpoint": args.ckpt,
        "sha256": sha256(args.ckpt),
        "settings": vars(args),
        **provenance.provenance(torch.device("cpu")),
        "tokens": records,
    }
    write_json(Path(f"{args.out}.json"), record, new=True)
    draw(Path(f"{args.out}.png"), records, model.config.radius)
    print(f"{args.out}.json, {args.out}.png")
    return script.DONE


def main(argv: list[str] | None = None) -> int:
    return script.run(
        "examples.collapse", parse_args, run, argv,
        when_stopped="nothing was written", out_of_memory="Lower --num-images.",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
