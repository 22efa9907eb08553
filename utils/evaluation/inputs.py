"""What is evaluated: an .npz or a folder of PNGs; what can be said about the two before anything is computed."""

from pathlib import Path

import numpy as np

from utils.evaluation import frechet
from utils.evaluation.inception import POOL_DIM
from utils.evaluation.npz_reader import NpzReader
from utils.evaluation.png_folder import PngFolder
from utils.evaluation.precision_recall import NEIGHBOUR

PUBLISHED_COUNT = 50_000
Images = NpzReader | PngFolder


def open_images(path: str | Path) -> Images:
    """Images and / or statistics at a path. Raises ValueError in one line that names it, whatever is wrong with it."""
    return PngFolder(path) if Path(path).is_dir() else NpzReader(path)


def check_inputs(reference: Images, samples: Images) -> None:
    """Raise ValueError for files that cannot be evaluated."""
    if not samples.count:
        raise ValueError(f"{samples.path}: has statistics only; samples need images (arr_0)")
    if samples.count < 2:
        raise ValueError(f"{samples.path}: has 1 image; a covariance needs 2")
    for file in (reference, samples):
        if reference.count and file.count <= NEIGHBOUR:
            raise ValueError(f"{file.path}: has {file.count} images; precision and recall need {NEIGHBOUR + 1}")


def inspect(reference: Images, samples: Images) -> list[str]:
    """What about the two files makes their numbers differ from published ones, a line each."""
    notes = []
    if samples.count != PUBLISHED_COUNT:
        notes.append(f"{samples.count} samples; published numbers use {PUBLISHED_COUNT}")
    for file, counts in ((samples, True), (reference, "mu" not in reference.statistics)):
        if counts and 0 < file.count < POOL_DIM:
            notes.append(f"{file.path.name} has {file.count} images: below {POOL_DIM}, FID is biased upwards by much")
    sizes = [f"{file.height} x {file.width}" for file in (reference, samples) if file.count]
    if len(set(sizes)) > 1:
        notes.append(f"reference images are {sizes[0]}, samples {sizes[1]}: each is resized to 299 x 299 on its own")
    if reference.count and ("mu" in reference.statistics) != ("mu_s" in reference.statistics):
        notes.append(f"{reference.path.name} has statistics for one of FID and sFID; the other is of its images")
    if samples.count > frechet.INCEPTION_SCORE_BLOCK and samples.labels is not None and looks_sorted(samples.labels):
        notes.append("labels look sorted: the Inception Score of such a file is too small; shuffle images and labels")
    return notes


def looks_sorted(labels: np.ndarray) -> bool:
    """Whether neighbours share their label far more often than chance has it."""
    if len(labels) < 2:
        return False
    chance = np.square(np.unique(labels, return_counts=True)[1] / len(labels)).sum()
    return chance < 1 and (labels[1:] == labels[:-1]).mean() > (1 + chance) / 2
