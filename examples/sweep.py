"""Quality against evaluations of the head, and against guidance: one command for any checkpoint.

    python -m examples.sweep CKPT REF.npz --samplers sde=100,25 midpoint=2,3,5 --cfg-scales 1 2 3 4.5 --out sweep

Every point samples the same plan: the same seeds, labels and noise addresses. OUT/sweep.json grows point by point, and
the same command continues; a point that is there is not made again, and more points may be asked for later.
OUT/sweep.md and OUT/sweep.png show what is there. Several EMA decays would be rows of --weights: checkpoints hold one.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot
from tqdm import tqdm

import models
from dataset.toy import fit_judge
from models import SamplingSettings, SphereAR
from models.samplers import SAMPLERS
from utils import checkpoint_file, distributed, script
from utils.evaluation.features import my_parts
from utils.evaluation.inputs import open_images
from utils.evaluation.pixels import pixel_distances, pixel_features
from utils.files import atomic_file, lock, read_json, write_json
from utils.images import to_uint8
from utils.provenance import provenance
from utils.sampling.draws import image_noise, make_labels

matplotlib.use("Agg")  # no window
METRICS = {
    "class_agreement": "class agreement",
    "pixel_frechet": "pixel Fréchet",
    "pixel_mind": "pixel MIND",
}
BEST = "pixel_frechet"  # what chooses the best guidance
READ_AT_ONCE = 500


class Point(NamedTuple):
    """What is sampled, as it stands in the record; `steps` is text, such as 100 or 50:20."""

    seed: int
    weights: str
    sampler: str
    steps: str
    cfg_scale: float

    @property
    def settings(self) -> SamplingSettings:
        steps = script.one_or_two(int, self.steps)
        return SamplingSettings(self.cfg_scale, sampler=self.sampler, num_sampling_steps=steps)

    def evaluations(self, num_tokens: int) -> float:
        """Evaluations of the head, mean over tokens."""
        return mean(len(self.settings.at(position, num_tokens).times) for position in range(num_tokens))


def sampler_and_steps(word: str) -> list[tuple[str, str]]:
    """The value of --samplers: sde=100,50:20 -> (sde, 100), (sde, 50:20)."""
    name, _, counts = word.partition("=")
    if name not in SAMPLERS or not counts:
        raise argparse.ArgumentTypeError(f"{word} must be SAMPLER=STEPS,…; samplers are {', '.join(SAMPLERS)}")
    for count in counts.split(","):
        script.one_or_two(script.within(1, 10**4), count)
    return [(name, count) for count in counts.split(",")]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = script.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("ckpt", metavar="CKPT", help="a SphereAR checkpoint")
    add("reference", metavar="REF", help="real images: an .npz or a folder of PNGs")
    add("--out", default="sweep", type=Path, help="folder of sweep.json, .md and .png (default: %(default)s)")
    add("--samplers", type=sampler_and_steps, nargs="+", default=[[("sde", "100")]], metavar="NAME=STEPS,…")
    add("--cfg-scales", type=script.at_least(1.0), nargs="+", default=[1.0, 1.5, 2.0, 3.0, 4.5, 6.0])
    add("--weights", choices=("ema", "raw"), nargs="+", default=["ema"])
    add("--seeds", type=script.SEED, nargs="+", default=[0, 1, 2])
    add("--num-images", type=script.at_least(2), default=2000, help="per point (default: %(default)s)")
    add("--batch-size", type=script.at_least(1), default=250, help="images at a time (default: %(default)s)")
    add("--judge", metavar="DATA", help="labelled images, tar or folder: dataset.toy's classifier says the class")
    return parser.parse_args(argv)


# ---- a point -----------------------------------------------------------------------------------------------------


def sample(model: SphereAR, point: Point, labels: np.ndarray, batch_size: int) -> Iterator[tuple[range, np.ndarray]]:
    """This process's images of a point, uint8 (n, S, S, 3), with their numbers."""
    device, settings = model.pos_for_diff.weight.device, point.settings
    for part in filter(len, my_parts(len(labels), batch_size)):
        images = torch.arange(part.start, part.stop, device=device)
        noise = image_noise(point.seed, images, settings.num_noise, model.config.latent_dim)
        asked = torch.from_numpy(labels[part.start : part.stop]).to(device)
        with script.autocast(device, script.choose_precision(None, device)):
            tokens = models.generate_tokens(model, asked, settings, noise)
            yield part, np.concatenate([to_uint8(pixels) for pixels in models.decode(model, tokens)])


