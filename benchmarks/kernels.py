"""How many kernels a GPU is given per image token and per training step, counted without a GPU.

    python benchmarks/kernels.py [--models SphereAR-B SphereAR-L SphereAR-H] [--what sampling training]

The models are made of fake CUDA tensors (shapes, dtypes and devices without numbers: FakeTensorMode, which also
refuses tensors of different devices). What torch.compile is given goes through Inductor down to the code it generates
for an H100: its Triton kernels and calls of libraries are counted there. Every other operator that is not a view counts
as one kernel. A library's call counts as one, though it may launch two. Nothing runs on a GPU: these are counts, not
times. Results go to benchmarks/results/kernels.json.
"""

import argparse
import copy
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._dynamo.device_interface import CudaInterface
from torch._guards import detect_fake_mode
from torch._inductor import compile_fx, config, graph
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import models  # noqa: E402
from benchmarks.sampling import straightforward_phases  # noqa: E402
from benchmarks.training import Ours, Straightforward  # noqa: E402
from dataset import Sample  # noqa: E402
from models import PRESETS, Phases, SamplingSettings, SphereAR, SphereARConfig  # noqa: E402
from utils.files import read_json, write_json  # noqa: E402
from utils.noise import normals  # noqa: E402
from utils.provenance import provenance  # noqa: E402
from utils.sampling.draws import compiled_normals, image_noise  # noqa: E402
from utils.sampling.graphs import compile_pieces, static_phases  # noqa: E402
from utils.training.compilation import compile_ar  # noqa: E402

RESULTS = ROOT / "benchmarks/results/kernels.json"
GUIDED = SamplingSettings()
H100 = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32, total_memory=80 * 2**30,
)  # fmt: skip
KERNEL = re.compile(r"^\s+(?:\w+ = )?(triton_\w+)\.run\(|\b(extern_kernels\.\w+|torch\.ops\.[\w.]+)\(", re.MULTILINE)
NO_KERNEL = {  # beside views
    torch.ops.aten._unsafe_view.default, torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default, torch.ops.aten.new_empty.default, torch.ops.aten.new_empty_strided.default,
    torch.ops.aten.lift_fresh.default, torch.ops.aten._local_scalar_dense.default,
}  # fmt: skip


# ---- a GPU that is not there -------------------------------------------------------------------------------------


class Kernels(TorchDispatchMode):
    """Counts, in `fake_gpu`, the kernels of what runs: `eager` by operator, `compiled` by name in Inductor's code."""

    def __init__(self):
        super().__init__()
        self.device = "cuda"
        self.eager: Counter[str] = Counter()
        self.compiled: Counter[str] = Counter()
        self.codes: list[str] = []  # what Inductor generated, graph by graph
        self._inside = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    @property
    def total(self) -> int:
        return self.eager.total() + self.compiled.total()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if (
            not self._inside
            and not func.is_view
            and func not in NO_KERNEL
            and _on_gpu(args if result is None else result, self.device)
        ):
            self.eager[str(func)] += 1
        return result

    def compile(self, module: torch.fx.GraphModule, inputs: list, **options: object) -> Callable:
        """In the place of Inductor's compile_fx_inner: generates the code, counts it at each call, runs none of it."""
        same, kernels = copy.deepcopy(module), Counter()
        self._inside = True
        try:
            kernels = _kernels_of(code := generated_code(module, inputs, **options))
            self.codes.append(code)
        finally:
            self._inside = False

        made = []

        def run(arguments: list) -> object:
            before, self._inside = self._inside, True
            self.compiled += kernels
            try:
                if not made:  # later calls make the same, without going through the graph
                    made.append(same(*arguments))
                    return made[0]
                return tree_map_only(Tensor, lambda x: x.new_empty_strided(x.shape, x.stride()), made[0])
            finally:
                self._inside = before

        run._boxed_call = True
        return run


def _on_gpu(result: object, device: str) -> bool:
    leaves = tree_leaves(result)
    return any(leaf.device.type == device for leaf in leaves if isinstance(leaf, Tensor))


def _kernels_of(code: str) -> Counter[str]:
    body = code.partition("\n    def call(")[2] or code.partition("\ndef call(")[2]
    return Counter(triton or other for triton, other in KERNEL.findall(body))


class _Generated(Exception):
    pass


def generated_code(module: torch.fx.GraphModule, inputs: list, **options: object) -> str:
    """Inductor's code for a graph, up to where a GPU would be needed to load it."""
    codes = []
    if not any(isinstance(value, Tensor) and value.is_cuda for value in inputs):
        module, inputs = moved_to_gpu(module, inputs)

    def stop(lowering: graph.GraphLowering) -> None:
        codes.append(lowering.codegen()[0].value)
        raise _Generated

    with patch.object(graph.GraphLowering, "_compile_to_module", stop):
        try:
            compile_fx.compile_fx_inner(module, inputs, **options)
        except Exception:
            if not codes:
                raise
    return codes[0]


