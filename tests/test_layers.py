"""Attention dispatch, and blocks under compilation."""

import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F

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


def flash_attn_with_kvcache(q, k_cache, v_cache, k, v, *, cache_seqlens, causal):
    """The package's function in plain torch, by its documentation: k and v (B, n, H, K) are stored in place behind the
    first cache_seqlens (B,) int32 entries of each row; q sees those, and of k what lies before it."""
    assert causal and cache_seqlens.dtype == torch.int32 and cache_seqlens.shape == (len(q),)
    assert q.dtype == k.dtype == v.dtype == k_cache.dtype == v_cache.dtype and cache_seqlens.is_contiguous()
    rows = []
    for row, length in enumerate(cache_seqlens.tolist()):
        end = length + k.shape[1]
        k_cache[row, length:end], v_cache[row, length:end] = k[row], v[row]
        seen = torch.ones(q.shape[1], end).tril(end - q.shape[1]).bool()
        keys, values = (x[row : row + 1, :end].transpose(1, 2) for x in (k_cache, v_cache))
        one = F.scaled_dot_product_attention(q[row : row + 1].transpose(1, 2), keys, values, attn_mask=seen)
        rows.append(one.transpose(1, 2))
    return torch.cat(rows)


@pytest.fixture
def flash_decoding(monkeypatch):
    monkeypatch.setattr(models.layers, "flash_attn_with_kvcache", flash_attn_with_kvcache)
    monkeypatch.setattr(models.layers, "uses_flash", lambda x: not x.is_meta)
    monkeypatch.setattr(
        models.layers, "flash_attn_func",
        lambda q, k, v, causal: F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal
        ).transpose(1, 2),
    )  # fmt: skip


def test_decode_attention_by_lengths_is_attention_over_a_slice(flash_decoding):
    torch.manual_seed(0)
    keys, values, (q, k, v) = *torch.randn(2, 2, 8, 3, 16), torch.randn(3, 2, 1, 3, 16)
    expected_keys, expected_values, mask = models.layers.extend((keys.clone(), values.clone()), 5, k, v)
    lengths = torch.full((2,), 5, dtype=torch.int32)
    out = models.layers.decode_attention(q, k, v, keys, values, lengths)
    assert mask is None and torch.equal(keys[:, :6], expected_keys) and torch.equal(values[:, :6], expected_values)
    over = (x.transpose(1, 2) for x in (q, expected_keys, expected_values))
    assert torch.allclose(out, F.scaled_dot_product_attention(*over).transpose(1, 2), atol=1e-6)
    torch.library.opcheck(models.layers.decode_attention, (q, k, v, keys, values, lengths), test_utils="test_schema")


def test_decode_steps_by_lengths_are_those_by_slices(flash_decoding, monkeypatch):
    nano, tokens = stirred_nano(), torch.randn(2, 16, 8)
    conditions = []
    for static in (True, False):
        cache = nano.new_cache(2, torch.float32, "cpu")
        assert cache.takes_lengths
        nano.prefill(torch.tensor([1, 2]), cache)
        at = torch.tensor if static else int
        conditions.append(torch.stack([nano.decode_step(tokens[:, p], at(p), cache) for p in range(15)]))
    assert torch.allclose(*conditions, atol=1e-4)
