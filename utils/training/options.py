"""train.py's command line: every flag, the recipes' values as defaults, and what cannot go together."""

import argparse
import sys
from pathlib import Path

# The recipes' values where they differ between the stages
SVAE_RECIPE = dict(epochs=100, global_batch_size=256, lr=1e-4, warmup_steps=-1, decay_start=-1, ema=0.0)
AR_RECIPE = dict(epochs=400, global_batch_size=512, lr=3e-4, warmup_steps=20_000, decay_start=None, ema=0.9999)

# What may change when a run is continued, and what may change but is said; everything else must be as it was
SAID = {"lr", "min_lr", "max_grad_norm", "mixed_precision"}
FREE = SAID | {
    "data_path", "results_dir", "trained_vae", "vgg_weights", "epochs", "max_steps", "grad_accum_steps", "num_workers",
    "log_every", "save_every", "keep_freq", "sample_every", "compile", "grad_checkpointing", "max_skipped_steps",
    "max_bad_share", "world_size",
}  # fmt: skip


def parse_args(argv: list[str] | None, description: str, models: list[str]) -> argparse.Namespace:
    """The command line with the recipe's defaults of its stage. Raises ValueError for flags that cannot go together."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--data-path",
        required=True,
        help="ILSVRC2012_img_train.tar (a tar of class tars), or a folder of class folders",
    )
    add(
        "--results-dir", default="results", help="checkpoints, log.txt and tensorboard/; a run found there is continued"
    )
    add("--model", default="SphereAR-L", choices=models, help="size; with --vae-only, whose S-VAE [%(default)s]")
    add("--vae-only", action="store_true", help="train the S-VAE instead of the AR model")
    add("--trained-vae", metavar="FILE", help="AR: the S-VAE's checkpoint; it decides image size, patch and latent dim")
    add("--image-size", type=int, help="side of the pictures in pixels [the model's]")
    add("--patch-size", type=int, help="side of a token in pixels [the model's]")
    add("--latent-dim", type=int, help="dimension of a token [the model's]")
    add("--num-classes", type=int, help="classes in the data [the model's]")
    add("--cls-token-num", type=int, help="AR: class tokens in front [the model's]")
    add("--class-dropout", type=float, help="AR: share of labels replaced by the null class [the model's, 0.1]")
    add("--diff-batch-mul", type=int, help="AR: flow times drawn per token [the model's, 4]")

    add("--epochs", type=int, help="[100 with --vae-only, else 400]")
    add("--max-steps", type=int, help="stop after so many updates, if that is before the epochs' end")
    add("--global-batch-size", type=int, help="pictures per update, over all processes [256 with --vae-only, else 512]")
    add("--grad-accum-steps", type=int, default=1, help="split each process's share of a batch to save memory [1]")
    add("--lr", type=float, help="[1e-4 with --vae-only, else 3e-4]")
    add("--min-lr", type=float, default=1e-5, help="learning rate that the cosine decays to [%(default)s]")
    add("--warmup-steps", type=int, help="linear warm-up; -1: none [-1 with --vae-only, else 20000]")
    add(
        "--decay-start",
        type=int,
        help="first step of the cosine; -1: none [-1 with --vae-only, else after the warm-up]",
    )
    add("--weight-decay", type=float, default=0.05, help="[%(default)s]")
    add("--beta1", type=float, default=0.9, help="[%(default)s]")
    add("--beta2", type=float, default=0.95, help="[%(default)s]")
    add("--max-grad-norm", type=float, default=1.0, help="gradients are clipped to this norm [%(default)s]")
    add("--ema", type=float, help="decay of the weights' moving average; 0: none [0 with --vae-only, else 0.9999]")
    add(
        "--max-skipped-steps",
        type=int,
        default=20,
        help="non-finite updates in a row that end the run, counted at log lines and checkpoints [%(default)s]",
    )

    add("--reconstruction-weight", type=float, default=1.0, help="S-VAE: weight of L1 [%(default)s]")
    add("--perceptual-weight", type=float, default=1.0, help="S-VAE: weight of LPIPS [%(default)s]")
    add("--disc-weight", type=float, default=0.5, help="S-VAE: weight of the adversary in both losses [%(default)s]")
    add("--disc-start", type=int, default=20_000, help="S-VAE: the adversary's first step [%(default)s]")
    add("--kl-weight", type=float, default=0.004, help="S-VAE: weight of the KL [%(default)s]")
    add("--vgg-weights", metavar="FILE", help="S-VAE: torchvision's VGG16 weights for LPIPS [downloaded]")

    add("--aug-decay-start-epoch", type=int, default=350, help="random crops grow rare from here [%(default)s]")
    add(
        "--aug-decay-end-epoch", type=int, default=375, help="and are gone from here; centre crops remain [%(default)s]"
    )
    add("--no-flip", action="store_true", help="no horizontal flips (digits, letters)")
    add("--max-bad-share", type=float, default=0.001, help="unreadable pictures replaced before it is an error [0.001]")
    add("--num-workers", type=int, default=8, help="loading processes per training process [%(default)s]")

    add(
        "--mixed-precision", choices=["none", "bf16", "fp16"], help="autocast over float32 weights [bf16; none on CPUs]"
    )
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile [on GPUs only]")
    add("--grad-checkpointing", action="store_true", help="recompute activations: less memory, about 30 %% more time")
    add("--global-seed", type=int, default=0, help="[%(default)s]")
    add("--log-every", type=int, default=100, help="steps between log lines [%(default)s]")
    add(
        "--save-every", type=int, default=5000, help="steps between checkpoints, beside every epoch's end [%(default)s]"
    )
    add("--keep-freq", type=int, default=50, help="keep every so many epochs' checkpoint for good [%(default)s]")
    add("--sample-every", type=int, default=5000, help="steps between pictures in TensorBoard; 0: none [%(default)s]")
    args = parser.parse_args(argv)

    for name, value in (SVAE_RECIPE if args.vae_only else AR_RECIPE).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.decay_start is None:
        args.decay_start = max(0, args.warmup_steps)
    check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    def require(ok: bool, flag: str, allowed: str) -> None:
        if not ok:
            raise ValueError(f"{flag} {getattr(args, flag[2:].replace('-', '_'))}: {allowed}")

    if args.vae_only:
        require(args.trained_vae is None, "--trained-vae", "is for the AR stage; leave it or --vae-only out")
    elif args.trained_vae is None:
        raise ValueError(
            "--trained-vae: AR training needs a trained S-VAE; train one with --vae-only, then name its file"
        )
    elif not Path(args.trained_vae).is_file():
        raise ValueError(f"--trained-vae {args.trained_vae}: no such file; train the S-VAE with --vae-only first")
    for flag in ("--epochs", "--global-batch-size", "--grad-accum-steps", "--log-every", "--save-every", "--keep-freq",
                 "--max-skipped-steps"):  # fmt: skip
        require(getattr(args, flag[2:].replace("-", "_")) >= 1, flag, "must be at least 1")
    require(args.max_steps is None or args.max_steps >= 1, "--max-steps", "must be at least 1")
    require(args.num_workers >= 0, "--num-workers", "must be at least 0")
    require(args.lr > 0, "--lr", "must be above 0")
    require(0 <= args.ema < 1, "--ema", "must lie in [0, 1); 0 turns it off")
    require(args.max_grad_norm > 0, "--max-grad-norm", "must be above 0")
    for flag in ("--weight-decay", "--reconstruction-weight", "--perceptual-weight", "--disc-weight", "--disc-start",
                 "--kl-weight", "--aug-decay-start-epoch", "--sample-every", "--min-lr", "--global-seed"):  # fmt: skip
        require(getattr(args, flag[2:].replace("-", "_")) >= 0, flag, "must be at least 0")
    for flag in ("--beta1", "--beta2"):
        require(0 <= getattr(args, flag[2:]) < 1, flag, "must lie in [0, 1)")
    require(args.class_dropout is None or 0 <= args.class_dropout <= 1, "--class-dropout", "must lie in [0, 1]")
    for flag in ("--cls-token-num", "--diff-batch-mul", "--num-classes"):
        value = getattr(args, flag[2:].replace("-", "_"))
        require(value is None or value >= 1, flag, "must be at least 1")
    require(args.patch_size in (None, 4, 8, 16, 32), "--patch-size", "must be 4, 8, 16 or 32")
    require(args.warmup_steps >= -1, "--warmup-steps", "must be at least 0, or -1 for none")
    require(args.decay_start >= -1, "--decay-start", "must be at least 0, or -1 for none")
    if args.decay_start >= 0:
        require(args.min_lr <= args.lr, "--min-lr", f"must not be above --lr {args.lr}")
        require(args.decay_start >= args.warmup_steps, "--decay-start",
                f"must not be before the warm-up's end, --warmup-steps {args.warmup_steps}")  # fmt: skip


def check_run(args: argparse.Namespace, steps_per_epoch: int) -> int:
    """The number of updates of the run. Raises ValueError where batch, schedule and processes do not fit together."""
    shares = args.world_size * args.grad_accum_steps
    if args.global_batch_size % shares:
        raise ValueError(
            f"--global-batch-size {args.global_batch_size} must be a multiple of processes x --grad-accum-steps = "
            f"{args.world_size} x {args.grad_accum_steps}; "
            f"{args.global_batch_size // shares * shares or shares} would do"
        )
    if steps_per_epoch == 0:
        raise ValueError(f"--global-batch-size {args.global_batch_size} is more than the data set holds: lower it")
    total_steps = min(args.epochs * steps_per_epoch, args.max_steps or sys.maxsize)
    for flag, value in {"--warmup-steps": args.warmup_steps, "--decay-start": args.decay_start}.items():
        if value > total_steps:
            raise ValueError(f"{flag} {value}: the run has only {total_steps} steps; lower it, or -1 for none")
    return total_steps


def check_same_run(path: Path, state: dict, args: argparse.Namespace, config: dict) -> list[str]:
    """What to say about continuing the run of checkpoint `state` with these flags and this architecture.

    Raises ValueError naming what differs where that makes it another run.
    """
    before, now = {**vars(state["args"]), "architecture": state["config"]}, {**vars(args), "architecture": config}
    changed = {name: (value, now[name]) for name, value in before.items() if name in now and value != now[name]}
    others = [f"{name} was {old}, now {new}" for name, (old, new) in changed.items() if name not in FREE]
    if others:
        raise ValueError(
            f"--results-dir {args.results_dir} holds another run ({path.name}): {'; '.join(others)}; "
            "give the same flags to continue it, or another folder"
        )
    notes = [f"continuing with another --{name.replace('_', '-')}: {now[name]} instead of {changed[name][0]}"
             for name in sorted(SAID & changed.keys())]  # fmt: skip
    if changed.keys() & {"world_size", "grad_accum_steps"}:
        notes.append(
            f"continuing on {now['world_size']} processes x {now['grad_accum_steps']} parts a run of "
            f"{before['world_size']} x {before['grad_accum_steps']}: same global batches and random numbers; but sums "
            "round differently and the discriminator's batch norms see other parts, so not bit for bit the same"
        )
    if args.decay_start >= 0 and changed.keys() & {"epochs", "max_steps"}:
        notes.append("continuing with another length: the learning rate follows the new schedule from here")
    return notes
