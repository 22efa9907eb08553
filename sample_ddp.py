"""Class-conditional samples of a SphereAR checkpoint, on any number of processes, as one .npz for the evaluator.

    python sample_ddp.py --ckpt SphereAR_B.pt --num-fid-samples 16 --class-ids 207,360
    torchrun --nproc_per_node=8 sample_ddp.py --model SphereAR-L --ckpt SphereAR_L.pt --cfg-scale 4.6 --to-npz

Image i depends on (checkpoint, seed, i, settings) alone, not on processes, batch size or interruptions. Finished
batches are kept as shards in the sample folder: the same command continues a run that was stopped.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from models import PRESETS, SphereAR, load_checkpoint
from utils import distributed
from utils.evaluation.npz_reader import NpzReader
from utils.files import atomic_file
from utils.images import layout, write_contact_sheet
from utils.noise import Purpose, normals, words
from utils.sampling.few_rows import choose_ways, use_ways
from utils.sampling.graphs import cast_weights, make_static
from utils.sampling.run_folder import Stopped, open_run, raise_on_signals, read_json, write_json
from utils.sampling.shards import Range, assemble, finished_shards, missing_ranges, read_image, write_shard

LAST_STEP_SIZE = 0.04  # of the published numbers
DECODE_PIXELS = {"cuda": 2**22, "cpu": 2**19}  # images decoded at a time: 64 and 8 of 256 x 256
LARGE = 2**24  # parameters that no CPU's cache holds


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="checkpoint; its EMA weights are used when it has them")
    parser.add_argument("--model", choices=sorted(PRESETS), help="checked against the checkpoint, which knows its size")
    parser.add_argument("--sample-dir", default="samples", help="folder that every process sees (default: %(default)s)")
    parser.add_argument("--num-fid-samples", type=int, default=50000, help="images, exactly (default: %(default)s)")
    parser.add_argument("--per-proc-batch-size", type=int, help="default: 256 on a GPU, 16 on a CPU")
    parser.add_argument("--cfg-scale", type=float, default=4.5, help="1 = no guidance; published: 4.5, L 4.6")
    parser.add_argument("--cfg-schedule", choices=("linear", "constant"), default="linear")
    parser.add_argument("--num-sampling-steps", type=int, default=100, help="per token, and a last one of 0.04")
    parser.add_argument("--sampler", choices=("sde", "ode"), default="sde")
    parser.add_argument("--global-seed", type=int, default=0)
    parser.add_argument(
        "--labels",
        choices=("random", "balanced"),
        default="random",
        help="random: uniform (published); balanced: equally many of each class, shuffled",
    )
    parser.add_argument("--class-ids", help="only these classes in turn, such as 207,360 (instead of --labels)")
    parser.add_argument("--to-npz", action="store_true", help="join the shards into SAMPLE_DIR/samples.npz at the end")
    parser.add_argument("--save-images", metavar="DIR", help="also write DIR/000000.png, ...")
    parser.add_argument("--mixed-precision", choices=("none", "bf16"), help="default: bf16 on a GPU, none on a CPU")
    parser.add_argument("--tf32", action="store_true", help="allow TF32 in float32 products on a GPU")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile and CUDA graphs (default: on a GPU); --no-compile: PyTorch's plain operators, "
        "on a CPU too, where otherwise large models get faster linear layers",
    )
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace, model: SphereAR) -> None:
    """ValueError naming flag, value and remedy for what the parser cannot know."""
    for flag in ("num_fid_samples", "per_proc_batch_size", "num_sampling_steps"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag)} must be at least 1")
    if not 1 <= args.cfg_scale < math.inf:
        raise ValueError(f"--cfg-scale {args.cfg_scale} must be at least 1 (1 = no guidance), and finite")
    if not 0 <= args.global_seed < 2**64:
        raise ValueError(f"--global-seed {args.global_seed} must lie in 0 to 2^64 - 1")
    if args.class_ids is not None:
        try:
            args.class_ids = [int(word) for word in args.class_ids.split(",")]
        except ValueError:
            raise ValueError(f"--class-ids {args.class_ids} must be numbers with commas, such as 207,360") from None
        wrong = [label for label in args.class_ids if not 0 <= label < model.config.num_classes]
        if wrong:
            raise ValueError(f"--class-ids {wrong[0]} must lie in 0 to {model.config.num_classes - 1}")
    if args.model and _size(PRESETS[args.model]) != _size(model.config):
        fitting = [name for name, preset in PRESETS.items() if _size(preset) == _size(model.config)]
        raise ValueError(f"--model {args.model} does not fit --ckpt {args.ckpt}, which is {fitting or 'of no preset'}")


def _size(config) -> tuple:
    return config.num_layers, config.width, config.num_heads, config.head_blocks, config.head_width


# ---- one result, whatever the machine --------------------------------------------------------------------------------


def make_labels(args: argparse.Namespace, num_classes: int) -> np.ndarray:
    """The class of every image, int64 (num_fid_samples,)."""
    images = torch.arange(args.num_fid_samples)
    if args.class_ids is not None:
        return np.resize(np.array(args.class_ids), args.num_fid_samples)
    drawn = words(args.global_seed, Purpose.LABELS, images, count=2).numpy()
    if args.labels == "random":
        return drawn[:, 0] * num_classes >> 32
    labels = np.empty(args.num_fid_samples, np.int64)
    labels[np.lexsort(drawn.T)] = np.arange(args.num_fid_samples) % num_classes
    return labels


def image_noise(
    seed: int,
    images: Tensor,
    num_steps: int,
    channels: int,
    draw: Callable = normals,
    on_token: Callable = lambda: None,
) -> Callable[[int, int], Tensor]:
    """The noise source of a batch for `generate_tokens`: every value addressed by (seed, image, token, step).

    on_token() is called each time a token's noise is asked for.
    """
    steps = torch.arange(num_steps + 1, device=images.device)[:, None]

    def noise(token: int, rows: int) -> Tensor:  # (steps + 1, rows, C)
        on_token()
        token = torch.full((), token, device=images.device)  # a tensor: a compiled `draw` is compiled once
        purposes = (Purpose.SAMPLING, Purpose.SAMPLING_NULL)[: rows // len(images)]
        return torch.cat(
            [draw(seed, purpose, images, steps, token, count=channels, device=images.device) for purpose in purposes], 1
        )

    return noise


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, 3, S, S) in [-1, 1] -> uint8 (B, S, S, 3), in float32 (bf16 would be biased by 0.4 grey levels)."""
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def decode(model: SphereAR, tokens: Tensor, first: int = 0) -> np.ndarray:
    """Tokens (B, P, C) -> uint8 images (B, S, S, 3), a few at a time: memory does not grow with the batch.

    FloatingPointError names the image, counted from `first`, whose tokens or pixels are not finite.
    """
    chunk = max(1, DECODE_PIXELS[tokens.device.type] // model.config.svae.image_size**2)
    images = []
    for part in tokens.split(chunk):
        decoded = model.vae.decode(part)
        finite = part.isfinite().flatten(1).all(1) & decoded.isfinite().flatten(1).all(1)
        if not finite.all():
            raise FloatingPointError(f"image {first + int(finite.int().argmin())} has values that are not finite")
        first += len(part)
        images.append(to_uint8(decoded))
    return np.concatenate(images)


# ---- never lost ------------------------------------------------------------------------------------------------------


def settings_of(args: argparse.Namespace, model: SphereAR) -> dict:
    """What defines the images of a run, by flag, as JSON gives it back."""
    digest = hashlib.sha256()
    with open(args.ckpt, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    flags = ("num_fid_samples", "cfg_scale", "cfg_schedule", "num_sampling_steps", "sampler", "global_seed", "labels")
    flags += ("class_ids", "mixed_precision", "tf32")
    settings = {f"--{flag.replace('_', '-')}": getattr(args, flag) for flag in flags}
    return json.loads(json.dumps({"--ckpt sha256": digest.hexdigest(), "config": asdict(model.config), **settings}))


def batch_rows(args: argparse.Namespace, missing: list[Range]) -> int:
    """Images in a batch: as asked, or fewer where not even every process's first one would be full."""
    return min(args.per_proc_batch_size, -(-sum(stop - start for start, stop in missing) // distributed.world_size()))


def batches_of(missing: list[Range], batch_size: int, rank: int, world_size: int) -> list[Range]:
    """This process's batches: runs of at most batch_size neighbouring images, dealt out in turn."""
    batches = [(at, min(at + batch_size, stop)) for start, stop in missing for at in range(start, stop, batch_size)]
    return batches[rank::world_size]


def agree(function: Callable):
    """`function()` of rank 0, as result or as ValueError, on every process."""
    outcome = None, None
    if distributed.is_main():
        try:
            outcome = function(), None
        except (ValueError, OSError) as error:
            outcome = None, ValueError(str(error))
    result, error = distributed.gather_objects(outcome)[0]
    if error:
        raise error
    return result


# ---- the run ---------------------------------------------------------------------------------------------------------


def sample_batch(
    args: argparse.Namespace, model: SphereAR, labels: np.ndarray, batch: Range, rows: int, on_token: Callable
) -> np.ndarray:
    """The images of a batch, uint8 (n, S, S, 3). With static shapes the batch is filled up to `rows` with others."""
    device = model.pos_for_diff.weight.device
    start, stop = batch
    images = np.arange(start, start + rows if args.compile else stop)
    noise = image_noise(
        args.global_seed,
        torch.from_numpy(images).to(device),
        args.num_sampling_steps,
        model.config.latent_dim,
        draw=compiled_normals() if args.compile else normals,
        on_token=on_token,
    )
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, args.mixed_precision == "bf16"):
        tokens = model.generate_tokens(
            torch.from_numpy(labels[images % len(labels)]).to(device),
            cfg_scale=args.cfg_scale,
            cfg_schedule=args.cfg_schedule,
            num_sampling_steps=args.num_sampling_steps,
            last_step_size=LAST_STEP_SIZE,
            sampler=args.sampler,
            noise=noise,
        )
        return decode(model, tokens[: stop - start], start)


@cache
def compiled_normals() -> Callable:
    return torch.compile(normals, dynamic=False)


def sample_batches(args: argparse.Namespace, model: SphereAR, labels: np.ndarray, missing: list[Range]) -> None:
    """Sample this process's share of the missing images into shards, with a progress bar of the whole on rank 0."""
    world_size, total = distributed.world_size(), sum(stop - start for start, stop in missing)
    rows = batch_rows(args, missing)
    behind = None  # the event of the token before
    with tqdm(
        total=len(labels),
        initial=len(labels) - total,
        disable=not distributed.is_main(),
        bar_format="{l_bar}{bar}| {n:.0f}/{total} images [{elapsed}<{remaining}, {rate_noinv_fmt}]",
        unit=" images",
        mininterval=0.5 if sys.stderr.isatty() else 10,
    ) as progress:
        for start, stop in batches_of(missing, rows, distributed.rank(), world_size):
            share = (stop - start) * world_size / model.config.num_tokens

            def on_token(share: float = share) -> None:
                nonlocal behind
                progress.update(min(share, progress.total - progress.n))
                if torch.cuda.is_available():  # at most two tokens in the queue: a signal is not kept waiting
                    if behind is not None:
                        behind.synchronize()
                    behind = torch.cuda.Event()
                    behind.record()

            images = sample_batch(args, model, labels, (start, stop), rows, on_token)
            if args.save_images:
                save_images(Path(args.save_images), start, images)
            write_shard(Path(args.sample_dir) / "shards", start, images)


def save_images(folder: Path, start: int, images: np.ndarray) -> None:
    for index, image in enumerate(images, start):
        with atomic_file(folder / f"{index:06d}.png") as file:
            Image.fromarray(image).save(file, format="PNG")


def save_missing_images(folder: Path, total: int, read: Callable[[int], np.ndarray]) -> None:
    """`read(index)` gives an image as uint8 (1, S, S, 3)."""
    for index in range(total):
        if not (folder / f"{index:06d}.png").exists():
            save_images(folder, index, read(index))


def wait_for_shards(folder: Path, image_size: int, total: int) -> dict[Range, Path]:
    """The shards of all processes, once they cover every image. Polls the folder: signals get through, unlike in a
    collective; when another process fails, torchrun ends this one."""
    while missing_ranges(list(shards := finished_shards(folder, image_size)), total):
        time.sleep(0.5)
    return shards


def finish(
    args: argparse.Namespace, model: SphereAR, labels: np.ndarray, shards: dict[Range, Path], receipt: dict
) -> None:
    """On rank 0, with every image in a shard: missing PNGs, contact sheet, receipt, and the .npz."""
    folder, config = Path(args.sample_dir), model.config
    if args.save_images:
        save_missing_images(Path(args.save_images), len(labels), lambda index: read_image(shards, index)[None])
    rows = {label: [read_image(shards, i) for i in indices] for label, indices in layout(labels).items()}
    write_contact_sheet(folder / "contact_sheet.png", rows, config.num_classes)
    if receipt["images_in_last_run"] or not (folder / "samples.json").exists():
        write_json(folder / "samples.json", receipt)
    if args.to_npz:
        assemble(folder / "samples.npz", shards, labels, config.svae.image_size)
        shutil.rmtree(folder / "shards")
    result = folder / ("samples.npz" if args.to_npz else "shards")
    print(f"{len(labels)} images in {result}; contact sheet {folder / 'contact_sheet.png'}", flush=True)


def make_receipt(args: argparse.Namespace, settings: dict, device: torch.device, made: int, seconds: float) -> dict:
    """What somebody needs to make these images again, and how fast they were made."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = (
        subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() if shutil.which("git") else ""
    )
    return {
        "checkpoint": os.path.abspath(args.ckpt),
        "settings": settings,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "commit": commit or None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "processes": distributed.world_size(),
        "batch_size_per_process": args.per_proc_batch_size,
        "compile": bool(args.compile),
        "linear_ways": read_json(Path(args.sample_dir) / "run.json").get("linear_ways", {}),
        "images_in_last_run": made,
        "seconds_of_last_run": round(seconds, 2),
        "images_per_second": round(made / seconds, 4) if made else None,
    }


def prepare(
    args: argparse.Namespace, device: torch.device, stack: ExitStack
) -> tuple[SphereAR, np.ndarray, dict, list[Range]]:
    """Model, labels, settings and missing images: checks everything before the first image, alike on every process."""
    on_gpu = device.type == "cuda"
    args.per_proc_batch_size = (256 if on_gpu else 16) if args.per_proc_batch_size is None else args.per_proc_batch_size
    args.mixed_precision = args.mixed_precision or ("bf16" if on_gpu else "none")
    args.compile = True if on_gpu and args.compile is None else args.compile
    model = load_checkpoint(args.ckpt, device)
    if not isinstance(model, SphereAR):
        raise ValueError(f"--ckpt {args.ckpt} is an S-VAE; sampling needs a SphereAR checkpoint")
    check_args(args, model)
    if args.mixed_precision == "bf16":
        cast_weights(model, torch.bfloat16)
    trunk = torch.nn.ModuleList([model.layers, model.head])
    folder = Path(args.sample_dir)

    def plan():
        settings = settings_of(args, model)
        if args.save_images:
            Path(args.save_images).mkdir(parents=True, exist_ok=True)
        stored = open_run(folder, settings, stack)
        if (folder / "samples.npz").exists():
            return settings, [], 0, {}
        shards = finished_shards(folder / "shards", model.config.svae.image_size)
        missing = missing_ranges(list(shards), args.num_fid_samples)
        rows = batch_rows(args, missing) * (2 if args.cfg_scale > 1 else 1)
        ways = stored.get("linear_ways", {})  # by rows: a continued run keeps to them, for the same bits
        if missing and args.compile is None and sum(p.numel() for p in trunk.parameters()) > LARGE:
            if str(rows) not in ways:
                ways[str(rows)] = choose_ways(trunk, rows)
                write_json(folder / "run.json", {**stored, "linear_ways": ways})
            return settings, missing, rows, ways[str(rows)]
        return settings, missing, rows, {}

    settings, missing, rows, ways = agree(plan)
    if not (folder / "run.json").exists():
        raise ValueError(f"--sample-dir {folder} is not seen by every process; choose a shared folder")
    use_ways(trunk, ways, rows)
    if args.compile:
        make_static(model)
    return model, make_labels(args, model.config.num_classes), settings, missing


def run(args: argparse.Namespace, stack: ExitStack) -> None:
    device = distributed.init()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    model, labels, settings, missing = prepare(args, device, stack)
    made = sum(stop - start for start, stop in missing)
    if (Path(args.sample_dir) / "samples.npz").exists():
        shutil.rmtree(Path(args.sample_dir) / "shards", ignore_errors=True)
        if args.save_images and distributed.is_main():
            reader = NpzReader(Path(args.sample_dir) / "samples.npz")
            save_missing_images(Path(args.save_images), reader.count, lambda index: reader.read(index, index + 1))
        return distributed.print0(f"{args.sample_dir}/samples.npz is already complete")
    distributed.print0(f"{len(labels)} images, {len(labels) - made} of them finished before, on {device.type}")
    start = time.perf_counter()
    sample_batches(args, model, labels, missing)
    if distributed.is_main():
        shards = wait_for_shards(Path(args.sample_dir) / "shards", model.config.svae.image_size, len(labels))
        receipt = make_receipt(args, settings, device, made, time.perf_counter() - start)
        finish(args, model, labels, shards, receipt)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    raise_on_signals()
    # bf16 on a CPU: the norms' weights stay float32
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight", UserWarning, "torch")
    try:
        with ExitStack() as stack:
            run(args, stack)
    except ValueError as error:  # alike on every process
        distributed.print0(f"sample_ddp.py: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"sample_ddp.py: error: {error}", file=sys.stderr, flush=True)
        return 1
    except FloatingPointError as error:
        remedy = "use --mixed-precision none or another checkpoint"
        print(f"sample_ddp.py: error: --ckpt {args.ckpt}: {error}; {remedy}", file=sys.stderr, flush=True)
        return 1
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        print(f"sample_ddp.py: error: {reason} Lower --per-proc-batch-size.", file=sys.stderr, flush=True)
        return 1
    except Stopped as stopped:
        distributed.print0("\nstopped; finished batches are kept: the same command continues", file=sys.stderr)
        return 128 + stopped.signum
    distributed.cleanup()
    return 0


if __name__ == "__main__":
    sys.exit(main())
