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
    """A function of tensors, all on one device, whose shapes never change: on CUDA replayed as one graph.

    The result is the graph's own memory: use it before the next call. On a CPU the function itself is called.
    """

    def __init__(self, function: Callable[..., Tensor], pool: object = None):
        self.function, self.pool, self.graph = function, pool, None

    def __call__(self, *inputs: Tensor) -> Tensor:
        if not inputs[0].is_cuda:
            return self.function(*inputs)
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
    """torch.compile the blocks in place; returns the head's step, compiled: network, guidance and update as one.

    One compiled block serves all layers. Works on any model with `layers` and `head.step` as in models.spherear.
    """
    for module in model.layers:
        module.compile(dynamic=False)
    return torch.compile(model.head.step, dynamic=False)


def static_phases(phases, num_class_tokens: int):
    """Phases of models.generation with static shapes: the same results to rounding, and no token waits for the device.

    Every batch must have the same number of rows, or it is compiled and captured again.
    """
    pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    @cache
    def decode_graph(kv_cache, length: int) -> Graphed:
        part = kv_cache.first(length)
        return Graphed(lambda tokens, position: phases.decode_step(tokens, position, part), pool)

    @cache
    def sample_graph(rows: int, guided: bool, times: tuple[float, ...]) -> Graphed:
        def sample_token(condition, noise, time_embedding, *scale):
            return phases.sample_token(condition, noise, time_embedding, scale[0] if guided else None, times=times)

        return Graphed(sample_token, pool)

    def decode_step(tokens: Tensor, position: int, kv_cache) -> Tensor:
        whole = kv_cache.keys.shape[2]
        needed = position + num_class_tokens + 1
        bucket = -(-needed * BUCKETS // whole)  # 1 to BUCKETS
        length = -(-whole * bucket // BUCKETS // 8) * 8
        where = torch.full((), position, device=tokens.device)
        return decode_graph(kv_cache, length)(tokens, where)

    def sample_token(condition, noise, time_embedding, scale, times) -> Tensor:
        scales = () if scale is None else (torch.full((), scale, device=noise.device),)
        return sample_graph(len(condition), scale is not None, times)(condition, noise, time_embedding, *scales)

    # one cache for all batches: graphs know its address
    return type(phases)(cache(phases.new_cache), phases.prefill, sample_token, decode_step)


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
