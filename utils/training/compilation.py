"""What torch.compile is given in training: the large parts, each for itself, in place; the same numbers to rounding.

Equal blocks share one graph, so this is far quicker than the whole; and on several processes a block's gradients leave
while the backward pass goes on, where one graph would hold all of them back to its end.
"""

import torch
from torch import nn


def compile_svae(vae: nn.Module, *others: nn.Module) -> None:
    """For the S-VAE's training: the parts of an S-VAE (models.svae), and `others` (LPIPS, the discriminator) whole."""
    encoder, decoder = vae.encoder, vae.decoder
    stems = encoder.patchify, decoder.unpatchify, decoder.conv_out
    _compile(*stems, *encoder.layers, *decoder.layers, *others)


def compile_ar(model: nn.Module) -> None:
    """For AR training: a model's (models.spherear) blocks and whole head, and the encoder of its frozen S-VAE."""
    encoder = model.vae.encoder
    _compile(encoder.patchify, *encoder.layers, *model.layers, model.head)


def _compile(*parts: nn.Module) -> None:
    if hasattr(torch._dynamo.config, "optimize_ddp"):  # it would cut a block's graph wherever DDP's buckets end
        torch._dynamo.config.optimize_ddp = False
    for part in parts:
        part.compile(dynamic=False)
