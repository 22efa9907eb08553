"""Quality against evaluations of the head, and against guidance: one command for any checkpoint.

    python -m examples.sweep CKPT REF.npz --samplers sde=100,25 midpoint=2,3,5 --cfg-scales 1 2 3 4.5 --out sweep

Every point samples the same plan: the same seeds, labels and noise addresses. OUT/sweep.json grows point by point: the
same command continues, and more points may be asked for later. OUT/sweep.md and OUT/sweep.png show what is there.
Several EMA decays would be more names of --weights: a checkpoint holds one.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot
from torch import Tensor
from tqdm import tqdm

import models
from dataset.toy import Judge, fit_judge
from models import SamplingSettings, SphereAR
from models.samplers import SAMPLERS
from utils import checkpoint_file, distributed, script
from utils.evaluation.batches import Batches
from utils.evaluation.extraction import NETWORK_BATCH, Extraction, Settings, choose_workers
from utils.evaluation.inputs import Images, open_images
from utils.evaluation.metrics import SEED, Reference, as_reference, distances, floor
from utils.evaluation.pixels import pixel_distances, pixel_features
from utils.files import atomic_file, lock, read_json, write_json
from utils.images import to_uint8
from utils.provenance import provenance
from utils.sampling.draws import image_noise, make_labels

matplotlib.use("Agg")  # no window
METRICS = {  # in a point's record -> as it is shown
    "class_agreement": "class agreement",
    "pixel_frechet": "pixel Fréchet",
    "pixel_mind": "pixel MIND",
    "FID": "FID",
    "sFID": "sFID",
    "MIND": "MIND",
}
BEST = "pixel_frechet"  # its least value is the best guidance
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
    add("--num-images", type=script.at_least(4), default=2000, help="per point (default: %(default)s)")
    add("--batch-size", type=script.at_least(1), default=250, help="images at a time (default: %(default)s)")
    add("--judge", metavar="DATA", help="labelled images, tar or folder: dataset.toy's classifier says the class")
    add(
        "--inception",
        choices=("none", "best", "all"),
        default="none",
        help="FID and MIND too, of these points; best: of the guidance with the least pixel Fréchet distance",
    )
    return parser.parse_args(argv)


# ---- one point ---------------------------------------------------------------------------------------------------


def load(file: checkpoint_file.Examined, weights: str) -> SphereAR:
    """The model of a checkpoint. ValueError for another kind, or raw weights where there are no others."""

    def build(checkpoint: dict) -> SphereAR:
        model = models.from_checkpoint(checkpoint, ema=weights == "ema")
        if not isinstance(model, SphereAR):
            raise ValueError("is an S-VAE; a sweep needs a SphereAR checkpoint")
        if weights == "raw" and not checkpoint.get("ema"):
            raise ValueError("holds one set of weights, no EMA beside them; leave --weights out")
        return model

    return checkpoint_file.load_examined(file, build)


def sampled(model: SphereAR, point: Point, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """The point's images by their numbers: (n,) -> (n, 3, S, S)."""

    def make(numbers: Tensor) -> Tensor:
        noise = image_noise(point.seed, numbers, point.settings.num_noise, model.config.latent_dim)
        with script.autocast(numbers.device, script.choose_precision(None, numbers.device)):
            tokens = models.generate_tokens(model, labels[numbers], point.settings, noise)
            return torch.cat(list(models.decode(model, tokens)))

    return make


