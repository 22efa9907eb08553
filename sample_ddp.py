"""Class-conditional samples of a SphereAR checkpoint, on any number of processes, as one .npz for the evaluator.

    python sample_ddp.py --ckpt SphereAR_B.pt --num-fid-samples 16 --class-ids 207,360
    torchrun --nproc_per_node=8 sample_ddp.py --model SphereAR-L --ckpt SphereAR_L.pt --cfg-scale 4.6 --to-npz

Image i depends on (checkpoint, seed, i, settings) alone, not on processes, batch size or interruptions. Finished
batches are kept as shards in the sample folder: the same command continues a run that was stopped.
"""

import sys

if __name__ == "__main__":
    from utils.early import end_when_told

    end_when_told()

import argparse
import json
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import models
from models import PRESETS, SVAE, Phases, SamplingSettings, SphereAR, SphereARConfig
from models.flow import CFG_SCHEDULES
from models.generation import watch_nothing
from models.samplers import SAMPLERS
from utils import checkpoint_file, distributed, script
from utils.evaluation.npz_reader import NpzReader
from utils.evaluation.png_folder import PngFolder
from utils.files import read_json, write_json
from utils.images import layout, png_path, to_float, to_uint8, write_contact_sheet, write_missing_pngs, write_png
from utils.noise import normals
from utils.provenance import provenance
from utils.sampling import draws, few_rows, graphs, run_folder, shards
from utils.sampling.shards import Range

PUBLISHED, NUM_SAMPLES = SamplingSettings(), 50_000
WAIT_SECONDS = 1800  # for another process
Images = NpzReader | PngFolder
Observer = Callable[[int, Tensor, Tensor], None]  # (position, raw, token), see generate_tokens

__all__ = ["decode", "encode", "generate", "load", "main"]


