"""The data set: tar or folder, training and evaluation images, bad ones replaced."""

import errno
import hashlib
import multiprocessing
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, default_collate

from dataset import CropKey, build_dataset
from dataset.decode import BadImage
from dataset.imagenet import open_source
from tests.helpers.dataset_tars import (
    class_tars,
    contents,
    damaged_tar,
    expected,
    image_file,
    label,
    small_classes,
)

SIZE = 16


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPHEREAR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path):
    return build_dataset(class_tars(tmp_path / "train.tar", small_classes()), SIZE, num_classes=3, seed=5)


@pytest.fixture
def damaged(tmp_path):
    return damaged_tar(tmp_path / "damaged.tar")


def test_a_folder_of_class_folders_reads_the_same(tmp_path):
    classes = small_classes()
    source = open_source(folder(tmp_path / "train", classes))
    assert contents(source) == expected(classes)
    assert [label(source, i) for i in range(24)] == [0] * 8 + [1] * 8 + [2] * 8


def test_wrong_places_and_class_counts_are_named(tmp_path):
    tar = class_tars(tmp_path / "train.tar", small_classes())
    with pytest.raises(ValueError, match=r"--num-classes 1000, .* holds 3 classes .* set --num-classes 3"):
        build_dataset(tar, 32, num_classes=1000, seed=0)
    with pytest.raises(ValueError, match="no such file or folder"):
        build_dataset(tmp_path / "absent.tar", 32, num_classes=3, seed=0)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="without class folders; expected one"):
        build_dataset(tmp_path / "folder", 32, num_classes=3, seed=0)
    (tmp_path / "folder" / "n0.TAR").touch()
    with pytest.raises(ValueError, match=r"it holds tars: give the tar itself \(n0.TAR\)"):
        build_dataset(tmp_path / "folder", 32, num_classes=3, seed=0)
    (tmp_path / "folder" / "n0").mkdir()
    with pytest.raises(ValueError, match=r"class folder n0 holds no images"):
        build_dataset(tmp_path / "folder", 32, num_classes=3, seed=0)


def test_probability_zero_is_the_centre_crop_and_one_is_not(data):
    data.flip = False
    data.fast = False
    for index in range(24):
        assert torch.equal(data[CropKey(0, index, 0.0)].image, data[index].image)
    different = [not torch.equal(data[CropKey(0, index, 1.0)].image, data[index].image) for index in range(24)]
    assert sum(different) > 15
    assert not torch.equal(data[CropKey(0, 3, 1.0)].image, data[CropKey(1, 3, 1.0)].image)


def test_flips_come_half_of_the_time_and_can_be_off(data):
    data.fast = False
    flipped = 0
    for epoch in range(4):
        for index in range(24):
            image, centre = data[CropKey(epoch, index, 0.0)].image, data[index].image
            flipped += torch.equal(image, centre.flip(-1))
            assert torch.equal(image, centre) or torch.equal(image, centre.flip(-1))
    assert 32 < flipped < 64


def test_the_default_loader_reads_evaluation_images(data):
    batch = next(iter(DataLoader(data, batch_size=24)))
    assert batch.index.tolist() == list(range(24)) and batch.label.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert data[-1].index == 23 and data[-1].label == 2
    with pytest.raises(IndexError):
        data[24]


def test_grey_images_have_three_channels(tmp_path):
    tar = class_tars(tmp_path / "grey.tar", {"n0": {"0.JPEG": image_file(0, mode="L"), "1.JPEG": image_file(1)}})
    data = build_dataset(tar, SIZE, num_classes=1, seed=0)
    for sample in (data[0], data[CropKey(0, 0, 1.0)]):
        assert sample.image.shape == (3, SIZE, SIZE) and torch.equal(sample.image[0], sample.image[2])
    assert default_collate([data[CropKey(0, i, 1.0)] for i in range(2)]).image.shape == (2, 3, SIZE, SIZE)


def _read_all(source, reads, answer):
    rng = np.random.RandomState(os.getpid() % 2**31)
    wrong = 0
    for index in rng.randint(0, len(source), reads):
        content = source.read(index)
        wrong += hashlib.sha256(content).hexdigest() != source.digests[index]
    answer.put(wrong)


