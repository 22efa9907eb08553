"""evaluator.py as a command: TensorFlow's numbers, any number of processes, every bad input in one line."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluator
from tests.helpers.graph_def import inception_graph
from tests.test_frechet import brute_force, published_frechet, published_score, statistics
from tests.test_inception import mutate, pictures
from utils.evaluation import npz_reader
from utils.evaluation.features import cache_path
from utils.evaluation.npz_reader import NpzReader

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    path = tmp_path_factory.mktemp("graph") / "graph.pb"
    path.write_bytes(inception_graph(seed=1))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """16 reference pictures, deflated, and 12 samples of another size, stored, with sorted labels."""
    folder = tmp_path_factory.mktemp("files")
    np.savez_compressed(folder / "reference.npz", pictures(16, 32).numpy())
    np.savez(folder / "samples.npz", pictures(12, 48, seed=1).numpy(), np.arange(12) // 4)
    return folder


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(*arguments, **keywords):
    return evaluator.main([str(argument) for argument in arguments], **keywords)


def evaluation(samples):
    return json.loads(samples.with_suffix(".json").read_text())["evaluation"]


def test_the_five_numbers_are_the_published_ones_on_1_2_and_4_processes(files, graph, capfd, one_thread):
    """Torch against the graph executed by TensorFlow with the protocol's formulas; torchrun against one process."""
    reference, samples = files / "reference.npz", files / "samples.npz"
    samples.with_suffix(".json").write_text('{"receipt": 1}')
    options = ["--inception", graph, "--batch-size", "2", "--pr-dtype", "float32"]
    assert run(reference, samples, *options) == 0
    out, err = capfd.readouterr()
    record = evaluation(samples)
    metrics = record["metrics"]
    assert (
        out
        == "".join(f"{name}: {value}\n" for name, value in metrics.items())
        == samples.with_suffix(".txt").read_text()
    )
    assert list(metrics) == ["Inception Score", "FID", "sFID", "Precision", "Recall"]
    assert json.loads(samples.with_suffix(".json").read_text())["receipt"] == 1
    for word in (
        "12 samples; published numbers use 50000",
        "samples.npz has 12 images: below 2048, FID is biased",
        "reference.npz has 16 images: below 2048, FID is biased",
        "32 x 32, samples 48 x 48",
    ):
        assert sum(word in line for line in err.splitlines()) >= 1
    assert len(record["weights"]["sha256"]) == len(record["samples"]["sha256"]) == 64
    assert record["dtypes"] == {"network": "float32", "precision and recall": "float32", "statistics": "float64"}

    from utils.evaluation.inception_tensorflow import TensorFlowInception

    tensorflow = TensorFlowInception(graph)
    (pool, spatial), (other_pool, other_spatial) = (
        tensorflow(torch.from_numpy(NpzReader(path).read(0, count))) for path, count in ((reference, 16), (samples, 12))
    )
    assert metrics["Inception Score"] == pytest.approx(published_score(tensorflow.logits(other_pool), 5000), rel=1e-4)
    # Random weights give features so close together that float16 is noise: tests/test_frechet.py judges that mode.
    expected = brute_force(pool.numpy(), other_pool.numpy())
    assert (metrics["Precision"], metrics["Recall"]) == pytest.approx(expected, abs=1e-3)
    for name, mine, other in (("FID", pool, other_pool), ("sFID", spatial, other_spatial)):
        # Few images: the covariances restricted to their span have the same trace of the root, and sqrtm is quick.
        basis = np.linalg.qr(torch.cat([mine, other]).double().numpy().T)[0]
        expected = published_frechet(
            *statistics(mine.double().numpy() @ basis), *statistics(other.double().numpy() @ basis)
        )
        assert metrics[name] == pytest.approx(expected, rel=1e-6)

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for processes in (2, 4):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += ["evaluator.py", reference, samples, *options]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300)
        again = evaluation(samples)
        assert again["processes"] == processes
        assert again["metrics"] == metrics


