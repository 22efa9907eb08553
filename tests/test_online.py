"""Comparison with a reference while training: what it takes, what it gives, and what it leaves behind."""

import os

import numpy as np
import pytest
import torch

from tests.helpers.evaluation import Instant, random_images, use_instant
from utils.evaluation import online
from utils.evaluation.features import Extractor, extract
from utils.evaluation.frechet import frechet_distance
from utils.evaluation.inputs import open_images
from utils.evaluation.mind import mind
from utils.evaluation.reconstruction import psnr, ssim
from utils.images import to_float, to_uint8

CPU = torch.device("cpu")
COUNT = 40  # more than are made at once


@pytest.fixture
def network(monkeypatch):
    use_instant(monkeypatch, network := Instant(), sha256="abc")
    return network


@pytest.fixture
def reference(tmp_path):
    np.savez(tmp_path / "reference.npz", random_images(16, 32).numpy())
    return tmp_path / "reference.npz"


@pytest.fixture
def made():
    """Images (40, 3, 32, 32) in [-1, 1]."""
    return to_float(random_images(COUNT, 32, seed=1).permute(0, 3, 1, 2))


def features(images):
    with Extractor(Instant(), 2, CPU, 1) as extractor:
        return extract([images], extractor, len(images), len(images), name="x", half=True, shows=False)


def test_samples_have_the_distances_of_their_features(network, reference, made):
    comparison = online.compare_samples(str(reference), CPU)
    found = comparison.generated(lambda numbers: made[numbers], COUNT)
    ours, theirs = features(to_uint8(made)), features(open_images(reference).read(0, 16))
    moments = [x.statistics[name] for x in (ours, theirs) for name in ("mu", "sigma")]
    assert found["FID"] == pytest.approx(frechet_distance(*moments), rel=1e-8)  # 2e-9 was seen
    assert found["MIND"] == pytest.approx(mind(ours.pool, theirs.pool, seed=2020), rel=1e-6)
    assert comparison.receipt["weights"]["sha256"] == "abc" and comparison.receipt["reference"]["images"] == 16
    assert network.images == 16 + COUNT
    assert comparison.generated(lambda numbers: made[numbers], COUNT) == found
    assert network.images == 16 + 2 * COUNT  # the reference was known


def test_statistics_alone_give_fid_alone_and_count_before_images(network, reference, made, tmp_path):
    theirs = features(random_images(20, 32, seed=2).numpy()).statistics
    np.savez(tmp_path / "statistics.npz", **theirs)
    np.savez(tmp_path / "both.npz", arr_0=np.load(reference)["arr_0"], **theirs)
    alone, both = (
        online.compare_samples(str(tmp_path / name), CPU).generated(lambda numbers: made[numbers], COUNT)
        for name in ("statistics.npz", "both.npz")
    )
    assert alone.keys() == {"FID"} and both.keys() == {"FID", "MIND"}
    assert alone["FID"] == both["FID"]


def test_the_references_features_are_kept_only_when_asked(network, reference, made):
    plain = online.compare_samples(str(reference), CPU).generated(lambda numbers: made[numbers], COUNT)
    assert list(reference.parent.iterdir()) == [reference]
    for from_cache in (False, True):
        comparison = online.compare_samples(str(reference), CPU, cache_features=True)
        assert comparison.generated(lambda numbers: made[numbers], COUNT) == plain
        assert comparison.receipt["reference"]["features_from_cache"] is from_cache


def test_reconstructions_are_compared_with_their_originals(network, reference):
    comparison = online.compare_reconstructions(str(reference), None, 100, 32, CPU)
    seen = []

    def darker(images):
        seen.append(images)
        return 0.9 * images - 0.1

    found = comparison.reconstructed(darker)
    originals = open_images(reference).read(0, 16)
    assert torch.equal(torch.cat(seen), to_float(torch.from_numpy(originals).permute(0, 3, 1, 2)))
    images = to_uint8(darker(torch.cat(seen)))
    assert found["PSNR"] == pytest.approx(psnr(images, originals).mean().item())
    assert found["SSIM"] == pytest.approx(ssim(images, originals).mean().item())
    assert found["rFID"] > 1e-3 and comparison.reconstructed(lambda images: images)["rFID"] < 1e-6


def test_fewer_originals_are_spread_over_the_file(reference):
    source = open_images(reference)
    some = online.Spread(source, 4)
    assert some.numbers == [0, 5, 10, 15] and np.array_equal(some.read(1, 3), source.read(0, 16)[[5, 10]])


def test_references_that_do_not_do_are_refused(reference, tmp_path):
    np.savez(tmp_path / "one.npz", random_images(1, 32).numpy())
    with pytest.raises(ValueError, match=r"--eval-reference .*one.npz: FID needs at least 2 images"):
        online.compare_samples(str(tmp_path / "one.npz"), CPU)
    with pytest.raises(ValueError, match=r"has 16 images of 32 x 32; reconstructions need at least 2 of 64 x 64"):
        online.compare_reconstructions(str(reference), None, 100, 64, CPU)


def test_settings_of_torch_are_put_back(network, reference, made, monkeypatch):
    """Also what runs under autocast, with TF32, is compared in float32."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    threads, seen = torch.get_num_threads(), []

    def make(numbers):
        seen.append((torch.is_autocast_enabled("cpu"), torch.backends.cuda.matmul.allow_tf32))
        torch.set_num_threads(threads + 1)
        return made[numbers]

    with torch.autocast("cpu", torch.bfloat16):
        online.compare_samples(str(reference), CPU).generated(make, COUNT)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [(False, False)] * 2
    assert torch.backends.cuda.matmul.allow_tf32 and torch.get_num_threads() == threads and torch.is_grad_enabled()


def test_originals_that_change_between_two_comparisons_are_refused(network, reference):
    """Old features and new pixels would be compared."""
    comparison = online.compare_reconstructions(str(reference), None, 100, 32, CPU)
    comparison.reconstructed(lambda images: images)
    np.savez(reference, random_images(16, 32, seed=3).numpy())
    os.utime(reference, ns=(1, 1))  # two writes may share a tick of the clock
    with pytest.raises(ValueError, match=r"reference\.npz: is no longer the file that was opened"):
        comparison.reconstructed(lambda images: images)
