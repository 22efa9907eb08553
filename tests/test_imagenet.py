"""The data set: tar or folder, training and evaluation images, bad ones replaced."""

import hashlib
import multiprocessing
import os
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, default_collate

from dataset import CropKey, build_dataset
from dataset.imagenet import open_source
from tests.helpers.dataset_tars import bad_images, class_tars, contents, expected, image_file, label, small_classes

SIZE = 16


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPHEREAR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path):
    return build_dataset(class_tars(tmp_path / "train.tar", small_classes()), SIZE, num_classes=3, seed=5)


@pytest.fixture
def damaged(tmp_path):
    """7 bad images among 63."""
    classes = small_classes(classes=2, images=28)
    for kind, (content, _) in bad_images().items():
        classes["n00000000"][f"{kind}.JPEG"] = content
    return class_tars(tmp_path / "damaged.tar", classes)


def test_a_folder_of_class_folders_reads_the_same(tmp_path):
    classes = small_classes()
    for name, files in classes.items():
        (tmp_path / "train" / name).mkdir(parents=True)
        for file, content in files.items():
            (tmp_path / "train" / name / file).write_bytes(content)
    source = open_source(tmp_path / "train")
    assert contents(source) == expected(classes)
    assert [label(source, i) for i in range(24)] == [0] * 8 + [1] * 8 + [2] * 8


def test_wrong_places_and_class_counts_are_named(tmp_path):
    tar = class_tars(tmp_path / "train.tar", small_classes())
    with pytest.raises(ValueError, match=r"--num-classes 1000, .* holds 3 classes .* set --num-classes 3"):
        build_dataset(tar, 32, num_classes=1000, seed=0)
    with pytest.raises(ValueError, match="no such file or folder"):
        build_dataset(tmp_path / "absent.tar", 32, num_classes=3, seed=0)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="without class folders"):
        build_dataset(tmp_path / "folder", 32, num_classes=3, seed=0)
    (tmp_path / "folder" / "n0").mkdir()
    with pytest.raises(ValueError, match="class folder n0 holds no images"):
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
