"""Generation with static shapes: compiled pieces, and on CUDA one graph per phase instead of thousands of launches.

Nothing is put into the model: what comes out here is handed to `generate_tokens` instead of the model's own phases.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn as nn
from torch import Tensor

BUCKETS = 4  # decode graphs: attention reads a quarter, half, three quarters, or all of the cache


class Graphed:
    """A function of CUDA tensors whose shapes never change, captured once and replayed as one graph.

    The result is the graph's own memory: use it before the next call.
    """

    def __init__(self, function: Callable[..., Tensor], pool: object):
        self.function, self.pool, self.graph = function, pool, None

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self.graph is None:
            self._capture(inputs)
        for own, value in zip(self.inputs, inputs, strict=True):
            own.copy_(value)
        self.graph.replay()
        return self.output

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = [value.clone() for value in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles, and takes what libraries allocate at first use
                self.function(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=self.pool, capture_error_mode="thread_local"):  # NCCL has threads
            self.output = self.function(*self.inputs)


def compile_pieces(model: nn.Module) -> Callable[..., Tensor]:
    """torch.compile the blocks and the S-VAE's decoder in place; returns the head's step, compiled: network, guidance
    and update as one.

    One compiled block serves all layers. Works on any model with the parts of models.spherear.
    """
    decoder = model.vae.decoder
    for module in (*model.layers, *decoder.layers, decoder.unpatchify, decoder.conv_out):
        module.compile(dynamic=False)
    return torch.compile(model.head.step, dynamic=False)


def static_phases(phases, num_class_tokens: int, cuda_graphs: bool):
    """Phases of models.generation with static shapes: the same results to rounding, and no token waits for the device.

    With `cuda_graphs` one graph per phase, on CUDA. Of all batches only the newest kind, by rows and dtype, has memory
    and graphs here: another is compiled and captured again.
    """
    pool = torch.cuda.graph_pool_handle() if cuda_graphs else None
    newest = {}  # the KV cache, by its kind: graphs know its address, so all batches share it

    def graphed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return Graphed(function, pool) if cuda_graphs else function

    @cache
    def decode_graph(kv_cache, key: tuple) -> Callable[..., Tensor]:
        return graphed(lambda tokens, position: phases.decode_step(tokens, position, kv_cache))

    @cache
    def sample_graph(times: tuple[float, ...], guided: bool, key: tuple) -> Callable[..., Tensor]:
        def sample_token(condition, noise, time_embedding, *scale):
            return phases.sample_token(condition, noise, time_embedding, scale[0] if guided else None, times=times)

        return graphed(sample_token)

    @cache
    def first(kv_cache, length: int):
        return kv_cache.first(length)

    def new_cache(rows: int, dtype: torch.dtype, device: torch.device):
        kind = rows, dtype, device
        if kind not in newest:
            newest.clear()
            for remembered in (decode_graph, sample_graph, first):
                remembered.cache_clear()
            newest[kind] = phases.new_cache(*kind)
        return newest[kind]

    def decode_step(tokens: Tensor, position: int, kv_cache) -> Tensor:
        if not kv_cache.takes_lengths:
            whole = kv_cache.keys.shape[2]
            needed = position + num_class_tokens + 1
            bucket = -(-needed * BUCKETS // whole)  # 1 to BUCKETS
            kv_cache = first(kv_cache, -(-whole * bucket // BUCKETS // 8) * 8)
        where = torch.full((), position, device=tokens.device)
        return decode_graph(kv_cache, _key(tokens))(tokens, where)

    def sample_token(condition, noise, time_embedding, scale, times) -> Tensor:
        scales = () if scale is None else (torch.full((), scale, device=noise.device),)
        inputs = condition, noise, time_embedding, *scales
        return sample_graph(tuple(times), scale is not None, _key(*inputs))(*inputs)

    return type(phases)(new_cache, phases.prefill, sample_token, decode_step)


def _key(*inputs: Tensor) -> tuple:
    """What a graph has captured beside its function: its inputs' shapes and dtypes, and autocast's state."""
    kind = inputs[0].device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return autocast, *((value.shape, value.dtype) for value in inputs)


def batch_that_fits(bytes_per_image: int, free: int) -> int:
    """The largest power of two of images whose KV cache leaves a quarter of the free memory (bytes) for all else."""
    return 2 ** (max(1, 3 * free // 4 // bytes_per_image).bit_length() - 1)


class Throttle:
    """Called once per token, it keeps at most two tokens in a GPU's queue: a signal is not kept waiting."""

    def __init__(self):
        self.behind = None  # the event of the token before

    def __call__(self) -> None:
        if torch.cuda.is_available():
            if self.behind is not None:
                self.behind.synchronize()
            self.behind = torch.cuda.Event()
            self.behind.record()


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Store the weights of linear layers and convolutions in the autocast dtype: the numbers that autocast would use,
    without casting them anew at every call."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            module.to(dtype)
