"""The S-VAE: stems, configs that cannot be, shapes at its boundary, initialisation."""

import pytest
import torch

from models import SVAE, SVAEConfig, stem_channels_for
from tests.helpers.nano import NANO


@pytest.mark.parametrize("patch_size, stages", [(4, 2), (8, 3), (16, 4)])
def test_patch_size_sets_the_number_of_stem_stages(patch_size, stages):
    channels = stem_channels_for(patch_size, 64)
    config = SVAEConfig(32, patch_size, 8, 64, 1, 1, 1, stem_channels=channels)
    svae = SVAE(config)
    assert len(svae.encoder.patchify[0].net) == len(svae.decoder.unpatchify[1].net) == stages
    reconstruction, kl = svae(torch.zeros(2, 3, 32, 32))
    assert reconstruction.shape == (2, 3, 32, 32) and kl.shape == ()
    assert svae.encode(torch.zeros(2, 3, 32, 32)).mode().shape == (2, (32 // patch_size) ** 2, 8)
    assert stem_channels_for(16, 512) == SVAEConfig().stem_channels


@pytest.mark.parametrize(
    "bad, word",
    [
        ({"patch_size": 8}, "patch_size 8"),
        ({"image_size": 250}, "image_size 250"),
        ({"latent_dim": 1}, "latent_dim 1"),
        ({"num_heads": 7}, "num_heads"),
        ({"width": 256}, "width 256"),
        ({"posterior": "cauchy"}, "posterior 'cauchy'"),
    ],
)
def test_impossible_configs_are_refused(bad, word):
    with pytest.raises(ValueError, match=word):
        SVAEConfig(**bad)


def test_wrong_image_and_token_shapes_are_refused():
    svae = SVAE(NANO.svae)
    with pytest.raises(ValueError, match="image_size"):
        svae.encode(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"must be \(B, 16, 8\)"):
        svae.decode(torch.zeros(1, 16, 16))


def test_kl_is_a_mean_over_batch_and_tokens():
    svae, images = SVAE(NANO.svae).eval(), torch.rand(3, 3, 32, 32) * 2 - 1
    posterior = svae.encode(images)
    assert posterior.kl().shape == (3, 16) and posterior.kl().std() > 0
    torch.testing.assert_close(svae(images)[1], posterior.kl().mean())