class Real(NamedTuple):
    """What samples are held against; Inception's part only where it is asked for."""

    pixels: Tensor
    judge: Judge | None
    extraction: Extraction | None = None
    reference: Reference | None = None

    def floor(self, count: int) -> dict[str, float]:
        """Pixel distances of `count` of the real images, at most half, to the other half; as evaluator.py's --floor."""
        order = torch.randperm(len(self.pixels), generator=torch.Generator().manual_seed(SEED))
        some, others = order[: min(count, len(order) // 2)], order[len(order) // 2 :]
        return {"images": len(some), **pixel_distances(self.pixels[some], self.pixels[others])}

    def score(self, make: Callable[[Tensor], Tensor], labels: Tensor, batch_size: int) -> dict[str, float]:
        """The metrics of images that `make` makes by number, on all processes."""
        pixels, agreed = torch.zeros(len(labels), self.pixels.shape[1]), torch.zeros(())

        def batches() -> Iterator[np.ndarray]:
            for part in filter(len, distributed.my_parts(len(labels), batch_size)):
                numbers = torch.arange(part.start, part.stop, device=labels.device)
                images = to_uint8(make(numbers))
                pixels[part.start : part.stop] = pixel_features(images)
                if self.judge:
                    agreed.add_(self.judge.agreement(images, labels[numbers].cpu().numpy()) * len(part))
                yield images

        if self.extraction:
            found = distances(self.extraction(Batches(batches())).features, self.reference)
        else:
            found = {}
            for _ in batches():
                pass
        if self.judge:
            found["class_agreement"] = distributed.reduce_sum(agreed).item() / len(labels)
        return found | pixel_distances(distributed.reduce_sum(pixels), self.pixels)


def pixels_of(images: Images) -> Tensor:
    """Pixel features of all images of a file."""
    starts = range(0, images.count, READ_AT_ONCE)
    return torch.cat([pixel_features(images.read(at, min(at + READ_AT_ONCE, images.count))) for at in starts])


def inception(device: torch.device, images: Images) -> Extraction:
    """The network that FID and MIND are defined on; the features of a file stay beside it, for the next command."""
    settings, batch_size = Settings(cache_features=True), NETWORK_BATCH[device.type]
    return Extraction(settings, device, batch_size, choose_workers(settings, device, batch_size, [images]))


# ---- all points --------------------------------------------------------------------------------------------------


def open_record(path: Path, identity: dict) -> dict:
    """The record at `path`, or a new one. ValueError where another model, reference or plan made it, or no sweep."""
    record = read_json(path, "remove it") if path.exists() else {**identity, "points": []}
    if differing := [name for name in identity if record.get(name) != identity[name]]:
        change = "; ".join(f"{name}: {record.get(name)} there, {identity[name]} now" for name in differing)
        raise ValueError(f"--out {path.parent} holds another sweep ({change}); choose another folder")
    points, measured = record.get("points"), record.get("floor", {})
    if not (isinstance(points, list) and all(map(is_point, points)) and isinstance(measured, dict)):
        raise ValueError(f"{path} is damaged, not as a sweep writes it: remove it")
    return record


def is_point(value: object) -> bool:
    """Whether a value of the record is a point with its measurements."""
    if not isinstance(value, dict):
        return False
    kinds = Point.__annotations__ | dict.fromkeys(("evaluations", BEST, *(METRICS.keys() & value.keys())), float)
    return all(isinstance(value.get(name), int | float if kind is float else kind) for name, kind in kinds.items())


def require_ours(out: Path) -> None:
    """ValueError where the table or the picture would replace a file that belongs to no sweep."""
    for path in (out / "sweep.md", out / "sweep.png"):
        if os.path.lexists(path) and not (out / "sweep.json").exists():
            raise ValueError(f"{path}: is there already, without a sweep.json; move it away, or choose another --out")


def curves(points: Iterable[dict]) -> dict[tuple, dict[float, dict[str, list[float]]]]:
    """(weights, sampler, evaluations, steps) -> guidance -> metric -> its value for every seed; all in order."""
    found: dict = {}
    order = "weights", "sampler", "evaluations", "steps", "cfg_scale", "seed"
    for point in sorted(points, key=lambda point: [point[name] for name in order]):
        *curve, scale, _ = (point[name] for name in order)
        metrics = found.setdefault(tuple(curve), {}).setdefault(scale, {})
        for name in METRICS.keys() & point.keys():
            metrics.setdefault(name, []).append(point[name])
    return found


def best(curve: dict[float, dict[str, list[float]]]) -> float:
    return min(curve, key=lambda scale: mean(curve[scale][BEST]))


def spread(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def table(record: dict) -> str:
    """Markdown: a line per point, the best guidance of every curve in bold, ± one standard deviation over seeds."""
    shown = [name for name in METRICS if any(name in point for point in record["points"])]
    lines = [f"| sampler | steps | evaluations | guidance | {' | '.join(METRICS[name] for name in shown)} | seeds |"]
    lines.append("|---" * (5 + len(shown)) + "|")
    for (weights, sampler, evaluations, steps), curve in curves(record["points"]).items():
        for scale, metrics in curve.items():
            mark = "**" if scale == best(curve) else ""
            cells = [sampler if weights == "ema" else f"{sampler}, raw", steps, f"{evaluations:g}"]
            cells.append(f"{mark}{scale:g}{mark}")
            for name in shown:
                values = metrics.get(name, [])
                deviation = f" ± {spread(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{mean(values):.3f}{deviation}" if values else "")
            lines.append(f"| {' | '.join(cells)} | {len(metrics[BEST])} |")
    floor = ", ".join(f"{METRICS[name]} {record['floor'][name]:.3f}" for name in shown if name in record["floor"])
    lines.append(f"\n{record['--num-images']} images; {record['floor']['images']} real ones against others: {floor}.")
    return "\n".join(lines) + "\n"


def draw(path: Path, record: dict) -> None:
    """Above, quality at the best guidance against evaluations; below, quality against guidance."""
    shown = [name for name in METRICS if any(name in point for point in record["points"])]
    found = curves(record["points"])
    lines = list(dict.fromkeys((weights, sampler) for weights, sampler, *_ in found))
    figure, axes = pyplot.subplots(2, len(shown), figsize=(4.6 * len(shown), 8), layout="constrained", squeeze=False)
    for (upper, lower), name in zip(axes.T, shown):
        for number, line in enumerate(lines):
            of_line = {curve[2:]: scales for curve, scales in found.items() if curve[:2] == line}
            at_best = [(evaluations, scales[best(scales)].get(name)) for (evaluations, _), scales in of_line.items()]
            at_best = [(evaluations, mean(values), spread(values)) for evaluations, values in at_best if values]
            if at_best:
                label = line[1] if line[0] == "ema" else f"{line[1]}, raw"
                upper.errorbar(*zip(*at_best), color=f"C{number}", marker="o", label=label)
            for (evaluations, steps), scales in of_line.items():
                points = [(scale, mean(values[name])) for scale, values in scales.items() if name in values]
                shade = 1 / (1 + 0.6 * [*of_line].index((evaluations, steps)))
                lower.plot(*zip(*points) if points else ((), ()), ".-", color=f"C{number}", alpha=shade)
        for axis in (upper, lower):
            axis.set_title(METRICS[name])
            if name in record["floor"]:
                axis.axhline(record["floor"][name], color="grey", linewidth=0.8)
        upper.set(xscale="log", xlabel=f"evaluations per token, at the guidance of least {METRICS[BEST]}")
        lower.set_xlabel("guidance (paler: more evaluations)")
    axes[0, 0].legend()
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)


def show(out: Path, record: dict) -> None:
    """Write the table and the picture of what is there."""
    with atomic_file(out / "sweep.md") as file:
        file.write(table(record).encode())
    draw(out / "sweep.png", record)


def run(args: argparse.Namespace) -> int:
    device = distributed.init()
    distributed.from_main(lambda: require_ours(args.out))
    checkpoint = distributed.from_main(lambda: checkpoint_file.examine(args.ckpt))
    with distributed.all_or_none():
        by_weights = {name: load(checkpoint, name).to(device) for name in dict.fromkeys(args.weights)}
        config, images = by_weights[args.weights[0]].config, open_images(args.reference)
        if images.count < 4:
            raise ValueError(f"{args.reference}: has {images.count} images; a reference of real ones is needed")
    real = Real(pixels_of(images), fit_judge(args.judge, config.svae.image_size) if args.judge else None)
    identity = {"checkpoint sha256": checkpoint.sha256, "reference sha256": images.sha256()}
    identity |= {"--judge": args.judge, "--num-images": args.num_images}
    rows = list(itertools.chain(*args.samplers))
    plan = itertools.product(args.seeds, args.weights, rows, args.cfg_scales)  # all of a seed first
    plan = list(dict.fromkeys(Point(seed, weights, *row, scale) for seed, weights, row, scale in plan))
    with ExitStack() as stack:

        def start() -> dict:
            args.out.mkdir(parents=True, exist_ok=True)
            lock(args.out, stack, "--out")
            return open_record(args.out / "sweep.json", identity)

        record = distributed.from_main(start)
        record |= {**provenance(device), "processes": distributed.world_size()}
        record["floor"] = record.get("floor", {}) | real.floor(args.num_images)
        done = {Point(*(entry[name] for name in Point._fields)): entry for entry in record["points"]}

        def measure(points: Iterable[Point], wanted: str, real: Real) -> None:
            """Score those points that lack what is wanted, and put them into the record."""
            missing = [point for point in points if wanted not in done.get(point, {})]
            distributed.print0(f"{len(missing)} points to sample for {METRICS[wanted]}")
            for point in tqdm(missing, unit="point", disable=not distributed.is_main()):
                started = time.monotonic()
                labels = make_labels("balanced", args.num_images, config.num_classes, point.seed)
                labels = torch.from_numpy(labels).to(device)
                make = sampled(by_weights[point.weights], point, labels)
                found = {"evaluations": point.evaluations(config.num_tokens)}
                found |= real.score(make, labels, args.batch_size)
                found |= {"seconds": round(time.monotonic() - started, 1), "commit": record["commit"]}
                done[point] = {**point._asdict(), **found}
                record["points"] = list(done.values())
                distributed.from_main(lambda: write_json(args.out / "sweep.json", record))

        if args.inception != "all":
            measure(plan, BEST, real)
        if args.inception == "best":
            scales = {curve: best(found) for curve, found in curves(done[point] for point in plan).items()}
            plan = [p for p in plan if scales[p.weights, p.sampler, done[p]["evaluations"], p.steps] == p.cfg_scale]
        if args.inception != "none":
            with inception(device, images) as extraction:
                known = extraction(images, keep_spatial=True)
                record["floor"] |= floor(args.num_images, known, None, device)["metrics"]
                measure(plan, "FID", real._replace(extraction=extraction, reference=as_reference(known, device)))
        distributed.from_main(lambda: show(args.out, record))
    distributed.print0(f"{args.out}/sweep.json, sweep.md, sweep.png")
    return script.DONE


def main(argv: list[str] | None = None) -> int:
    return script.run(
        "examples.sweep", parse_args, run, argv,
        when_stopped="finished points are kept: the same command continues", out_of_memory="Lower --batch-size.",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
