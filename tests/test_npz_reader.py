"""Images and statistics out of an .npz: any order, every damage one clean error."""

import hashlib
import os
import threading
import zipfile

import numpy as np
import pytest

from tests.helpers.evaluation import mutate, random_images, write_files
from utils.evaluation import npz_reader
from utils.evaluation.npz_reader import NpzReader, is_covariance


def good():
    return random_images(5, 8).numpy()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_are_read_in_any_order(save, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (50, 6, 7, 3), dtype=np.uint8)
    save(tmp_path / "images.npz", images, np.arange(50))
    reader = NpzReader(tmp_path / "images.npz")
    assert (reader.count, reader.height, reader.width) == (50, 6, 7)
    assert np.array_equal(reader.labels, np.arange(50))
    for start, stop in ((0, 5), (5, 50), (3, 4), (49, 50), (10, 30)):
        assert np.array_equal(reader.read(start, stop), images[start:stop])
    reader.close()
    assert np.array_equal(reader.read(7, 9), images[7:9])


def test_a_fingerprint_changes_with_size_date_and_content(tmp_path):
    path, found = tmp_path / "images.npz", []
    for images, date in ((good(), 1), (good(), 2), (255 - good(), 2), (good()[:4], 2)):
        np.savez(path, images)
        os.utime(path, ns=(date, date))
        found.append(NpzReader(path).fingerprint())
    for before, after, changed in zip(found, found[1:], ({"mtime_ns"}, {"crc"}, {"size", "crc"})):
        assert {name for name in before if before[name] != after[name]} == changed


def test_an_abandoned_checksum_ends_early(tmp_path):
    reader, abandoned = NpzReader(write_files(tmp_path) / "reference.npz"), threading.Event()
    assert reader.sha256(abandoned) == hashlib.sha256(reader.path.read_bytes()).hexdigest()
    abandoned.set()
    assert reader.sha256(abandoned) == hashlib.sha256().hexdigest()


def test_covariances_are_told_from_indefinite_matrices():
    x = np.random.default_rng(0).normal(size=(30, 50))
    for count in (2, 30):  # of low rank both
        covariance = np.cov(x[:count], rowvar=False)
        for dtype in (np.float64, np.float32):
            assert is_covariance(covariance.astype(dtype))
        indefinite = covariance.copy()
        indefinite[0, 1] = indefinite[1, 0] = 2 * np.sqrt(covariance[0, 0] * covariance[1, 1])
        assert not is_covariance(indefinite)
    assert is_covariance(np.zeros((3, 3)))


def test_a_thousand_mutated_files_give_clean_errors_only(tmp_path, monkeypatch):
    monkeypatch.setattr(npz_reader, "STATISTICS", {"mu": (4,), "sigma": (4, 4), "mu_s": (3,), "sigma_s": (3, 3)})
    rng, refused = np.random.default_rng(0), 0
    arrays = {"mu": np.ones(4), "sigma": np.eye(4), "mu_s": np.ones(3), "sigma_s": np.eye(3)}
    path = tmp_path / "images.npz"
    originals = []
    for save in (np.savez, np.savez_compressed):
        save(path, arr_0=good(), arr_1=np.arange(5), **arrays)
        originals.append(path.read_bytes())
    for number in range(1000):
        path.write_bytes(mutate(originals[number % 2], rng))
        try:
            reader = NpzReader(path)
            for start in range(reader.count):
                reader.read(start, start + 1)
        except ValueError as error:
            refused += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error)
        else:
            reader.close()
    assert 300 < refused < 1000


def test_a_bomb_is_not_inflated(tmp_path):
    """A header that promises more than the member holds is refused before any of it is read."""
    header = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little")
    text = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 9999, 9999, 3), }"
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", header + text.ljust(117) + b"\n" + bytes(10_000))
    with pytest.raises(ValueError, match="10000 bytes, not those of shape"):
        NpzReader(tmp_path / "bomb.npz")


def test_more_images_than_memory_holds_features_of_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(npz_reader, "MAX_IMAGES", 4)
    np.savez(tmp_path / "many.npz", good())
    with pytest.raises(ValueError, match="arr_0 has 5 images; 4 at most"):
        NpzReader(tmp_path / "many.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("replace", [False, True])
def test_a_file_that_changes_in_use_is_refused(save, replace, tmp_path):
    """Overwritten in place, or another put there under its name, of its size."""
    path = tmp_path / "images.npz"
    save(path, good())
    reader = NpzReader(path)
    reader.read(0, 2), reader.sha256()
    save(tmp_path / "other.npz", good()[::-1])
    if replace:
        os.replace(tmp_path / "other.npz", path)
    else:
        path.write_bytes((tmp_path / "other.npz").read_bytes())
        os.utime(path, ns=(1, 1))  # two writes may share a tick of the clock
    for use in (lambda: reader.read(2, 4), lambda: reader.read(0, 2), reader.sha256):
        with pytest.raises(ValueError, match=r"images\.npz: is no longer the file that was opened") as error:
            use()
        assert "\n" not in str(error.value)
