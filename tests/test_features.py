"""Features of an iterable of images, whatever hands them out."""

import multiprocessing
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.helpers.evaluation import Instant, random_images, write_files
from utils.evaluation.features import Extractor, exact_arithmetic, extract, read_parts, workers_within_memory
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
    images = random_images(12, 48, seed=1)
    from_file = extract(read_parts(samples, 8, 8), extractor, 12, 8, name="samples")
    generated = extract((images[start : start + 8] for start in (0, 8)), extractor, 12, 8, name="generated")
    assert torch.equal(generated.pool, from_file.pool)
    assert generated.statistics.keys() == {"mu", "sigma", "mu_s", "sigma_s"}
    for name, values in generated.statistics.items():
        assert (values == from_file.statistics[name]).all()
    sizes = [5, 0, 7]  # of nobody knows how many, over the ends of parts
    unknown = extract((batch.numpy() for batch in images.split(sizes)), extractor, None, 8, name="unknown")
    assert torch.allclose(unknown.pool, from_file.pool, atol=1e-4)
    assert np.allclose(unknown.statistics["sigma"], from_file.statistics["sigma"], atol=1e-3)


def test_a_subset_has_the_features_and_statistics_of_its_images(samples, extractor):
    whole = extract(read_parts(samples, 8, 8), extractor, 12, 8, name="samples", keep_spatial=True)
    rows = torch.tensor([7, 0, 3])
    images = random_images(12, 48, seed=1)[rows]
    alone = extract([images], extractor, 3, 8, name="three", keep_spatial=True)
    subset = whole.subset(rows)
    assert torch.allclose(subset.pool, alone.pool, atol=1e-4)
    assert torch.allclose(subset.spatial, alone.spatial, atol=1e-4)
    assert subset.statistics.keys() == alone.statistics.keys()
    for name, values in alone.statistics.items():
        assert np.allclose(subset.statistics[name], values, atol=1e-3)


def test_arithmetic_is_exact_for_a_while():
    """Whatever a training run has set comes back."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = cudnn.benchmark = True
        with exact_arithmetic():
            assert (matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark) == (
                False,
                False,
                True,
                False,
            )
            assert torch.is_inference_mode_enabled()
        assert matmul.allow_tf32 and cudnn.allow_tf32 and cudnn.benchmark and not torch.is_inference_mode_enabled()
        with exact_arithmetic(tf32=True):
            assert cudnn.allow_tf32 and not matmul.allow_tf32
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before


def test_processes_may_hand_out_unequal_shares(tmp_path):
    """Three processes with 5, 0 and 2 images in turns of 2: turn by turn, rank by rank."""
    processes = [
        multiprocessing.get_context("fork").Process(target=extract_share, args=(rank, tmp_path)) for rank in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    with Extractor(Instant(), 4, CPU, workers=1) as extractor:
        one_by_one = extract([random_images(7, 8)[[0, 1, 5, 6, 2, 3, 4]]], extractor, 7, 2, name="all")
    assert torch.equal(found[0], one_by_one.pool)


def extract_share(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=3, timeout=timedelta(seconds=60))
    share = random_images(7, 8).split([5, 0, 2])[rank]
    with Extractor(Instant(), 4, CPU, workers=1) as extractor:
        features = extract([share] if len(share) else [], extractor, None, 2, name="share")
    torch.save(features.pool, folder / f"{rank}.pt")
    dist.destroy_process_group()


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
