"""A folder of PNGs: their order, and one line for what is no image of the kind that is measured."""

import hashlib
import os
import threading

import numpy as np
import pytest
from PIL import Image

from tests.helpers.evaluation import mutate, random_images
from utils.evaluation.png_folder import PngFolder
from utils.images import write_png

IMAGES = random_images(12, 8).numpy()


@pytest.fixture
def folder(tmp_path):
    for index, image in enumerate(IMAGES):
        write_png(tmp_path / f"{index}.png", image)
    (tmp_path / "notes.txt").write_text("ignored")
    return tmp_path


def test_images_are_read_in_the_order_of_their_numbers(folder):
    images = PngFolder(folder)
    assert (images.count, images.height, images.width) == (12, 8, 8)
    for start, stop in ((0, 12), (3, 5), (11, 12)):
        assert np.array_equal(images.read(start, stop), IMAGES[start:stop])


def test_fingerprint_and_checksum_change_with_the_files(folder):
    before = PngFolder(folder).fingerprint(), PngFolder(folder).sha256()
    assert before == (PngFolder(folder).fingerprint(), PngFolder(folder).sha256())
    os.utime(folder / "3.png", ns=(1, 1))
    after = PngFolder(folder).fingerprint(), PngFolder(folder).sha256()
    assert after[0] != before[0] and after[1] == before[1]
    write_png(folder / "3.png", IMAGES[4])
    assert PngFolder(folder).sha256() != before[1]
    abandoned = threading.Event()
    abandoned.set()
    assert PngFolder(folder).sha256(abandoned) == hashlib.sha256().hexdigest()


def jpeg(path):
    Image.fromarray(IMAGES[0]).save(path.with_suffix(".JPEG"))


BAD = {
    "a lossy format": jpeg,
    "its mode is L, but": lambda path: Image.fromarray(IMAGES[0]).convert("L").save(path),
    "its mode is RGBA, but": lambda path: Image.fromarray(IMAGES[0]).convert("RGBA").save(path),
    "is 8 x 9, but 0.png is 8 x 8": lambda path: Image.new("RGB", (9, 8)).save(path),
    "no PNG, or a damaged one": lambda path: path.write_bytes(b"text"),
    "no PNG, or": lambda path: Image.fromarray(IMAGES[0]).save(path, format="BMP"),
    "damaged": lambda path: path.write_bytes(path.read_bytes()[:60]),
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_file_is_named(folder, message):
    BAD[message](folder / "7.png")
    with pytest.raises(ValueError, match=message) as error:
        PngFolder(folder).read(0, 12)
    assert "7." in str(error.value).split(":")[0] and "\n" not in str(error.value)


def test_mutated_files_give_clean_errors_only(folder):
    rng, original, refused = np.random.default_rng(0), (folder / "0.png").read_bytes(), 0
    for _ in range(200):
        (folder / "0.png").write_bytes(mutate(original, rng))
        try:
            PngFolder(folder).read(0, 2)
        except ValueError as error:
            refused += 1
            assert str(folder) in str(error) and "\n" not in str(error)
    assert refused > 100


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: data[:60] + b"?" + data[61:], lambda _: b"x"])
def test_the_checksum_finds_a_damaged_png_without_decoding_any(folder, damage):
    images = PngFolder(folder)
    (folder / "7.png").write_bytes(damage((folder / "7.png").read_bytes()))
    with pytest.raises(ValueError, match=r"7\.png: (a damaged|no) PNG"):
        images.sha256()


def test_a_png_that_changes_in_use_is_refused(folder):
    """Two that change their names keep sizes and dates; neither reading nor the checksum goes on with them."""
    for name in ("3.png", "4.png"):
        os.utime(folder / name, ns=(1, 1))
    images = PngFolder(folder)
    images.read(0, 12), images.sha256()
    (folder / "3.png").rename(folder / "x")
    (folder / "4.png").rename(folder / "3.png")
    (folder / "x").rename(folder / "4.png")
    assert np.array_equal(images.read(5, 12), IMAGES[5:])
    for use in (lambda: images.read(0, 12), images.sha256):
        with pytest.raises(ValueError, match=r"3\.png: is no longer the file that was opened"):
            use()
