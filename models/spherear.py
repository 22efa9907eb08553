"""SphereAR: a causal transformer over hyperspherical tokens with a diffusion head for the next one.

Letters: B batch · P tokens (raster order) · C latent channels · D width · L = class tokens + P − 1 · N rows
(N = 2B with guidance: null-class rows behind the class rows). SphereAR, arXiv 2509.24335, section 3.3.
Parameter names of the released checkpoints.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.diffusion_head import DiffusionHead
from models.layers import Block, KVCache, init_transformer, rope_2d
from models.svae import SVAE, SVAEConfig


@dataclass(frozen=True)
class SphereARConfig:
    """Architecture of a SphereAR model, its S-VAE included."""

    num_layers: int
    num_heads: int
    width: int
    head_blocks: int
    head_width: int
    head_adaln_sets: int
    svae: SVAEConfig = field(default_factory=SVAEConfig)
    num_classes: int = 1000
    num_class_tokens: int = 16
    class_dropout_prob: float = 0.1
    diffusion_batch_mul: int = 4

    def __post_init__(self):
        if self.width % (4 * self.num_heads):
            raise ValueError(f"width {self.width} must be a multiple of 4 x num_heads ({self.num_heads})")
        if self.head_blocks % self.head_adaln_sets:
            raise ValueError(f"head_blocks {self.head_blocks} must be a multiple of {self.head_adaln_sets} adaLN sets")
        if self.num_classes < 1 or self.num_class_tokens < 1 or self.diffusion_batch_mul < 1:
            raise ValueError("num_classes, num_class_tokens and diffusion_batch_mul must be at least 1")
        if not 0 <= self.class_dropout_prob <= 1:
            raise ValueError(f"class_dropout_prob {self.class_dropout_prob} must lie in [0, 1]")

    @property
    def num_tokens(self) -> int:
        return self.svae.num_tokens

    @property
    def latent_dim(self) -> int:
        return self.svae.latent_dim

    @property
    def radius(self) -> float:
        return self.svae.radius

    @property
    def null_class(self) -> int:
        return self.num_classes

    def cache_shape(self, rows: int) -> tuple[int, ...]:
        """Of the keys, and of the values, in the KV cache of a generation: see SphereAR.new_cache."""
        length = self.num_class_tokens + self.num_tokens - 1
        return self.num_layers, rows, -(-length // 8) * 8, self.num_heads, self.width // self.num_heads

    def cache_bytes(self, rows: int, dtype: torch.dtype) -> int:
        """Of the whole KV cache."""
        return 2 * math.prod(self.cache_shape(rows)) * dtype.itemsize


# fmt: off
PRESETS = {
    # published FID on ImageNet 256: B 1.92 (cfg 4.5), L 1.54 (4.6), H 1.34 (4.5)
    "SphereAR-B": SphereARConfig(
        num_layers=24, num_heads=12, width=768, head_blocks=6, head_width=768, head_adaln_sets=2),
    "SphereAR-L": SphereARConfig(
        num_layers=32, num_heads=16, width=1024, head_blocks=8, head_width=1024, head_adaln_sets=2),
    "SphereAR-H": SphereARConfig(
        num_layers=40, num_heads=20, width=1280, head_blocks=12, head_width=1280, head_adaln_sets=3),
    # ours, for CPUs: the quickstart's digits
    "SphereAR-Nano": SphereARConfig(
        num_layers=6, num_heads=3, width=192, head_blocks=3, head_width=192, head_adaln_sets=1,
        svae=SVAEConfig(image_size=32, patch_size=8, latent_dim=8, width=128, num_heads=2, encoder_layers=2,
                        decoder_layers=2, stem_channels=(16, 32, 64, 128)),
        num_classes=10, num_class_tokens=4,
    ),
}
# fmt: on


class SphereAR(nn.Module):
    """The autoregressive model with its S-VAE (`vae`) and diffusion head (`head`)."""

    def __init__(self, config: SphereARConfig):
        super().__init__()
        self.config = config
        self.vae = SVAE(config.svae)
        self.cls_embedding = nn.Embedding(config.num_classes + 1, config.num_class_tokens * config.width)
        self.proj_in = nn.Linear(config.latent_dim, config.width)
        self.emb_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.layers = nn.ModuleList(Block(config.width, config.num_heads) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.pos_for_diff = nn.Embedding(config.num_tokens, config.width)
        for module in (self.cls_embedding, self.proj_in, self.layers, self.pos_for_diff):
            module.apply(init_transformer)
        self.head = DiffusionHead(
            config.latent_dim, config.width, config.head_width, config.head_blocks, config.head_adaln_sets
        )
        rope = rope_2d(config.svae.grid, config.width // config.num_heads, config.num_class_tokens)
        self.register_buffer("rope", rope[:-1], persistent=False)  # (L, K/2, 2): the last token is never an input
        self.grad_checkpointing = False

    # ---- training -------------------------------------------------------------------------------------------------

    def forward(self, tokens: Tensor, labels: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The AR loss, float32 scalar: `condition`, then the head's flow-matching loss.

        tokens: (B, P, C); labels: (B,), null_class where dropped; t: (M, B, P); noise: (M, B, P, C).
        """
        return self.head(tokens, self.condition(tokens, labels), t, noise)

    def condition(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Conditions (B, P, D) of tokens (B, P, C), each from its class label (B,) and the earlier tokens."""
        x = torch.cat([self._class_tokens(labels), self.proj_in(tokens[:, :-1])], dim=1)
        x = self.emb_norm(x)  # (B, L, D)
        for layer in self.layers:
            if self.grad_checkpointing and self.training:
                x = checkpoint(layer, x, self.rope, True, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, self.rope, causal=True)
        return self.norm(x[:, -self.config.num_tokens :]) + self.pos_for_diff.weight

    def _class_tokens(self, labels: Tensor) -> Tensor:
        return self.cls_embedding(labels).unflatten(-1, (self.config.num_class_tokens, -1))

    # ---- generation -----------------------------------------------------------------------------------------------

    def new_cache(self, rows: int, dtype: torch.dtype, device: torch.device | str) -> KVCache:
        """An empty KV cache for one generation of `rows` rows; its length is a multiple of 8, for masked attention."""
        shape = self.config.cache_shape(rows)
        return KVCache(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))

    def prefill(self, labels: Tensor, cache: KVCache) -> Tensor:
        """Read the class tokens of labels (N,) into the cache; the condition (N, D) of token 0."""
        x = self.emb_norm(self._class_tokens(labels))
        for i, layer in enumerate(self.layers):
            x = layer(x, self.rope[: x.shape[1]], causal=True, cache=cache.layer(i))
        return self.norm(x[:, -1]) + self.pos_for_diff.weight[0]

    def decode_step(self, tokens: Tensor, position: int | Tensor, cache: KVCache) -> Tensor:
        """Read the tokens (N, C) at `position`; the condition (N, D) of the token at position + 1.

        A 0-dim tensor as position keeps all shapes static; the cache may then be any `first` part that reaches beyond
        it (see `extend`), and is the whole one where it takes lengths (see `decode_attention`).
        """
        index = self.config.num_class_tokens + position
        if isinstance(position, int):
            rope, embedding = self.rope[index : index + 1], self.pos_for_diff.weight[position + 1]
        else:
            rope = self.rope.index_select(0, index.view(1))
            embedding = self.pos_for_diff.weight.index_select(0, position.view(1) + 1)
        x = self.proj_in(tokens).to(embedding.dtype).unsqueeze(1)  # (N, 1, D), float32 under autocast as in training
        x = self.emb_norm(x)
        if cache.takes_lengths and not isinstance(position, int):
            index = index.to(torch.int32).expand(len(tokens)).contiguous()  # as decode_attention wants it
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, cache=cache.layer(i), position=index)
        return self.norm(x[:, 0]) + embedding
