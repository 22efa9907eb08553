"""The discriminator's initialisation."""

import torch

from models.discriminator import PatchDiscriminator


def test_convolutions_keep_pytorchs_biases_as_in_the_released_code():
    torch.manual_seed(0)
    convolutions = [module for module in PatchDiscriminator().net if isinstance(module, torch.nn.Conv2d)]
    first, last = convolutions[0], convolutions[-1]
    assert [module.bias is None for module in convolutions] == [False, True, True, True, False]
    for module in (first, last):
        bound = (module.in_channels * 16) ** -0.5  # uniform in ±1 / sqrt(fan in)
        assert module.bias.abs().max() <= bound and (module.bias != 0).all()
    assert first.bias.std() > 0.05
