"""report.html: everything on one page, whatever the run; and a page that fails fails no run."""

import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest

from examples import report
from tests.helpers import small_run
from tests.helpers.small_run import flags, run_here
from utils.images import write_png
from utils.training import report_page
from utils.training.metrics_file import MetricsFile

BROWSERS = "chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"
VERSIONS = {"python": "3.11", "torch": "2.11"}


def write_run(folder, steps=40):
    """A run's metrics.jsonl and sheets, as training writes them, with odd values here and there."""
    (folder / "sheets").mkdir(parents=True)
    file = MetricsFile(folder / "metrics.jsonl", 0)
    settings = {
        "model": "SphereAR-Nano",
        "vae_only": False,
        "global_batch_size": 32,
        "data_path": "<b>&.tar",
        "lr": 1e-3,
    }
    file.append("run", 0, {"settings": settings, "trainable_parameters": 3_500_000, "device": "a CPU",
                           "versions": VERSIONS, "commit": None})  # fmt: skip
    for step in range(1, steps + 1):
        loss = float("nan") if step == 3 else 2 / step
        file.append("training", step, {"epoch": 0, "ar_loss": loss, "lr": 1e-3, "images/s": 100.0 + step})
        if step % 10 == 0:
            write_png(folder / f"sheets/step_{step:08d}.png", np.full((70, 274, 3), step, np.uint8))
            file.append("evaluation", step, {"held_out_ar_loss": 3 / step, "FID": 100 - step, "MIND": None,
                                             "seconds": 1.5, "receipt": {"weights": {"sha256": "abc"}}})  # fmt: skip
    file.close()
    return folder


def test_the_page_holds_everything_and_asks_for_nothing(tmp_path, capsys):
    assert report.main([str(write_run(tmp_path / "run"))]) == 0
    page = (tmp_path / "run/report.html").read_text()
    assert capsys.readouterr().out.strip() == str(tmp_path / "run/report.html")
    assert "3,500,000" in page and "&lt;b&gt;&amp;.tar" in page and "<b>&.tar" not in page
    for title in ("ar_loss", "lr", "images/s", "FID"):
        assert f'alt="{title} by step"' in page
    assert page.count("data:image/svg+xml") == 4  # no value of MIND can be drawn
    assert page.count("data:image/png") == 4 and "step 40" in page
    assert "held out: ar_loss" in page and "abc" in page and "120.5" in page  # the median of images/s
    assert set(re.findall(r'(?:src|href)="(\w+:)', page)) == {"data:"}
    assert "nan" not in re.sub('data:[^"]*|Nano', "", page).lower()


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    settings = {"model": "SphereAR-L", "vae_only": True, "global_batch_size": 32}
    file.append("run", 0, {"settings": settings, "trainable_parameters": 1, "device": "", "versions": {}, "commit": ""})
    file.close()
    assert "SphereAR-L, S-VAE stage" in report_page.write_report(tmp_path).read_text()


