"""Weights from one file to another: .pt (ours and the published ones) and .safetensors, in either direction.

    python -m examples.convert hf://guolinke/SphereAR/SphereAR_B.pt SphereAR_B.safetensors
    python -m examples.convert results/L/checkpoints/last.pt L.safetensors

OUT holds what is sampled from, the EMA weights where IN has any, in float32, and the config. What is printed is the
same for both files: the size, the number of parameters, and a hash of the weights.
"""

import argparse
import os
import sys
from pathlib import Path

from models import SVAE, checkpoint_state, config_to_dict, from_checkpoint, preset_of
from utils import checkpoint_file, safetensors_file, script


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = script.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", help="a .pt, a .safetensors, or hf://OWNER/REPO/FILE")
    parser.add_argument("target", metavar="OUT", help="FILE.pt or FILE.safetensors")
    parser.add_argument("--no-ema", action="store_true", help="take the raw weights, not their moving average")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    target = Path(args.target)
    if target.suffix not in (".pt", ".safetensors"):
        raise ValueError(f"{target}: its name must end in .pt or .safetensors, which says what is written")
    if not target.parent.is_dir():
        raise ValueError(f"{target}: there is no such folder")
    if os.path.lexists(target):
        raise ValueError(f"{target}: is there already; remove it, or choose another name")
    file = checkpoint_file.examine(args.source)
    model = checkpoint_file.load_examined(file, lambda checkpoint: from_checkpoint(checkpoint, ema=not args.no_ema))
    state, config = checkpoint_state(model), config_to_dict(model.config)
    if target.suffix == ".pt":
        checkpoint_file.write({"model": state, "config": config}, target)
    else:
        safetensors_file.write(state, config, target)
    name = "S-VAE" if isinstance(model, SVAE) else preset_of(model.config) or "SphereAR of no preset's size"
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{target}: {name}, {count:,} parameters, sha256 of the weights {safetensors_file.weights_sha256(state)}")
    return script.DONE


def main(argv: list[str] | None = None) -> int:
    return script.run(
        "examples.convert", parse_args, run, argv,
        when_stopped="nothing was written", out_of_memory="It needs three times the weights' size.",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