def moved_to_gpu(module: torch.fx.GraphModule, inputs: list) -> tuple[torch.fx.GraphModule, list]:
    """A graph of fake CPU tensors, and its inputs, on the GPU."""
    mode, module = detect_fake_mode(inputs), copy.deepcopy(module)
    with mode:
        inputs = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") if isinstance(x, Tensor) else x
            for x in inputs
        ]
    for node in module.graph.nodes:
        if "device" in node.kwargs:
            node.update_kwarg("device", torch.device("cuda:0"))
    FakeTensorProp(module, mode).propagate(*inputs)
    return module, inputs


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """What PyTorch's SDPA runs on a GPU: FlashAttention, or, for a mask or float32, the memory-efficient kernel. Where
    there is no GPU to ask, it would choose the plain formula."""
    if attn_mask is None and q.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    if attn_mask is not None:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(attn_mask.logical_not(), -torch.inf)
        attn_mask = attn_mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, False, 0.0, is_causal)[0]


def flash_stand_in(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return fused_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal).transpose(1, 2)


@contextmanager
def fake_gpu() -> Iterator[Kernels]:
    """Inside, tensors on "cuda" are fake, torch.compile generates an H100's code and runs none, and all is counted."""
    answers = {
        "get_device_properties": lambda device=None: H100,
        "get_device_capability": lambda device=None: (H100.major, H100.minor),
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "is_bf16_supported": lambda including_emulation=True: True,
    }
    real_compile, kernels = compile_fx.compile_fx, Kernels()

    def compile_counted(module, inputs, inner_compile=None, **options):
        return real_compile(module, inputs, inner_compile=kernels.compile, **options)

    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
            if hasattr(CudaInterface, name):
                stack.enter_context(patch.object(CudaInterface, name, staticmethod(answer)))
        stack.enter_context(patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
        stack.enter_context(patch("torch._inductor.scheduler.has_triton", lambda: True))
        stack.enter_context(patch("torch.utils._triton.triton_hash_with_backend", lambda: "none"))
        stack.enter_context(patch.object(compile_fx, "compile_fx", compile_counted))
        stack.enter_context(patch.object(nn.functional, "scaled_dot_product_attention", fused_attention))
        stack.enter_context(
            config.patch(
                fx_graph_cache=False, compile_threads=1, joint_graph_constant_folding=False
            )  # it would compute
        )
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        stack.callback(torch._dynamo.reset)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=False))
        stack.enter_context(kernels)
        yield kernels


def fake_model(model_config: SphereARConfig, dtype: torch.dtype = torch.bfloat16) -> SphereAR:
    """The model as fake tensors on the GPU, its linear layers and convolutions in `dtype` (inside `fake_gpu`)."""
    with torch.device("cuda"):
        model = SphereAR(model_config).eval().requires_grad_(False)
    for module in model.modules():
        for name, value in list(module._buffers.items()):
            module._buffers[name] = value.to("cuda")  # RoPE is made on the CPU
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            for name, value in list(module._parameters.items()):
                if value is not None:
                    module._parameters[name] = nn.Parameter(value.to(dtype), requires_grad=False)
    return model


# ---- what is counted ---------------------------------------------------------------------------------------------


class _Enough(Exception):
    pass


def sampling(name: str, batch: int = 256, tokens: int = 3, settings: SamplingSettings = GUIDED) -> dict:
    """Kernels of a token (the last of `tokens`) of the published sampler with guidance, under bf16 autocast.

    ours: as sample_ddp.py runs on a GPU, which replays most of them in two CUDA graphs; with flash-attn: the same where
    that package is (its kernel stood in for by an operator without content); straightforward: velocity network with its
    embeddings, and blocks, compiled, all else eager (benchmarks/sampling.py). graph_breaks shall be 0, and what is
    recompiled behind the first guided token too.
    """
    counts = {}
    for kind in ("ours", "ours with flash-attn", "straightforward"):
        with (
            fake_gpu() as kernels,
            patch("models.layers.flash_attn_func", flash_stand_in if "flash" in kind else None),
            torch.no_grad(),
            torch.autocast("cuda", torch.bfloat16),
        ):
            model = fake_model(PRESETS[name], torch.float32 if kind == "straightforward" else torch.bfloat16)
            images, last = torch.arange(batch, device="cuda"), {}

            def counted(what: str, function: Callable, kernels: Kernels = kernels, last: dict = last) -> Callable:
                def call(*args: object, **options: object) -> object:
                    before = kernels.total
                    result = function(*args, **options)
                    last[what] = kernels.total - before
                    return result

                return call

            if kind != "straightforward":
                evaluation = counted("head evaluation", compile_pieces(model))
                phases, draw = Phases.of(model, settings, evaluation), compiled_normals()
                phases = static_phases(phases, model.config.num_class_tokens, cuda_graphs=False)
            else:
                for block in model.layers:
                    block.compile(dynamic=False)
                phases, draw = straightforward_phases(model, torch.compile), normals
            phases = replace(
                phases,
                sample_token=counted("head", phases.sample_token),
                decode_step=counted("decode step", phases.decode_step),
            )
            noise = counted("noise", image_noise(0, images, settings.num_noise, model.config.latent_dim, draw))
            totals, graphs = [], []

            def observe(
                position: int, *_: Tensor, kernels: Kernels = kernels, totals: list = totals, graphs: list = graphs
            ) -> None:
                totals.append(kernels.total)
                graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
                if position + 1 == tokens:
                    raise _Enough

            with suppress(_Enough):
                models.generate_tokens(model, images, settings, noise, phases, observe)
            breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
            counts[kind] = {
                **last, "token": totals[-1] - totals[-2], "graph_breaks": breaks, "recompiled": graphs[-1] - graphs[1],
            }  # fmt: skip
            if kind == "ours":
                before = kernels.total
                list(
                    models.decode(
                        model, torch.zeros(batch, model.config.num_tokens, model.config.latent_dim, device="cuda")
                    )
                )
                counts[kind]["decoder"] = kernels.total - before
    return counts


