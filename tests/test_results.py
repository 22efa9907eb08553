"""SAMPLE.txt and SAMPLE.json: nothing but results of ours is written over, and a fault is seen before the work."""

import os

import pytest

from tests.helpers.evaluation import Instant, run, use_instant, write_files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def instant(monkeypatch):
    network = Instant()
    use_instant(monkeypatch, network)
    return network


def test_an_unreadable_json_beside_the_samples_is_not_overwritten(files, tmp_path, instant, capfd):
    samples = tmp_path / "samples.npz"
    samples.write_bytes((files / "samples.npz").read_bytes())
    for text in ("my notes", "[]"):
        samples.with_suffix(".json").write_text(text)
        assert run(files / "reference.npz", samples) == 2
        assert "no JSON object" in capfd.readouterr().err and instant.images == 0
        assert samples.with_suffix(".json").read_text() == text


def test_samples_are_not_overwritten_by_their_results(files, tmp_path, instant, capfd):
    samples = tmp_path / "samples.txt"
    samples.write_bytes((files / "samples.npz").read_bytes())
    assert run(files / "reference.npz", samples) == 2
    assert "samples.txt: the results would be written over it" in capfd.readouterr().err
    assert samples.read_bytes() == (files / "samples.npz").read_bytes() and instant.images == 0


def test_a_folder_that_cannot_be_written_is_noticed_before_the_network_runs(files, instant, capfd, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert run(files / "reference.npz", files / "samples.npz") == 2
    assert f"{files}: cannot be written to" in capfd.readouterr().err and instant.images == 0


def test_a_text_beside_the_samples_that_is_no_result_is_not_overwritten(files, tmp_path, instant, capfd):
    samples = tmp_path / "samples.npz"
    samples.write_bytes((files / "samples.npz").read_bytes())
    samples.with_suffix(".txt").write_text("my notes\n")
    assert run(files / "reference.npz", samples) == 2
    assert "samples.txt is no result" in capfd.readouterr().err and instant.images == 0
    assert samples.with_suffix(".txt").read_text() == "my notes\n"
    samples.with_suffix(".txt").unlink()
    for _ in range(2):  # but earlier results are
        assert run(files / "reference.npz", samples) == 0


def test_a_link_to_an_input_counts_as_the_input(files, tmp_path, instant, capfd):
    reference, samples = tmp_path / "reference.npz", tmp_path / "samples.npz"
    for path in (reference, samples):
        path.write_bytes((files / path.name).read_bytes())
    samples.with_suffix(".json").symlink_to(reference)
    assert run(reference, samples) == 2
    assert "samples.json: the results would be written over it" in capfd.readouterr().err
