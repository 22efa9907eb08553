"""What can be said about two inputs before anything is computed."""

import numpy as np

from utils.evaluation.inputs import looks_sorted


def test_labels_that_look_sorted():
    rng = np.random.default_rng(0)
    for classes in (2, 10, 1000):
        labels = rng.integers(0, classes, 5000)
        assert not looks_sorted(labels)
        assert looks_sorted(np.sort(labels))
    assert not looks_sorted(np.zeros(100)) and not looks_sorted(np.zeros(1))
