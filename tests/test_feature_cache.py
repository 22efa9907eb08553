"""Features kept beside a file: the same numbers without the network, and only under an equal key."""

import os
import zipfile

import numpy as np
import pytest

from tests.helpers.evaluation import Instant, evaluation, run, use_instant, write_files
from utils import provenance
from utils.evaluation import feature_cache
from utils.evaluation.feature_cache import cache_path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def instant(monkeypatch):
    network = Instant()
    use_instant(monkeypatch, network)
    return network


def test_cached_features_give_the_same_numbers_without_the_network(files, tmp_path, instant, monkeypatch):
    paths = [tmp_path / name for name in ("reference.npz", "samples.npz")]
    for path in paths:
        path.write_bytes((files / path.name).read_bytes())
    instant.pool *= 0.01  # as small as genuine features
    assert run(*paths, "--cache-features") == 0
    first, done = evaluation(paths[1]), instant.images
    assert done == 28
    assert run(*paths, "--cache-features") == 0
    assert instant.images == done
    assert evaluation(paths[1])["metrics"] == first["metrics"]
    assert evaluation(paths[1])["samples"] == {**first["samples"], "features_from_cache": True}
    assert not first["samples"]["features_from_cache"]
    with np.load(cache_path(paths[1])) as archive:
        assert archive["pool"].dtype == np.float16  # as precision and recall take them: half the file and memory
    assert run(*paths, "--cache-features", "--pr-dtype", "float32") == 0  # another key
    with np.load(cache_path(paths[1])) as archive:
        assert archive["pool"].dtype == np.float32
    assert run(*paths, "--cache-features", "--batch-size", 5) == 0  # and another
    assert instant.images == 3 * done
    damaged = cache_path(paths[1])
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    os.utime(paths[0])
    assert run(*paths, "--cache-features", "--batch-size", 5) == 0  # damaged, and made for a file of another date
    assert instant.images == 4 * done
    for room, name, value in (  # features of another version of ours, and of another device
        (feature_cache, "VERSION", 0),
        (provenance, "device_name", lambda device: "another"),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(room, name, value)
            assert run(*paths, "--cache-features") == 0
    with monkeypatch.context() as changed:
        use_instant(changed, instant, sha256="1")
        assert run(*paths, "--cache-features") == 0
    assert instant.images == 7 * done
    assert run(*paths, "--cache-features") == 0
    with zipfile.ZipFile(cache_path(paths[1])) as archive, zipfile.ZipFile(tmp_path / "fewer", "w") as fewer:
        fewer.writestr("record.npy", archive.read("record.npy"))
    os.replace(tmp_path / "fewer", cache_path(paths[1]))  # a good record, no arrays
    assert run(*paths, "--cache-features") == 0
    assert instant.images == 8 * done + 12
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*"))


def test_a_cache_that_cannot_be_written_costs_no_numbers(files, tmp_path, instant, capfd, monkeypatch):
    for name in ("reference.npz", "samples.npz"):
        (tmp_path / name).write_bytes((files / name).read_bytes())

    def read_only(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(feature_cache, "save_features", read_only)
    assert run(tmp_path / "reference.npz", tmp_path / "samples.npz", "--cache-features") == 0
    out, err = capfd.readouterr()
    assert "FID: " in out and "--cache-features: [Errno 30] Read-only file system; going on" in err


@pytest.mark.parametrize("foreign", ["statistics", "notes"])
def test_a_file_that_is_no_cache_of_ours_is_kept(files, tmp_path, instant, capfd, foreign):
    samples, other = tmp_path / "samples.npz", tmp_path / "samples.features.npz"
    samples.write_bytes((files / "samples.npz").read_bytes())
    if foreign == "notes":
        other.write_bytes(b"")
    else:
        np.savez(other, mu=np.zeros(2048), sigma=np.eye(2048))
    content = other.read_bytes()
    assert run(files / "reference.npz", samples, "--cache-features") == 0
    assert "samples.features.npz" in capfd.readouterr().err
    assert other.read_bytes() == content


def test_a_reference_called_like_the_cache_is_refused(files, tmp_path, instant, capfd):
    samples, other = tmp_path / "samples.npz", tmp_path / "samples.features.npz"
    samples.write_bytes((files / "samples.npz").read_bytes())
    for reference in (files / "reference.npz", samples):  # images; a feature cache of ours, which holds statistics
        other.unlink(missing_ok=True)
        if reference == samples:
            assert run(files / "reference.npz", samples, "--cache-features") == 0
        else:
            other.write_bytes(reference.read_bytes())
        content, done = other.read_bytes(), instant.images
        capfd.readouterr()
        assert run(other, samples, "--cache-features", "--batch-size", 3) == 2
        assert "samples.features.npz: the features would be written over it" in capfd.readouterr().err
        assert other.read_bytes() == content and instant.images == done
