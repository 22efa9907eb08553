"""Generation with static shapes: compiled pieces, and on CUDA one graph per phase instead of thousands of launches.

Works on any model with `layers`, `head` (`net`, `step`, `sample`), `new_cache` and `decode_step` as in models.spherear;
`generate_tokens` then runs unchanged, and no token waits for the device.
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


def make_static(model: nn.Module, compile: bool = True) -> None:
    """Let the model generate with static shapes, on the instance: results are the same to rounding.

    Every batch must have the same number of rows, or it is compiled and captured again. With `compile` the blocks, the
    velocity network and the sampler's update go through torch.compile: one block serves all layers.
    """
    pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
    if compile:
        for module in (*model.layers, model.head.net):
            module.compile(dynamic=False)
        model.head.step = torch.compile(model.head.step, dynamic=False)
    decode_step, sample = model.decode_step, model.head.sample
    model.new_cache = cache(model.new_cache)  # one for all batches: graphs know its address

    @cache
    def decode_graph(kv_cache, length: int) -> Graphed:
        part = kv_cache.first(length)
        return Graphed(lambda tokens, position: decode_step(tokens, position, part), pool)

    @cache
    def sample_graph(rows: int, guided: bool, last_step_size: float, sampler: str) -> Graphed:
        def sample_token(condition, noise, time_embedding, *scale):
            return sample(condition, noise, time_embedding, scale[0] if guided else None, last_step_size, sampler)

        return Graphed(sample_token, pool)

    def static_decode_step(tokens: Tensor, position: int, kv_cache) -> Tensor:
        whole = kv_cache.keys.shape[2]
        needed = position + model.config.num_class_tokens + 1
        bucket = -(-needed * BUCKETS // whole)  # 1 to BUCKETS
        length = -(-whole * bucket // BUCKETS // 8) * 8
        where = torch.full((), position, device=tokens.device)
        return decode_graph(kv_cache, length)(tokens, where)

    def static_sample(condition, noise, time_embedding, scale, last_step_size, sampler) -> Tensor:
        graph = sample_graph(len(condition), scale is not None, last_step_size, sampler)
        scales = () if scale is None else (torch.full((), scale, device=noise.device),)
        return graph(condition, noise, time_embedding, *scales)

    model.decode_step, model.head.sample = static_decode_step, static_sample


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Store the weights of linear layers and convolutions in the autocast dtype: the numbers that autocast would use,
    without casting them anew at every call."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            module.to(dtype)
