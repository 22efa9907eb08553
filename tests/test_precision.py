"""Under bf16 autocast the residual stream of every transformer stays float32, as in the reference."""

import pytest
import torch

from models import PRESETS, SphereAR
from models.layers import Block
from utils.sampling.graphs import cast_weights

NANO = PRESETS["SphereAR-Nano"]
TOKENS = torch.ones(2, NANO.num_tokens, NANO.latent_dim)
LABELS = torch.tensor([1, 2])


def encode(model):
    model.vae.encode(torch.zeros(2, 3, NANO.svae.image_size, NANO.svae.image_size))
    return model.vae.encoder.layers


def decode(model):
    model.vae.decode(TOKENS)
    return model.vae.decoder.layers


def condition(model):
    model.condition(TOKENS, LABELS)
    return model.layers


def prefill(model):
    model.prefill(LABELS, model.new_cache(2, torch.bfloat16, "cpu"))
    return model.layers


def decode_step(model):
    model.decode_step(TOKENS[:, 0], 0, model.new_cache(2, torch.bfloat16, "cpu"))
    return model.layers


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trunk", [encode, decode, condition, prefill, decode_step])
def test_residual_stream_is_float32_under_autocast(trunk, weights):
    model, entered = SphereAR(NANO), {}
    if weights == torch.bfloat16:  # as for sampling
        cast_weights(model, weights)
    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_pre_hook(lambda block, inputs: entered.update({block: inputs[0].dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        layers = trunk(model)
    assert entered == dict.fromkeys(layers, torch.float32)
