"""Images handed out batch by batch: what they are is checked as they come."""

import numpy as np
import pytest
import torch

from tests.helpers.evaluation import random_images
from utils.evaluation.batches import Batches


def test_batches_come_as_they_are_and_are_counted():
    images = random_images(7, 8)
    batches = Batches(iter([images[:3].numpy(), images[3:3], images[3:]]), "mine")
    assert (batches.height, batches.width, batches.count) == (8, 8, 0)
    taken = list(batches)
    assert torch.equal(torch.cat([torch.as_tensor(batch) for batch in taken]), images) and len(taken) == 2
    assert batches.count == 7 and str(batches.path) == "mine" and batches.sha256() is None


def test_no_batch_at_all_is_a_share_too():
    batches = Batches([])
    assert list(batches) == [] and (batches.count, batches.height) == (0, 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), r"images: a batch is float32 \(2, 8, 8, 3\), but batches are uint8"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"a batch is torch.uint8 \(2, 3, 8, 8\)"),
        (np.zeros((8, 8, 3), np.uint8), r"a batch is uint8 \(8, 8, 3\)"),  # an array of images is no batch of them
        (np.zeros((16, 0, 0, 3), np.uint8), r"a batch is uint8 \(16, 0, 0, 3\), .* H and W at least 1"),
        ([[0]], "a batch is list"),
        (np.zeros((2, 9, 8, 3), np.uint8), "a batch has images of 9 x 8, others are 8 x 8"),
    ],
)
def test_anything_else_is_refused(wrong, message):
    good = random_images(2, 8).numpy()
    with pytest.raises(ValueError, match=message):
        list(Batches([good, wrong]))
