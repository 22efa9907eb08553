"""train.py's command line: the published commands, each stage's values, and flags that would have no effect."""

import argparse
import shlex
from pathlib import Path

import pytest

from models import PRESETS
from models.posteriors import POSTERIORS
from models.svae import PROJECTIONS
from utils.training.options import check_same_run, parse_args

# to the letter, but for the names of files and hosts
PUBLISHED_SVAE = """
--results-dir $result_path --data-path $data_path \
--image-size 256 --epochs 100 --patch-size 16 --latent-dim 16 --vae-only \
--lr 1e-4 --global-batch-size 256 --warmup-steps -1 --decay-start -1
"""
PUBLISHED_AR = """
--results-dir $result_path --data-path $data_path --image-size 256 \
--model SphereAR-B --epochs 400 --patch-size 16 --latent-dim 16 \
--lr 3e-4 --global-batch-size 512 --trained-vae $vae_ckpt --ema 0.9999
"""


def parse(command: str):
    return parse_args(shlex.split(command), "", list(PRESETS), list(POSTERIORS), list(PROJECTIONS))


def test_published_commands_are_the_shortest_ones():
    """The recipes are the defaults, so spelling them out changes nothing."""
    published, short = vars(parse(PUBLISHED_SVAE)), vars(parse("--vae-only --data-path $data_path"))
    same = {name for name in published if published[name] == short[name]}
    assert published.keys() - same == {"results_dir", "image_size", "patch_size", "latent_dim"}
    published = vars(parse(PUBLISHED_AR))
    short = vars(parse("--model SphereAR-B --data-path $data_path --trained-vae $vae_ckpt"))
    same = {name for name in published if published[name] == short[name]}
    assert published.keys() - same == {"results_dir", "image_size", "patch_size", "latent_dim"}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--vae-only --diff-batch-mul 7", r"--diff-batch-mul 7: is for AR training; leave it or --vae-only out"),
        ("--vae-only --class-dropout 0", r"--class-dropout 0.0: is for AR training"),
        ("--vae-only --trained-vae x.pt", r"--trained-vae x.pt: is for AR training"),
        ("--trained-vae x.pt --kl-weight 0.5", r"--kl-weight 0.5: is for the S-VAE's training \(--vae-only\)"),
        ("--trained-vae x.pt --disc-weight 0", r"--disc-weight 0.0: is for the S-VAE's training"),
        ("--vae-only --disc-weight 0 --disc-start 5", r"--disc-start 5: has an effect only with --disc-weight above 0"),
        ("--vae-only --perceptual-weight 0 --vgg-weights x", r"--vgg-weights x: has an effect only with --perceptual"),
        ("--vae-only --min-lr 0", r"--min-lr 0.0: has an effect only with --decay-start"),
        ("--trained-vae x.pt --cache-features", r"--cache-features True: has an effect only in AR training"),
        ("--trained-vae x.pt --lr inf", r"--lr: inf must be above 0"),
        ("--trained-vae x.pt --lr nan", r"--lr: nan must be above 0"),
        (f"--vae-only --latent-dim {10**22}", r"--latent-dim: 1000\d+ must lie in \[2, 1048576\]"),
        (f"--vae-only --image-size {10**22}", r"--image-size: 1000\d+ must lie in \[1, 8192\]"),
        (f"--trained-vae x.pt --cls-token-num {10**22}", r"--cls-token-num: 1000\d+ must lie in"),
        ("--vae-only --max-bad-share 1e308", r"--max-bad-share: 1e308 must lie in \[0.0, 1.0\]"),
        ("--vae-only --posterior fixed-sigma --sigma 1e308", r"--sigma: 1e308 is too large"),
        ("--vae-only --results-dir ''", r"--results-dir: is followed by nothing"),
        ("--trained-vae x.pt --global-seed 18446744073709551616", r"--seed: 18446744073709551616 must lie in"),
        ("--trained-vae x.pt --epochs 1.5", r"--epochs: 1.5 is no whole number"),
        ("--trained-vae x.pt --min-lr 1 --lr 0.1", r"--min-lr 1.0: must not be above --lr 0.1"),
    ],
)
def test_flags_without_effect_or_out_of_range_are_refused(command, message):
    with pytest.raises(ValueError, match=message):
        parse(f"--data-path data {command}")


def test_what_has_no_effect_is_none():
    args = parse("--data-path data --vae-only --disc-weight 0")
    assert (args.disc_start, args.min_lr, args.diff_batch_mul) == (None, None, None)
    args = parse("--data-path data --trained-vae x.pt")
    assert (args.kl_weight, args.disc_weight, args.min_lr, args.decay_start) == (None, None, 1e-5, 20_000)


def test_released_ways_to_turn_something_off_are_understood():
    released = parse("--data-path data --trained-vae x.pt --ema -1 --max-grad-norm 0 --keep-freq 0 --seed 7")
    ours = parse("--data-path data --trained-vae x.pt --ema 0 --max-grad-norm 0 --keep-freq 0 --global-seed 7")
    assert released == ours and (ours.ema, ours.max_grad_norm, ours.keep_freq, ours.global_seed) == (0.0, 0.0, 0, 7)
    for wrong in ("--ema -0.5", "--ema 1", "--max-grad-norm -1", "--keep-freq -1"):
        with pytest.raises(ValueError, match=wrong.split()[0]):
            parse(f"--data-path data --trained-vae x.pt {wrong}")


def test_a_checkpoint_without_a_command_line_is_refused():
    for before in (["--lr"], argparse.Namespace(), argparse.Namespace(lr=1.0, model="SphereAR-B")):
        with pytest.raises(ValueError, match=r"step_1\.pt: not a checkpoint of a run: its args"):
            check_same_run(Path("step_1.pt"), before, argparse.Namespace(), {}, {})
