"""What is compiled in training: how many graphs, none broken, none compiled anew later. A CPU counts as a GPU would."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import vgg16

from benchmarks.kernels import cpu_for_gpu, fake_gpu
from models.layers import Block, rope_2d
from tests.helpers import small_run
from utils.training import draws
from utils.training.compilation import compile_ar
from utils.training.tracker import Tracker

BATCH = "--global-batch-size", 2


@pytest.fixture
def graphs(monkeypatch):
    """Dynamo's counters; torch.compile without code generation, where a broken graph is an error."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch._dynamo.config, "optimize_ddp", True)  # and as it was when the test is over
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    draws._compiled.cache_clear()
    yield torch._dynamo.utils.counters["stats"]
    draws._compiled.cache_clear()


@pytest.fixture
def random_vgg16(monkeypatch):
    """In the place of the download."""
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = vgg16(weights=None, init_weights=False).features.state_dict()
    state = {f"features.{name}": 0.05 * torch.randn(value.shape) for name, value in shapes.items()}
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: state)


def train_counting(monkeypatch, graphs, tmp_path, *extra, svae=None) -> tuple[list[int], float]:
    """Graphs after each step of a run with --compile; how far its model is from that of one without."""
    counts, add = [], Tracker.add
    monkeypatch.setattr(Tracker, "add", lambda *a, **b: counts.append(graphs["unique_graphs"]) or add(*a, **b))
    data = small_run.write_tar(tmp_path / "train.tar")
    command = small_run.flags(data, tmp_path / "run", *BATCH, *extra, "--compile", svae=svae)
    compiled = small_run.run_here(*command)["model"]
    graphs_at_end = list(counts)
    command = small_run.flags(data, tmp_path / "plain", *BATCH, *extra, "--no-compile", svae=svae)
    difference = small_run.largest_difference(compiled, small_run.run_here(*command)["model"])
    return graphs_at_end, difference


def test_the_svae_stage_compiles_all_its_parts_once(monkeypatch, graphs, random_vgg16, tmp_path):
    extra = "--max-steps", 4, "--perceptual-weight", 1, "--disc-weight", 0.5, "--disc-start", 3
    counts, difference = train_counting(monkeypatch, graphs, tmp_path, *extra)
    # normals, uniforms, both stems, the encoder's and decoder's block (of one width here), conv_out, LPIPS; from the
    # adversary's start the discriminator: frozen for the model's loss, on images, on reconstructions
    assert counts == [7, 7, 10, 10]
    assert difference < 1e-4


def test_the_ar_stage_compiles_all_its_parts_once(monkeypatch, graphs, tmp_path):
    svae = small_run.write_svae(tmp_path / "svae.pt")
    extra = "--max-steps", 3, "--grad-checkpointing", "--grad-accum-steps", 2
    counts, difference = train_counting(monkeypatch, graphs, tmp_path, *extra, svae=svae)
    # draws: class dropout, flow times, flow noise, the posterior's normals and uniforms; the encoder's stem and block;
    # the AR block; the whole head
    assert counts == [9, 9, 9]
    assert difference < 1e-4


class Blocks(nn.Module):
    """The parts of an AR model that compile_ar asks for; in use are its blocks only."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block(256, 4) for _ in range(3))  # of 4 MB: more than DDP's first bucket
        self.head, self.vae = nn.Identity(), nn.Module()
        self.vae.encoder = nn.Module()
        self.vae.encoder.patchify, self.vae.encoder.layers = nn.Identity(), nn.ModuleList()
        self.register_buffer("rope", rope_2d(2, 64, 0))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x, self.rope)
        return x


@pytest.mark.parametrize("cut", [False, True])
def test_ddp_does_not_cut_a_block(monkeypatch, graphs, cut):
    subgraphs = []
    backend = partial(torch.compile, backend=lambda graph, inputs: subgraphs.append(graph) or graph.forward)
    monkeypatch.setattr(torch, "compile", backend)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = Blocks()
        compile_ar(model)
        if cut:  # torch's default: what the test must notice
            torch._dynamo.config.optimize_ddp = True
        model = DistributedDataParallel(model, static_graph=True, broadcast_buffers=False)
        for _ in range(2):
            model(torch.randn(1, 4, 256, requires_grad=True)).sum().backward()
    finally:
        dist.destroy_process_group()
    assert (len(subgraphs) > 1) == cut


def test_kernels_of_a_block():
    """In the code for an H100. Forward: four products, attention, and nine more of which five cast weights to bf16."""
    with fake_gpu() as kernels, cpu_for_gpu():
        kernels.device = "cpu"
        model = Blocks()
        model.rope = torch.empty_like(model.rope)
        model.layers[0].compile(dynamic=False)
        with torch.autocast("cpu", torch.bfloat16):
            out = model.layers[0](torch.randn(2, 4, 256, requires_grad=True), model.rope, causal=True)
        forward = kernels.compiled.total()
        out.sum().backward()
    assert (forward, kernels.compiled.total() - forward) == (14, 19)
