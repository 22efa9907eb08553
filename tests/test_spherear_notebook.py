"""The notebook's code cells, one after another, on a random SphereAR-Nano; and the pictures that are kept in it."""

import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from tests.helpers.sampling import write_checkpoint

NOTEBOOK = Path(__file__).parents[1] / "examples" / "spherear.ipynb"


def code_cells() -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_every_cell_runs(tmp_path, monkeypatch):
    for folder in ("examples", "quickstart/data", "quickstart/ar/checkpoints"):
        (tmp_path / folder).mkdir(parents=True)
    write_checkpoint(tmp_path / "quickstart/ar/checkpoints/last.pt")
    images = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "quickstart/data/reference.npz", arr_0=images, arr_1=np.arange(10))
    monkeypatch.chdir(tmp_path / "examples")
    monkeypatch.setattr(sys, "path", list(sys.path))
    names: dict = {}
    for cell in code_cells():
        source = "".join(cell["source"]).replace("num_sampling_steps=25", "num_sampling_steps=1")  # in seconds
        exec(compile(source, str(NOTEBOOK), "exec"), names)
    assert (names["images"] == images).all()  # to the end: they are read in the last cells but one


def test_pictures_are_kept_and_small():
    outputs = [output for cell in code_cells() for output in cell["outputs"]]
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 5 and not any(output["output_type"] == "error" for output in outputs)
    assert all(Image.open(io.BytesIO(base64.b64decode(picture))).width == 640 for picture in pictures)
    assert NOTEBOOK.stat().st_size < 400_000
