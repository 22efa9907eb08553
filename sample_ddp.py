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
from collections.abc import Callable
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
from models import PRESETS, Phases, SamplingSettings, SphereAR, SphereARConfig
from models.flow import CFG_SCHEDULES
from models.samplers import SAMPLERS
from utils import checkpoint_file, distributed, script
from utils.evaluation.npz_reader import NpzReader
from utils.files import read_json, write_json
from utils.images import layout, png_path, to_uint8, write_contact_sheet, write_missing_pngs, write_png
from utils.noise import normals
from utils.provenance import provenance
from utils.sampling import draws, few_rows, graphs, run_folder, shards
from utils.sampling.shards import Range

PUBLISHED = SamplingSettings()
WAIT_SECONDS = 1800  # for another process


def class_ids(text: str) -> list[int]:
    """The value of --class-ids: 207,360 -> [207, 360]."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} must be numbers with commas, such as 207,360") from None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = script.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, at_least = parser.add_argument, script.at_least
    add("--ckpt", required=True, help="checkpoint; its EMA weights are used when it has them")
    add("--model", choices=sorted(PRESETS), help="checked against the checkpoint, which knows its size")
    add("--sample-dir", default="samples", help="folder that every process sees (default: %(default)s)")
    add("--num-fid-samples", type=script.within(1, 10**7), default=50000, help="images, exactly (default: %(default)s)")
    add("--per-proc-batch-size", type=at_least(1), help="default: 256 on a GPU, 16 on a CPU")
    add("--cfg-scale", type=at_least(1.0), default=PUBLISHED.cfg_scale, help="1 = no guidance; published: 4.5, L 4.6")
    add("--cfg-schedule", choices=CFG_SCHEDULES, default=PUBLISHED.cfg_schedule)
    add(
        "--num-sampling-steps",
        type=script.within(1, 10**4),
        default=PUBLISHED.num_sampling_steps,
        help="per token (default: %(default)s); sde and ode add a small last one, midpoint asks the head twice a step",
    )
    add("--sampler", choices=list(SAMPLERS), default=PUBLISHED.sampler)
    add("--global-seed", type=script.SEED, default=0)
    labels = parser.add_mutually_exclusive_group().add_argument
    labels("--labels", choices=("random", "balanced"), default="random",
        help="random: uniform (published); balanced: equally many of each class, shuffled")  # fmt: skip
    labels("--class-ids", type=class_ids, help="only these classes in turn, such as 207,360 (instead of --labels)")
    add("--to-npz", action="store_true", help="join the shards into SAMPLE_DIR/samples.npz at the end")
    add("--save-images", metavar="DIR", help="also write DIR/000000.png, ...")
    add("--mixed-precision", choices=("none", "bf16"), help="default: bf16 on a GPU, none on a CPU")
    add("--reference-uint8", action="store_true",
        help="convert to bytes in bf16, as the released code does: 0.4 grey levels brighter")  # fmt: skip
    add("--tf32", action="store_true", help="allow TF32 in float32 products on a GPU")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile and CUDA graphs (default: on a GPU); --no-compile: PyTorch's plain operators, "
             "on a CPU too, where otherwise large models get faster linear layers")  # fmt: skip
    return parser.parse_args(argv)


# ---- what is sampled, and what of it is missing ------------------------------------------------------------------


def load_model(args: argparse.Namespace, file: checkpoint_file.Examined) -> SphereAR:
    """The model of --ckpt in float32, on the CPU. ValueError for another kind, or another size than --model says."""
    model = checkpoint_file.load_examined(file, models.from_checkpoint)
    if not isinstance(model, SphereAR):
        raise ValueError(f"--ckpt {args.ckpt} is an S-VAE; sampling needs a SphereAR checkpoint")
    if args.model and size_of(PRESETS[args.model]) != size_of(model.config):
        fitting = [name for name, preset in PRESETS.items() if size_of(preset) == size_of(model.config)]
        raise ValueError(
            f"--model {args.model} does not fit --ckpt {args.ckpt}, which is {', '.join(fitting) or 'of no preset'}"
        )
    return model


def size_of(config: SphereARConfig) -> tuple[int, ...]:
    return config.num_layers, config.width, config.num_heads, config.head_blocks, config.head_width


def settings_of(args: argparse.Namespace, config: SphereARConfig, ckpt_sha256: str) -> dict:
    """What defines the images of a run, by flag, as JSON gives it back."""
    flags = ("num_fid_samples", "cfg_scale", "cfg_schedule", "num_sampling_steps", "sampler", "global_seed", "labels")
    flags += ("class_ids", "mixed_precision", "reference_uint8", "tf32")
    settings = {f"--{flag.replace('_', '-')}": getattr(args, flag) for flag in flags}
    settings |= {} if args.class_ids is None else {"--labels": None}
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
    rows, ways = rows_of(args, plan), stored.get("linear_ways", {})  # a continued run keeps to them, for the same bits
    if str(rows) not in ways:
        ways[str(rows)] = few_rows.choose_ways(trunk, rows)
        run_folder.note(folder, {"linear_ways": ways})
    return plan._replace(ways=ways[str(rows)])


def rows_of(args: argparse.Namespace, plan: Plan) -> int:
    """Rows that a linear layer gets: with guidance each image has a null-class row."""
    return plan.batch_size * (2 if args.cfg_scale > 1 else 1)


# ---- my batches -> tokens -> pixels -> shards --------------------------------------------------------------------


def batch_sampler(args: argparse.Namespace, model: SphereAR, labels: np.ndarray, size: int) -> Callable:
    """The function that makes the images of a batch. With --compile, batches are filled up to `size` with others."""
    device = model.pos_for_diff.weight.device
    settings = SamplingSettings(args.cfg_scale, args.cfg_schedule, args.sampler, args.num_sampling_steps)
    phases, draw = Phases.of(model, settings), normals
    if args.compile:
        sampler = graphs.compile_pieces(model, SAMPLERS[settings.sampler])
        phases = graphs.static_phases(Phases.of(model, settings, sampler), model.config.num_class_tokens)
        draw = draws.compiled_normals()

    def sample(batch: Range, observe: Callable[[int, Tensor, Tensor], None]) -> np.ndarray:
        """uint8 (n, S, S, 3). FloatingPointError names an image whose tokens or pixels are not finite."""
        start, stop = batch
        images = np.arange(start, start + size if args.compile else stop)
        on_device = torch.from_numpy(images).to(device), torch.from_numpy(labels[images % len(labels)]).to(device)
        noise = draws.image_noise(args.global_seed, on_device[0], settings.num_noise, model.config.latent_dim, draw)
        pixels = []
        with script.autocast(device, args.mixed_precision):
            tokens = models.generate_tokens(model, on_device[1], settings, noise, phases, observe)[: stop - start]
            require_finite(tokens, start, args)
            for part in models.decode(model, tokens):
                require_finite(part, start + sum(map(len, pixels)), args)
                pixels.append(to_uint8(part, torch.bfloat16 if args.reference_uint8 else torch.float32))
        return np.concatenate(pixels)

    return sample


def require_finite(values: Tensor, first: int, args: argparse.Namespace) -> None:
    finite = values.isfinite().flatten(1).all(1)
    if not finite.all():
        raise FloatingPointError(
            f"--ckpt {args.ckpt}: image {first + int(finite.int().argmin())} has values that are not finite; use "
            f"{'' if args.mixed_precision == 'none' else '--mixed-precision none or '}another checkpoint"
        )


def sample_batches(args: argparse.Namespace, model: SphereAR, labels: np.ndarray, plan: Plan, key: int) -> None:
    """Sample this process's share of the missing images into shards, with a progress bar of the whole on rank 0."""
    world_size, throttle = distributed.world_size(), graphs.Throttle()
    sample = batch_sampler(args, model, labels, plan.batch_size)
    with tqdm(
        total=len(labels),
        initial=len(labels) - plan.count,
        disable=not distributed.is_main(),
        bar_format="{l_bar}{bar}| {n:.0f}/{total} images [{elapsed}<{remaining}, {rate_noinv_fmt}]",
        unit=" images",
        mininterval=0.5 if sys.stderr.isatty() else 10,
    ) as progress:
        for start, stop in shards.batches_of(plan.missing, plan.batch_size, distributed.rank(), world_size):
            share = (stop - start) * world_size / model.config.num_tokens

            def observe(position: int, raw: Tensor, token: Tensor, share: float = share) -> None:
                progress.update(min(share, progress.total - progress.n))
                throttle()

            images = sample((start, stop), observe)
            for index, image in enumerate(images if args.save_images else ()):
                write_png(png_path(args.save_images, start + index), image)
            shards.write_shard(Path(args.sample_dir) / "shards", start, images, key)


