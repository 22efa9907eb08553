"""ADM's crops against the golden arrays, and their windows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.draws import CropDraws
from dataset.transforms import Window, center_window, crop_exact, crop_fast, random_window

GOLDEN = np.load(Path(__file__).parent / "data" / "golden_crops.npz", allow_pickle=False)
CASES = sorted({name.rsplit("_", 1)[0] for name in GOLDEN.files})


def golden_image(width, height, seed):
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
    pixels = golden_image(width, height, seed)
    if kind == "center":
        window = center_window(size, width, height)
    else:
        low, high = size, -(-size * 10 // 8)  # undo the draws: the middles of the wanted bins
        scale = (short_side - low + 0.5) / (high - low + 1)
        at_origin = random_window(CropDraws(0, scale, 0, 0, False), size, width, height)
        tops, lefts = at_origin.height - size + 1, at_origin.width - size + 1
        draws = CropDraws(0, scale, (top + 0.5) / tops, (left + 0.5) / lefts, False)
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
def test_windows_lie_inside_the_image(width, height):
    for u in (0.0, 0.5, 1 - 2**-53):
        window = random_window(CropDraws(u, u, u, u, False), 32, width, height)
        assert 32 <= window.short_side <= 40 and min(window.width, window.height) == window.short_side
        assert 0 <= window.top <= window.height - 32 and 0 <= window.left <= window.width - 32
    assert random_window(CropDraws(0, 1 - 2**-53, 1 - 2**-53, 0, False), 32, width, height).short_side == 40
    image = Image.fromarray(golden_image(width, height, 0))
    assert crop_exact(image, 32, window).size == (32, 32)
    assert crop_fast(torch.from_numpy(np.array(image)).permute(2, 0, 1), 32, window).shape == (3, 32, 32)


def test_a_known_window():
    assert center_window(64, 500, 375) == Window(64, 86, 64, 0, 11)  # 125 x 93 after halving twice
    assert center_window(32, 131, 64) == Window(32, 65, 32, 0, 16)  # exactly twice is halved too: 65 x 32
