"""ADM's crops against the golden arrays, the draws, decoding, and what counts as a bad picture."""

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.decode import BadPicture, decode_exact, decode_fast
from dataset.transforms import Draws, Window, center_window, crop_exact, crop_fast, draw, random_window
from tests.helpers.dataset_tars import bad_pictures, picture

GOLDEN = np.load(Path(__file__).parent / "data" / "golden_crops.npz", allow_pickle=False)
CASES = sorted({name.rsplit("_", 1)[0] for name in GOLDEN.files})


def golden_picture(width, height, seed):
    rs = np.random.RandomState(seed)
    y, x = np.mgrid[:height, :width]
    a = np.zeros((height, width, 3))
    for channel in range(3):
        for _ in range(6):
            fx, fy, phase = rs.uniform(-0.25, 0.25, 3)
            a[..., channel] += np.sin(2 * np.pi * (fx * x + fy * y) / (1 + 4 * rs.rand()) + 20 * phase)
    return (255 * (a - a.min()) / (a.max() - a.min()) + 0.5).astype(np.uint8)


def golden_crop(case, kind):
    """Picture, side, window and expected crop of a golden case."""
    width, height, size, short_side, top, left, seed = map(int, GOLDEN[f"{case}_params"])
    pixels = golden_picture(width, height, seed)
    if kind == "center":
        window = center_window(size, width, height)
    else:
        low, high = size, -(-size * 10 // 8)  # undo the draws: the middles of the wanted bins
        scale = (short_side - low + 0.5) / (high - low + 1)
        at_origin = random_window(Draws(0, scale, 0, 0, False), size, width, height)
        tops, lefts = at_origin.height - size + 1, at_origin.width - size + 1
        draws = Draws(0, scale, (top + 0.5) / tops, (left + 0.5) / lefts, False)
        window = random_window(draws, size, width, height)
        assert (window.short_side, window.top, window.left) == (short_side, top, left)
    return pixels, size, window, GOLDEN[f"{case}_{kind}"]


@pytest.mark.parametrize("kind", ["random", "center"])
@pytest.mark.parametrize("case", CASES)
def test_exact_crops_equal_the_golden_ones(case, kind):
    pixels, size, window, expected = golden_crop(case, kind)
    assert np.array_equal(np.asarray(crop_exact(Image.fromarray(pixels), size, window)), expected)


@pytest.mark.parametrize("kind", ["random", "center"])
@pytest.mark.parametrize("case", CASES)
def test_fast_crops_differ_by_two_levels_on_one_percent_at_most(case, kind):
    pixels, size, window, expected = golden_crop(case, kind)
    crop = crop_fast(torch.from_numpy(pixels).permute(2, 0, 1), size, window)
    difference = np.abs(crop.permute(1, 2, 0).numpy().astype(int) - expected)
    assert crop.dtype == torch.uint8 and difference.max() <= 2 and (difference > 0).mean() < 0.01
    grey = crop_fast(torch.from_numpy(pixels[None, ..., 0].copy()), size, window)
    assert torch.equal(grey[0], crop[0])


@pytest.mark.parametrize(("width", "height"), [(56, 75), (32, 32), (500, 31), (40, 3000), (130, 129)])
def test_windows_lie_inside_the_picture(width, height):
    for u in (0.0, 0.5, 1 - 2**-53):
        window = random_window(Draws(u, u, u, u, False), 32, width, height)
        assert 32 <= window.short_side <= 40 and min(window.width, window.height) == window.short_side
        assert 0 <= window.top <= window.height - 32 and 0 <= window.left <= window.width - 32
    assert random_window(Draws(0, 1 - 2**-53, 1 - 2**-53, 0, False), 32, width, height).short_side == 40
    image = Image.fromarray(golden_picture(width, height, 0))
    assert crop_exact(image, 32, window).size == (32, 32)
    assert crop_fast(torch.from_numpy(np.array(image)).permute(2, 0, 1), 32, window).shape == (3, 32, 32)


def test_a_known_window():
    assert center_window(64, 500, 375) == Window(64, 86, 64, 0, 11)  # 125 x 93 after halving twice
    assert center_window(32, 131, 64) == Window(32, 65, 32, 0, 16)  # exactly twice is halved too: 65 x 32


def test_no_two_pictures_of_an_epoch_share_draws():
    draws = {draw(0, epoch, index) for epoch in range(2) for index in range(10_000)} | {draw(1, 0, 0)}
    assert len(draws) == 20_001
    assert len({d.choice for d in draws}) == len({d.top for d in draws}) == 20_001
    assert draw(3, 2**31, 2**40) == draw(3, 2**31, 2**40)


def test_draws_are_uniform_and_independent():
    table = np.array([draw(5, 1, index) for index in range(4000)], float)
    assert np.all((table >= 0) & (table <= 1))
    assert np.allclose(table.mean(0), 0.5, atol=0.03)
    assert np.abs(np.corrcoef(table.T) - np.eye(5)).max() < 0.06
    assert np.abs(np.corrcoef(table[1:, 0], table[:-1, 0])[0, 1]) < 0.06


def test_a_draw_never_changes():
    expected = Draws(0.047750112370791964, 0.6074384456319367, 0.5022478233722624, 0.27186690248318357, True)
    assert draw(7, 3, 11) == expected


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_fast_and_exact_decoding_agree(mode):
    data = picture(1, 123, 77, mode)
    fast = decode_fast(data, "a.JPEG").expand(3, -1, -1)
    assert torch.equal(fast.permute(1, 2, 0), torch.from_numpy(np.array(decode_exact(data, "a.JPEG"))))


@pytest.mark.parametrize("kind", bad_pictures())
def test_bad_pictures_are_refused_with_a_reason_by_both_decoders(kind):
    data, says = bad_pictures()[kind]
    for decode in (decode_exact, decode_fast):
        with pytest.raises(BadPicture, match=says):
            decode(data, "a.JPEG")


def test_huge_and_extreme_pictures_are_refused_before_any_memory_is_taken():
    data = bytearray(picture(1))
    frame = data.index(b"\xff\xc0")
    for height, width in ((0xFFFF, 0xFFFF), (0xFFFF, 20)):
        data[frame + 5 : frame + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
        for decode in (decode_exact, decode_fast):
            with pytest.raises(BadPicture, match=f"{width}x{height}|exceeds limit"):
                decode(bytes(data), "a.JPEG")


def test_png_is_fine_where_the_name_says_so():
    data = picture(3, form="PNG")
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
    with pytest.raises(BadPicture, match="16 bits per channel"):
        decode_exact(data, "a.png")


def test_random_damage_never_raises_anything_but_bad_picture():
    good, rng, refused = picture(4, 90, 80), np.random.RandomState(0), 0
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
            except BadPicture:
                outcomes.append("bad")
        assert outcomes[0] == outcomes[1]
        refused += outcomes[0] == "bad"
    assert 20 < refused < 150
