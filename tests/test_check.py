"""dataset.check says what a data set holds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dataset.check import check, main
from tests.helpers.dataset_tars import bad_images, class_tars, damaged_tar, image_file, small_classes

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPHEREAR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def damaged(tmp_path):
    return damaged_tar(tmp_path / "damaged.tar")


def test_check_says_what_is_there(damaged, tmp_path, capsys):
    assert check(damaged) == 1
    out = capsys.readouterr().out
    assert "64 images of 2 classes" in out and "per class: 28 to 36" in out and "bad images: 8 (12.500%)" in out
    for kind, (_, says) in bad_images().items():
        assert any(f"n00000000/{kind}.JPEG" in line and says in line for line in out.splitlines())
    assert main([str(damaged), "--num-classes", "7"]) == 2
    assert capsys.readouterr().err.startswith("dataset.check: error: --num-classes 7, but")
    command = [sys.executable, "-m", "dataset.check"]
    good = class_tars(tmp_path / "good.tar", small_classes())
    run = subprocess.run([*command, good, "--num-workers", "1"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "bad images: 0 (0.000%)" in run.stdout, run.stderr
    assert "shorter side: 33 to 35 pixels, longest 43" in run.stdout


def test_names_of_any_bytes_are_shown_in_any_locale(tmp_path, capsys):
    folder = tmp_path / "dätä"
    for label in ("a", "b\x1b[31m"):
        (folder / label).mkdir(parents=True)
        (folder / label / "good.JPEG").write_bytes(image_file(0))
    Path(os.fsdecode(os.fsencode(folder) + b"/a/gr\xc3\xbcn\xff.JPEG")).write_bytes(b"")
    assert main([str(folder)]) == 0
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = subprocess.run([sys.executable, "-m", "dataset.check", folder], cwd=ROOT, env=ascii_only, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
    for out in (capsys.readouterr().out, run.stdout.decode()):
        lines = out.splitlines()
        assert lines[0].endswith(": 3 images of 2 classes")
        assert lines[-1].startswith("  a/gr") and lines[-1].endswith("n\\udcff.JPEG: empty") and lines[-1].isprintable()


@pytest.mark.parametrize("count", ["-1", "1" + "0" * 22])
def test_a_number_of_workers_out_of_range_is_one_line(tmp_path, capsys, count):
    assert main([str(tmp_path), "--num-workers", count]) == 2
    assert capsys.readouterr().err == f"dataset.check: error: --num-workers {count} must lie in [0, 1024]\n"
