"""Images as bytes, as files, and on the contact sheet."""

import numpy as np
import torch
from PIL import Image
from torchvision.models import ResNet18_Weights

from utils.images import class_names, layout, to_uint8, write_contact_sheet


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
