"""train.py's command line: every flag with its range, the recipes' values as defaults, and what cannot go together."""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

from utils.script import SEED, Parser, above, at_least, number, within

# The recipes' values. A flag that stands in one of them only has no effect in the other stage, and is refused there.
SVAE_RECIPE = dict(
    epochs=100, global_batch_size=256, lr=1e-4, warmup_steps=-1, decay_start=-1, ema=0.0, reconstruction_weight=1.0,
    perceptual_weight=1.0, disc_weight=0.5, disc_start=20_000, kl_weight=0.004, vgg_weights=None, sigma=None,
)  # fmt: skip
AR_RECIPE = dict(
    epochs=400, global_batch_size=512, lr=3e-4, warmup_steps=20_000, decay_start=None, ema=0.9999, trained_vae=None,
    cls_token_num=None, class_dropout=None, diff_batch_mul=None, eval_cfg_scale=3.0,
)  # fmt: skip
# Flags that have an effect only beside others: when, and with which
DEPENDENT: dict[str, tuple[Callable[[argparse.Namespace], bool], str]] = {
    "min_lr": (lambda args: args.decay_start >= 0, "with --decay-start"),
    "disc_start": (lambda args: bool(args.disc_weight), "with --disc-weight above 0"),
    "vgg_weights": (lambda args: bool(args.perceptual_weight), "with --perceptual-weight above 0"),
    "eval_reference": (lambda args: args.eval_every > 0, "with --eval-every"),
    "eval_samples": (
        lambda args: args.eval_every > 0 and bool(args.eval_reference or args.vae_only),
        "with --eval-every and --eval-reference",
    ),
    "eval_cfg_scale": (lambda args: args.eval_reference is not None, "with --eval-every and --eval-reference"),
    **{
        name: (
            lambda args: args.eval_reference is not None and not args.vae_only,
            "in AR training with --eval-every and --eval-reference",
        )
        for name in ("cache_features", "eval_judge")
    },
}
MIN_LR = 1e-5
EVAL_SAMPLES = 5000  # MIND's authors find as many as telling as FID of 50,000
MAX_SIZE = 2**20  # of an architecture's numbers

# Flags that may differ when a run is resumed, and those of them whose change is told. All others must be as they were;
# those of the architecture are not compared themselves, but the architecture that comes of them.
TOLD = {"lr", "min_lr", "max_grad_norm", "mixed_precision"}
ARCHITECTURE = {
    "image_size", "patch_size", "latent_dim", "posterior", "projection", "sigma", "cls_token_num", "class_dropout",
    "diff_batch_mul",
}  # fmt: skip
SHOWN = {"num_pictures": "the number of images"}  # names that checkpoints keep, as people read them
ALWAYS = {"model", "vae_only", "global_batch_size", "global_seed"}  # in every run's command line
MEASURED = {"latent_shift", "latent_scale", "svae.latent_shift", "svae.latent_scale"}  # follow from the weights
FREE = TOLD | ARCHITECTURE | {
    "data_path", "results_dir", "trained_vae", "vgg_weights", "epochs", "max_steps", "grad_accum_steps", "num_workers",
    "log_every", "save_every", "keep_freq", "sample_every", "eval_every", "eval_samples", "eval_reference",
    "eval_cfg_scale", "eval_judge", "cache_features", "compile", "grad_checkpointing", "max_skipped_steps",
    "max_bad_share", "world_size",
}  # fmt: skip

OR_NONE = number(int, lambda value: value >= -1, "be at least 0, or -1 for none")


