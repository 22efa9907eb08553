"""How fast sampling is, phase by phase and as a whole, against the straightforward implementation and the ceiling.

    python benchmarks/sampling.py --model SphereAR-B --batch 2                      # CPU, float32
    python benchmarks/sampling.py --model SphereAR-L --batch 256 --precision bf16   # GPU

Random weights; both implementations in the same process, turn by turn; the best of --repeats of each phase. The
straightforward one (below) does what the released code does: cache slices, a float32 KV cache, every embedding at every
evaluation. With --compile (the default on a GPU) its blocks and its velocity are compiled too, as the released code's
are; on a CPU both are eager by default. A batch's time is put together from the phases: prefill + tokens x (noise +
head + decode step) + decoder; where that is below --whole seconds, a whole generation of each is timed as well.
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

from models import PRESETS, Phases, SamplingSettings, SphereAR, decode, generate_tokens
from models.flow import guide
from models.layers import KVCache
from utils.files import write_json
from utils.images import to_uint8
from utils.noise import normals
from utils.provenance import provenance
from utils.sampling.draws import compiled_normals, image_noise
from utils.sampling.few_rows import choose_ways, is_large, use_ways
from utils.sampling.graphs import cast_weights, compile_pieces, static_phases


def straightforward_phases(model: SphereAR, compiled: Callable[[Callable], Callable] | None = None) -> Phases:
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


def parts_of(
    model: SphereAR, phases: Phases, settings: SamplingSettings, batch: int, device: torch.device, draw: Callable | None
) -> dict[str, Callable]:
    """The parts of a generation as functions without arguments; `decode_step` is three positions over the sequence.

    draw: of the addressed noise; None: torch's own, and the decoder takes all images at once.
    """
    torch.manual_seed(1)
    c = model.config
    rows, scale = (2 * batch, settings.cfg_scale) if settings.cfg_scale > 1 else (batch, None)
    labels = torch.cat([torch.arange(batch) % c.num_classes, torch.full((rows - batch,), c.null_class)]).to(device)
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
    cache = phases.new_cache(rows, dtype, device)
    noise_of = noise_source(settings, batch, c.latent_dim, device, draw)
    noise = image_noise(0, torch.arange(batch, device=device), settings.num_noise, c.latent_dim)(1, batch)
    tokens = torch.nn.functional.normalize(torch.randn(rows, c.latent_dim, device=device), dim=-1) * c.radius
    image_tokens = tokens[:batch, None].expand(-1, c.num_tokens, -1)
    condition, times = phases.prefill(labels, cache), model.head.embed_times(settings.times)
    positions = [0, c.num_tokens // 2, c.num_tokens - 2]
    return {
        "prefill": lambda: phases.prefill(labels, cache),
        "noise": lambda: noise_of(1, batch),
        "head": lambda: phases.sample_token(condition, noise, times, scale, times=settings.times),
        "decode_step": lambda: [phases.decode_step(tokens, position, cache).clone() for position in positions],
        "decoder": lambda: pixels_of(model, image_tokens, draw),
        "whole": lambda: pixels_of(model, generate_tokens(model, labels[:batch], settings, noise_of, phases), draw),
    }


def noise_source(
    settings: SamplingSettings, batch: int, channels: int, device: torch.device, draw: Callable | None
) -> Callable[[int, int], Tensor]:
    if draw is None:
        return lambda token, rows: torch.randn(settings.num_noise, rows, channels, device=device)
    return image_noise(0, torch.arange(batch, device=device), settings.num_noise, channels, draw)


def pixels_of(model: SphereAR, tokens: Tensor, draw: Callable | None) -> list:
    return [model.vae.decode(tokens)] if draw is None else [to_uint8(part) for part in decode(model, tokens)]


def flops_of(parts: dict[str, Callable], calls: dict[str, float]) -> float:
    """Floating-point operations of a batch; of uncompiled parts, which the counter sees."""
    total = 0.0
    with FlopCounterMode(display=False) as counter:
        for phase, times in calls.items():
            before = counter.get_total_flops()
            parts[phase]()
            total += times * (counter.get_total_flops() - before)
    return total


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
    parser.add_argument("--whole", type=float, default=60, help="time whole generations below these seconds [60]")
    parser.add_argument("--out", help="JSON (default: benchmarks/results/sampling_MODEL_DEVICE_BATCH_PRECISION.json)")
    args = parser.parse_args()
    device, guided = torch.device(args.device), not args.no_guidance
    args.compile = device.type == "cuda" if args.compile is None else args.compile
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    plain = build(args.model, device)
    shared = {} if args.precision == "bf16" or args.compile else {id(p): p for p in plain.parameters()}
    fast, ways = copy.deepcopy(plain, shared), {}
    if args.precision == "bf16":
        cast_weights(fast, torch.bfloat16)
    scale = SamplingSettings().cfg_scale if guided else 1.0
    settings = SamplingSettings(cfg_scale=scale, num_sampling_steps=args.steps)
    config, on_gpu = plain.config, device.type == "cuda"
    calls = {"prefill": 1, "noise": config.num_tokens, "head": config.num_tokens, "decoder": 1}
    calls["decode_step"] = (config.num_tokens - 1) / 3  # a call is three positions
    if args.no_decoder:
        del calls["decoder"]

    def parts(model: SphereAR, phases: Phases, draw: Callable | None) -> dict[str, Callable]:
        return parts_of(model, phases, settings, args.batch, device, draw)

    best: dict[str, dict[str, float]] = {"straightforward": {}, "ours": {}}
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, args.precision == "bf16"):
        straightforward, ours = straightforward_phases(plain), Phases.of(fast, settings)
        if args.compile:
            ours = static_phases(ours, config.num_class_tokens, cuda_graphs=False)
        flops = {
            "straightforward": flops_of(parts(plain, straightforward, None), calls),
            "ours": flops_of(parts(fast, ours, normals), calls),
        }
        trunk, rows = nn.ModuleList([fast.layers, fast.head]), args.batch * (1 + guided)
        if args.compile:
            for block in plain.layers:
                block.compile()
            straightforward = straightforward_phases(plain, torch.compile)
            ours = Phases.of(fast, settings, compile_pieces(fast))
            ours = static_phases(ours, config.num_class_tokens, cuda_graphs=on_gpu)
        elif not on_gpu and is_large(trunk):
            use_ways(trunk, ways := choose_ways(trunk, rows), rows)
        phases = {
            "straightforward": parts(plain, straightforward, None),
            "ours": parts(fast, ours, compiled_normals() if args.compile else normals),
        }
        difference = {}
        for phase in ("head", "decode_step"):
            a, b = (p[phase]() for p in phases.values())
            a, b = (torch.stack(x) if isinstance(x, list) else x for x in (a, b))
            difference[phase] = ((a.float() - b.float()).abs().max() / a.abs().max()).item()
        for _ in range(args.repeats):
            for phase in calls:
                for name, functions in phases.items():
                    seconds = seconds_of(functions[phase], device)
                    best[name][phase] = min(seconds, best[name].get(phase, seconds))
        total = {name: sum(calls[phase] * seconds for phase, seconds in times.items()) for name, times in best.items()}
        whole = {}
        if not args.no_decoder:
            whole = {name: seconds_of(phases[name]["whole"], device) for name in phases if total[name] < args.whole}
        peak = ceiling(device, dtype, args.repeats)

    rate = {name: args.batch / seconds for name, seconds in total.items()}
    per_image = {name: value / args.batch for name, value in flops.items()}
    against = f"the straightforward implementation, {'compiled' if args.compile else 'eager'}"
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
        share = rate[name] * per_image[name] / peak
        print(
            f"{name}: {rate[name]:.4g} images/s by its parts; executes {per_image[name] / 1e12:.3g} TFLOP per image, "
            f"{share:.1%} of the ceiling of {peak / 1e12:.3g} TFLOP/s"
        )
    print(f"ours against {against}, by parts: {rate['ours'] / rate['straightforward']:.2f} times as fast")
    for name, seconds in whole.items():
        print(f"{name}, a whole generation: {seconds:.3g} s, {args.batch / seconds:.4g} images/s")
    if len(whole) == 2:
        print(f"ours against {against}, whole: {whole['straightforward'] / whole['ours']:.2f} times as fast")
    print(f"largest relative differences: {difference}")

    report = {
        "settings": vars(args),
        "ratio_is_against": against,
        "extrapolated_from": "one token's head and noise, three positions of the decode step; best of the repeats",
        "seconds_per_call": best,
        "calls_per_batch": calls,
        "images_per_second": rate,
        "ratio": rate["ours"] / rate["straightforward"],
        "seconds_of_a_whole_generation": whole,
        "tflop_per_image_executed": {name: value / 1e12 for name, value in per_image.items()},
        "ceiling_tflops": peak / 1e12,
        "share_of_ceiling": {name: value * per_image[name] / peak for name, value in rate.items()},
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