def test_the_tensorflow_backend_agrees_and_needs_the_graph(files, graph, capfd):
    samples = files / "samples.npz"
    assert run(files / "reference.npz", samples, "--inception", graph) == 0
    mine = evaluation(samples)["metrics"]
    assert run(files / "reference.npz", samples, "--inception", graph, "--backend", "tensorflow") == 0
    record = evaluation(samples)
    assert record["versions"]["tensorflow"].startswith("2.")
    for name, tolerance in (("Inception Score", 1e-4), ("FID", 1e-6), ("sFID", 1e-6)):
        assert record["metrics"][name] == pytest.approx(mine[name], rel=tolerance)
    capfd.readouterr()
    if installed():
        assert run(files / "reference.npz", samples, "--inception", installed(), "--backend", "tensorflow") == 2
        assert "executes the original graph" in capfd.readouterr().err


def installed():
    from utils.evaluation.inception_weights import installed_file

    return installed_file()


class Instant:
    """A network in no time: pool and spatial features are random projections of the mean colours of a 4 x 4 grid."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.pool = torch.randn(48, 2048, generator=generator) / 48
        self.spatial = torch.randn(48, 2023, generator=generator) / 48
        self.batches = []

    def __call__(self, images):
        self.batches.append(len(images))
        cells = images.float().unflatten(1, (4, -1)).unflatten(3, (4, -1)).mean(dim=(2, 4)).flatten(1)
        return (cells @ self.pool).relu(), (cells @ self.spatial).relu()

    @property
    def images(self):
        return sum(self.batches)


@pytest.fixture
def instant(monkeypatch):
    network = Instant()
    monkeypatch.setattr(
        evaluator, "load_network", lambda args, device: (network, {"path": "-", "kind": "-", "sha256": "0"}, False)
    )
    return network


def test_without_a_classifier_four_metrics(files, instant, capfd):
    assert run(files / "reference.npz", files / "samples.npz") == 0
    out = capfd.readouterr().out.splitlines()
    assert out[0].startswith("Inception Score: not available (these weights have no classifier")
    assert [line.split(":")[0] for line in out[1:]] == ["FID", "sFID", "Precision", "Recall"]
    assert all(np.isfinite(float(line.split(":")[1])) for line in out[1:])
    assert evaluation(files / "samples.npz")["metrics"]["Inception Score"] is None


def test_batch_size_does_not_move_the_numbers(files, instant):
    found = []
    for size in (1, 3, 64):
        assert run(files / "reference.npz", files / "samples.npz", "--batch-size", size) == 0
        found.append(evaluation(files / "samples.npz")["metrics"])
    for name in ("FID", "sFID", "Precision", "Recall"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-6) == pytest.approx(found[2][name], rel=1e-6)


def test_pool_features_are_kept_in_float16_unless_their_distances_would_not_fit(files, instant):
    batches = evaluator.Batches(instant, 4, torch.device("cpu"))

    def pool(half):
        return evaluator.extract(NpzReader(files / "samples.npz"), batches, torch.device("cpu"), None, half).pool

    instant.pool *= 0.01
    assert pool(False).dtype == torch.float32
    assert torch.equal(pool(True), pool(False).half())
    instant.pool *= 1000
    assert torch.equal(pool(True), pool(False)) and pool(True).dtype == torch.float32


def test_cached_features_give_the_same_numbers_without_the_network(files, tmp_path, instant, monkeypatch):
    paths = [tmp_path / name for name in ("reference.npz", "samples.npz")]
    for path in paths:
        path.write_bytes((files / path.name).read_bytes())
    instant.pool *= 0.01  # as small as genuine features
    assert run(*paths, "--cache-features") == 0
    first, done = evaluation(paths[1]), instant.images
    assert done == 28
    assert run(*paths, "--cache-features") == 0
    assert instant.images == done
    assert evaluation(paths[1])["metrics"] == first["metrics"]
    assert evaluation(paths[1])["samples"] == {**first["samples"], "features_from_cache": True}
    assert not first["samples"]["features_from_cache"]
    with np.load(cache_path(paths[1])) as archive:
        assert archive["pool"].dtype == np.float16  # as precision and recall take them: half the file and memory
    assert run(*paths, "--cache-features", "--pr-dtype", "float32") == 0  # another key
    with np.load(cache_path(paths[1])) as archive:
        assert archive["pool"].dtype == np.float32
    assert run(*paths, "--cache-features", "--batch-size", 5) == 0  # and another
    assert instant.images == 3 * done
    damaged = cache_path(paths[1])
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    os.utime(paths[0])
    assert run(*paths, "--cache-features", "--batch-size", 5) == 0  # damaged, and made for a file of another date
    assert instant.images == 4 * done
    for name in ("FEATURES_VERSION", "name_of"):  # features of another version of ours, and of another device
        with monkeypatch.context() as changed:
            changed.setattr(evaluator, name, 0 if name == "FEATURES_VERSION" else lambda device: "another")
            assert run(*paths, "--cache-features") == 0
    other_weights = instant, {"path": "-", "kind": "-", "sha256": "1"}, False
    with monkeypatch.context() as changed:
        changed.setattr(evaluator, "load_network", lambda args, device: other_weights)
        assert run(*paths, "--cache-features") == 0
    assert instant.images == 7 * done
    assert run(*paths, "--cache-features") == 0
    with zipfile.ZipFile(cache_path(paths[1])) as archive, zipfile.ZipFile(tmp_path / "fewer", "w") as fewer:
        fewer.writestr("record.npy", archive.read("record.npy"))
    os.replace(tmp_path / "fewer", cache_path(paths[1]))  # a good record, no arrays
    assert run(*paths, "--cache-features") == 0
    assert instant.images == 8 * done + 12
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*"))


def test_a_reference_of_statistics_only(files, tmp_path, instant, capfd):
    reader = NpzReader(files / "reference.npz")
    pool, spatial = (part.numpy().astype(np.float64) for part in instant(torch.from_numpy(reader.read(0, 16))))
    (mu, sigma), (mu_s, sigma_s) = statistics(pool), statistics(spatial)
    np.savez(tmp_path / "statistics.npz", mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    whole = "--batch-size", 16  # as here: rounding depends on the batch
    assert run(files / "reference.npz", files / "samples.npz", *whole) == 0
    expected = evaluation(files / "samples.npz")["metrics"]
    assert run(tmp_path / "statistics.npz", files / "samples.npz", *whole) == 0
    found = evaluation(files / "samples.npz")["metrics"]
    assert found["FID"] == pytest.approx(expected["FID"], rel=1e-9)
    assert found["sFID"] == pytest.approx(expected["sFID"], rel=1e-9)
    assert found["Precision"] is None and found["Recall"] is None
    assert "Precision: not available" in capfd.readouterr().out
    # Statistics beside images win: they describe the whole data set.
    images = reader.read(0, 16)
    np.savez(tmp_path / "both.npz", images, mu=mu + 1, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    assert run(tmp_path / "both.npz", files / "samples.npz") == 0
    found = evaluation(files / "samples.npz")["metrics"]
    assert abs(found["FID"] - expected["FID"]) > 1
    assert found["Precision"] == expected["Precision"]
    np.savez(tmp_path / "half.npz", images, mu=mu, sigma=sigma)
    assert run(tmp_path / "half.npz", files / "samples.npz", *whole) == 0
    assert evaluation(files / "samples.npz")["metrics"]["sFID"] == pytest.approx(expected["sFID"], rel=1e-9)
    assert "half.npz has statistics for one of FID and sFID" in capfd.readouterr().err
    np.savez(tmp_path / "far.npz", mu=mu + 1e200, sigma=sigma)
    assert run(tmp_path / "far.npz", files / "samples.npz") == 2
    assert "FID is inf: are mu and sigma" in capfd.readouterr().err
    np.savez(tmp_path / "three.npz", reader.read(0, 3))
    assert run(tmp_path / "statistics.npz", tmp_path / "three.npz") == 0  # no precision and recall to compute
    capfd.readouterr()
    assert run(files / "reference.npz", tmp_path / "statistics.npz") == 2
    assert "samples need images" in capfd.readouterr().err


@pytest.mark.parametrize("flags", [(), ("--cache-features",)])
def test_a_damaged_byte_in_a_stored_file_is_noticed(files, tmp_path, instant, capfd, flags):
    data = bytearray((files / "samples.npz").read_bytes())
    assert data.find(b"arr_0") < 100  # the images begin near the file's start
    data[500] ^= 1
    (tmp_path / "samples.npz").write_bytes(data)
    assert run(files / "reference.npz", tmp_path / "samples.npz", *flags) == 2
    assert "samples.npz: arr_0 does not agree with its checksum" in capfd.readouterr().err


def test_a_cache_that_cannot_be_written_costs_no_numbers(files, tmp_path, instant, capfd, monkeypatch):
    for name in ("reference.npz", "samples.npz"):
        (tmp_path / name).write_bytes((files / name).read_bytes())

    def read_only(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(evaluator, "save_features", read_only)
    assert run(tmp_path / "reference.npz", tmp_path / "samples.npz", "--cache-features") == 0
    out, err = capfd.readouterr()
    assert "FID: " in out and "--cache-features: [Errno 30] Read-only file system; going on" in err


def test_too_few_images_are_refused_before_the_network_runs(files, tmp_path, instant, capfd):
    np.savez(tmp_path / "three.npz", arr_0=NpzReader(files / "samples.npz").read(0, 3))
    assert run(files / "reference.npz", tmp_path / "three.npz") == 2
    assert "three.npz: has 3 images; precision and recall need 4" in capfd.readouterr().err
    assert instant.images == 0


def test_ctrl_c_is_one_line_and_writes_nothing(files, tmp_path, instant, capfd, monkeypatch):
    (tmp_path / "samples.npz").write_bytes((files / "samples.npz").read_bytes())

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluator, "frechet_distance", interrupted)
    assert run(files / "reference.npz", tmp_path / "samples.npz") == 130
    out, err = capfd.readouterr()
    assert out == "" and "evaluator.py: stopped; no numbers were written" in err
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]


def test_features_that_are_not_finite_are_an_error(files, instant, capfd):
    instant.pool[0] = torch.nan
    assert run(files / "reference.npz", files / "samples.npz") == 2
    assert "not finite" in capfd.readouterr().err


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


# Reading


def good():
    return pictures(5, 8).numpy()


def pickled(path):
    np.savez(path, np.array([{}, 1], dtype=object))


def cut(path):
    np.savez(path, good())
    path.write_bytes(path.read_bytes()[:-200])


def cut_inside(path):
    """The directory in place, images missing before it."""
    np.savez(path, good())
    data = path.read_bytes()
    path.write_bytes(data[:300] + data[500:])


BAD = {
    "float32, but images are uint8": lambda path: np.savez(path, good().astype(np.float32)),
    "but images are N x H x W x 3": lambda path: np.savez(path, good()[..., :2]),
    r"\(8, 8, 3\), but images": lambda path: np.savez(path, good()[0]),
    "there are no images": lambda path: np.savez(path, good()[:0]),
    "neither images": lambda path: np.savez(path, other=good()),
    "pickled array": pickled,
    "cut short": cut,
    "damaged|cut short|beyond|not where": cut_inside,
    "no .npz file": lambda path: path.write_bytes(b"text"),
    "no .npz file, or": lambda path: path.write_bytes(b""),
    "no such file": lambda path: None,
    "Fortran": lambda path: np.savez(path, np.asfortranarray(good())),
    "only one of mu and sigma": lambda path: np.savez(path, mu=np.zeros(2048)),
    "mu is float64 of shape": lambda path: np.savez(path, mu=np.zeros(3), sigma=np.zeros((3, 3))),
    "Is a directory": lambda path: path.mkdir(),
    "sigma is no covariance": lambda path: np.savez(path, mu=np.zeros(2048), sigma=-np.eye(2048)),
    "sigma is no covariance: not": lambda path: np.savez(path, mu=np.zeros(2048), sigma=np.tri(2048)),
    "a variance below 0 or above": lambda path: np.savez(path, mu=np.zeros(2048), sigma=1e308 * np.eye(2048)),
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_file_is_one_line_and_status_2(message, files, tmp_path, instant, capfd):
    path = tmp_path / "bad.npz"
    BAD[message](path)
    for arguments in ((path, files / "samples.npz"), (files / "reference.npz", path)):
        assert run(*arguments) == 2
        err = capfd.readouterr().err.splitlines()
        assert len([line for line in err if "error" in line]) == 1

        assert re.search(message, err[-1]) and str(path) in err[-1]
        assert instant.images == 0


def test_bad_options(files, capfd):
    assert run(files / "reference.npz", files / "samples.npz", "--batch-size", 0) == 2
    assert "--batch-size 0" in capfd.readouterr().err
    assert run(files / "reference.npz", files / "samples.npz", "--inception", "gone") == 2
    assert "--inception names 'gone'" in capfd.readouterr().err
    if not torch.cuda.is_available():
        assert run(files / "reference.npz", files / "samples.npz", "--tf32") == 2
        assert "--tf32 needs" in capfd.readouterr().err


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_are_read_in_any_order(save, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (50, 6, 7, 3), dtype=np.uint8)
    save(tmp_path / "images.npz", images, np.arange(50))
    reader = NpzReader(tmp_path / "images.npz")
    assert (reader.count, reader.height, reader.width) == (50, 6, 7)
    assert np.array_equal(reader.labels, np.arange(50))
    for start, stop in ((0, 5), (5, 50), (3, 4), (49, 50), (10, 30)):
        assert np.array_equal(reader.read(start, stop), images[start:stop])
    reader.close()
    assert np.array_equal(reader.read(7, 9), images[7:9])


def test_sorted_labels_are_said_where_the_score_has_several_blocks(files, instant, capfd, monkeypatch):
    for block, warned in ((12, False), (11, True)):
        monkeypatch.setattr(evaluator, "INCEPTION_SCORE_BLOCK", block)
        assert run(files / "reference.npz", files / "samples.npz") == 0
        assert ("labels look sorted" in capfd.readouterr().err) == warned


def test_a_fingerprint_changes_with_size_date_and_content(tmp_path):
    path, found = tmp_path / "images.npz", []
    for images, date in ((good(), 1), (good(), 2), (255 - good(), 2), (good()[:4], 2)):
        np.savez(path, images)
        os.utime(path, ns=(date, date))
        found.append(NpzReader(path).fingerprint())
    for before, after, changed in zip(found, found[1:], ({"mtime_ns"}, {"crc"}, {"size", "crc"})):
        assert {name for name in before if before[name] != after[name]} == changed


def test_an_abandoned_checksum_ends_early(files):
    reader, abandoned = NpzReader(files / "reference.npz"), threading.Event()
    assert reader.sha256(abandoned) == hashlib.sha256(reader.path.read_bytes()).hexdigest()
    abandoned.set()
    assert reader.sha256(abandoned) == hashlib.sha256().hexdigest()


def test_labels_that_look_sorted():
    rng = np.random.default_rng(0)
    for classes in (2, 10, 1000):
        labels = rng.integers(0, classes, 5000)
        assert not evaluator.looks_sorted(labels)
        assert evaluator.looks_sorted(np.sort(labels))
    assert not evaluator.looks_sorted(np.zeros(100)) and not evaluator.looks_sorted(np.zeros(1))


def test_a_thousand_mutated_files_give_clean_errors_only(tmp_path, monkeypatch):
    monkeypatch.setattr(npz_reader, "STATISTICS", {"mu": (4,), "sigma": (4, 4), "mu_s": (3,), "sigma_s": (3, 3)})
    rng, refused = np.random.default_rng(0), 0
    arrays = {"mu": np.ones(4), "sigma": np.eye(4), "mu_s": np.ones(3), "sigma_s": np.eye(3)}
    path = tmp_path / "images.npz"
    originals = []
    for save in (np.savez, np.savez_compressed):
        save(path, arr_0=good(), arr_1=np.arange(5), **arrays)
        originals.append(path.read_bytes())
    for number in range(1000):
        path.write_bytes(mutate(originals[number % 2], rng))
        try:
            reader = NpzReader(path)
            for start in range(reader.count):
                reader.read(start, start + 1)
        except ValueError as error:
            refused += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error)
        else:
            reader.close()
    assert 300 < refused < 1000


def test_a_bomb_is_not_inflated(tmp_path):
    """A header that promises more than the member holds is refused before any of it is read."""
    header = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little")
    text = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 9999, 9999, 3), }"
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", header + text.ljust(117) + b"\n" + bytes(10_000))
    with pytest.raises(ValueError, match="10000 bytes, not those of shape"):
        NpzReader(tmp_path / "bomb.npz")
