"""Images as bytes, as files, and on the contact sheet."""

import numpy as np
import torch
from PIL import Image

from utils.images import class_names, layout, to_uint8, write_contact_sheet


def test_uint8_conversion():
    values = torch.tensor([-2, -1, -0.5, 0, 0.9999, 1, 2]).view(1, 1, 1, 7).expand(1, 3, 1, 7)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 64, 128, 255, 255, 255]


def test_contact_sheet_names_imagenet_classes(tmp_path):
    assert class_names(1000)[207] == "golden retriever" and class_names(10)[3] == "3"
    rows = layout(np.arange(50000) % 1000)
    assert len(rows) == 10 and all(len(indices) == 8 for indices in rows.values()) and {0, 999} <= set(rows)
    image = np.full((32, 32, 3), (7, 8, 9), np.uint8)
    write_contact_sheet(tmp_path / "sheet.png", {207: [image] * 3, 360: [image]}, 1000)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[0] == 2 * 66 + 2 and (sheet == (7, 8, 9)).all(-1).sum() == 4 * 64 * 64
