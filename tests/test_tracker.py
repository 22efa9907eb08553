"""What a run reports besides its log lines: sheets, evaluations, throughput; and what happens where it cannot."""

import time

import numpy as np
import pytest
import torch
from PIL import Image

from utils.training.metrics_file import read_metrics
from utils.training.tracker import Progress, Tracker


@pytest.fixture
def said():
    return []


@pytest.fixture
def tracker(tmp_path, said):
    with Tracker(tmp_path, Progress(100, 10, step=20), 8, report=said.append) as tracker:
        yield tracker


def test_a_sheet_is_the_grid_of_images(tracker, tmp_path):
    levels = torch.linspace(-1, 1, 256).reshape(1, 1, 16, 16).expand(3, 3, -1, -1)
    tracker.image("images", levels)
    sheet = np.asarray(Image.open(tmp_path / "sheets/step_00000020.png"))
    assert sheet.shape == (20, 3 * 18 + 2, 3)
    assert sheet[2:18, 2:18, 0].reshape(-1).tolist() == list(range(256))


def test_only_a_sheet_of_ours_is_replaced(tracker, tmp_path, said):
    sheet = tmp_path / "sheets/step_00000020.png"
    for level in (0.0, 1.0):  # our own first
        tracker.image("images", torch.full((1, 3, 4, 4), level))
    assert np.asarray(Image.open(sheet)).max() == 255 and not said
    Image.new("RGB", (3, 3)).save(sheet)
    foreign = sheet.read_bytes()
    for _ in range(2):
        tracker.image("images", torch.zeros(1, 3, 4, 4))
    assert sheet.read_bytes() == foreign and len(said) == 1
    assert "sheets: step_00000020.png was not written by train.py; move it away; training goes on" in said[0]


def test_an_evaluation_is_told_and_kept_with_its_receipt(tracker, tmp_path):
    tracker.evaluation({"FID": 12.5, "MIND": float("nan")}, {"seed": 3}, seconds=4.321)
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    expected = {"kind": "evaluation", "step": 20, "FID": 12.5, "MIND": None, "seconds": 4.32, "receipt": {"seed": 3}}
    assert {name: value for name, value in record.items() if name != "time"} == expected
    assert "step 20: evaluated in 4 s  FID 12.5" in (tmp_path / "log.txt").read_text()


def test_a_pause_is_no_time_of_training(tracker, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    tracker.started = 0.0
    tracker.add({"loss": torch.tensor(1.0)}, finite=torch.tensor(True), indices=torch.arange(8))
    tracker.progress.step += 1
    now[0] = 2.0
    with tracker.pause():
        now[0] = 102.0
    assert tracker.log(1e-3)["images/s"] == 4
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (record["step"], record["images/s"], record["loss"], record["epoch"]) == (21, 4.0, 1.0, 2)


def test_what_cannot_be_written_is_told_once_and_training_goes_on(tracker, tmp_path, said):
    (tmp_path / "sheets").write_text("a file where the folder should be")
    for _ in range(2):
        tracker.image("images", torch.zeros(1, 3, 4, 4))
    (tmp_path / "sheets").unlink()
    tracker.image("images", torch.zeros(1, 3, 4, 4))
    assert len(said) == 1 and "sheets: File exists; training goes on" in said[0]
    assert (tmp_path / "sheets/step_00000020.png").exists()