class Real:
    """What samples are held against: pixel features of the reference, and perhaps a judge of classes."""

    def __init__(self, path: str, judge: str | None, image_size: int):
        file = open_images(path)
        if file.count < 4:
            raise ValueError(f"{path}: has {file.count} images; a reference of real ones is needed")
        starts = range(0, file.count, READ_AT_ONCE)
        blocks = [pixel_features(file.read(start, min(start + READ_AT_ONCE, file.count))) for start in starts]
        self.pixels, self.sha256 = torch.cat(blocks), file.sha256()
        self.judge = fit_judge(judge, image_size) if judge else None

    def floor(self, count: int) -> dict[str, float]:
        """What real images score: `count` of the reference, or half of it, against its others."""
        order = torch.randperm(len(self.pixels), generator=torch.Generator().manual_seed(0))
        some, others = order.tensor_split([min(count, len(order) // 2)])
        return {"images": len(some), **pixel_distances(self.pixels[some], self.pixels[others])}

    def score(self, images: Iterator[tuple[range, np.ndarray]], labels: np.ndarray) -> dict[str, float]:
        """The metrics of a point's images."""
        pixels, agreed = torch.zeros(len(labels), self.pixels.shape[1]), torch.zeros(())
        for part, some in images:
            numbers = slice(part.start, part.stop)
            pixels[numbers] = pixel_features(some)
            agreed += self.judge.agreement(some, labels[numbers]) * len(part) if self.judge else 0
        pixels, agreed = distributed.reduce_sum(pixels), distributed.reduce_sum(agreed)
        found = {"class_agreement": agreed.item() / len(labels)} if self.judge else {}
        return found | pixel_distances(pixels, self.pixels)


# ---- all points --------------------------------------------------------------------------------------------------


def open_record(path: Path, identity: dict) -> dict:
    """The record at `path`, or a new one. ValueError where another model, reference or plan made it."""
    record = read_json(path, "remove it") if path.exists() else {**identity, "points": []}
    if differing := [name for name in identity if record.get(name) != identity[name]]:
        change = "; ".join(f"{name}: {record.get(name)} there, {identity[name]} now" for name in differing)
        raise ValueError(f"--out {path.parent} holds another sweep ({change}); choose another folder")
    return record


def averages(record: dict) -> list[dict]:
    """Points that differ in their seed alone, as one: of each metric the mean, and its standard deviation or None."""
    name = lambda point: tuple(point[field] for field in Point._fields[1:])  # noqa: E731
    groups: dict[tuple, list[dict]] = {}
    for point in record["points"]:
        groups.setdefault(name(point), []).append(point)
    rows = []
    for same in groups.values():
        row = {**same[0], "seeds": len(same)}
        for metric in METRICS:
            if values := [point[metric] for point in same if metric in point]:
                row[metric] = mean(values), stdev(values) if len(values) > 1 else None
        rows.append(row)
    return rows


def curves(rows: list[dict]) -> dict[str, list[dict]]:
    """What differs in guidance alone, by name, in the order of guidance."""
    found: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["cfg_scale"]):
        raw = ", raw weights" if row["weights"] == "raw" else ""
        found.setdefault(f"{row['sampler']} {row['steps']} ({row['evaluations']:g}){raw}", []).append(row)
    return dict(sorted(found.items(), key=lambda item: (item[1][0]["sampler"], item[1][0]["evaluations"])))


def best(curve: list[dict]) -> dict:
    return min(curve, key=lambda row: row[BEST][0])


def table(record: dict, rows: list[dict]) -> str:
    """Markdown: a line per point; the best guidance of every curve in bold."""
    metrics = [metric for metric in METRICS if any(metric in row for row in rows)]
    lines = [f"| sampler, steps (evaluations) | guidance | {' | '.join(METRICS[m] for m in metrics)} | seeds |"]
    lines.append("|---" * (3 + len(metrics)) + "|")
    for name, curve in curves(rows).items():
        for row in curve:
            mark = "**" if row is best(curve) else ""
            cells = [text_of(metric, *row[metric]) if metric in row else "" for metric in metrics]
            lines.append(f"| {name} | {mark}{row['cfg_scale']:g}{mark} | {' | '.join(cells)} | {row['seeds']} |")
    floor = ", ".join(f"{METRICS[m]} {record['floor'][m]:.3g}" for m in METRICS if m in record["floor"])
    count = record["floor"]["images"]
    lines.append(f"\n{record['--num-images']} images per point; {count} real ones against others: {floor}.")
    return "\n".join(lines) + "\n"


def text_of(metric: str, value: float, deviation: float | None) -> str:
    scale, digits = (100, ".1f") if metric == "class_agreement" else (1, ".3g")
    spread = "" if deviation is None else f" ± {scale * deviation:.1g}"
    return f"{scale * value:{digits}}{spread}"


def draw(path: Path, record: dict, rows: list[dict]) -> None:
    """Quality at the best guidance against evaluations; quality against guidance."""
    shown = [metric for metric in METRICS if any(metric in row for row in rows)]
    figure, axes = pyplot.subplots(2, len(shown), figsize=(4.6 * len(shown), 8), layout="constrained", squeeze=False)
    samplers = sorted({row["sampler"] for row in rows})
    colours = {sampler: f"C{number}" for number, sampler in enumerate(samplers)}
    for (upper, lower), metric in zip(axes.T, shown):
        for sampler in samplers:
            chosen = [best(c) for c in curves(rows).values() if c[0]["sampler"] == sampler and c[0]["weights"] == "ema"]
            chosen = [row for row in chosen if metric in row]
            values, spreads = zip(*(row[metric] for row in chosen))
            x = [row["evaluations"] for row in chosen]
            upper.errorbar(x, values, [s or 0 for s in spreads], color=colours[sampler], marker="o", label=sampler)
        for number, (name, curve) in enumerate(curves(rows).items()):
            style = ("-", "--", ":", "-.")[number % 4]
            points = [(row["cfg_scale"], row[metric][0]) for row in curve if metric in row]
            lower.plot(*zip(*points), style, color=colours[curve[0]["sampler"]], label=name)
        for axis in (upper, lower):
            axis.set_title(METRICS[metric])
            if metric in record["floor"]:
                axis.axhline(record["floor"][metric], color="grey", linewidth=0.8)
        upper.set_xscale("log")
        upper.set_xlabel(f"evaluations per token, at the guidance of least {METRICS[BEST]}")
        lower.set_xlabel("guidance")
    axes[0, 0].legend()
    axes[1, 0].legend(fontsize=6)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)


def show(out: Path, record: dict) -> None:
    """Write the table and the picture of what is there."""
    rows = averages(record)
    with atomic_file(out / "sweep.md") as file:
        file.write(table(record, rows).encode())
    draw(out / "sweep.png", record, rows)


def run(args: argparse.Namespace) -> int:
    device = distributed.init()
    checkpoint = distributed.from_main(lambda: checkpoint_file.examine(args.ckpt))
    with distributed.all_or_none():
        by_weights = {name: load(checkpoint, name).to(device) for name in dict.fromkeys(args.weights)}
        config = next(iter(by_weights.values())).config
        real = Real(args.reference, args.judge, config.svae.image_size)
    identity = {
        "checkpoint sha256": checkpoint.sha256,
        "reference sha256": real.sha256,
        "--judge": args.judge,
        "--num-images": args.num_images,
    }
    with ExitStack() as stack:

        def start() -> dict:
            args.out.mkdir(parents=True, exist_ok=True)
            lock(args.out, stack, "--out")
            return open_record(args.out / "sweep.json", identity)

        record = distributed.from_main(start)
        record |= {"floor": real.floor(args.num_images), **provenance(device), "processes": distributed.world_size()}
        there = {tuple(point[field] for field in Point._fields) for point in record["points"]}
        rows = list(itertools.chain(*args.samplers))
        plan = [
            Point(seed, weights, *row, scale)
            for seed, weights, row, scale in itertools.product(args.seeds, args.weights, rows, args.cfg_scales)
        ]  # all of a seed first
        missing = [point for point in dict.fromkeys(plan) if point not in there]
        distributed.print0(f"{len(plan)} points, {len(plan) - len(missing)} of them finished before")
        for point in tqdm(missing, unit="point", disable=not distributed.is_main()):
            labels, started = make_labels("balanced", args.num_images, config.num_classes, point.seed), time.monotonic()
            found = real.score(sample(by_weights[point.weights], point, labels, args.batch_size), labels)
            evaluations = point.evaluations(config.num_tokens)
            values = {"evaluations": evaluations, **found, "seconds": round(time.monotonic() - started, 1)}
            record["points"].append({**point._asdict(), **values, "commit": record["commit"]})
            distributed.from_main(lambda: write_json(args.out / "sweep.json", record))
        distributed.from_main(lambda: show(args.out, record))
    distributed.print0(f"{args.out}/sweep.json, sweep.md, sweep.png")
    return script.DONE


def load(file: checkpoint_file.Examined, weights: str) -> SphereAR:
    """The model of a checkpoint. ValueError for another kind, or raw weights where there are no others."""

    def build(checkpoint: dict) -> SphereAR:
        model = models.from_checkpoint(checkpoint, ema=weights == "ema")
        if not isinstance(model, SphereAR):
            raise ValueError("is an S-VAE; this needs a SphereAR checkpoint")
        if weights == "raw" and not checkpoint.get("ema"):
            raise ValueError("holds one set of weights, no EMA beside them; leave --weights out")
        return model

    return checkpoint_file.load_examined(file, build)


def main(argv: list[str] | None = None) -> int:
    return script.run(
        "examples.sweep", parse_args, run, argv,
        when_stopped="finished points are kept: the same command continues", out_of_memory="Lower --batch-size.",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
