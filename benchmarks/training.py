"""AR training step: images/s, its parts, share of the matmul ceiling, against the straightforward step.

    python benchmarks/training.py [--model SphereAR-L] [--batch-size 64] [--steps 10] [--precision bf16] [--compile]

The straightforward step is kept here, over the same modules: S-VAE encoded with autograd and its KL thrown away,
condition embedded after the 4-fold repeat, plain AdamW, one EMA operation per tensor, the loss read at every step.
Both run in turns in one process. Results go to benchmarks/results/training.json.
"""

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from dataset import Sample  # noqa: E402
from models import PRESETS, SVAE, SphereAR  # noqa: E402
from models.flow import interpolate  # noqa: E402
from models.losses import kl_loss  # noqa: E402
from utils.training.ema import EMA  # noqa: E402


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


class Straightforward:
    """The step as one writes it first."""

    def __init__(self, model: SphereAR, autocast: torch.autocast, device: torch.device):
        self.model, self.autocast, self.device = model, autocast, device
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.averages = [weight.detach().clone() for weight in self.weights]
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)

    def step(self, batch: Sample) -> float:
        model, config = self.model, self.model.config
        images = (batch.image.float() / 127.5 - 1).to(self.device)
        labels = batch.label.to(self.device)
        with self.autocast:
            posterior = model.vae.encode(images)
            kl_loss(posterior)
            tokens = (config.radius * posterior.rsample()).detach()
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
    parser.add_argument("--compile", action="store_true", help="compile our step's blocks, as train.py does on GPUs")
    parser.add_argument("--grad-checkpointing", action="store_true", help="in ours")
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = options.precision or ("bf16" if device.type == "cuda" else "none")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    config = PRESETS[options.model]
    settings = argparse.Namespace(
        mixed_precision=precision, lr=1e-4, beta1=0.9, beta2=0.95, weight_decay=0.05, max_grad_norm=1.0, global_seed=0,
        grad_accum_steps=1, grad_checkpointing=options.grad_checkpointing, compile=options.compile,
    )  # fmt: skip
    stage = train.ARStage(settings, config, SVAE(config.svae), device)
    ema = EMA(stage.trained.named_parameters(), 0.9999)
    plain_model = copy.deepcopy(stage.trained)
    plain_model.vae.to(memory_format=torch.contiguous_format)
    straightforward = Straightforward(plain_model, stage.autocast, device)
    side, batch_size = config.svae.image_size, options.batch_size
    batch = Sample(
        torch.randint(256, (batch_size, 3, side, side), dtype=torch.uint8),
        torch.randint(config.num_classes, (batch_size,)), torch.arange(batch_size), [""] * batch_size,
    )  # fmt: skip

    def ours() -> None:
        stage.backward([batch], 0)
        stage.update()
        ema.update()

    with FlopCounterMode(display=False) as counter:
        stage.backward([batch], 0)
    flop = counter.get_total_flops() / batch_size
    for _ in range(3):
        ours()
        straightforward.step(batch)
    times = {"ours": [], "straightforward": []}
    for _ in range(options.steps):
        times["ours"].append(seconds(ours, device))
        times["straightforward"].append(seconds(lambda: straightforward.step(batch), device))
    medians = {name: statistics.median(values) for name, values in times.items()}

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        ours()
    index = batch.index.to(device)
    images, label = stage.images(batch), batch.label.to(device)
    with stage.autocast:
        tokens = stage.tokens(images, index, 0)
        labels, t, noise = stage.draws(label, index, 0)

    def transformer() -> None:
        with stage.autocast:
            condition = stage.trained.condition(tokens, labels)
        condition.float().sum().backward()

    condition = torch.randn(batch_size, config.num_tokens, config.width, device=device, requires_grad=True)

    def head() -> None:
        with stage.autocast:
            loss = stage.trained.head.loss(tokens, condition, t, noise)
        loss.backward()

    def encode() -> None:
        with stage.autocast, torch.no_grad():
            stage.trained.vae.encode(stage.images(batch))

    def optimizer() -> None:
        stage.update()
        ema.update()

    parts = {
        "S-VAE encode": encode,
        "random draws": lambda: (stage.draws(label, index, 0), stage.posterior_draws(index, 0)),
        "transformer": transformer,
        "head": head,
    }
    milliseconds = {name: 1e3 * median_seconds(part, device, options.steps) for name, part in parts.items()}
    values = []
    for _ in range(options.steps):
        stage.backward([batch], 0)
        values.append(seconds(optimizer, device))
    milliseconds["optimizer, clipping, EMA"] = 1e3 * statistics.median(values)

    ceiling = matmul_ceiling(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    result = {
        "model": options.model, "batch_size": batch_size, "precision": precision, "compile": options.compile,
        "device": name, "torch": torch.__version__,
        "images_per_second": {key: batch_size / value for key, value in medians.items()},
        "times_faster": medians["straightforward"] / medians["ours"],
        "step_ms": {key: 1e3 * value for key, value in medians.items()},
        "parts_ms": milliseconds,
        "gflop_per_image": flop / 1e9,
        "matmul_ceiling_tflops": ceiling / 1e12,
        "share_of_ceiling": flop * batch_size / medians["ours"] / ceiling,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }  # fmt: skip
    text = json.dumps(result, indent=2)
    print(text)
    path = ROOT / "benchmarks/results/training.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


if __name__ == "__main__":
    main()
