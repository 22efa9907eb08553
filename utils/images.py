"""Images: bytes and floats, PNG files, and the contact sheet: one row per class, its name in front."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from utils.files import atomic_file

IMAGENET_CLASSES = Path(__file__).resolve().parent.parent / "assets" / "imagenet_classes.txt"  # a name per line
MAX_ROWS, GAP = 10, 2


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 in 0..255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: torch.Tensor, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """(B, 3, S, S) in [-1, 1] -> uint8 (B, S, S, 3), computed in `dtype`: bfloat16 is 0.4 grey levels brighter."""
    return (127.5 * images.to(dtype) + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def write_png(path: Path, image: np.ndarray) -> None:
    """An image (uint8, H W 3) as a file, atomically."""
    with atomic_file(path) as file:
        Image.fromarray(image).save(file, format="PNG")


def png_path(folder: str | Path, index: int) -> Path:
    """Where image `index` of a folder of images stands."""
    return Path(folder) / f"{index:06d}.png"


def write_missing_pngs(folder: Path, count: int, read: Callable[[int], np.ndarray]) -> None:
    """Write those of images 0 to count − 1 that the folder lacks; read(index) gives one (uint8, H W 3).

    Damaged ones are written again: every byte is held against the PNG's checksums.
    """
    for index in range(count):
        if not is_whole_png(png_path(folder, index)):
            write_png(png_path(folder, index), read(index))


def is_whole_png(path: Path) -> bool:
    """Whether a PNG is there, complete and undamaged, by the checksum of each of its chunks; no pixel is decoded."""
    if not path.is_file():
        return False
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
    except Exception:  # Pillow raises a dozen kinds
        return False
    return True


def class_names(num_classes: int) -> list[str]:
    """ImageNet's names for 1000 classes, plain numbers for any other count."""
    if num_classes == 1000:
        return IMAGENET_CLASSES.read_text(encoding="utf-8").splitlines()
    return [str(label) for label in range(num_classes)]


def layout(labels: np.ndarray) -> dict[int, np.ndarray]:
    """Which images stand in which row: class -> indices, at most ten classes, spread evenly over those present."""
    present = np.unique(labels)
    rows = present[np.linspace(0, len(present) - 1, min(MAX_ROWS, len(present))).round().astype(int)]
    columns = 8 if len(rows) > 4 else 16
    return {int(label): np.flatnonzero(labels == label)[:columns] for label in rows}


def write_contact_sheet(path: Path, rows: dict[int, list[np.ndarray]], num_classes: int) -> None:
    """PNG of rows of images (uint8, H W 3); small images are enlarged by whole factors. Written atomically."""
    names = class_names(num_classes)
    size = next(iter(rows.values()))[0].shape[0]
    side = size * max(1, 64 // size)
    font = ImageFont.load_default(max(12, side // 8))
    captions = {label: f"{label} {names[label]}" if num_classes == 1000 else names[label] for label in rows}
    margin = int(max(font.getlength(caption) for caption in captions.values())) + 12
    columns = max(len(images) for images in rows.values())
    sheet = Image.new("RGB", (margin + columns * (side + GAP), len(rows) * (side + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (label, images) in enumerate(rows.items()):
        top = GAP + row * (side + GAP)
        draw.text((6, top + side / 2), captions[label], fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            tile = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(tile, (margin + column * (side + GAP), top))
    with atomic_file(path) as file:
        sheet.save(file, format="PNG")
