"""How fast sampling is, phase by phase, against the straightforward implementation and the machine's ceiling.

    python benchmarks/sampling.py --model SphereAR-B --batch 2                      # CPU, float32
    python benchmarks/sampling.py --model SphereAR-L --batch 256 --precision bf16   # GPU

Random weights; both implementations in the same process, turn by turn; the best of --repeats of each phase. The
straightforward one (below) is what the released code does: eager, cache slices, every embedding at every step. An
image's time is put together from the phases: prefill + tokens x (noise + head + decode step) + decoder.
"""

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import PRESETS, Phases, SamplingSettings, SphereAR, decode
from models.flow import guide
from models.layers import KVCache
from models.samplers import uniform_times
from utils.files import write_json
from utils.images import to_uint8
from utils.noise import normals
from utils.provenance import provenance
from utils.sampling.draws import compiled_normals, image_noise
from utils.sampling.few_rows import choose_ways, is_large, use_ways
from utils.sampling.graphs import cast_weights, compile_pieces, static_phases

LAST_STEP_SIZE = SamplingSettings().last_step_size


def straightforward_phases(
    model: SphereAR, settings: SamplingSettings, compiled: Callable[[Callable], Callable] | None = None
) -> Phases:
    """Euler-Maruyama with nothing taken out of the loop: time, condition and adaLN parameters at every evaluation; and
    a float32 KV cache, of which every position takes its slice. compiled: torch.compile, for the velocity."""
    head_velocity = model.head.velocity if compiled is None else compiled(model.head.velocity)

    def sample_token(condition, noise, time_embedding, scale, times) -> Tensor:
        dt = times[1]

        def velocity(x: Tensor, t: float) -> Tensor:
            x = x if scale is None else torch.cat([x, x])
            v = head_velocity(x, torch.full((len(x),), t, device=x.device), condition)
            return v.float() if scale is None else guide(*v.chunk(2), scale)

        x = noise[0]
        for t, draw in zip(times, noise[1:]):
            x = x + ((1 + t) * velocity(x, t) - x) * dt + (2 * (1 - t) * dt) ** 0.5 * draw
        return x + (1 - times[-1]) * velocity(x, times[-1])

    def new_cache(rows: int, dtype: torch.dtype, device: torch.device) -> KVCache:
        return model.new_cache(rows, torch.float32, device)

    return Phases(new_cache, model.prefill, sample_token, model.decode_step)


