"""How near reconstructions are to their originals, image by image: PSNR and SSIM.

Legend: n images, H x W their size. Images are uint8 (n, H, W, 3), as for all other metrics: `utils.images.to_uint8`
makes them of a model's [-1, 1]. Both functions return one float64 per image, on the images' device, so that a mean
over batches and processes is a sum divided by a count. torchmetrics is imported with the first batch: it takes seconds.
"""

import numpy as np
import torch
from torch import Tensor

LARGEST = 255.0
WINDOW = 11  # pixels that SSIM's Gaussian window (sigma 1.5) spans


def psnr(images: np.ndarray | Tensor, reference: np.ndarray | Tensor) -> Tensor:
    """Peak signal-to-noise ratio (n,) in decibels, 10 log10(255^2 / mean squared error); equal images have infinity."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    images, reference = channels_first(images, reference)
    return peak_signal_noise_ratio(images, reference, LARGEST, reduction="none", dim=(1, 2, 3))


def ssim(images: np.ndarray | Tensor, reference: np.ndarray | Tensor) -> Tensor:
    """Structural similarity (n,) in [-1, 1], 1 for equal images; Wang et al., IEEE TIP 13 (2004).

    A Gaussian window of 11 x 11 pixels, sigma 1.5, K1 = 0.01, K2 = 0.03, on each colour by itself; the mean is over all
    pixels, the images being mirrored at their border. Raises ValueError for images smaller than the window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    images, reference = channels_first(images, reference)
    if min(images.shape[2:]) < WINDOW:
        raise ValueError(f"images of {images.shape[2]} x {images.shape[3]} pixels: SSIM needs {WINDOW} x {WINDOW}")
    return structural_similarity_index_measure(images, reference, data_range=LARGEST, reduction="none").reshape(-1)


def channels_first(images: np.ndarray | Tensor, reference: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64 (n, 3, H, W). Raises ValueError unless they are uint8 (n, H, W, 3) of one shape."""
    pair = torch.as_tensor(images), torch.as_tensor(reference)
    if pair[0].shape != pair[1].shape or any(x.dtype != torch.uint8 or x.ndim != 4 or x.shape[3] != 3 for x in pair):
        given = " and ".join(f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" for x in pair)
        raise ValueError(f"images and reference are {given}: both must be uint8 (n, H, W, 3) of one shape")
    return tuple(x.permute(0, 3, 1, 2).double() for x in pair)