def test_many_large_sheets_stay_a_small_page(tmp_path):
    write_run(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    for step in range(100, 112):
        write_png(tmp_path / f"sheets/step_{step:08d}.png", noise)
    page = report_page.write_report(tmp_path).read_text()
    assert len(re.findall("data:image/(?:png|jpeg)", page)) == report_page.MAX_SHEETS
    assert "step 10<" in page and "step 111<" in page and len(page) < 3_000_000


def test_a_folder_that_is_no_runs_is_refused(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert re.search("has no metrics.jsonl; name the --results-dir", capsys.readouterr().err)


def test_only_a_page_of_ours_is_replaced(tmp_path, capsys):
    page = write_run(tmp_path, 1) / "report.html"
    for _ in range(2):
        assert report.main([str(tmp_path)]) == 0
    page.write_text("<!DOCTYPE html><title>my own</title>")
    assert report.main([str(tmp_path)]) == 2
    assert page.read_text().endswith("<title>my own</title>")
    assert "report.html was not written by train.py; move it away" in capsys.readouterr().err


def test_what_is_no_sheet_is_named_and_left_out(tmp_path):
    sheets = write_run(tmp_path, 10) / "sheets"
    os.mkfifo(sheets / "step_00000001.png")  # would be waited for
    (sheets / "step_00000002.png").write_bytes(b"\x89PNG and no more")
    shutil.copy(sheets / "step_00000010.png", sheets / "step_best.png")
    (sheets / "step_00000003.png").mkdir()
    page = report_page.write_report(tmp_path).read_text()
    assert page.count("data:image/png") == 1 and ">step 10<" in page
    assert re.findall(r">([^<>]*) is no sheet<", page) == [
        "step_00000001.png", "step_00000002.png", "step_00000003.png", "step_best.png",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name, value",
    [
        ("settings", None), ("settings", "x"), ("trainable_parameters", {}), ("device", None), ("versions", 3),
        ("time", 1e300), ("time", 1e17), ("time", "noon"), ("commit", 7), ("time", None),
    ],
)  # fmt: skip
def test_records_that_are_no_runs_are_one_line(tmp_path, capsys, name, value):
    path = write_run(tmp_path, 0) / "metrics.jsonl"
    record = json.loads(path.read_text()) | {name: value}
    path.write_text(json.dumps(record) + "\n")
    code = report.main([str(tmp_path)])
    lines = capsys.readouterr().err.splitlines()
    shown = name in ("trainable_parameters", "device")  # anything can be
    assert (code, len(lines)) == ((0, 0) if shown else (2, 1))
    assert shown or f"{path}: holds records that are not as train.py writes them (" in lines[0]
    del record[name]
    path.write_text(json.dumps(record) + "\n")
    assert report.main([str(tmp_path)]) == 2


def test_training_ends_with_the_page_and_does_not_fail_with_it(tmp_path, monkeypatch, capsys):
    data, svae = small_run.write_tar(tmp_path / "train.tar"), small_run.write_svae(tmp_path / "svae.pt")
    command = flags(data, tmp_path / "run", "--max-steps", 2, "--sample-every", 2, svae=svae)
    monkeypatch.setattr(report_page, "curve", lambda *_: 1 / 0)
    run_here(*command)
    assert re.search(r"could not write .*report.html: division by zero; python -m", capsys.readouterr().err)
    assert not (tmp_path / "run/report.html").exists()
    monkeypatch.undo()
    run_here(*command)
    page = (tmp_path / "run/report.html").read_text()
    assert page.count("data:image/png") == 1 and "ar_loss" in page
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[1])["kind"] == "training"


@pytest.mark.browser
def test_a_browser_shows_it(tmp_path):
    """Everything on the page is drawn: every image has a size, and the screenshot is not empty."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no headless browser: apt-get install chromium-headless-shell")
    page = report_page.write_report(write_run(tmp_path / "run"))
    probe = tmp_path / "run/probe.html"  # the page, and a script that writes down what became of its images
    script = """<script>onload = () => document.title = [...document.images].map(
        image => image.naturalWidth > 0 && image.getBoundingClientRect().width > 100)</script>"""
    probe.write_text(page.read_text() + script)
    options = "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,1800"
    result = subprocess.run([browser, *options, "--dump-dom", probe.as_uri()], capture_output=True, text=True,
                            timeout=120, check=True)  # fmt: skip
    assert f"<title>{','.join(['true'] * 8)}</title>" in result.stdout
    picture = tmp_path / "page.png"
    subprocess.run([browser, *options, f"--screenshot={picture}", page.as_uri()], capture_output=True, timeout=120,
                   check=True)  # fmt: skip
    from PIL import Image

    with Image.open(picture) as image:
        assert image.size == (1200, 1800) and len(np.unique(np.asarray(image.convert("L")))) > 20
