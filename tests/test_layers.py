"""Attention dispatch, and blocks under compilation."""

import importlib.util
import sys

import pytest
import torch

import models.layers
from tests.helpers.nano import stirred_nano


class CudaLike:
    """What the dispatch asks of a tensor, without a GPU."""

    def __init__(self, dtype, is_cuda=True):
        self.dtype, self.is_cuda = dtype, is_cuda


@pytest.fixture
def flash_stand_in(monkeypatch):
    """A function of flash_attn_func's signature and (B, L, H, K) layout."""
    calls = []

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        calls.append((q, k, v, causal))
        return "flash"

    monkeypatch.setattr(models.layers, "flash_attn_func", flash_attn_func)
    return calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_cuda_goes_to_flash_attention(flash_stand_in, dtype):
    q, k, v = (CudaLike(dtype) for _ in range(3))
    assert models.layers.attention(q, k, v, causal=True) == "flash"
    assert flash_stand_in == [(q, k, v, True)]


def test_everything_else_goes_to_sdpa(flash_stand_in):
    q = torch.randn(2, 5, 3, 8)
    out = models.layers.attention(q, q, q, causal=True)
    assert out.shape == q.shape and not flash_stand_in
    weights = torch.einsum("blhk,bmhk->bhlm", q, q) / 8**0.5
    weights = weights.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1)
    assert torch.allclose(out, torch.einsum("bhlm,bmhk->blhk", weights, q), atol=1e-5)
    with pytest.raises(AttributeError):  # float32 on CUDA falls through to SDPA, which our stand-in tensor cannot do
        models.layers.attention(*[CudaLike(torch.float32)] * 3)
    assert not flash_stand_in


def test_the_package_is_taken_when_importable_and_never_needed(monkeypatch):
    class FlashAttn:
        flash_attn_func = flash_attn_with_kvcache = "the package's"

    for package, expected in ((FlashAttn, "the package's"), (None, None)):
        monkeypatch.setitem(sys.modules, "flash_attn", package)
        spec = importlib.util.spec_from_file_location("layers_again", models.layers.__file__)
        layers = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(layers)
        assert layers.flash_attn_func == layers.flash_attn_with_kvcache == expected


def test_a_compiled_block_is_one_graph():
    nano, x = stirred_nano(), torch.randn(2, 5, 192)
    block = nano.layers[0]
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x, nano.rope[:5], causal=True), block(x, nano.rope[:5], causal=True))
