"""Images left out: the same for everybody, never trained on, and nothing changes where there are none."""

import numpy as np
import pytest
import torch

from dataset import build_dataset, train_loader
from dataset.draws import epoch_order
from dataset.held_out import HeldOut, held_out_indices
from tests.helpers.small_run import BATCH, CLASSES, PER_CLASS, write_tar

COUNT = CLASSES * PER_CLASS


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    tar = write_tar(tmp_path_factory.mktemp("held_out") / "train.tar")
    return build_dataset(tar, 16, num_classes=CLASSES, seed=0)


def order(data, held_out, **options):
    """Places of the images of three epochs, a list per epoch."""
    num_steps = 3 * ((COUNT - len(held_out)) // BATCH)
    loader = train_loader(data, global_batch_size=BATCH, batch_size=BATCH, seed=1, num_steps=num_steps,
                          held_out=held_out, **options)  # fmt: skip
    return np.array([index for batch in loader for index in batch.index.tolist()]).reshape(3, -1)


@pytest.mark.parametrize("count", [0, 1, 4, COUNT])
def test_they_are_spread_over_the_classes(count):
    indices = held_out_indices(COUNT, count)
    assert len(set(indices.tolist())) == count and list(indices) == sorted(indices)
    if count == CLASSES:
        assert {index // PER_CLASS for index in indices} == set(range(CLASSES))


def test_training_never_sees_them_and_all_others(data):
    held_out = held_out_indices(COUNT, 12)  # 40 are left: whole epochs
    for epoch in order(data, held_out):
        assert set(epoch.tolist()) == set(range(COUNT)) - set(held_out.tolist())


def test_the_order_is_that_of_all_images_without_them(data):
    everything, held_out = order(data, held_out_indices(COUNT, 0)), held_out_indices(COUNT, 4)
    for number, (whole, epoch) in enumerate(zip(everything, order(data, held_out))):
        assert whole.tolist() == epoch_order(1, number, COUNT)[: len(whole)].tolist()
        rest = [index for index in whole if index not in held_out]
        assert epoch[: len(rest)].tolist() == rest


def test_they_are_centre_crops_as_batches_and_as_bytes(data):
    left_out = HeldOut(data, held_out_indices(COUNT, 5))
    batch = left_out.batch(range(1, 4))
    assert batch.index.tolist() == left_out.indices[1:4]
    assert torch.equal(batch.image[0], data[left_out.indices[1]].image)
    assert batch.label.tolist() == [data.label(index) for index in left_out.indices[1:4]]
    assert np.array_equal(left_out.read(1, 4), batch.image.permute(0, 2, 3, 1).numpy())
    assert (left_out.count, left_out.height, left_out.width) == (5, 16, 16)
