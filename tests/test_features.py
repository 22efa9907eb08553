"""Features of an iterable of images, whatever hands them out."""

import pytest
import torch

from tests.helpers.evaluation import Instant, random_images, write_files
from utils.evaluation.features import Extractor, extract, read_parts, workers_within_memory
from utils.evaluation.npz_reader import NpzReader

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return NpzReader(write_files(tmp_path_factory.mktemp("files")) / "samples.npz")


@pytest.fixture
def extractor():
    with Extractor(Instant(), 4, CPU, workers=1) as extractor:
        yield extractor


def test_pool_features_are_kept_in_float16_unless_their_distances_would_not_fit(samples, extractor):
    def pool(half):
        return extract(read_parts(samples, 4, 4), extractor, 12, 4, name="samples", half=half).pool

    extractor.network.pool *= 0.01
    assert pool(False).dtype == torch.float32
    assert torch.equal(pool(True), pool(False).half())
    extractor.network.pool *= 1000
    assert torch.equal(pool(True), pool(False)) and pool(True).dtype == torch.float32


def test_any_iterable_gives_the_features_of_the_same_images_in_a_file(samples, extractor):
    """A generator of batches, as sampling while training would be, against the .npz; one batch is a part here."""
    images = random_images(12, 48, seed=1).numpy()
    from_file = extract(read_parts(samples, 8, 8), extractor, 12, 8, name="samples")
    generated = extract((images[start : start + 8] for start in (0, 8)), extractor, 12, 8, name="generated")
    assert torch.equal(generated.pool, from_file.pool)
    assert generated.statistics.keys() == {"mu", "sigma", "mu_s", "sigma_s"}
    for name, values in generated.statistics.items():
        assert (values == from_file.statistics[name]).all()


def test_features_that_are_not_finite_name_the_images(samples, extractor):
    extractor.network.pool[0] = torch.nan
    with pytest.raises(ValueError, match="samples: features of images 0 to 7 are not finite"):
        extract(read_parts(samples, 8, 4), extractor, 12, 8, name="samples")


def test_batches_in_work_are_bounded_by_memory():
    assert workers_within_memory(64, 2, 256, 256) == 64 and workers_within_memory(2, 2, 256, 256) == 2
    assert 1 < workers_within_memory(64, 2, 2048, 2048) < 64
    assert workers_within_memory(64, 2, 6000, 6000) == 1
    with pytest.raises(
        ValueError, match="images of 4096 x 4096 pixels are too large for batches of 64: take --batch-size 5"
    ):
        workers_within_memory(1, 64, 4096, 4096)
    assert workers_within_memory(1, 5, 4096, 4096) == 1
    with pytest.raises(ValueError, match="scale them down"):
        workers_within_memory(1, 1, 20_000, 20_000)
