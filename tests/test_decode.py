"""Decoding, and what counts as a bad image."""

import io
import multiprocessing
import os
import zlib
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import dataset.decode
from dataset.decode import BadImage, as_pillow, decode
from tests.helpers.dataset_tars import bad_images, image_file


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpegs_have_pillows_pixels(mode):
    rng = np.random.RandomState(0)
    for seed in range(60):
        quality, subsampling, progressive, optimize = rng.randint((5, 0, 0, 0), (101, 3, 2, 2)).tolist()
        options = dict(quality=quality, subsampling=subsampling, progressive=progressive, optimize=optimize)
        file = io.BytesIO()
        width, height = rng.randint(1, 200, 2)
        image = Image.open(io.BytesIO(image_file(seed, width, height, mode)))
        image.save(file, "JPEG", **options)
        expected = np.array(Image.open(file).convert("RGB"))
        assert np.array_equal(as_pillow(decode(file.getvalue(), "a.JPEG")), expected)


@pytest.mark.parametrize("kind", bad_images())
def test_bad_images_are_refused_with_a_reason(kind):
    data, says = bad_images()[kind]
    with pytest.raises(BadImage, match=says):
        decode(data, "a.JPEG")


def test_huge_and_extreme_images_are_refused_before_any_memory_is_taken():
    data = bytearray(image_file(1))
    frame = data.index(b"\xff\xc0")
    for height, width in ((0xFFFF, 0xFFFF), (0xFFFF, 20)):
        data[frame + 5 : frame + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
        with pytest.raises(BadImage, match=f"{width}x{height}|exceeds limit"):
            decode(bytes(data), "a.JPEG")


def test_png_is_fine_where_the_name_says_so():
    data = image_file(3, form="PNG")
    pixels = decode(data, "a.png")
    assert as_pillow(pixels).mode == "RGB"
    assert torch.equal(pixels.permute(1, 2, 0), torch.tensor(np.array(Image.open(io.BytesIO(data)))))


def test_sixteen_bits_per_channel_are_refused_in_colour_too():
    def chunk(kind, content):
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = (8).to_bytes(4, "big") * 2 + bytes([16, 2, 0, 0, 0])
    rows = zlib.compress(bytes(8 * (1 + 8 * 6)))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    assert Image.open(io.BytesIO(data)).mode == "RGB"
    with pytest.raises(BadImage, match="16 bits per channel"):
        decode(data, "a.png")


def test_random_damage_is_refused_where_pillow_refuses_it_or_libjpeg_warns():
    good, rng, refused, damaged = image_file(4, 90, 80), np.random.RandomState(0), 0, 0
    for _ in range(150):
        data = bytearray(good)
        for place in rng.randint(2, len(data), 3):
            data[place] = rng.randint(256)
        data = bytes(data[: rng.randint(2, len(data) + 1)] if rng.rand() < 0.3 else data)
        ours, pillows = (reason(each, data, "a.JPEG") for each in (decode, dataset.decode._decode_others))
        assert ours == pillows or ours.startswith("damaged: ")
        refused, damaged = refused + bool(pillows), damaged + (ours != pillows)
    assert 20 < refused < 150 and damaged > 20


def reason(decoder, *arguments):
    """Why a decoder refuses an image, or an empty string."""
    try:
        decoder(*arguments)
    except BadImage as error:
        return str(error)
    return ""


def damaged_data(good, kind):
    """A JPEG with damage to its image data that no header tells of."""
    data = bytearray(good)
    middle = (data.index(b"\xff\xda") + len(data)) // 2
    if kind == "cut":
        return bytes(data[:middle]) + b"\xff\xd9"
    if kind == "zeros":
        data[middle : middle + 64] = bytes(64)
        return bytes(data)
    return bytes(data[:-2]) + b"\x55" * 9 + b"\xff\xd9"  # too long


@pytest.mark.parametrize(
    ("kind", "says"),
    [("cut", "premature end of data segment"), ("zeros", ""), ("too long", r"\d extraneous bytes before marker 0xd9")],
)
def test_damaged_image_data_are_bad_and_said_by_nobody_else(kind, says, capfd):
    good = image_file(5, 200, 150)
    data = damaged_data(good, kind)
    assert Image.open(io.BytesIO(data)).convert("RGB").size == (200, 150)  # Pillow passes it
    with pytest.raises(BadImage, match=f"^damaged: .*{says}"):
        decode(data, "a.JPEG")
    decode(good, "a.JPEG")
    assert capfd.readouterr() == ("", "")


def test_what_others_write_to_stderr_meanwhile_is_passed_on(capfd, monkeypatch):
    decode_jpeg = dataset.decode.decode_jpeg
    monkeypatch.setattr(dataset.decode, "decode_jpeg", lambda data: os.write(2, b"step 7\r") and decode_jpeg(data))
    with pytest.raises(BadImage, match=r"^damaged: premature end of data segment$"):
        decode(damaged_data(image_file(5), "cut"))
    assert capfd.readouterr().err == "step 7\r"


def test_forked_processes_keep_their_warnings_apart():
    good, bad = image_file(5), damaged_data(image_file(5), "cut")
    decode(good)  # the pipe is there before the fork
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        reasons = pool.map(partial(reason, decode), [good, bad] * 100, chunksize=1)
    assert reasons == ["", "damaged: premature end of data segment"] * 100