def parse_args(
    argv: list[str] | None, description: str, models: list[str], posteriors: list[str], projections: list[str]
) -> argparse.Namespace:
    """The command line with its stage's recipe as defaults; None stands for a flag that has no effect.

    models, posteriors and projections are the choices of the flags of those names.

    Raises ValueError for flags that cannot go together.
    """
    parser = Parser(prog="train.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    add("--image-size", type=within(1, 2**13), help="side of the images in pixels [the model's]")
    add("--patch-size", type=int, choices=[4, 8, 16, 32], help="side of a token in pixels [the model's]")
    add("--latent-dim", type=within(2, MAX_SIZE), help="dimension of a token [the model's]")
    add("--posterior", choices=posteriors, help="the S-VAE's law of latents; with --trained-vae, its own [the model's]")
    add("--sigma", type=above(0), help="S-VAE: deviation of the posterior fixed-sigma, mean size of random-sigma's")
    add("--projection", choices=projections, help="of latents onto the sphere: for decoder and AR model, for the "
        "decoder only, or not [all; none for posteriors that are not spherical]")  # fmt: skip
    add("--num-classes", type=within(1, MAX_SIZE), help="classes in the data [the model's]")
    add("--cls-token-num", type=within(1, MAX_SIZE), help="AR: class tokens in front [the model's]")
    add("--class-dropout", type=within(0.0, 1.0), help="AR: share of labels replaced by the null class [0.1]")
    add("--diff-batch-mul", type=within(1, MAX_SIZE), help="AR: flow times drawn per token [the model's, 4]")

    add("--epochs", type=at_least(1), help="[100 with --vae-only, else 400]")
    add("--max-steps", type=at_least(1), help="stop after so many updates, if that is before the epochs' end")
    add(
        "--global-batch-size", type=at_least(1), help="images per update, all processes [256 with --vae-only, else 512]"
    )
    add("--grad-accum-steps", type=at_least(1), default=1, help="split each process's share to save memory [1]")
    add("--lr", type=above(0), help="[1e-4 with --vae-only, else 3e-4]")
    add("--min-lr", type=at_least(0.0), help=f"learning rate that the cosine decays to [{MIN_LR:g}]")
    add("--warmup-steps", type=OR_NONE, help="linear warm-up; -1: none [-1 with --vae-only, else 20000]")
    add(
        "--decay-start",
        type=OR_NONE,
        help="first step of the cosine; -1: none [-1 with --vae-only, else after the warm-up]",
    )
    add("--weight-decay", type=at_least(0.0), default=0.05, help="[%(default)s]")
    add("--beta1", type=within(0.0, 1.0, open_end=True), default=0.9, help="[%(default)s]")
    add("--beta2", type=within(0.0, 1.0, open_end=True), default=0.95, help="[%(default)s]")
    add(
        "--max-grad-norm",
        type=at_least(0.0),
        default=1.0,
        help="gradients are clipped to it; 0: not [%(default)s]",
    )
    add(
        "--ema",
        type=number(float, lambda value: 0 <= value < 1 or value == -1, "lie in [0, 1), or be -1 for none"),
        help="decay of the weights' moving average; 0 or -1: none [0 with --vae-only, else 0.9999]",
    )
    add(
        "--max-skipped-steps",
        type=at_least(1),
        default=20,
        help="non-finite updates in a row that end the run, counted at log lines and checkpoints [%(default)s]",
    )

    add("--reconstruction-weight", type=at_least(0.0), help="S-VAE: weight of L1 [1.0]")
    add("--perceptual-weight", type=at_least(0.0), help="S-VAE: weight of LPIPS [1.0]")
    add("--disc-weight", type=at_least(0.0), help="S-VAE: weight of the adversary in both losses [0.5]")
    add("--disc-start", type=at_least(0), help="S-VAE: the adversary's first step [20000]")
    add("--kl-weight", type=at_least(0.0), help="S-VAE: weight of the KL [0.004]")
    add("--vgg-weights", metavar="FILE", help="S-VAE: torchvision's VGG16 weights for LPIPS [downloaded]")

    add("--aug-decay-start-epoch", type=at_least(0), default=350, help="random crops grow rare from here [%(default)s]")
    add("--aug-decay-end-epoch", type=at_least(0), default=375, help="from here centre crops remain [%(default)s]")
    add("--no-flip", action="store_true", help="no horizontal flips (digits, letters)")
    add(
        "--max-bad-share",
        type=within(0.0, 1.0),
        default=0.001,
        help="of unreadable images before it is an error [0.001]",
    )
    add("--num-workers", type=within(0, 1024), default=8, help="loading processes per training process [%(default)s]")

    add(
        "--mixed-precision", choices=["none", "bf16", "fp16"], help="autocast over float32 weights [bf16; none on CPUs]"
    )
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile [on GPUs only]")
    add("--grad-checkpointing", action="store_true", help="recompute activations: less memory, about 30 %% more time")
    add("--global-seed", "--seed", type=SEED, default=0, help="[%(default)s]")
    add("--log-every", type=at_least(1), default=100, help="steps between log lines [%(default)s]")
    add(
        "--save-every",
        type=at_least(1),
        default=5000,
        help="steps between checkpoints, and at every epoch's end [5000]",
    )
    add(
        "--keep-freq", type=at_least(0), default=50, help="keep every so many epochs' checkpoint for good; 0: none [50]"
    )
    add("--sample-every", type=at_least(0), default=5000, help="steps between sheets of images; 0: none [5000]")
    add("--eval-every", type=at_least(0), default=0, help="steps between evaluations, and one at the end; 0: none [0]")
    add("--eval-reference", metavar="FILE", help="AR: .npz, statistics or folder of PNGs for FID and MIND of samples; "
        "S-VAE: images to reconstruct [those held out]")  # fmt: skip
    add("--eval-samples", type=within(2, 10**6), help=f"images to sample or reconstruct [{EVAL_SAMPLES}]")
    add("--eval-cfg-scale", type=at_least(1.0), help="AR: guidance of these samples [3.0]")
    add("--eval-judge", metavar="DATA", help="AR: tar or folder of small labelled images, such as digits; how many "
        "samples a classifier of them sees as their class")  # fmt: skip
    add("--cache-features", action="store_true", default=None, help="AR: keep the reference's features beside it, for "
        "the next start and for evaluator.py --cache-features")  # fmt: skip
    add("--held-out", type=within(0, 10**7), default=0, metavar="N",
        help="leave N images out of training; --eval-every reports their loss [0]")  # fmt: skip
    args = parser.parse_args(argv)

    fill_in_recipe(args)
    args.ema = max(0.0, args.ema)
    check_together(args)
    return args


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def fill_in_recipe(args: argparse.Namespace) -> None:
    """Give flags that were left out their stage's values. Raises ValueError for a flag that has no effect."""
    own, other = (SVAE_RECIPE, AR_RECIPE) if args.vae_only else (AR_RECIPE, SVAE_RECIPE)
    stage = (
        "AR training; leave it or --vae-only out"
        if args.vae_only
        else "the S-VAE's training (--vae-only); leave it out"
    )
    for name in other.keys() - own.keys():
        if getattr(args, name) is not None:
            raise ValueError(f"{flag(name)} {getattr(args, name)}: is for {stage}")
    asked = {name for name in DEPENDENT if getattr(args, name) is not None}
    for name, value in {**own, "min_lr": MIN_LR, "eval_samples": EVAL_SAMPLES}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.decay_start is None:
        args.decay_start = max(0, args.warmup_steps)
    for name, (has_effect, needed) in DEPENDENT.items():
        if not has_effect(args):
            if name in asked:
                raise ValueError(f"{flag(name)} {getattr(args, name)}: has an effect only {needed}; leave it out")
            setattr(args, name, None)


def check_together(args: argparse.Namespace) -> None:
    """Raises ValueError for flags of which each is good, but not both."""
    if not args.vae_only and args.trained_vae is None:
        raise ValueError(
            "--trained-vae: AR training needs a trained S-VAE; train one with --vae-only, then name its file"
        )
    if args.decay_start >= 0 and args.min_lr > args.lr:
        raise ValueError(f"--min-lr {args.min_lr}: must not be above --lr {args.lr}")
    if args.eval_every and args.eval_reference is None and not args.held_out:
        raise ValueError(f"--eval-every {args.eval_every}: nothing to evaluate; add --eval-reference or --held-out")
    if 0 <= args.decay_start < args.warmup_steps:
        raise ValueError(
            f"--decay-start {args.decay_start}: must not be before the warm-up's end, "
            f"--warmup-steps {args.warmup_steps}"
        )


def given(args: argparse.Namespace, **fields: str) -> dict:
    """Those of the flags that were given, by the name of the field that each sets: field="flag"."""
    values = {field: getattr(args, name) for field, name in fields.items()}
    return {field: value for field, value in values.items() if value is not None}


SVAE_FIELDS = {name: name for name in ("image_size", "patch_size", "latent_dim", "posterior", "sigma", "projection")}
AR_FIELDS = {
    "num_classes": "num_classes", "num_class_tokens": "cls_token_num", "class_dropout_prob": "class_dropout",
    "diffusion_batch_mul": "diff_batch_mul",
}  # fmt: skip


def svae_config(args: argparse.Namespace, preset):
    """The S-VAE's config: the preset's (models.SVAEConfig) with what the flags change."""
    return preset.changed(**given(args, **SVAE_FIELDS))


def ar_config(args: argparse.Namespace, preset, svae):
    """The AR model's config: the preset's (models.SphereARConfig) with what the flags change, over a trained S-VAE.

    Raises ValueError where a flag contradicts that S-VAE, or where it is not ready.
    """
    for name, asked in given(args, **SVAE_FIELDS).items():
        if asked != getattr(svae, name):
            raise ValueError(
                f"{flag(name)} {asked}: the S-VAE {args.trained_vae} was trained with {getattr(svae, name)}; "
                "leave the flag out, or give the S-VAE that fits"
            )
    if svae.is_flat and svae.latent_scale is None:
        raise ValueError(f"--trained-vae {args.trained_vae}: its latents' scale is not measured yet; end its training")
    return dataclasses.replace(preset, svae=svae, **given(args, **AR_FIELDS))


def check_run(args: argparse.Namespace, steps_per_epoch: int) -> int:
    """The number of updates of the run. Raises ValueError where batch, schedule and processes do not fit together."""
    shares = args.world_size * args.grad_accum_steps
    if args.global_batch_size % shares:
        raise ValueError(
            f"--global-batch-size {args.global_batch_size} must be a multiple of processes x --grad-accum-steps = "
            f"{args.world_size} x {args.grad_accum_steps}; "
            f"{args.global_batch_size // shares * shares or shares} would do"
        )
    if steps_per_epoch < 1:
        without = f" without --held-out {args.held_out}" if args.held_out else ""
        raise ValueError(
            f"--global-batch-size {args.global_batch_size} is more than the data set holds{without}: lower it"
        )
    total_steps = min(args.epochs * steps_per_epoch, args.max_steps or sys.maxsize)
    for name in ("warmup_steps", "decay_start"):
        if getattr(args, name) > total_steps:
            raise ValueError(
                f"{flag(name)} {getattr(args, name)}: the run has only {total_steps} steps; lower it, or -1 for none"
            )
    return total_steps


def check_same_run(path: Path, args_before: argparse.Namespace, args: argparse.Namespace,
                   config_before: dict, config: dict) -> list[str]:  # fmt: skip
    """What to tell about continuing the run of the checkpoint at `path` with these flags and this architecture.

    Raises ValueError naming what differs where that makes it another run. A flag without effect here is not compared.
    """
    if not isinstance(args_before, argparse.Namespace) or not vars(args_before).keys() >= ALWAYS:
        raise ValueError(f"{path}: not a checkpoint of a run: its args are no command line's; move it away")
    before, now = {"held_out": 0, **vars(args_before)}, vars(args)  # checkpoints older than that flag lack it
    changed = {name: (old, now[name]) for name, old in before.items() if name in now and now[name] != old}
    strict = changed.keys() - FREE - {name for name, value in now.items() if value is None}
    others = [f"{SHOWN.get(name, name)} was {old}, now {new}" for name, (old, new) in changed.items() if name in strict]
    if "vae_only" not in changed:
        old, new = flatten(config_before), flatten(config)
        others += [f"architecture: {name} was {old.get(name)}, now {new.get(name)}"
                   for name in sorted((old | new).keys() - MEASURED) if old.get(name) != new.get(name)]  # fmt: skip
    if others:
        raise ValueError(
            f"--results-dir {args.results_dir} holds another run ({path.name}): {'; '.join(others)}; "
            "give the same flags to continue it, or another folder"
        )
    notes = [f"continuing with another {flag(name)}: {now[name]} instead of {changed[name][0]}"
             for name in sorted(TOLD & changed.keys()) if now[name] is not None]  # fmt: skip
    if changed.keys() & {"world_size", "grad_accum_steps"}:
        notes.append(
            f"continuing on {now['world_size']} processes x {now['grad_accum_steps']} parts a run of "
            f"{before['world_size']} x {before['grad_accum_steps']}: same global batches and random numbers; but sums "
            "round differently and the discriminator's batch norms see other parts, so not bit for bit the same"
        )
    if args.decay_start >= 0 and changed.keys() & {"epochs", "max_steps"}:
        notes.append("continuing with another length: the learning rate follows the new schedule from here")
    return notes


def flatten(values: dict, prefix: str = "") -> dict:
    """A nested dict as one: {"svae": {"width": 8}} -> {"svae.width": 8}."""
    flat = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
