"""A pipe where a file is expected is one line, and nothing waits for it."""

import os

import pytest

import evaluator
import train
from dataset import tar_index, toy
from models.lpips import vgg_weights
from tests.helpers import small_run
from tests.helpers.dataset_tars import class_tars, small_classes
from utils.evaluation.feature_cache import cache_path, load_features
from utils.evaluation.npz_reader import NpzReader
from utils.evaluation.results import check_outputs


@pytest.fixture
def pipe(tmp_path):
    def make(name):
        os.mkfifo(tmp_path / name)
        return tmp_path / name

    return make


def test_as_an_input(pipe, tmp_path, capsys):
    path = pipe("samples.npz")
    for read in (NpzReader, lambda path: toy.class_agreement(tmp_path, path)):
        with pytest.raises(ValueError, match=r"samples\.npz: is no file"):
            read(path)
    with pytest.raises(ValueError, match=r"samples\.npz is no file"):
        vgg_weights(path)
    assert evaluator.main([str(path), str(path)]) == 2
    assert "is no file" in capsys.readouterr().err


def test_beside_the_samples(pipe, tmp_path):
    samples = tmp_path / "samples.npz"
    reference = tmp_path / "reference.npz"
    samples.touch(), reference.touch()
    with pytest.raises(ValueError, match=r"--save-statistics .*results go there"):
        check_outputs(reference, samples, statistics=tmp_path / "samples.txt")
    pipe("samples.txt")
    with pytest.raises(ValueError, match=r"samples\.txt is no result"):
        check_outputs(reference, samples)
    os.mkfifo(cache_path(samples))
    assert load_features(samples, {}, set()) is None


def test_as_a_png(pipe, tmp_path, capsys):
    pipe("0.png")
    assert evaluator.main([str(tmp_path), str(tmp_path)]) == 2
    assert "is no file" in capsys.readouterr().err


def test_as_a_tar_index(tmp_path):
    path = class_tars(tmp_path / "train.tar", small_classes())
    os.mkfifo(tmp_path / "train.tar.index.npz")
    assert tar_index.load_index(path).classes


def test_as_a_log(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "log.txt")
    command = small_run.flags(small_run.write_tar(tmp_path / "t.tar"), tmp_path / "run", "--max-steps", 1)
    assert train.main(command) == 2
    assert "log.txt: is a pipe" in capsys.readouterr().err
