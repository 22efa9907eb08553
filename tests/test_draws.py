"""Labels and noise of image i: addressed by seed and i alone, whatever the batch and the number of images."""

from functools import partial

import numpy as np
import pytest
import torch

from utils.noise import Purpose, normals
from utils.sampling.draws import compiled_normals, image_noise, make_labels


def test_noise_is_addressed_by_image_token_and_step():
    noise = image_noise(5, torch.tensor([3, 9]), num_noise=5, channels=8)
    both, one = noise(0, 4), noise(2, 2)
    assert both.shape == (5, 4, 8) and one.shape == (5, 2, 8)
    assert torch.equal(one[3, 1], normals(5, Purpose.SAMPLING, 9, step=3, token=2, count=8))
    assert torch.equal(both[3, 1], normals(5, Purpose.SAMPLING, 9, step=3, token=0, count=8))
    assert torch.equal(both[3, 3], normals(5, Purpose.SAMPLING_NULL, 9, step=3, token=0, count=8))


def test_compiled_noise_is_the_same_bit_for_bit(monkeypatch):
    """torch.compile without code generation: the same tracing, guards and recompilations, in seconds."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    compiled_normals.cache_clear()
    draw = compiled_normals()
    images = torch.tensor([4, 2**40])
    for token in range(3):
        address = 3, Purpose.SAMPLING, images, torch.arange(5)[:, None], torch.tensor(token)
        assert torch.equal(draw(*address, count=7), normals(*address, count=7))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    compiled_normals.cache_clear()


def test_labels():
    balanced = make_labels("balanced", 5000, 100, seed=0)
    assert (np.bincount(balanced) == 50).all()
    assert (np.bincount(balanced[:500], minlength=100) > 0).mean() > 0.95  # shuffled: no class is all in one block
    assert (balanced != make_labels("balanced", 5000, 100, seed=1)).any()
    random = make_labels("random", 5000, 100, seed=0)
    assert random.dtype == np.int64 and random.min() == 0 and random.max() == 99
    assert (random[:300] == make_labels("random", 300, 100, seed=0)).all()  # by image, not by count
    assert 60 < ((np.bincount(random) - 50.0) ** 2 / 50).sum() < 150  # chi square, 99 degrees of freedom
    assert make_labels("random", 5, 10, 0, class_ids=[4, 2]).tolist() == [4, 2, 4, 2, 4]


@pytest.mark.parametrize("wrong", [-1, 10])
def test_a_class_that_the_model_does_not_have_is_refused(wrong):
    with pytest.raises(ValueError, match=f"--class-ids {wrong} must lie in 0 to 9"):
        make_labels("random", 5, 10, 0, class_ids=[4, wrong])