# ---- shards -> results -------------------------------------------------------------------------------------------


def finish(
    args: argparse.Namespace, config: SphereARConfig, labels: np.ndarray, finished: dict[Range, Path], receipt: dict
) -> None:
    """On rank 0, with every image in a shard or in the .npz: whatever else there shall be."""
    folder, new = Path(args.sample_dir), receipt["images_in_last_run"] > 0
    npz, sheet = folder / "samples.npz", folder / "contact_sheet.png"
    if new or not (folder / "samples.json").exists():
        write_json(folder / "samples.json", receipt)
    complete = npz.exists()
    if args.to_npz and not complete:
        key, record = run_folder.key_of(receipt["settings"]), partial(run_folder.note, folder)
        shards.assemble(npz, finished, labels, config.svae.image_size, key, record)
    if npz.exists():
        shards.remove_shards(folder / "shards")
        reader = NpzReader(npz)
    read = (lambda i: reader.read(i, i + 1)[0]) if npz.exists() else (lambda i: shards.read_image(finished, i))
    where = f"{npz}, already complete" if complete else npz if npz.exists() else folder / "shards"
    print(f"{len(labels)} images in {where}", flush=True)
    if args.save_images:
        write_missing_pngs(Path(args.save_images), len(labels), read)
    if new or not sheet.exists():
        rows = {label: [read(i) for i in indices] for label, indices in layout(labels).items()}
        write_contact_sheet(sheet, rows, config.num_classes)
        print(f"contact sheet {sheet}", flush=True)


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
    args.per_proc_batch_size = args.per_proc_batch_size or (256 if on_gpu else 16)
    args.mixed_precision = script.choose_precision(args.mixed_precision, device)
    args.compile = True if on_gpu and args.compile is None else args.compile
    file = distributed.from_main(lambda: checkpoint_file.examine(args.ckpt))
    with distributed.all_or_none():
        model = load_model(args, file).to(device)
        config, size = model.config, model.config.svae.image_size
        classes, seed = config.num_classes, args.global_seed
        labels = draws.make_labels(args.labels, args.num_fid_samples, classes, seed, args.class_ids)
    if args.mixed_precision == "bf16":
        graphs.cast_weights(model, torch.bfloat16)
    trunk, settings = nn.ModuleList([model.layers, model.head]), settings_of(args, config, file.sha256)

    with ExitStack() as stack:
        plan = distributed.from_main(lambda: make_plan(args, settings, size, trunk, stack))
        with distributed.all_or_none():
            if not Path(args.sample_dir, "run.json").exists():
                raise ValueError(f"--sample-dir {args.sample_dir} is not seen by every process; choose a shared folder")
        start, finished = time.perf_counter(), {}
        if plan.missing:
            before = len(labels) - plan.count
            distributed.print0(f"{len(labels)} images, {before} of them finished before, on {device.type}")
            few_rows.use_ways(trunk, plan.ways, rows_of(args, plan))
            sample_batches(args, model, labels, plan, run_folder.key_of(settings))
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
