"""dataset.check says what a data set holds."""

import subprocess
import sys
from pathlib import Path

import pytest

from dataset.check import check
from tests.helpers.dataset_tars import bad_images, class_tars, small_classes

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPHEREAR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def damaged(tmp_path):
    """8 bad images among 64."""
    classes = small_classes(classes=2, images=28)
    for kind, (content, _) in bad_images().items():
        classes["n00000000"][f"{kind}.JPEG"] = content
    return class_tars(tmp_path / "damaged.tar", classes)


def test_check_says_what_is_there(damaged, tmp_path, capsys):
    assert check(damaged) == 1
    out = capsys.readouterr().out
    assert "64 images of 2 classes" in out and "per class: 28 to 36" in out and "bad images: 8 (12.500%)" in out
    for kind, (_, says) in bad_images().items():
        assert any(f"n00000000/{kind}.JPEG" in line and says in line for line in out.splitlines())
    assert check(damaged, num_classes=7) == 2 and "--num-classes 7" in capsys.readouterr().out
    command = [sys.executable, "-m", "dataset.check"]
    good = class_tars(tmp_path / "good.tar", small_classes())
    run = subprocess.run([*command, good, "--num-workers", "1"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "bad images: 0 (0.000%)" in run.stdout, run.stderr
    assert "shorter side: 33 to 35 pixels, longest 43" in run.stdout
