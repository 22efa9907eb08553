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
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.training import Ours, Straightforward  # noqa: E402
from dataset import Sample  # noqa: E402
from models import PRESETS, SphereAR, SphereARConfig  # noqa: E402
from utils.files import read_json, write_json  # noqa: E402
from utils.provenance import provenance  # noqa: E402
from utils.training.compilation import compile_ar  # noqa: E402

RESULTS = ROOT / "benchmarks/results/kernels.json"
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
    """Counts, inside `fake_gpu`, the kernels of what runs: `eager` by operator, `compiled` by name in its code."""

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

        def run(arguments: list) -> object:
            arguments, before = tuple(arguments), self._inside
            self.compiled += kernels
            self._inside = True
            try:
                return same(*arguments)
            finally:
                self._inside = before

        run._boxed_call = True
        return run


def _on_gpu(result: object, device: str) -> bool:
    leaves = torch.utils._pytree.tree_leaves(result)
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


@contextmanager
def fake_gpu() -> Iterator[Kernels]:
    """Inside, tensors on "cuda" are fake; torch.compile generates code for an H100 and runs none; all is counted."""
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
        stack.enter_context(config.patch(fx_graph_cache=False, compile_threads=1))
        torch._dynamo.reset()
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


def sampling(name: str) -> dict:
    """Kernels per head evaluation, per decode step and per token."""
    from torch import autocast

    with fake_gpu() as kernels:
        model = fake_model(PRESETS[name])
        net, width = model.head.net, model.config.head_width
        with torch.no_grad(), autocast("cuda", torch.bfloat16):
            x, modulation = torch.randn(512, 16, device="cuda"), net.modulation(torch.randn(512, width, device="cuda"))
            before = kernels.total
            torch.compile(net, dynamic=False)(x, modulation)
            return {"network": kernels.total - before}


@contextmanager
def cpu_for_gpu() -> Iterator[None]:
    """Inside, fake CPU tensors are trained as a GPU's would be: torch's engine refuses a GPU that is not there.

    Attention is FlashAttention, and operators over lists of tensors are chosen as on a GPU. Autocast follows the CPU's
    list of operators.
    """

    def flash(q: Tensor, k: Tensor, v: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]

    with (
        patch.object(nn.functional, "scaled_dot_product_attention", flash),
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
    report = read_json(RESULTS, "remove it") if RESULTS.exists() else {}
    for what in options.what:
        counts = {name: COUNTS[what](name) for name in options.models}
        report[what] = {"made_by": provenance(torch.device("cpu")), "kernels": counts}
        for name, found in counts.items():
            print(f"{what}, {name}: {found}")
    write_json(RESULTS, report)


if __name__ == "__main__":
    main()
