"""Decoding, and what counts as a bad image."""

import io
import multiprocessing
import os
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import dataset.decode
from dataset.decode import BadImage, decode_exact, decode_fast
from tests.helpers.dataset_tars import bad_images, image_file


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_fast_and_exact_decoding_agree(mode):
    data = image_file(1, 123, 77, mode)
    fast = decode_fast(data, "a.JPEG").expand(3, -1, -1)
    assert torch.equal(fast.permute(1, 2, 0), torch.from_numpy(np.array(decode_exact(data, "a.JPEG"))))


@pytest.mark.parametrize("kind", bad_images())
def test_bad_images_are_refused_with_a_reason_by_both_decoders(kind):
    data, says = bad_images()[kind]
    for decode in (decode_exact, decode_fast):
        with pytest.raises(BadImage, match=says):
            decode(data, "a.JPEG")


def test_huge_and_extreme_images_are_refused_before_any_memory_is_taken():
    data = bytearray(image_file(1))
    frame = data.index(b"\xff\xc0")
    for height, width in ((0xFFFF, 0xFFFF), (0xFFFF, 20)):
        data[frame + 5 : frame + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
        for decode in (decode_exact, decode_fast):
            with pytest.raises(BadImage, match=f"{width}x{height}|exceeds limit"):
                decode(bytes(data), "a.JPEG")


def test_png_is_fine_where_the_name_says_so():
    data = image_file(3, form="PNG")
    assert decode_exact(data, "a.png").mode == "RGB"
    assert torch.equal(
        decode_fast(data, "a.png").permute(1, 2, 0), torch.tensor(np.array(Image.open(io.BytesIO(data))))
    )


def test_sixteen_bits_per_channel_are_refused_in_colour_too():
    def chunk(kind, content):
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = (8).to_bytes(4, "big") * 2 + bytes([16, 2, 0, 0, 0])
    rows = zlib.compress(bytes(8 * (1 + 8 * 6)))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    assert Image.open(io.BytesIO(data)).mode == "RGB"
    with pytest.raises(BadImage, match="16 bits per channel"):
        decode_exact(data, "a.png")


def test_random_damage_never_raises_anything_but_bad_image():
    good, rng, refused = image_file(4, 90, 80), np.random.RandomState(0), 0
    for _ in range(150):
        data = bytearray(good)
        for place in rng.randint(2, len(data), 3):
            data[place] = rng.randint(256)
        data = bytes(data[: rng.randint(2, len(data) + 1)] if rng.rand() < 0.3 else data)
        outcomes = []
        for decode in (decode_exact, decode_fast):
            try:
                decode(data, "a.JPEG")
                outcomes.append("fine")
            except BadImage:
                outcomes.append("bad")
        assert outcomes[0] == outcomes[1]
        refused += outcomes[0] == "bad"
    assert 20 < refused < 150


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
    for decode in (decode_exact, decode_fast):
        with pytest.raises(BadImage, match=f"^damaged: .*{says}"):
            decode(data, "a.JPEG")
        decode(good, "a.JPEG")
    assert capfd.readouterr() == ("", "")


def test_what_others_write_to_stderr_meanwhile_is_passed_on(capfd, monkeypatch):
    decode_jpeg = dataset.decode.decode_jpeg
    monkeypatch.setattr(dataset.decode, "decode_jpeg", lambda data: os.write(2, b"step 7\r") and decode_jpeg(data))
    with pytest.raises(BadImage, match=r"^damaged: premature end of data segment$"):
        decode_fast(damaged_data(image_file(5), "cut"))
    assert capfd.readouterr().err == "step 7\r"


def test_forked_processes_keep_their_warnings_apart():
    good, bad = image_file(5), damaged_data(image_file(5), "cut")
    decode_fast(good)  # the pipe is there before the fork
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        verdicts = pool.map(is_bad, [good, bad] * 100, chunksize=1)
    assert verdicts == [False, True] * 100


def is_bad(data):
    try:
        decode_fast(data)
    except BadImage:
        return True
    return False
