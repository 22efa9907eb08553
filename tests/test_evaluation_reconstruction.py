"""PSNR and SSIM: answers from paper and pencil, and the definition once more in scipy."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from utils.evaluation.reconstruction import psnr, ssim

C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def flat(*levels: int) -> np.ndarray:
    """One flat image per grey level."""
    return np.broadcast_to(np.array(levels, np.uint8)[:, None, None, None], (len(levels), 16, 12, 3)).copy()


@pytest.fixture
def pair():
    generator = np.random.default_rng(0)
    reference = generator.integers(0, 256, (3, 20, 24, 3), dtype=np.uint8)
    return np.clip(reference + generator.normal(0, 20, reference.shape), 0, 255).astype(np.uint8), reference


def test_flat_images_have_the_values_of_the_formulas():
    images, reference = flat(10, 50, 255), flat(12, 51, 0)
    differences = np.array([2, 1, 255])
    assert psnr(images, reference).numpy() == pytest.approx(20 * np.log10(255 / differences), abs=1e-5)
    a, b = np.array([10.0, 50, 255]), np.array([12.0, 51, 0])
    assert ssim(images, reference).numpy() == pytest.approx((2 * a * b + C1) / (a * a + b * b + C1), rel=1e-9)


def test_equal_images_have_no_noise_and_full_similarity(pair):
    assert psnr(pair[0], pair[0]).tolist() == [np.inf] * 3
    assert ssim(pair[0], pair[0]).tolist() == pytest.approx([1] * 3, abs=1e-12)


def test_ssim_is_that_of_wang_et_al_in_scipy(pair):
    def blur(x):  # within each image and colour
        return gaussian_filter(x, (0, 1.5, 1.5, 0), truncate=3.5, mode="mirror")

    x, y = (values.astype(np.float64) for values in pair)
    mean_x, mean_y = blur(x), blur(y)
    covariance = blur(x * y) - mean_x * mean_y
    variances = blur(x * x) - mean_x**2 + blur(y * y) - mean_y**2
    expected = (2 * mean_x * mean_y + C1) * (2 * covariance + C2) / ((mean_x**2 + mean_y**2 + C1) * (variances + C2))
    assert ssim(*pair).numpy() == pytest.approx(expected.mean(axis=(1, 2, 3)), rel=1e-9)


def test_each_image_counts_by_itself_and_torch_will_do(pair):
    for metric in (psnr, ssim):
        whole = metric(*map(torch.from_numpy, pair))
        assert whole.dtype == torch.float64 and whole.shape == (3,)
        alone = [metric(pair[0][i : i + 1], pair[1][i : i + 1]) for i in range(3)]
        assert torch.cat(alone).numpy() == pytest.approx(whole.numpy(), rel=1e-12)


def test_other_images_are_refused(pair):
    images, reference = pair
    for wrong in (images[:2], images.astype(np.float32), images[..., :1], images[0]):
        for metric in (psnr, ssim):
            with pytest.raises(ValueError, match=r"both must be uint8 \(n, H, W, 3\) of one shape"):
                metric(wrong, reference)
    with pytest.raises(ValueError, match="10 x 24 pixels: SSIM needs 11 x 11"):
        ssim(images[:, :10], reference[:, :10])
