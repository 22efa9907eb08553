"""dataset.reference: the centre crops of a whole data set in one .npz."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dataset import build_dataset, reference
from dataset.loader import read_batches
from dataset.reference import main, write_reference
from tests.helpers.dataset_tars import class_tars, image_file, small_classes
from utils.evaluation.inputs import open_images

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPHEREAR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tar(tmp_path):
    return class_tars(tmp_path / "train.tar", small_classes())


def test_it_holds_the_exact_centre_crop_and_label_of_every_image(tar, tmp_path, capsys):
    for workers, name in ((0, "a.npz"), (2, "b.npz")):
        out = tmp_path / "new" / name
        assert main([str(tar), "--image-size", "16", "--out", str(out), "--num-workers", str(workers)]) == 0
        assert capsys.readouterr().out.strip() == str(out)
    assert [path.name for path in sorted(out.parent.iterdir())] == ["a.npz", "b.npz"]
    assert out.read_bytes() == (out.parent / "a.npz").read_bytes()
    data = build_dataset(tar, 16, num_classes=3, seed=9)
    with np.load(out, allow_pickle=False) as arrays:
        assert arrays.files == ["arr_0", "arr_1"]
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert images.dtype == np.uint8 and images.shape == (24, 16, 16, 3) and labels.dtype == np.int64
    for index in range(24):
        assert np.array_equal(images[index], data[index].image.permute(1, 2, 0)) and labels[index] == data.label(index)


def test_a_bad_image_is_replaced_and_named_and_more_are_an_error(tar, tmp_path, capsys):
    classes = small_classes()
    classes["n00000001"]["bad.JPEG"] = b""
    assert write_reference(class_tars(tmp_path / "one.tar", classes), 16, tmp_path / "one.npz") == 1
    assert capsys.readouterr().err == "bad image replaced (1 so far): n00000001/bad.JPEG: empty\n"
    assert np.load(tmp_path / "one.npz")["arr_0"].shape == (25, 16, 16, 3)
    classes["n00000002"]["worse.JPEG"] = b"x"
    with pytest.raises(ValueError, match=r"more than 0\.1% of the images are bad; run python -m dataset.check"):
        write_reference(class_tars(tmp_path / "two.tar", classes), 16, tmp_path / "two.npz")
    assert not list(tmp_path.glob("*two.npz*"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--out", "taken.npz"], "--out taken.npz is there already; remove it, or choose another name"),
        (["--out", "ref.npy"], "--out ref.npy must end in .npz"),
        (["--image-size", "0"], "--image-size 0 must lie in [1, 8192]"),
        (["--num-workers", "-1"], "--num-workers -1 must lie in [0, 1024]"),
        (["--num-workers", "1000000"], "--num-workers 1000000 must lie in"),
        (["--image-size", "10000000"], "--image-size 10000000 must lie in"),
    ],
)
def test_mistakes_are_named_in_one_line(tar, tmp_path, monkeypatch, capsys, options, says):
    monkeypatch.chdir(tmp_path)
    Path("taken.npz").write_bytes(b"mine")
    assert main([str(tar), "--image-size", "16", "--out", "new.npz", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dataset.reference: error: {says}") and error.count("\n") == 1
    assert Path("taken.npz").read_bytes() == b"mine" and not Path("new.npz").exists()
    assert main(["absent", "--image-size", "16", "--out", "new.npz"]) == 2
    assert "absent: no such file or folder" in capsys.readouterr().err


def test_a_disk_without_room_is_told_at_once(tar, tmp_path, monkeypatch):
    monkeypatch.setattr(reference.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(ValueError, match=r"--out .*ref.npz needs 0.0 GB, 0.0 are free; choose another disk"):
        write_reference(tar, 16, tmp_path / "ref.npz")


@pytest.mark.parametrize("end", [False, True])
def test_what_another_program_writes_there_is_never_replaced(tar, tmp_path, monkeypatch, end):
    out = tmp_path / "ref.npz"
    images = reference._write_images
    monkeypatch.setattr(reference, "_write_images", lambda *a: (out.write_bytes(b"theirs"), images(*a))[1])
    if not end:
        out.symlink_to("nowhere.npz")
    with pytest.raises((ValueError, FileExistsError), match="is there already"):
        write_reference(tar, 16, out)
    assert out.read_bytes() == b"theirs" if end else out.is_symlink()
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_memory_does_not_grow_with_the_images(tmp_path, monkeypatch):
    tar = class_tars(tmp_path / "train.tar", {"n0": {f"{i}.JPEG": image_file(0) for i in range(640)}})
    resident = []

    def watched(*arguments):
        for batch in read_batches(*arguments):
            yield batch
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

    monkeypatch.setattr(reference, "read_batches", watched)
    write_reference(tar, 256, tmp_path / "ref.npz")
    assert (tmp_path / "ref.npz").stat().st_size > 640 * 256 * 256 * 3  # 126 MB
    assert max(resident[2:]) - resident[2] < 25e6


def test_a_signal_leaves_no_file(tmp_path):
    tar = class_tars(tmp_path / "train.tar", {"n0": {f"{i}.JPEG": image_file(i) for i in range(3000)}})
    process = subprocess.Popen(
        [sys.executable, "-m", "dataset.reference", tar, "--image-size", "256", "--out", tmp_path / "ref" / "ref.npz"],
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not list(tmp_path.glob("ref/.ref.npz.*.tmp")):
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    assert process.wait(20) == 128 + signal.SIGTERM
    assert "\ndataset.reference: stopped; nothing was written\n" in process.stderr.read()
    assert not list((tmp_path / "ref").iterdir())


def test_the_evaluator_reads_it(tar, tmp_path):
    write_reference(tar, 16, tmp_path / "ref.npz")
    assert open_images(tmp_path / "ref.npz").count == 24
