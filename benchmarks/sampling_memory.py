"""Memory of sampling with guidance in bf16, per GPU: computed from shapes, without a GPU and without numbers.

    python benchmarks/sampling_memory.py [--models SphereAR-B SphereAR-L SphereAR-H] [--gpu-gib 79]

The KV cache is what grows with the batch. "all else" is the most that a token and the decoding of 64 images hold beside
weights and cache, at the default batch: the bytes of all tensors alive on fake CUDA tensors, operator by operator. On
top come a GPU's context, what CUDA graphs keep, and gaps between allocations (not measured).
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.kernels import fake_gpu, fake_model  # noqa: E402
from benchmarks.memory import GIB, Alive  # noqa: E402
from models import PRESETS, Phases, SamplingSettings  # noqa: E402
from utils.files import write_json  # noqa: E402
from utils.provenance import provenance  # noqa: E402
from utils.sampling.graphs import batch_that_fits  # noqa: E402

RESULTS = ROOT / "benchmarks/results/sampling_memory.json"


def memory(name: str, gpu_bytes: float) -> dict:
    """GiB by part, and the batch that sample_ddp.py chooses where that much is free before the model is there."""
    config, settings = PRESETS[name], SamplingSettings(num_sampling_steps=16)  # a chunk's adaLN parameters and more
    with fake_gpu(), torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        model = fake_model(config)
        weights = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
        batch = batch_that_fits(config.cache_bytes(2, torch.bfloat16), int(gpu_bytes - weights))
        rows, cache_bytes = 2 * batch, config.cache_bytes(2 * batch, torch.bfloat16)
        phases = Phases.of(model, settings)
        with Alive() as alive:
            kv_cache = phases.new_cache(rows, torch.bfloat16, torch.device("cuda"))
            condition = phases.prefill(torch.zeros(rows, dtype=torch.long, device="cuda"), kv_cache)
            noise = torch.randn(SamplingSettings().num_noise, batch, config.latent_dim, device="cuda")
            embedding = model.head.embed_times(settings.times)
            token = phases.sample_token(condition, noise, embedding, 2.0, times=settings.times)
            phases.decode_step(torch.cat([token, token]), torch.zeros((), dtype=torch.long, device="cuda"), kv_cache)
            model.vae.decode(torch.zeros(64, config.num_tokens, config.latent_dim, device="cuda"))
    return {
        "weights": weights / GIB,
        "KV cache at batch 256": config.cache_bytes(512, torch.bfloat16) / GIB,
        "default batch": batch,
        "KV cache at default batch": cache_bytes / GIB,
        "all else": (alive.peak - cache_bytes) / GIB,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [name for name in PRESETS if name != "SphereAR-Nano"]
    parser.add_argument("--models", nargs="+", choices=list(PRESETS), default=sizes)
    parser.add_argument("--gpu-gib", type=float, default=79, help="free memory of the GPU, GiB [%(default)s: of 80 GB]")
    options = parser.parse_args()
    found = {name: memory(name, options.gpu_gib * GIB) for name in options.models}
    for name, parts in found.items():
        print(name, {part: round(value, 1) for part, value in parts.items()})
    report = {"made_by": provenance(torch.device("cpu")), "gpu_gib": options.gpu_gib, "gib": found}
    write_json(RESULTS, report)


if __name__ == "__main__":
    main()
