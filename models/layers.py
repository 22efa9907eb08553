"""Transformer pieces shared by the S-VAE and the AR transformer: 2-D RoPE, attention, SwiGLU block, KV cache.

Letters: B batch · L sequence · D width · H heads · K head dim. Attention tensors are (B, L, H, K).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

try:
    from flash_attn import flash_attn_func, flash_attn_with_kvcache
except ImportError:  # optional
    flash_attn_func = flash_attn_with_kvcache = None


def rope_2d(grid: int, head_dim: int, num_prefix: int) -> Tensor:
    """cos and sin of every position's rotation angles, (num_prefix + grid², K/2, 2), float32.

    Grid tokens in raster order sit at (x + 1.5, y + 1.5), prefix tokens (registers, class tokens) at (0, 0). The first
    half of the pairs turns with x, the second with y.
    """
    if head_dim % 4:
        raise ValueError(f"head dim {head_dim} must be a multiple of 4: half rotates with x, half with y, in pairs")
    cpu = {"dtype": torch.float32, "device": "cpu"}  # real numbers even where the model is built on meta
    frequencies = 10000.0 ** (-torch.arange(0, head_dim // 2, 2, **cpu) / (head_dim // 2))
    centres = torch.arange(grid, **cpu) + 1.5
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    positions = torch.stack([x.flatten(), y.flatten()], dim=-1)  # (P, 2)
    positions = torch.cat([torch.zeros(num_prefix, 2, **cpu), positions])
    angles = (positions[:, :, None] * frequencies).flatten(1)  # (L, K/2)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate consecutive pairs of x (B, L, H, K) by rope (L, K/2, 2), in float32; keeps x's dtype."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope[:, None].unbind(-1)  # (L, 1, K/2)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x.dtype)


def uses_flash(x: Tensor) -> bool:
    """Whether attention is FlashAttention-2's: the package is importable, and tensors are fp16 or bf16 on CUDA."""
    return flash_attn_func is not None and x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of q (B, L, H, K) over k, v (B, M, H, K) -> (B, L, H, K).

    FlashAttention-2 where `uses_flash`, else PyTorch's SDPA. mask: boolean, broadcast to (B, H, L, M), True where
    attention is allowed (SDPA only).
    """
    if mask is None and uses_flash(q):
        return flash_attn_func(q, k, v, causal=causal)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2)


@torch.library.custom_op("spherear::decode_attention", mutates_args=("keys", "values"))
def decode_attention(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Attention of one token per row, q, k, v (B, 1, H, K), over a cache (B, L, H, K) and itself -> (B, 1, H, K).

    lengths: (B,) int32, on the device: how much of the cache is filled. k and v are stored behind; nothing beyond is
    read. One operator for torch.compile, which cannot look into FlashAttention's.
    """
    return flash_attn_with_kvcache(q, keys, values, k, v, cache_seqlens=lengths, causal=True)


@decode_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    return torch.empty_like(q)


class KVCache:
    """Keys and values of every layer for one generation, (layers, B, L, H, K) in the compute dtype, allocated once."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = keys, values

    @property
    def takes_lengths(self) -> bool:
        """Whether `decode_attention` reads it, which reads what is filled; else a mask goes over the whole of it."""
        return uses_flash(self.keys)

    def first(self, length: int) -> "KVCache":
        """The same memory, as a cache of the first `length` positions."""
        return KVCache(self.keys[:, :, :length], self.values[:, :, :length])

    def layer(self, i: int) -> "LayerCache":
        return self.keys[i], self.values[i]


LayerCache = tuple[Tensor, Tensor]  # keys and values of one layer, each (B, L, H, K)


def extend(cache: LayerCache, position: int | Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Store k, v (B, n, H, K) at `position`… and return the keys, values and mask to attend over.

    An int position gives exact slices and no mask; a 0-dim tensor (n = 1) keeps every shape static: the whole cache
    and a mask, as CUDA graphs need.
    """
    keys, values = cache
    if isinstance(position, int):
        end = position + k.shape[1]
        keys[:, position:end], values[:, position:end] = k, v
        return keys[:, :end], values[:, :end], None
    keys.index_copy_(1, position.view(1), k.to(keys.dtype))
    values.index_copy_(1, position.view(1), v.to(values.dtype))
    return keys, values, (torch.arange(keys.shape[1], device=k.device) <= position).view(1, 1, 1, -1)


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.wqkv = nn.Linear(width, 3 * width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rope: Tensor, causal: bool, cache: LayerCache | None, position) -> Tensor:
        q, k, v = self.wqkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # each (B, L, H, K)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        mask = None
        if isinstance(position, Tensor) and position.dim() == 1:
            return self.wo(decode_attention(q, k, v, *cache, position).flatten(2))
        if cache is not None:
            k, v, mask = extend(cache, position, k, v)
            q = q.to(k.dtype)
        return self.wo(attention(q, k, v, causal, mask).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        hidden = -(-int(8 * width / 3) // 256) * 256
        self.w1 = nn.Linear(width, 2 * hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h1, h2 = self.w1(x).chunk(2, dim=-1)
        return self.w2(F.silu(h1) * h2)


class Block(nn.Module):
    """Pre-norm transformer block: x += attention(norm(x)); x += SwiGLU(norm(x)). x: (B, L, D)."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.attention = Attention(width, num_heads)
        self.feed_forward = SwiGLU(width)
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.ffn_norm = nn.RMSNorm(width, eps=1e-6)

    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        causal: bool = False,
        cache: LayerCache | None = None,
        position: int | Tensor = 0,
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, causal, cache, position)
        return x + self.feed_forward(self.ffn_norm(x))


def init_transformer(module: nn.Module) -> None:
    """N(0, 0.02) for Linear and Embedding weights, zero biases; to be `apply`-ed. Convolutions keep their own init."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