def build(name: str, device: torch.device) -> SphereAR:
    torch.manual_seed(0)
    with device:
        model = SphereAR(PRESETS[name])
    for parameter in model.head.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model.eval().requires_grad_(False)


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ceiling(device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """FLOP/s of a large matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    a @ b
    return 2 * side**3 / min(seconds_of(lambda: a @ b, device) for _ in range(repeats + 2))


def phases_of(
    model: SphereAR, phases: Phases | None, settings: SamplingSettings, batch: int, device: torch.device, args
) -> dict[str, Callable]:
    """The parts of a generation as functions without arguments; `decode_step` is three positions over the sequence.

    phases: ours, or None for the straightforward implementation.
    """
    torch.manual_seed(1)
    c = model.config
    rows, scale = (2 * batch, settings.cfg_scale) if settings.cfg_scale > 1 else (batch, None)
    labels = torch.cat([torch.arange(batch) % c.num_classes, torch.full((rows - batch,), c.null_class)]).to(device)
    own = phases or Phases.of(model, settings)
    cache = own.new_cache(rows, torch.bfloat16 if args.precision == "bf16" else torch.float32, device)
    images = torch.arange(batch, device=device)
    noise_of = image_noise(0, images, settings.num_noise, c.latent_dim, compiled_normals() if args.compile else normals)
    noise = noise_of(1, batch)
    tokens = torch.nn.functional.normalize(torch.randn(rows, c.latent_dim, device=device), dim=-1) * c.radius
    image_tokens = tokens[:batch, None].expand(-1, c.num_tokens, -1)
    condition = own.prefill(labels, cache)
    positions = [0, c.num_tokens // 2, c.num_tokens - 2]
    if phases is None:
        head = lambda: straightforward_head(model, condition, noise, scale)  # noqa: E731
        draws = lambda: torch.randn(settings.num_noise, batch, c.latent_dim, device=device)  # noqa: E731
        decoder = lambda: model.vae.decode(image_tokens)  # noqa: E731
    else:
        times = model.head.embed_times(settings.times)
        head = lambda: phases.sample_token(condition, noise, times, scale, times=settings.times)  # noqa: E731
        draws = lambda: noise_of(1, batch)  # noqa: E731
        decoder = lambda: [to_uint8(part) for part in decode(model, image_tokens)]  # noqa: E731
    return {
        "prefill": lambda: own.prefill(labels, cache),
        "noise": draws,
        "head": head,
        "decode_step": lambda: [own.decode_step(tokens, position, cache).clone() for position in positions],
        "decoder": decoder,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(PRESETS), default="SphereAR-B")
    parser.add_argument("--batch", type=int, default=2, help="images")
    parser.add_argument("--precision", choices=("none", "bf16"), default="none")
    parser.add_argument("--no-guidance", action="store_true")
    parser.add_argument("--steps", type=int, default=SamplingSettings().num_sampling_steps)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    parser.add_argument("--no-decoder", action="store_true", help="leave out the decoder (slow on a CPU)")
    parser.add_argument("--out", help="JSON (default: benchmarks/results/sampling_MODEL_DEVICE_BATCH_PRECISION.json)")
    args = parser.parse_args()
    device, guided = torch.device(args.device), not args.no_guidance
    args.compile = device.type == "cuda" if args.compile is None else args.compile
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    plain = build(args.model, device)
    shared = {} if args.precision == "bf16" else {id(p): p for p in plain.parameters()}
    fast, ways = copy.deepcopy(plain, shared), {}
    if args.precision == "bf16":
        cast_weights(fast, torch.bfloat16)
    scale = SamplingSettings().cfg_scale if guided else 1.0
    settings = SamplingSettings(cfg_scale=scale, num_sampling_steps=args.steps)
    trunk, rows = nn.ModuleList([fast.layers, fast.head]), args.batch * (1 + guided)
    if not args.compile and device.type == "cpu" and is_large(trunk):
        use_ways(trunk, ways := choose_ways(trunk, rows), rows)
    ours = Phases.of(fast, settings, compile_pieces(fast) if args.compile else None)
    if args.compile:
        ours = static_phases(ours, fast.config.num_class_tokens, device.type == "cuda")

    config = plain.config
    calls = {"prefill": 1, "noise": config.num_tokens, "head": config.num_tokens, "decoder": 1}
    calls["decode_step"] = (config.num_tokens - 1) / 3  # a call is three positions
    if args.no_decoder:
        del calls["decoder"]
    best: dict[str, dict[str, float]] = {"straightforward": {}, "ours": {}}
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, args.precision == "bf16"):
        phases = {
            name: phases_of(model, its_own, settings, args.batch, device, args)
            for name, model, its_own in (("straightforward", plain, None), ("ours", fast, ours))
        }
        difference = {}
        for phase in ("head", "decode_step"):
            a, b = (p[phase]() for p in phases.values())
            a, b = (torch.stack(x) if isinstance(x, list) else x for x in (a, b))
            difference[phase] = ((a.float() - b.float()).abs().max() / a.abs().max()).item()
        with FlopCounterMode(display=False) as counter:
            flops = 0.0
            for phase, times in calls.items():
                before = counter.get_total_flops()
                phases["straightforward"][phase]()
                flops += times * (counter.get_total_flops() - before)
        for _ in range(args.repeats):
            for phase in calls:
                for name, functions in phases.items():
                    seconds = seconds_of(functions[phase], device)
                    best[name][phase] = min(seconds, best[name].get(phase, seconds))
        peak = ceiling(device, dtype, args.repeats)

    total = {name: sum(calls[phase] * seconds for phase, seconds in times.items()) for name, times in best.items()}
    rate = {name: args.batch / seconds for name, seconds in total.items()}
    per_image = flops / args.batch
    threads, setting = torch.get_num_threads(), f"{args.model}, batch {args.batch}, precision {args.precision}"
    print(f"{setting}, {'with' if guided else 'without'} guidance, {device}, {threads} threads")
    print(f"{'ms per call':<22}{'straightforward':>16}{'ours':>12}{'ratio':>8}{'share of ours':>15}")
    for phase in calls:
        a, b = best["straightforward"][phase] * 1e3, best["ours"][phase] * 1e3
        share = calls[phase] * b / total["ours"] / 1e3
        print(
            f"{phase + (' x 3' if phase == 'decode_step' else ''):<22}{a:>16.2f}{b:>12.2f}{a / b:>8.2f}{share:>15.1%}"
        )
    for name in rate:
        share = rate[name] * per_image / peak
        print(f"{name}: {rate[name]:.4g} images/s, {share:.1%} of the ceiling of {peak / 1e12:.3g} TFLOP/s")
    print(f"ratio {rate['ours'] / rate['straightforward']:.2f}; {per_image / 1e12:.3g} TFLOP per image")
    print(f"largest relative differences: {difference}")

    report = {
        "settings": vars(args),
        "extrapolated_from": "one token's head and noise, three positions of the decode step; best of the repeats",
        "seconds_per_call": best,
        "calls_per_batch": calls,
        "images_per_second": rate,
        "ratio": rate["ours"] / rate["straightforward"],
        "tflop_per_image": per_image / 1e12,
        "ceiling_tflops": peak / 1e12,
        "share_of_ceiling": {name: value * per_image / peak for name, value in rate.items()},
        "largest_relative_difference": difference,
        "linear_ways": ways,
        "machine": {**provenance(device), "load_average": os.getloadavg()},
    }
    name = f"sampling_{args.model}_{device.type}_{args.batch}_{args.precision}.json"
    path = Path(args.out or Path(__file__).parent / "results" / name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, report)
    print(path)


if __name__ == "__main__":
    main()
