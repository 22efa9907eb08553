"""S-VAE: image -> posterior over tokens of norm √C (encoder), tokens -> image (decoder).

Letters: B batch · S image side · g = S / patch · P = g² tokens (raster order) · D width · C latent channels.
Images are float in [-1, 1], (B, 3, S, S). SphereAR, arXiv 2509.24335, section 3.2; parameter names of the released
checkpoints.
"""

from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.layers import Block, init_transformer, rope_2d
from models.posteriors import POSTERIORS, Draws, Posterior
from models.sphere import project_to_sphere


class Projection(NamedTuple):
    """Where √C·z/‖z‖ stands in for z (the paper's Table 2)."""

    tokens: bool  # in what the decoder reads and in the AR model: its input, its target, its generation
    decoder: bool  # in what the decoder reads, only


PROJECTIONS = {
    "all": Projection(tokens=True, decoder=False),
    "decoder": Projection(tokens=False, decoder=True),
    "none": Projection(tokens=False, decoder=False),
}


@dataclass(frozen=True)
class SVAEConfig:
    """Architecture of an S-VAE; the defaults are the published one."""

    image_size: int = 256
    patch_size: int = 16
    latent_dim: int = 16
    width: int = 512
    num_heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 12
    num_registers: int = 4
    stem_channels: tuple[int, ...] = (64, 64, 128, 256, 512)  # conv_in's, then one per halving; mirrored in the decoder
    posterior: str = "power-spherical"
    sigma: float | None = None  # the deviation of a posterior that does not learn it
    projection: str = "all"
    latent_shift: float = 0.0  # latents that stay flat go to the AR model as (latent − shift) / scale …
    latent_scale: float | None = None  # … once both are measured, at the end of the S-VAE's training

    def __post_init__(self):
        if self.posterior not in POSTERIORS:
            raise ValueError(f"posterior {self.posterior!r} is not one of {', '.join(POSTERIORS)}")
        if self.projection not in PROJECTIONS:
            raise ValueError(f"projection {self.projection!r} is not one of {', '.join(PROJECTIONS)}")
        if POSTERIORS[self.posterior].on_sphere and self.projection != "all":
            raise ValueError(f"projection {self.projection}: latents of {self.posterior} are on the sphere; take all")
        if not ((self.sigma or 0) > 0 if POSTERIORS[self.posterior].takes_sigma else self.sigma is None):
            needing = " or ".join(name for name, posterior in POSTERIORS.items() if posterior.takes_sigma)
            raise ValueError(f"sigma {self.sigma}: a {needing} posterior needs one above 0, and no other takes one")
        if self.latent_scale is not None and (not self.is_flat or not self.latent_scale > 0):
            raise ValueError(f"latent_scale {self.latent_scale} must be above 0, and is for projection none or decoder")
        if self.latent_shift and self.latent_scale is None:
            raise ValueError(f"latent_shift {self.latent_shift} needs a latent_scale, as flat latents have")
        if self.patch_size != 2 ** (len(self.stem_channels) - 1):
            raise ValueError(
                f"patch_size {self.patch_size} needs {self.stem_channels} to have log2(patch_size) + 1 entries"
            )
        if self.image_size < self.patch_size or self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}")
        if self.stem_channels[-1] != self.width:
            raise ValueError(f"the last of stem_channels {self.stem_channels} must be the width {self.width}")
        if self.width % (4 * self.num_heads):
            raise ValueError(f"width {self.width} must be a multiple of 4 x num_heads ({self.num_heads})")
        if self.latent_dim < 2:
            raise ValueError(f"latent_dim {self.latent_dim} must be at least 2: a sphere needs two dimensions")

    def changed(self, **changes: object) -> "SVAEConfig":
        """This config with other values, and what follows from them: the stem of another patch size; no projection for
        another posterior that is not spherical, unless one is asked for."""
        if changes.get("patch_size", self.patch_size) != self.patch_size:
            changes["stem_channels"] = stem_channels_for(changes["patch_size"], self.width)
        if "posterior" in changes and not POSTERIORS[changes["posterior"]].on_sphere:
            changes.setdefault("projection", "none")
        return replace(self, **changes)

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        return self.grid**2

    @property
    def is_flat(self) -> bool:
        """Whether tokens are not on the sphere."""
        return not PROJECTIONS[self.projection].tokens

    @property
    def radius(self) -> float:
        return self.latent_dim**0.5


def stem_channels_for(patch_size: int, width: int) -> tuple[int, ...]:
    """Stem widths for a patch size: halved from `width` towards the pixels, at least 64 (at most `width`)."""
    if patch_size not in (4, 8, 16, 32):
        raise ValueError(f"patch_size {patch_size} is not one of 4, 8, 16, 32")
    stages = patch_size.bit_length() - 1
    return tuple(max(min(64, width), width >> (stages - i)) for i in range(stages + 1))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