def class_ids(text: str) -> list[int]:
    """The value of --class-ids: 207,360 -> [207, 360]."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} must be numbers with commas, such as 207,360") from None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = script.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, at_least = parser.add_argument, script.at_least
    add(
        "--ckpt",
        required=True,
        help="a .pt, a .safetensors, or hf://OWNER/REPO/FILE; its EMA weights if it has any",
    )
    add("--model", choices=sorted(PRESETS), help="checked against the checkpoint, which knows its size")
    add("--sample-dir", default="samples", help="folder that every process sees (default: %(default)s)")
    add("--num-fid-samples", type=script.within(1, 10**7),
        help=f"images, exactly (default: {NUM_SAMPLES}; with --init-images one of each)")  # fmt: skip
    add("--per-proc-batch-size", type=at_least(1),
        help="default: on a CPU 16, on a GPU a power of two whose KV cache leaves a quarter of the free memory (80 GB: "
             "1024 for B, 512 for L and H)")  # fmt: skip
    add("--cfg-scale", type=at_least(1.0), default=PUBLISHED.cfg_scale, help="1 = no guidance; published: 4.5, L 4.6")
    add("--cfg-schedule", choices=CFG_SCHEDULES, default=PUBLISHED.cfg_schedule)
    add(
        "--num-sampling-steps",
        "--sample-steps",
        type=partial(script.one_or_two, script.within(1, 10**4)),
        default=PUBLISHED.num_sampling_steps,
        help="per token (default: %(default)s), or fewer and fewer: 50:20; sde and ode add a small last one, midpoint "
        "asks the head twice a step",
    )
    add("--sampler", choices=list(SAMPLERS), default=PUBLISHED.sampler)
    add("--global-seed", "--seed", type=script.SEED, default=0)
    add("--no-ema", action="store_true", help="sample the raw weights, not their moving average")
    labels = parser.add_mutually_exclusive_group().add_argument
    labels("--labels", choices=("random", "balanced"), default="random",
        help="random: uniform (published); balanced: equally many of each class, shuffled")  # fmt: skip
    labels("--class-ids", type=class_ids, help="only these classes in turn, such as 207,360 (instead of --labels)")
    add("--init-images", metavar="FILE", help="continue real images: an .npz (arr_0; arr_1 are then the labels, unless "
        "--class-ids says others) or a folder of PNGs")  # fmt: skip
    add("--keep-tokens", type=at_least(0), metavar="N", help="with --init-images: how many of their first tokens stay")
    add("--to-npz", action="store_true", help="join the shards into SAMPLE_DIR/samples.npz at the end")
    add("--save-images", metavar="DIR", help="also write DIR/000000.png, ...")
    add("--mixed-precision", choices=("none", "bf16"), help="default: bf16 on a GPU, none on a CPU")
    add("--reference-uint8", action="store_true",
        help="convert to bytes in bf16, as the released code does: 0.4 grey levels brighter")  # fmt: skip
    add("--tf32", action="store_true", help="allow TF32 in float32 products on a GPU")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile (default: on a GPU); --no-compile: PyTorch's plain operators, on a CPU too, where "
             "otherwise large models get faster linear layers")  # fmt: skip
    add("--cuda-graphs", action=argparse.BooleanOptionalAction,
        help="replay a token's kernels as CUDA graphs, compiled or not (default: on a GPU)")  # fmt: skip
    args = parser.parse_args(argv)
    if (args.init_images is None) != (args.keep_tokens is None):
        raise ValueError("--init-images and --keep-tokens: give both, the images and how many of their tokens are kept")
    return args


# ---- in Python: from sample_ddp import load, generate, encode, decode ----------------------------------------------


def load(path: str | Path | checkpoint_file.Examined, *, ema: bool = True) -> SphereAR | SVAE:
    """The model in a checkpoint, in eval mode and float32, on the CPU; its EMA weights if it has any and `ema` is set.

    path: a file whose every byte is checked first, or one that was `examine`d before. ValueError names what is wrong.
    """
    file = path if isinstance(path, checkpoint_file.Examined) else checkpoint_file.examine(path)
    return checkpoint_file.load_examined(file, partial(models.from_checkpoint, ema=ema))


def generate(
    model: SphereAR,
    labels: Sequence[int] | np.ndarray | Tensor,
    settings: SamplingSettings = PUBLISHED,
    *,
    seed: int = 0,
    prompt: Tensor | None = None,
) -> np.ndarray:
    """uint8 images (B, S, S, 3) of these classes (B,), as one batch: the command's images 0, 1, … with --global-seed.

    prompt: the first tokens (B, n, C) of the images, which are continued. Runs where the model is, in the precision of
    torch.autocast around it. ValueError for a label that the model does not have.
    """
    labels = torch.as_tensor(labels, device=device_of(model))
    if labels.dim() != 1 or not len(labels) or labels.is_floating_point():
        raise ValueError(f"labels must be whole numbers (B,), at least one, not {labels.dtype} {tuple(labels.shape)}")
    if not 0 <= labels.min() <= labels.max() <= model.config.null_class:
        raise ValueError(f"labels must lie in 0 to {model.config.null_class} (no class), not {labels.tolist()}")
    images = torch.arange(len(labels), device=labels.device)
    return decode(model, token_sampler(model, settings, seed)(images, labels, prompt))


def encode(model: SphereAR | SVAE, images: np.ndarray | Tensor) -> Tensor:
    """Tokens (B, P, C) of uint8 images (B, S, S, 3). ValueError for images of another type or size."""
    images = torch.as_tensor(images, device=device_of(model))
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise ValueError(f"images must be uint8 (B, S, S, 3), not {images.dtype} {tuple(images.shape)}")
    return models.encode(model, to_float(images.permute(0, 3, 1, 2)))


def decode(model: SphereAR | SVAE, tokens: Tensor, *, first: int = 0, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """uint8 images (B, S, S, 3) of tokens (B, P, C), rounded in `dtype`.

    FloatingPointError names an image, counted from `first`, whose tokens or pixels are not finite.
    """
    require_finite(tokens, first)
    images = []
    for part in models.decode(model, tokens):
        require_finite(part, first + sum(map(len, images)))
        images.append(to_uint8(part, dtype))
    return np.concatenate(images)


def token_sampler(
    model: SphereAR, settings: SamplingSettings, seed: int, compile: bool = False, cuda_graphs: bool = False
) -> Callable[..., Tensor]:
    """The function that makes the tokens (B, P, C) of a batch; with the last two, B must always be the same."""
    phases, draw = Phases.of(model, settings), normals
    if compile:
        phases, draw = Phases.of(model, settings, graphs.compile_pieces(model)), draws.compiled_normals()
    if compile or cuda_graphs:
        phases = graphs.static_phases(phases, model.config.num_class_tokens, cuda_graphs)

    def sample(
        images: Tensor, labels: Tensor, prompt: Tensor | None = None, observe: Observer = watch_nothing
    ) -> Tensor:
        """images: their numbers (B,), which address their noise; labels (B,)."""
        noise = draws.image_noise(seed, images, settings.num_noise, model.config.latent_dim, draw)
        return models.generate_tokens(model, labels, settings, noise, phases, observe, prompt)

    return sample


def require_finite(values: Tensor, first: int) -> None:
    finite = values.isfinite().flatten(1).all(1)
    if not finite.all():
        raise FloatingPointError(f"image {first + int(finite.int().argmin())} has values that are not finite")


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


# ---- what is sampled, and what of it is missing ------------------------------------------------------------------


def load_model(args: argparse.Namespace, file: checkpoint_file.Examined) -> SphereAR:
    """The model of --ckpt. ValueError for another kind, or another size than --model says."""
    model = load(file, ema=not args.no_ema)
    if not isinstance(model, SphereAR):
        raise ValueError(f"--ckpt {args.ckpt} is an S-VAE; sampling needs a SphereAR checkpoint")
    fitting = models.preset_of(model.config)
    if args.model not in (None, fitting):
        raise ValueError(f"--model {args.model} does not fit --ckpt {args.ckpt}, which is {fitting or 'of no preset'}")
    return model


def open_init_images(args: argparse.Namespace, config: SphereARConfig) -> Images:
    """The images of --init-images. ValueError where they, or --keep-tokens, do not fit the model."""
    path, size = args.init_images, config.svae.image_size
    images = PngFolder(path) if Path(path).is_dir() else NpzReader(path)
    if (images.count, images.height, images.width) != (images.count or 1, size, size):
        told = f"{images.count} images of {images.height} x {images.width}"
        raise ValueError(f"--init-images {args.init_images}: has {told}; the model's are {size} x {size}")
    if images.labels is not None and not 0 <= images.labels.min() <= images.labels.max() < config.num_classes:
        raise ValueError(f"--init-images {args.init_images}: its labels must lie in 0 to {config.num_classes - 1}")
    if args.keep_tokens > config.num_tokens:
        raise ValueError(f"--keep-tokens {args.keep_tokens}: an image has {config.num_tokens} tokens")
    return images


def labels_of(args: argparse.Namespace, config: SphereARConfig, init: Images | None) -> np.ndarray:
    """The class of every image: its own where it begins as one of --init-images that has one, else as asked for."""
    if args.labels == "arr_1":
        return np.resize(init.labels.astype(np.int64), args.num_fid_samples)
    return draws.make_labels(args.labels, args.num_fid_samples, config.num_classes, args.global_seed, args.class_ids)


def settings_of(args: argparse.Namespace, config: SphereARConfig, ckpt_sha256: str, init: Images | None) -> dict:
    """What defines the images of a run, by flag, as JSON gives it back. Later flags only where they are set."""
    flags = ["num_fid_samples", "cfg_scale", "cfg_schedule", "num_sampling_steps", "sampler", "global_seed", "labels"]
    flags += ["class_ids", "mixed_precision", "reference_uint8", "tf32"]
    flags += [flag for flag in ("no_ema", "keep_tokens") if getattr(args, flag) not in (None, False)]
    settings = {f"--{flag.replace('_', '-')}": getattr(args, flag) for flag in flags}
    if isinstance(args.num_sampling_steps, tuple):
        settings["--num-sampling-steps"] = ":".join(map(str, args.num_sampling_steps))
    if args.class_ids is not None:
        settings["--labels"] = None
    if init is not None:
        settings["--init-images sha256"] = init.sha256()
    return json.loads(json.dumps({"--ckpt sha256": ckpt_sha256, "config": asdict(config), **settings}))


class Plan(NamedTuple):
    missing: list[Range]
    batch_size: int  # as asked, or less where not even every process's first batch would be full
    ways: dict[str, str]  # of linear layers, see few_rows

    @property
    def count(self) -> int:
        """How many images are missing."""
        return sum(stop - start for start, stop in self.missing)


def make_plan(args: argparse.Namespace, settings: dict, image_size: int, trunk: nn.Module, stack: ExitStack) -> Plan:
    """On rank 0: make --sample-dir this run's, look at every byte that is there, and say what is missing."""
    folder = Path(args.sample_dir)
    stored = run_folder.open_run(folder, settings, stack)
    if args.save_images:
        run_folder.claim_pngs(Path(args.save_images), settings)
    if (folder / "samples.npz").exists():
        shards.check_npz(folder / "samples.npz", stored.get("samples.npz"))
        return Plan([], 0, {})
    key = run_folder.key_of(settings)
    finished, rejected = shards.verified_shards(folder / "shards", image_size, args.num_fid_samples, key)
    if rejected:
        print(f"{rejected[0]}: damaged, or of another run; set aside with {len(rejected) - 1} others", flush=True)
    plan = Plan(shards.missing_ranges(list(finished), args.num_fid_samples), args.per_proc_batch_size, {})
    plan = plan._replace(batch_size=min(plan.batch_size, -(-plan.count // distributed.world_size())))
    if not plan.missing or args.compile is not None or not few_rows.is_large(trunk):
        return plan
    ways = stored.get("linear_ways", {})  # a continued run keeps to them, for the same bits
    rows = rows_of(args, plan.batch_size)
    if str(rows) not in ways:
        ways[str(rows)] = few_rows.choose_ways(trunk, rows)
        run_folder.note(folder, {"linear_ways": ways})
    return plan._replace(ways=ways[str(rows)])


def rows_of(args: argparse.Namespace, batch_size: int) -> int:
    """Rows that a linear layer gets: with guidance each image has a null-class row."""
    return batch_size * (2 if args.cfg_scale > 1 else 1)


def default_batch_size(args: argparse.Namespace, config: SphereARConfig, device: torch.device) -> int:
    """On a CPU 16; on a GPU, with the model there, what its free memory allows."""
    if device.type != "cuda":
        return 16
    bytes_per_image = config.cache_bytes(rows_of(args, 1), script.DTYPES[args.mixed_precision])
    return graphs.batch_that_fits(bytes_per_image, torch.cuda.mem_get_info(device)[0])


# ---- my batches -> tokens -> pixels -> shards --------------------------------------------------------------------


def sample_batches(
    args: argparse.Namespace, model: SphereAR, labels: np.ndarray, init: Images | None, plan: Plan, key: int
) -> None:
    """Sample this process's share of the missing images into shards, with a progress bar of the whole on rank 0."""
    world_size, throttle, device = distributed.world_size(), graphs.Throttle(), device_of(model)
    settings = SamplingSettings(args.cfg_scale, args.cfg_schedule, args.sampler, args.num_sampling_steps)
    sample = token_sampler(model, settings, args.global_seed, args.compile, args.cuda_graphs)
    dtype = torch.bfloat16 if args.reference_uint8 else torch.float32
    with (
        shards.Writer() as writer,
        tqdm(
            total=len(labels),
            initial=len(labels) - plan.count,
            disable=not distributed.is_main(),
            bar_format="{l_bar}{bar}| {n:.1f}/{total} images [{elapsed}<{remaining}, {rate_fmt}]",
            unit=" image",
            mininterval=0.5 if sys.stderr.isatty() else 10,
        ) as progress,
    ):
        for start, stop in shards.batches_of(plan.missing, plan.batch_size, distributed.rank(), world_size):
            share = (stop - start) * world_size / model.config.num_tokens

            def observe(position: int, raw: Tensor, token: Tensor, share: float = share) -> None:
                progress.update(min(share, progress.total - progress.n))
                throttle()

            # a batch of static shapes is filled up with other images
            images = np.arange(start, start + plan.batch_size if args.compile or args.cuda_graphs else stop)
            on_device = torch.from_numpy(images).to(device), torch.from_numpy(labels[images % len(labels)]).to(device)
            try:
                with script.autocast(device, args.mixed_precision):
                    prompt = None if init is None else first_tokens(model, init, images, args.keep_tokens)
                    tokens = sample(*on_device, prompt, observe)
                    pixels = decode(model, tokens, first=start, dtype=dtype)[: stop - start]
            except FloatingPointError as error:
                remedy = "" if args.mixed_precision == "none" else "--mixed-precision none or "
                raise FloatingPointError(f"--ckpt {args.ckpt}: {error}; use {remedy}another checkpoint") from None
            writer.call(write_batch, args, start, pixels, key)


def write_batch(args: argparse.Namespace, start: int, pixels: np.ndarray, key: int) -> None:
    """Images start, start + 1, …: as PNGs if they are asked for, and as a shard."""
    for index, image in enumerate(pixels if args.save_images else ()):
        write_png(png_path(args.save_images, start + index), image)
    shards.write_shard(Path(args.sample_dir) / "shards", start, pixels, key)


def first_tokens(model: SphereAR, init: Images, images: np.ndarray, count: int) -> Tensor:
    """The first tokens (B, count, C) of the images in --init-images, in turn, that these (B,) continue."""
    return encode(model, np.concatenate([init.read(i, i + 1) for i in images % init.count]))[:, :count]


# ---- shards -> results -------------------------------------------------------------------------------------------


def finish(
    args: argparse.Namespace, config: SphereARConfig, labels: np.ndarray, finished: dict[Range, Path], receipt: dict
) -> None:
    """On rank 0, with every image in a shard or in the .npz: the receipt, the .npz, PNGs and the contact sheet."""
    folder, new = Path(args.sample_dir), receipt["images_in_last_run"] > 0
    if new or not (folder / "samples.json").exists():
        write_json(folder / "samples.json", receipt)
    where, read = gather(args, config, labels, finished, run_folder.key_of(receipt["settings"]))
    print(f"{len(labels)} images in {where}", flush=True)
    if args.save_images:
        write_missing_pngs(Path(args.save_images), len(labels), read)
    sheet = folder / "contact_sheet.png"
    if new or not sheet.exists():
        rows = {label: [read(i) for i in indices] for label, indices in layout(labels).items()}
        write_contact_sheet(sheet, rows, config.num_classes)
        print(f"contact sheet {sheet}", flush=True)


def gather(
    args: argparse.Namespace, config: SphereARConfig, labels: np.ndarray, finished: dict[Range, Path], key: int
) -> tuple[str, Callable[[int], np.ndarray]]:
    """Join the shards into the .npz if that is asked for. Where the images are, in words, and how image i is read."""
    folder = Path(args.sample_dir)
    npz, complete = folder / "samples.npz", (folder / "samples.npz").exists()
    if not complete and not args.to_npz:
        return str(folder / "shards"), partial(shards.read_image, finished)
    if not complete:
        shards.assemble(npz, finished, labels, config.svae.image_size, key, partial(run_folder.note, folder))
    shards.remove_shards(folder / "shards")
    reader = NpzReader(npz)
    return f"{npz}, already complete" if complete else str(npz), lambda i: reader.read(i, i + 1)[0]


def make_receipt(
    args: argparse.Namespace, ckpt: str, settings: dict, device: torch.device, made: int, seconds: float
) -> dict:
    """What somebody needs to make these images again, and how fast they were made."""
    stored = read_json(Path(args.sample_dir) / "run.json", "another program wrote to it")
    return {
        "checkpoint": ckpt,
        "settings": settings,
        **provenance(device),
        "processes": distributed.world_size(),
        "batch_size_per_process": args.per_proc_batch_size,
        "compile": bool(args.compile),
        "cuda_graphs": bool(args.cuda_graphs),
        "linear_ways": stored.get("linear_ways", {}),
        "images_in_last_run": made,
        "seconds_of_last_run": round(seconds, 2),
        "images_per_second": round(made / seconds, 4) if made else None,
    }


def run(args: argparse.Namespace) -> int:
    # bf16 on a CPU: the norms' weights stay float32
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight", UserWarning, "torch")
    device = distributed.init()
    on_gpu = device.type == "cuda"
    script.allow_tf32(products=args.tf32, convolutions=args.tf32)
    args.mixed_precision = script.choose_precision(args.mixed_precision, device)
    if args.cuda_graphs and not on_gpu:
        raise ValueError("--cuda-graphs: needs a GPU; leave it out")
    args.compile = True if on_gpu and args.compile is None else args.compile
    args.cuda_graphs = on_gpu if args.cuda_graphs is None else args.cuda_graphs
    file = distributed.from_main(lambda: checkpoint_file.examine(args.ckpt))
    with distributed.all_or_none():
        model = load_model(args, file).to(device)
        config, size = model.config, model.config.svae.image_size
        init = open_init_images(args, config) if args.init_images else None
        args.num_fid_samples = args.num_fid_samples or (NUM_SAMPLES if init is None else init.count)
        args.labels = "arr_1" if init is not None and init.labels is not None and not args.class_ids else args.labels
        labels = labels_of(args, config, init)
    if args.mixed_precision == "bf16":
        graphs.cast_weights(model, torch.bfloat16)
    args.per_proc_batch_size = args.per_proc_batch_size or default_batch_size(args, config, device)
    trunk, settings = nn.ModuleList([model.layers, model.head]), settings_of(args, config, file.sha256, init)

    with ExitStack() as stack:
        plan = distributed.from_main(lambda: make_plan(args, settings, size, trunk, stack))
        with distributed.all_or_none():
            if not Path(args.sample_dir, "run.json").exists():
                raise ValueError(f"--sample-dir {args.sample_dir} is not seen by every process; choose a shared folder")
        start, finished = time.perf_counter(), {}
        if plan.missing:
            before = len(labels) - plan.count
            distributed.print0(f"{len(labels)} images, {before} of them finished before, on {device.type}")
            few_rows.use_ways(trunk, plan.ways, rows_of(args, plan.batch_size))
            sample_batches(args, model, labels, init, plan, run_folder.key_of(settings))
        if distributed.is_main():
            if not Path(args.sample_dir, "samples.npz").exists():
                patience = WAIT_SECONDS + time.perf_counter() - start  # the others' shares take as long as this one
                finished = shards.wait_for_shards(Path(args.sample_dir, "shards"), size, len(labels), patience)
            receipt = make_receipt(args, file.path, settings, device, plan.count, time.perf_counter() - start)
            finish(args, config, labels, finished, receipt)
    return script.DONE


def main(argv: list[str] | None = None) -> int:
    return script.run(
        "sample_ddp.py", parse_args, run, argv,
        when_stopped="finished batches are kept: the same command continues",
        out_of_memory="Lower --per-proc-batch-size.",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