def test_forked_workers_sharing_the_file_read_the_right_bytes(data):
    source = data.source
    source.digests = [hashlib.sha256(source.read(index)).hexdigest() for index in range(len(source))]
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    processes = [context.Process(target=_read_all, args=(source, 2500, answer)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [answer.get(timeout=60) for _ in processes] == [0] * 4
    for process in processes:
        process.join()
    assert os.lseek(source._fd, 0, os.SEEK_CUR) == 0  # the position that all of them share was never used


def test_a_pickled_data_set_opens_its_own_file(data):
    copy = pickle.loads(pickle.dumps(data))  # as spawned workers get it
    assert copy.source._fd != data.source._fd
    assert torch.equal(copy[3].image, data[3].image)


def test_the_replacement_keeps_the_crop_draws_of_the_place(damaged):
    data = build_dataset(damaged, SIZE, num_classes=2, seed=0)
    bad = next(i for i in range(len(data)) if data.name(i).endswith("cmyk.JPEG"))
    chosen = {next(i for i in range(len(data)) if torch.equal(data[i].image, data[bad].image)) for _ in range(2)}
    assert chosen != {bad} and data[bad].bad == f"{data.name(bad)}: mode CMYK instead of RGB or grey"
    assert data[bad].index == bad


def test_a_tar_cut_while_in_use_is_an_io_error(data):
    os.truncate(data.source.path, 2048)
    with pytest.raises(OSError, match="was cut while in use"):
        data[20]


def folder(path, classes):
    """Write a folder of class folders and return its path."""
    for name, files in classes.items():
        (path / name).mkdir(parents=True)
        for file, content in files.items():
            (path / name / file).write_bytes(content)
    return path


def test_a_file_that_cannot_be_read_is_a_bad_image(tmp_path, monkeypatch):
    root = folder(tmp_path / "train", small_classes())
    first = root / "n00000000"
    odd = {"fifo.JPEG": "no regular file", "folder.JPEG": "Is a directory", "link.JPEG": "No such file or directory",
           "loop.JPEG": "Too many levels of symbolic links", "failing.JPEG": "Input/output error"}  # fmt: skip
    os.mkfifo(first / "fifo.JPEG")
    (first / "folder.JPEG").mkdir()
    (first / "link.JPEG").symlink_to("nowhere")
    (first / "loop.JPEG").symlink_to("loop.JPEG")
    (first / "failing.JPEG").write_bytes(image_file(0))
    real_open = os.open

    def failing_open(path, *args, **options):
        if str(path).endswith("failing.JPEG"):
            raise OSError(errno.EIO, "Input/output error", path)
        return real_open(path, *args, **options)

    monkeypatch.setattr(os, "open", failing_open)
    data = build_dataset(root, SIZE, num_classes=3, seed=0)
    for name, says in odd.items():
        index = next(index for index in range(len(data)) if data.name(index) == f"n00000000/{name}")
        for key in (index, CropKey(0, index, 1.0)):
            assert data[key].bad.startswith(f"n00000000/{name}: ") and says in data[key].bad


def test_a_data_set_that_has_gone_is_an_error(tmp_path):
    root = folder(tmp_path / "train", small_classes())
    data = build_dataset(root, SIZE, num_classes=3, seed=0)
    (root / "n00000001" / "n00000001_0.JPEG").unlink()
    assert "n00000001_0.JPEG: cannot be read" in data[8].bad
    shutil.rmtree(root / "n00000001")
    with pytest.raises(OSError, match=r"class folder .*train/n00000001 has gone while in use"):
        data[9]


def test_too_many_open_files_are_no_fault_of_an_image(tmp_path, monkeypatch):
    data = build_dataset(folder(tmp_path / "train", small_classes()), SIZE, num_classes=3, seed=0)

    def full(path, *_, **__):
        raise OSError(errno.EMFILE, "Too many open files", path)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(OSError, match=r"Too many open files: .*n00000000_3\.JPEG"):
        data[3]


def test_a_disk_that_cannot_read_a_part_of_the_tar_costs_only_those_images(tmp_path, monkeypatch):
    data = build_dataset(class_tars(tmp_path / "train.tar", small_classes()), SIZE, num_classes=3, seed=0)
    start, real_pread = int(data.source.offsets[4]), os.pread

    def failing_pread(fd, size, offset):
        if start - 512 <= offset <= start:
            raise OSError(errno.EIO, "Input/output error")
        return real_pread(fd, size, offset)

    monkeypatch.setattr(os, "pread", failing_pread)
    assert data[4].bad == f"n00000000/at byte {start}: cannot be read: Input/output error"
    assert data[5].bad == ""


def test_what_cannot_be_opened_is_named(tmp_path, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    tar, root = class_tars(tmp_path / "train.tar", small_classes()), folder(tmp_path / "train", small_classes())
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match=r".*fifo: neither a file nor a folder"):
        open_source(tmp_path / "fifo")
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ValueError, match=r".*train.tar: cannot be read: Permission denied \(.*train.tar\)"):
        open_source(tar)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r".*train: cannot be read: Permission denied \(.*train\)"):
        open_source(root)


def test_a_huge_file_is_a_bad_image_and_never_read(tmp_path):
    """Sparse ones of 30 and 5 GB: in a class folder, and in a tar."""
    classes = folder(tmp_path / "classes", small_classes(1))
    (classes / "n00000000" / "huge.JPEG").touch()
    os.truncate(classes / "n00000000" / "huge.JPEG", 30 * 10**9)
    good, tar = image_file(0), tmp_path / "train.tar"
    parts = member("good.JPEG", len(good)) + good.ljust(-(-len(good) // 512) * 512, b"\0")
    parts += member("huge.JPEG", 5 * 2**30)
    size = len(parts) + 5 * 2**30 + 1024
    tar.write_bytes(member("n0.tar", size) + parts)
    os.truncate(tar, 512 + size + 1024)
    for path in (classes, tar):
        data = build_dataset(path, SIZE, num_classes=1, seed=0)
        huge = next(index for index in range(len(data)) if "huge" in data.name(index))
        with pytest.raises(BadImage, match=r"more than 301048576 bytes"):
            data.source.read(huge)
        assert data[huge].bad == f"{data.name(huge)}: more than 301048576 bytes"


def member(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)