def _conv(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


class DownBlock(nn.Module):
    """Residual block that halves the sides: (B, in, 2s, 2s) -> (B, out, s, s)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.block = nn.Sequential(
            _norm(in_channels), nn.SiLU(), _conv(in_channels, out_channels, stride=2),
            _norm(out_channels), nn.SiLU(), _conv(out_channels, out_channels),
        )  # fmt: skip
        self.shortcut = nn.Conv2d(in_channels, out_channels, 2, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.block(x)


class UpBlock(nn.Module):
    """Residual block that doubles the sides, then a second one: (B, in, s, s) -> (B, out, 2s, 2s)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.block = nn.Sequential(
            _norm(in_channels), nn.SiLU(), nn.ConvTranspose2d(in_channels, out_channels, 4, 2, padding=1, bias=False),
            _norm(out_channels), nn.SiLU(), _conv(out_channels, out_channels),
        )  # fmt: skip
        self.shortcut = nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2, bias=False)
        self.block2 = nn.Sequential(
            _norm(out_channels), nn.SiLU(), _conv(out_channels, out_channels),
            _norm(out_channels), nn.SiLU(), _conv(out_channels, out_channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        h = self.shortcut(x) + self.block(x)
        return h + self.block2(h)


class Stem(nn.Module):
    """A stack of down or up blocks, one per factor of two."""

    def __init__(self, block: type[nn.Module], channels: tuple[int, ...]):
        super().__init__()
        self.net = nn.Sequential(*(block(*pair) for pair in pairwise(channels)))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class ConvOut(nn.Sequential):
    """(B, in, S, S) -> (B, 3, S, S). A class with a forward of its own: torch.compile passes over a bare Sequential."""

    def __init__(self, in_channels: int):
        super().__init__(_norm(in_channels), nn.SiLU(), _conv(in_channels, 3))

    def forward(self, x: Tensor) -> Tensor:
        norm, silu, conv = self
        return conv(silu(norm(x)))


class TokenTransformer(nn.Module):
    """The bidirectional transformer in encoder and decoder; registers go in front and are dropped at the end."""

    def __init__(self, config: SVAEConfig, num_layers: int):
        super().__init__()
        self.register_token = nn.Embedding(config.num_registers, config.width)
        self.layers = nn.ModuleList(Block(config.width, config.num_heads) for _ in range(num_layers))
        rope = rope_2d(config.grid, config.width // config.num_heads, config.num_registers)
        self.register_buffer("freqs_cis", rope)
        self.grad_checkpointing = False

    def transform(self, x: Tensor) -> Tensor:
        registers = self.register_token.weight.expand(x.shape[0], -1, -1)
        x = torch.cat([registers, x], dim=1)  # (B, registers + P, D), float32 under autocast
        for layer in self.layers:
            if self.grad_checkpointing and self.training:
                x = checkpoint(layer, x, self.freqs_cis, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, self.freqs_cis)
        return x[:, registers.shape[1] :]


class Encoder(TokenTransformer):
    def __init__(self, config: SVAEConfig):
        super().__init__(config, config.encoder_layers)
        self.conv_in = _conv(3, config.stem_channels[0])
        self.patchify = nn.Sequential(Stem(DownBlock, config.stem_channels))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.output = nn.Linear(config.width, config.width, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patchify(self.conv_in(images))  # (B, D, g, g)
        x = self.transform(x.flatten(2).transpose(1, 2))  # (B, P, D)
        return self.output(self.norm(x))


class Decoder(TokenTransformer):
    def __init__(self, config: SVAEConfig):
        super().__init__(config, config.decoder_layers)
        to_grid = nn.Unflatten(2, (config.grid, config.grid))
        channels = config.stem_channels[::-1]
        self.conv_in = nn.Sequential(to_grid, _conv(config.width, config.width))
        self.unpatchify = nn.Sequential(to_grid, Stem(UpBlock, channels))
        self.conv_out = ConvOut(channels[-1])

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x.transpose(1, 2))  # (B, D, g, g)
        x = self.transform(x.flatten(2).transpose(1, 2))  # (B, P, D)
        return self.conv_out(self.unpatchify(x.transpose(1, 2)))


class SVAE(nn.Module):
    """The hyperspherical VAE: tokens are samples of its posterior, of norm config.radius (see config.projection)."""

    def __init__(self, config: SVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.encoder.apply(init_transformer)
        self.decoder.apply(init_transformer)
        self.encoder.output.reset_parameters()
        self.projection = PROJECTIONS[config.projection]
        posterior = POSTERIORS[config.posterior]
        self.posterior = posterior if config.sigma is None else partial(posterior, sigma=config.sigma)
        self.quant_proj = nn.Linear(config.width, posterior.num_outputs(config.latent_dim))
        self.post_quant_proj = nn.Linear(config.latent_dim, config.width, bias=False)

    def encode(self, images: Tensor) -> Posterior:
        """Posterior over the latents (B, P, C) of images."""
        side = self.config.image_size
        if images.shape[1:] != (3, side, side):
            raise ValueError(f"images {tuple(images.shape)} must be (B, 3, {side}, {side}): the S-VAE's image_size")
        return self.posterior(self.quant_proj(self.encoder(images)))

    def to_tokens(self, latents: Tensor) -> Tensor:
        """Tokens (B, P, C), as decoder and AR model know them, of a posterior's latents (B, P, C)."""
        if POSTERIORS[self.config.posterior].on_sphere:
            return latents
        if self.projection.tokens:
            return project_to_sphere(latents, self.config.radius)
        scale = self.config.latent_scale
        return latents if scale is None else (latents - self.config.latent_shift) / scale

    def decode(self, tokens: Tensor) -> Tensor:
        """Images (B, 3, S, S), not clamped, of tokens (B, P, C)."""
        expected = (self.config.num_tokens, self.config.latent_dim)
        if tokens.shape[1:] != expected:
            raise ValueError(f"tokens {tuple(tokens.shape)} must be (B, {expected[0]}, {expected[1]})")
        if self.config.latent_scale is not None:
            tokens = tokens * self.config.latent_scale + self.config.latent_shift
        if self.projection.decoder:
            tokens = project_to_sphere(tokens, self.config.radius)
        return self.decoder(self.post_quant_proj(tokens))

    def forward(self, images: Tensor, draws: Draws | None = None) -> tuple[Tensor, Tensor]:
        """Reconstruction, and the posterior's KL in nats, mean over batch and tokens. Without `draws`, torch's own."""
        posterior = self.encode(images)
        latents = posterior.sample() if draws is None else posterior.sample_from(draws)
        return self.decode(self.to_tokens(latents)), posterior.kl().mean()
