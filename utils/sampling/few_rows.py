"""Linear layers on a CPU with few rows: the fastest of four equal ways, found by a short trial.

With four or eight rows a linear layer reads all its weights for little arithmetic, and F.linear (x Wᵀ through MKL's
sgemm) reads them far below the memory's speed. W xᵀ, or a product of MKL or oneDNN over weights reordered once, are up
to three times as fast; which one, depends on machine, shape, dtype and number of rows. The ways differ in rounding: a
run that promises the same bits keeps to the ways that it chose first.
"""

import time
from collections.abc import Callable, Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

LARGE = 2**24  # parameters that no CPU's cache holds
TRIAL_SECONDS = 0.05  # per way and shape
TRIAL_LAYERS = 8  # of one shape, in turn: the weights of one alone would stay in the cache
GAIN = 1.1  # what a way must gain over F.linear to replace it


class FewRowLinear(nn.Linear):
    """An nn.Linear (same parameters, same names) that takes another way where its input has `rows` rows."""

    @classmethod
    def of(cls, linear: nn.Linear, rows: int, way: str) -> "FewRowLinear":
        new = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        new.weight, new.bias, new.rows = linear.weight, linear.bias, rows
        new.multiply = WAYS[way](linear.weight, linear.bias, rows)
        return new

    def forward(self, x: Tensor) -> Tensor:
        flat = x.to(self.weight.dtype).view(-1, self.in_features)
        if len(flat) != self.rows:
            return F.linear(x, self.weight, self.bias)
        return self.multiply(flat).view(*x.shape[:-1], self.out_features)


def _plain(weight: Tensor, bias: Tensor | None, rows: int) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, weight, bias)


def _columns(weight: Tensor, bias: Tensor | None, rows: int) -> Callable[[Tensor], Tensor]:
    if bias is None:
        return lambda x: (weight @ x.T).T.contiguous()
    column = bias[:, None]
    return lambda x: torch.addmm(column, weight, x.T).T.contiguous()


# The operators that torch.compile puts in for linear layers; private, so `MISSING` where torch lacks them.


def _prepacked(weight: Tensor, bias: Tensor | None, rows: int) -> Callable[[Tensor], Tensor]:
    multiply = torch.ops.mkldnn._linear_pointwise
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    return lambda x: multiply(x, packed, bias, "none", [], "")


def _prepacked_mkl(weight: Tensor, bias: Tensor | None, rows: int) -> Callable[[Tensor], Tensor]:
    """float32 only."""
    multiply, weight = torch.ops.mkl._mkl_linear, weight.detach()
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
    return lambda x: multiply(x, packed, weight, bias, rows)


WAYS = {"plain": _plain, "columns": _columns, "prepacked": _prepacked, "prepacked-mkl": _prepacked_mkl}
MISSING = AttributeError, RuntimeError


def is_large(module: nn.Module) -> bool:
    """Whether reading the module's weights is what takes the time."""
    return sum(parameter.numel() for parameter in module.parameters()) > LARGE


@torch.no_grad()
def fastest_way(linears: list[nn.Linear], rows: int) -> tuple[str, dict[str, float]]:
    """The name of the fastest way through linear layers of one shape at `rows` rows, and seconds per call of each.

    A way that this build of torch lacks, or whose result is off, is left out.
    """
    first = linears[0]
    x = torch.randn(rows, first.in_features).to(first.weight.dtype)
    expected = F.linear(x, first.weight, first.bias).float()
    tolerance = (1e-4 if first.weight.dtype == torch.float32 else 2e-2) * expected.abs().max()
    seconds = {}
    for way, build in WAYS.items():
        try:
            calls = [build(linear.weight, linear.bias, rows) for linear in linears]
            if (calls[0](x).float() - expected).abs().max() > tolerance:
                continue
        except MISSING:
            continue
        best, end = float("inf"), time.perf_counter() + TRIAL_SECONDS
        while time.perf_counter() < end or best == float("inf"):
            start = time.perf_counter()
            for call in calls:
                call(x)
            best = min(best, (time.perf_counter() - start) / len(calls))
        seconds[way] = best
    fastest = min(seconds, key=seconds.get)
    return fastest if seconds["plain"] > GAIN * seconds[fastest] else "plain", seconds


def choose_ways(module: nn.Module, rows: int) -> dict[str, str]:
    """The fastest way at `rows` rows for each shape of linear layer in the module, where it is not the plain one."""
    shapes: dict[str, list[nn.Linear]] = {}
    for _, _, linear in _linears(module):
        shapes.setdefault(_shape(linear), []).append(linear)
    ways = {shape: fastest_way(linears[:TRIAL_LAYERS], rows)[0] for shape, linears in shapes.items()}
    return {shape: way for shape, way in ways.items() if way != "plain"}


def use_ways(module: nn.Module, ways: dict[str, str], rows: int) -> None:
    """Put a FewRowLinear in the place of every linear layer whose shape is in `ways`. For inference only.

    A way that this build of torch lacks leaves the layer as it is.
    """
    for parent, name, linear in list(_linears(module)):
        if _shape(linear) in ways:
            try:
                setattr(parent, name, FewRowLinear.of(linear, rows, ways[_shape(linear)]))
            except MISSING:
                return


def _linears(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for parent in module.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                yield parent, name, child


def _shape(linear: nn.Linear) -> str:
    return f"{linear.in_features} x {linear.out_features}{'' if linear.bias is None else ' + bias'}"
