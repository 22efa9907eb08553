"""Images as bytes, as files, and on the contact sheet."""

import numpy as np
import torch
from PIL import Image
from torchvision.models import ResNet18_Weights

from utils.images import class_names, layout, png_path, to_uint8, write_contact_sheet, write_missing_pngs


def test_uint8_conversion():
    values = torch.tensor([-2, -1, -0.5, 0, 0.9999, 1, 2]).view(1, 1, 1, 7).expand(1, 3, 1, 7)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 64, 128, 255, 255, 255]


def test_the_released_conversion_is_in_bfloat16_and_brighter():
    """Above 128 bfloat16 has whole numbers only: what float32 cuts off is rounded there."""
    values = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    released = to_uint8(values, torch.bfloat16).astype(int)
    expected = torch.clamp(127.5 * values.bfloat16() + 128.0, 0, 255).permute(0, 2, 3, 1).to("cpu", dtype=torch.uint8)
    assert (released == expected.numpy()).all()
    assert 0.2 < (released - to_uint8(values)).mean() < 0.6


def test_names_are_torchvisions():
    assert class_names(1000) == ResNet18_Weights.IMAGENET1K_V1.meta["categories"]


def test_contact_sheet_names_imagenet_classes(tmp_path):
    assert class_names(1000)[207] == "golden retriever" and class_names(10)[3] == "3"
    rows = layout(np.arange(50000) % 1000)
    assert len(rows) == 10 and all(len(indices) == 8 for indices in rows.values()) and {0, 999} <= set(rows)
    image = np.full((32, 32, 3), (7, 8, 9), np.uint8)
    write_contact_sheet(tmp_path / "sheet.png", {207: [image] * 3, 360: [image]}, 1000)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[0] == 2 * 66 + 2 and (sheet == (7, 8, 9)).all(-1).sum() == 4 * 64 * 64


def test_pngs_that_are_missing_or_damaged_are_written_again(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    write_missing_pngs(tmp_path, 4, images.__getitem__)
    whole = [png_path(tmp_path, index).read_bytes() for index in range(4)]
    flipped = bytearray(whole[1])
    flipped[len(flipped) // 2] ^= 4
    png_path(tmp_path, 0).unlink()
    png_path(tmp_path, 1).write_bytes(flipped)
    png_path(tmp_path, 2).write_bytes(whole[2][: len(whole[2]) // 2])
    before, read = png_path(tmp_path, 3).stat().st_mtime_ns, []
    write_missing_pngs(tmp_path, 4, lambda index: (read.append(index), images[index])[1])
    assert read == [0, 1, 2] and png_path(tmp_path, 3).stat().st_mtime_ns == before
    assert [png_path(tmp_path, index).read_bytes() for index in range(4)] == whole