@contextmanager
def cpu_for_gpu() -> Iterator[None]:
    """Inside, fake CPU tensors are trained as a GPU's would be: torch's engine refuses a GPU that is not there.

    Operators over lists of tensors are chosen as on a GPU. Autocast follows the CPU's list of operators.
    """
    with (
        patch.object(nn.functional, "scaled_dot_product_attention", fused_attention),
        patch.object(Tensor, "item", lambda self: 1.0),  # the loss, for a log; Adam's step
        patch("torch.nn.utils.clip_grad._has_foreach_support", lambda *_: True),
        patch("torch.optim.adam._default_to_fused_or_foreach", lambda *_, **__: (False, True)),
    ):
        yield


def trainable_model(config: SphereARConfig) -> SphereAR:
    """A model as AR training has it, of fake tensors on the CPU (inside a FakeTensorMode)."""
    model = SphereAR(config)
    for module in model.modules():
        for buffer, value in module._buffers.items():
            module._buffers[buffer] = torch.empty_like(value)  # RoPE is real
    model.vae.requires_grad_(False).eval()
    return model


def fake_batch(config: SphereARConfig, size: int) -> Sample:
    """A batch of `size` images (inside a FakeTensorMode)."""
    side, numbers = config.svae.image_size, torch.zeros(size, dtype=torch.long)
    return Sample(torch.zeros(size, 3, side, side, dtype=torch.uint8), numbers, numbers, [""] * size)


def training(name: str) -> dict:
    """Kernels of an AR training step of 64 images under bf16 autocast: ours, and the straightforward one.

    Both are those of benchmarks/training.py, compiled: of the straightforward one blocks, stem and velocity network.
    """
    config, counts = PRESETS[name], {}
    for kind in ("ours", "straightforward"):
        with fake_gpu() as kernels, cpu_for_gpu():
            kernels.device = "cpu"
            model, autocast = trainable_model(config), torch.autocast("cpu", torch.bfloat16)
            if kind == "ours":
                compile_ar(model)
                step = Ours(model, autocast, torch.device("cpu"), compiled=True)
            else:
                encoder = model.vae.encoder
                for module in (*model.layers, model.head.net, *encoder.layers, encoder.patchify):
                    module.compile(dynamic=False)
                step = Straightforward(model, autocast, torch.device("cpu"))
            batch = fake_batch(config, 64)
            step.step(batch)  # compiles, and makes the optimizer's state
            eager, compiled = kernels.eager.copy(), kernels.compiled.copy()
            step.step(batch)
            eager, compiled = kernels.eager - eager, kernels.compiled - compiled
            counts[kind] = {
                "total": eager.total() + compiled.total(), "compiled": compiled.total(), "eager": eager.total(),
                "eager_operators": dict(eager.most_common()),
            }  # fmt: skip
    return counts


COUNTS: dict[str, Callable[[str], dict]] = {"sampling": sampling, "training": training}  # of a preset's name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [name for name in PRESETS if name != "SphereAR-Nano"]
    parser.add_argument("--models", nargs="+", choices=list(PRESETS), default=sizes)
    parser.add_argument("--what", nargs="+", choices=list(COUNTS), default=list(COUNTS))
    options = parser.parse_args()
    for what in options.what:
        for name in options.models:
            found = COUNTS[what](name)
            print(f"{what}, {name}: {json.dumps(found, indent=2)}", flush=True)
            report = read_json(RESULTS, "remove it") if RESULTS.exists() else {}
            kernels = report.get(what, {}).get("kernels", {})
            report[what] = {"made_by": provenance(torch.device("cpu")), "kernels": {**kernels, name: found}}
            write_json(RESULTS, report)


if __name__ == "__main__":
    main()
