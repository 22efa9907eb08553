"""AR training step: images/s, its parts, share of the matmul ceiling, against the straightforward step.

    python benchmarks/training.py [--model SphereAR-L] [--batch-size 64] [--steps 10] [--precision bf16] [--compile]

The straightforward step is kept here, over the same modules: S-VAE encoded with autograd and its KL thrown away,
condition embedded after the 4-fold repeat, plain AdamW, one EMA operation per tensor, the loss read at every step.
Both run in turns in one process. Results go to benchmarks/results/training.json.
"""

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from dataset import Sample  # noqa: E402
from models import PRESETS, SphereAR  # noqa: E402
from models.flow import interpolate  # noqa: E402
from models.posteriors import Draws  # noqa: E402
from utils import script  # noqa: E402
from utils.files import write_json  # noqa: E402
from utils.images import to_float  # noqa: E402
from utils.provenance import provenance  # noqa: E402
from utils.training.compilation import compile_ar  # noqa: E402
from utils.training.draws import StepDraws  # noqa: E402
from utils.training.ema import EMA  # noqa: E402
from utils.training.players import make_player  # noqa: E402


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - start


def median_seconds(function: Callable[[], object], device: torch.device, rounds: int) -> float:
    function()
    return statistics.median(seconds(function, device) for _ in range(rounds))


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product: what the machine can do at best."""
    side = 8192 if device.type == "cuda" else 1536
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    return 2 * side**3 / min(seconds(lambda: a @ b, device) for _ in range(10))


class Ours:
    """The step of train.py, from the same parts."""

    def __init__(self, model: SphereAR, autocast: torch.autocast, device: torch.device, compiled: bool = False):
        self.model, self.autocast, self.device, self.compiled = model, autocast, device, compiled
        self.player = make_player(
            "model", model, device, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, is_fp16=False, num_parts=1
        )
        self.ema = EMA(model.named_parameters(), 0.9999)

    def images(self, batch: Sample) -> torch.Tensor:
        memory_format = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        return to_float(batch.image.to(self.device).to(memory_format=memory_format))

    def draws(self, batch: Sample) -> StepDraws:
        return StepDraws(0, 0, batch.index.to(self.device), compiled=self.compiled)

    def posterior_draws(self, draws: StepDraws) -> Draws:
        config = self.model.config
        return Draws(*draws.posterior(config.num_tokens, *self.model.vae.posterior.num_draws(config.latent_dim)))

    def inputs(self, batch: Sample, draws: StepDraws) -> tuple[torch.Tensor, ...]:
        """What goes with the tokens: labels, flow times, flow noise."""
        config = self.model.config
        label = batch.label.to(self.device).where(~draws.is_dropped(config.class_dropout_prob), config.null_class)
        t = draws.flow_times(config.diffusion_batch_mul, config.num_tokens)
        return label, t, draws.flow_noise(config.diffusion_batch_mul, config.num_tokens, config.latent_dim)

    def tokens(self, batch: Sample, draws: StepDraws) -> torch.Tensor:
        with torch.no_grad():
            return self.model.vae.encode(self.images(batch)).sample_from(self.posterior_draws(draws))

    def backward(self, batch: Sample) -> None:
        draws = self.draws(batch)
        inputs = self.inputs(batch, draws)
        with self.autocast:
            loss = self.player(self.tokens(batch, draws), *inputs)
        self.player.backward(loss)

    def update(self) -> None:
        self.player.update(1.0)
        self.ema.update()

    def step(self, batch: Sample) -> None:
        self.backward(batch)
        self.update()


class Straightforward:
    """The step as one writes it first."""

    def __init__(self, model: SphereAR, autocast: torch.autocast, device: torch.device):
        self.model, self.autocast, self.device = model, autocast, device
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.averages = [weight.detach().clone() for weight in self.weights]
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)

    def step(self, batch: Sample) -> float:
        model, config = self.model, self.model.config
        images = to_float(batch.image).to(self.device)
        labels = batch.label.to(self.device)
        with self.autocast:
            posterior = model.vae.encode(images)
            posterior.kl().mean()
            tokens = posterior.sample().detach()
            dropped = torch.rand(len(labels), device=self.device) < config.class_dropout_prob
            condition = model.condition(tokens, labels.where(~dropped, config.null_class))
            target = tokens.flatten(0, 1).repeat(config.diffusion_batch_mul, 1)
            condition = condition.flatten(0, 1).repeat(config.diffusion_batch_mul, 1)
            t, noise = torch.randn(len(target), device=self.device).sigmoid(), torch.randn_like(target)
            velocity = model.head.velocity(interpolate(noise, target, t[:, None]), t, condition)
            loss = (velocity.float() - (target - noise)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for average, weight in zip(self.averages, self.weights):
                average.mul_(0.9999).add_(weight, alpha=1 - 0.9999)
        return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SphereAR-Nano", choices=list(PRESETS), help="[%(default)s]")
    parser.add_argument("--batch-size", type=int, default=64, help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each kind [%(default)s]")
    parser.add_argument("--precision", choices=["none", "bf16"], help="[bf16 on GPUs, else none]")
    parser.add_argument("--compile", action="store_true", help="compile our step's parts, as train.py does on GPUs")
    parser.add_argument("--grad-checkpointing", action="store_true", help="in ours")
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = script.choose_precision(options.precision, device)
    script.allow_tf32(products=device.type == "cuda", convolutions=device.type == "cuda")
    torch.manual_seed(0)
    config = PRESETS[options.model]
    autocast = script.autocast(device, precision)
    model = SphereAR(config).to(device)
    model.vae.requires_grad_(False).eval()
    straightforward = Straightforward(copy.deepcopy(model), autocast, device)
    model.vae.to(memory_format=torch.channels_last if device.type == "cuda" else torch.contiguous_format)
    model.grad_checkpointing = options.grad_checkpointing
    if options.compile:
        compile_ar(model)
    ours = Ours(model, autocast, device, compiled=options.compile)
    side, batch_size = config.svae.image_size, options.batch_size
    batch = Sample(
        torch.randint(256, (batch_size, 3, side, side), dtype=torch.uint8),
        torch.randint(config.num_classes, (batch_size,)), torch.arange(batch_size), [""] * batch_size,
    )  # fmt: skip

    with FlopCounterMode(display=False) as counter:
        ours.backward(batch)
    flop = counter.get_total_flops() / batch_size
    for _ in range(3):
        ours.step(batch)
        straightforward.step(batch)
    times = {"ours": [], "straightforward": []}
    for _ in range(options.steps):
        times["ours"].append(seconds(lambda: ours.step(batch), device))
        times["straightforward"].append(seconds(lambda: straightforward.step(batch), device))
    medians = {name: statistics.median(values) for name, values in times.items()}

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        ours.step(batch)
    draws = ours.draws(batch)
    with autocast:
        tokens, (labels, t, noise) = ours.tokens(batch, draws), ours.inputs(batch, draws)

    def transformer() -> None:
        with autocast:
            condition = model.condition(tokens, labels)
        condition.float().sum().backward()

    condition = torch.randn(batch_size, config.num_tokens, config.width, device=device, requires_grad=True)

    def head() -> None:
        with autocast:
            loss = model.head(tokens, condition, t, noise)
        loss.backward()

    def encode() -> None:
        with autocast, torch.no_grad():
            model.vae.encode(ours.images(batch))

    parts = {
        "S-VAE encode": encode,
        "random draws": lambda: (ours.inputs(batch, draws), ours.posterior_draws(draws)),
        "transformer": transformer,
        "head": head,
    }
    milliseconds = {name: 1e3 * median_seconds(part, device, options.steps) for name, part in parts.items()}
    values = []
    for _ in range(options.steps):
        ours.backward(batch)
        values.append(seconds(ours.update, device))
    milliseconds["optimizer, clipping, EMA"] = 1e3 * statistics.median(values)

    ceiling = matmul_ceiling(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    result = {
        "model": options.model, "batch_size": batch_size, "precision": precision, "compile": options.compile,
        "made_by": {**provenance(device), "load_average": os.getloadavg()},
        "images_per_second": {key: batch_size / value for key, value in medians.items()},
        "times_faster": medians["straightforward"] / medians["ours"],
        "step_ms": {key: 1e3 * value for key, value in medians.items()},
        "parts_ms": milliseconds,
        "gflop_per_image": flop / 1e9,
        "matmul_ceiling_tflops": ceiling / 1e12,
        "share_of_ceiling": flop * batch_size / medians["ours"] / ceiling,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    write_json(ROOT / "benchmarks/results/training.json", result)


if __name__ == "__main__":
    main()
