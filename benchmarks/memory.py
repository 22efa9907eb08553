"""Memory of an AR training step, per GPU: computed from shapes, without a GPU and without numbers.

    python -m benchmarks.memory [--models SphereAR-B SphereAR-L SphereAR-H] [--batch-size 64]

The step of benchmarks/training.py runs on fake tensors under bf16 autocast with FlashAttention, and the bytes of all
storages that are alive are added up after every operator. "compiled" has what torch.compile's partitioner decides to
keep for the backward pass, and runs the rest operator by operator. On top come a GPU's context, NCCL's buffers and gaps
between allocations (not measured). Results go to benchmarks/results/memory.json.
"""

import argparse
import sys
import weakref
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.kernels import cpu_for_gpu, fake_batch, trainable_model  # noqa: E402
from benchmarks.training import Ours  # noqa: E402
from models import PRESETS  # noqa: E402
from utils.files import write_json  # noqa: E402
from utils.provenance import provenance  # noqa: E402
from utils.training.compilation import compile_ar  # noqa: E402

GIB = 2**30
KINDS = "eager", "checkpointing", "compiled", "compiled, checkpointing"


class Alive(TorchDispatchMode):
    """Bytes of the storages alive, and the most there ever were (torch's MemTracker takes no frozen weights)."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self.known = WeakIdKeyDictionary()

    def add(self, tensors: object) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known[storage] = None
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.bytes)

    def _freed(self, size: int) -> None:
        self.bytes -= size

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.add(result := func(*args, **(kwargs or {})))
        return result


def training(name: str, batch_size: int, kind: str) -> dict[str, float]:
    """GiB: what stays from step to step, and the most that a step of this kind of KINDS has beside it."""
    torch._dynamo.reset()
    compiling = partial(torch.compile, backend="aot_eager_decomp_partition")
    with FakeTensorMode(), cpu_for_gpu(), patch.object(torch, "compile", compiling):
        model = trainable_model(PRESETS[name])
        model.grad_checkpointing = "checkpointing" in kind
        if is_compiled := "compiled" in kind:
            compile_ar(model)
        step = Ours(model, torch.autocast("cpu", torch.bfloat16), torch.device("cpu"), compiled=is_compiled)
        batch = fake_batch(model.config, batch_size)
        step.step(batch)  # compiles, and makes the optimizer's state
        moments = list(step.player.optimizer.state.values())
        alive = Alive()
        alive.add([list(model.parameters()), list(model.buffers()), step.ema.averages, moments, batch.image])
        with alive:
            step.step(batch)
    weights = sum(weight.nbytes for weight in step.player.weights)
    frozen = sum(weight.nbytes for weight in model.vae.parameters())
    sizes = {"weights": weights, "Adam": 2 * weights, "EMA": weights, "S-VAE": frozen}
    sizes |= {"gradients, activations": alive.peak - sum(sizes.values()), "peak": alive.peak}
    return {what: round(size / GIB, 2) for what, size in sizes.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [name for name in PRESETS if name != "SphereAR-Nano"]
    parser.add_argument("--models", nargs="+", choices=list(PRESETS), default=sizes, help="[B, L, H]")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time on a GPU [%(default)s]")
    options = parser.parse_args()
    report = {"batch_size": options.batch_size, "precision": "bf16", "GiB": {}}
    for name in options.models:
        for kind in KINDS:
            found = training(name, options.batch_size, kind)
            report["GiB"].setdefault(name, {})[kind] = found
            print(name, kind, ", ".join(f"{what} {size:.1f}" for what, size in found.items()), flush=True)
    write_json(ROOT / "benchmarks/results/memory.json", report | {"made_by": provenance(torch.device("cpu"))})


if __name__ == "__main__":
    main()
