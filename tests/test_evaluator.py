"""evaluator.py as a command: TensorFlow's numbers, any number of processes, every bad input in one line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluator import evaluate
from tests.helpers.evaluation import (
    Instant,
    brute_force,
    evaluation,
    published_frechet,
    published_score,
    random_images,
    run,
    statistics,
    use_instant,
    write_files,
)
from tests.helpers.graph_def import inception_graph
from utils.evaluation import features as evaluation_features
from utils.evaluation import frechet
from utils.evaluation.inception_weights import installed_file
from utils.evaluation.mind import mind
from utils.evaluation.npz_reader import NpzReader
from utils.files import read_json
from utils.images import write_png

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    path = tmp_path_factory.mktemp("graph") / "graph.pb"
    path.write_bytes(inception_graph(seed=1))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def instant(monkeypatch):
    network = Instant()
    use_instant(monkeypatch, network)
    return network


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    assert list(metrics) == ["Inception Score", "FID", "sFID", "Precision", "Recall", "MIND"]
    assert record["seeds"] == {"MIND": 2020}
    assert read_json(samples.with_suffix(".json"), "")["receipt"] == 1
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
    # Random weights give features so close together that float16 is noise: test_precision_recall.py judges it.
    expected = brute_force(pool.numpy(), other_pool.numpy())
    assert (metrics["Precision"], metrics["Recall"]) == pytest.approx(expected, abs=1e-3)
    assert metrics["MIND"] == pytest.approx(mind(other_pool, pool, seed=2020), rel=1e-4)
    for name, mine, other in (("FID", pool, other_pool), ("sFID", spatial, other_spatial)):
        # Few images: the covariances restricted to their span have the same trace of the root, and sqrtm is quick.
        basis = np.linalg.qr(torch.cat([mine, other]).double().numpy().T)[0]
        expected = published_frechet(
            *statistics(mine.double().numpy() @ basis), *statistics(other.double().numpy() @ basis)
        )
        assert metrics[name] == pytest.approx(expected, rel=1e-6)

    options += ["--floor", "--intervals", 2]
    assert run(reference, samples, *options) == 0
    spread = {name: value for name, value in evaluation(samples).items() if name in ("floor", "intervals")}
    assert evaluation(samples)["metrics"] == metrics and len(spread) == 2
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for processes in (2, 4):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += ["evaluator.py", reference, samples, *map(str, options)]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300)
        again = evaluation(samples)
        assert again["processes"] == processes
        assert again["metrics"] == metrics
        assert {name: again[name] for name in spread} == spread


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
    if installed_file():
        assert run(files / "reference.npz", samples, "--inception", installed_file(), "--backend", "tensorflow") == 2
        assert "executes the original graph" in capfd.readouterr().err


def test_without_a_classifier_the_other_metrics(files, instant, capfd):
    assert run(files / "reference.npz", files / "samples.npz") == 0
    out = capfd.readouterr().out.splitlines()
    assert out[0].startswith("Inception Score: not available (these weights have no classifier")
    assert [line.split(":")[0] for line in out[1:]] == ["FID", "sFID", "Precision", "Recall", "MIND"]
    assert all(np.isfinite(float(line.split(":")[1])) for line in out[1:])
    assert evaluation(files / "samples.npz")["metrics"]["Inception Score"] is None


def test_batch_size_does_not_move_the_numbers(files, instant):
    found = []
    for size in (1, 3, 64):
        assert run(files / "reference.npz", files / "samples.npz", "--batch-size", size) == 0
        found.append(evaluation(files / "samples.npz")["metrics"])
    for name in ("FID", "sFID", "Precision", "Recall"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-6) == pytest.approx(found[2][name], rel=1e-6)


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
    assert found["Precision"] is found["Recall"] is found["MIND"] is None
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


def test_a_folder_of_pngs_gives_the_numbers_of_its_npz(files, tmp_path, instant, capfd):
    folder = tmp_path / "run1.5"  # what follows the point belongs to the name
    folder.mkdir()
    for index, image in enumerate(NpzReader(files / "samples.npz").read(0, 12)):
        write_png(folder / f"{index}.png", image)  # 10.png comes after 9.png
    assert run(files / "reference.npz", files / "samples.npz") == 0
    expected = evaluation(files / "samples.npz")
    for _ in range(2):
        assert run(files / "reference.npz", folder, "--cache-features") == 0
    found = read_json(tmp_path / "run1.5.json", "")["evaluation"]
    assert found["metrics"] == expected["metrics"]
    assert found["samples"]["features_from_cache"] and len(found["samples"]["sha256"]) == 64
    assert {path.name for path in tmp_path.iterdir()} == {
        "run1.5",
        *(f"run1.5.{end}" for end in ("json", "txt", "features.npz")),
    }
    assert run(folder, files / "samples.npz") == 0
    assert evaluation(files / "samples.npz")["metrics"]["FID"] < 1e-9
    (files / "reference.features.npz").unlink()


def test_saved_statistics_are_a_reference_by_themselves(files, tmp_path, instant, capfd):
    saved = tmp_path / "reference_statistics.npz"
    assert run(files / "reference.npz", files / "samples.npz", "--save-statistics", saved) == 0
    expected = evaluation(files / "samples.npz")
    with np.load(saved) as archive:
        assert archive.files == ["mu", "sigma", "mu_s", "sigma_s", "record"]
        record = json.loads(bytes(archive["record"]))
    assert record["reference"] == expected["reference"] and record["weights"]["sha256"] == "0"
    assert run(saved, files / "samples.npz") == 0
    found = evaluation(files / "samples.npz")["metrics"]
    assert (found["FID"], found["sFID"]) == (expected["metrics"]["FID"], expected["metrics"]["sFID"])
    assert found["Precision"] is found["MIND"] is None
    content, done = saved.read_bytes(), instant.images
    capfd.readouterr()
    for path, message in ((saved, "exists; take it as the reference"), (tmp_path / "gone" / "x", "is no folder that")):
        assert run(files / "reference.npz", files / "samples.npz", "--save-statistics", path) == 2
        assert f"--save-statistics {path}: " in (err := capfd.readouterr().err) and message in err
    assert saved.read_bytes() == content and instant.images == done


def test_floor_and_intervals_stand_beside_the_numbers(files, tmp_path, instant, capfd):
    """From features once extracted: with the cache the network sees every image once."""
    paths = [tmp_path / name for name in ("reference.npz", "samples.npz", "real.npz")]
    for path, source in zip(paths, ("reference", "samples", "reference")):
        path.write_bytes((files / f"{source}.npz").read_bytes())
    reference, samples, real = paths
    assert run(reference, samples) == 0
    plain, done = samples.with_suffix(".txt").read_text().splitlines(), instant.images
    capfd.readouterr()
    for _ in range(2):
        assert run(reference, samples, "--cache-features", "--floor", "--intervals", 3) == 0
        out, err = capfd.readouterr()
        record = evaluation(samples)
        assert "the floor is that of 8 real images for want of more" in err
        assert out == samples.with_suffix(".txt").read_text()
        for line, before in zip(out.splitlines(), plain):
            name, number = before.split(": ")
            beside = line.removeprefix(before)  # first the number, as ever
            width, floor = record["intervals"]["half_widths"].get(name), record["floor"]["metrics"].get(name)
            expected = "" if width is None else f" ± {width:.3g} (95%)"
            expected += "" if floor is None else f"; real images {floor:.6g} (8 against 8)"
            assert beside == expected and (name == "Inception Score" or float(number) >= 0)
    assert instant.images == 2 * done
    assert record["floor"]["metrics"].keys() == {"FID", "sFID", "MIND"}
    assert record["intervals"]["half_widths"].keys() == {"FID", "Precision", "Recall", "MIND"}

    assert run(reference, samples, "--cache-features", "--floor", real) == 0
    assert evaluation(samples)["floor"]["images"] == 12 and instant.images == 2 * done + 16
    assert "(12 against 16)" in capfd.readouterr().out


def test_a_floor_needs_real_images_and_intervals_need_eight_samples(files, tmp_path, instant, capfd):
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "few.npz", NpzReader(files / "samples.npz").read(0, 7))
    np.savez(tmp_path / "one.npz", NpzReader(files / "samples.npz").read(0, 1))
    for arguments, message in (
        ((tmp_path / "statistics.npz", "--floor"), "statistics.npz: has statistics only; .* name some by --floor FILE"),
        ((files / "reference.npz", "--intervals"), "7 samples: intervals are taken from halves of them, and need 8"),
        ((files / "reference.npz", "--intervals", 1), "--intervals: 1 must be at least 2"),
        (
            (files / "reference.npz", "--floor", tmp_path / "one.npz"),
            "--floor .*one.npz: has 1 images; a floor needs 2",
        ),
        ((files / "reference.npz", "--floor", tmp_path / "gone.npz"), "gone.npz: there is no such file"),
        (
            (files / "reference.npz", "--floor", ""),
            "--floor: is followed by nothing, as by a shell variable that is not set",
        ),
    ):
        assert run(arguments[0], tmp_path / "few.npz", *arguments[1:]) == 2
        assert re.search(message, capfd.readouterr().err.splitlines()[-1])
    assert instant.images == 0
    assert run(tmp_path / "statistics.npz", tmp_path / "few.npz", "--floor", files / "reference.npz") == 0
    assert evaluation(tmp_path / "few.npz")["floor"]["metrics"].keys() == {"FID"}
    assert "(7 against statistics)" in capfd.readouterr().out


def test_in_python_any_iterable_gets_the_numbers_of_its_file(files, instant, capfd):
    assert run(files / "reference.npz", files / "samples.npz", "--floor") == 0
    expected = evaluation(files / "samples.npz")
    images = random_images(12, 48, seed=1)
    tf32 = torch.backends.cudnn.allow_tf32
    capfd.readouterr()
    for batches in (images.split(5), (batch.numpy() for batch in images.split(12))):
        found = evaluate(files / "reference.npz", batches, floor=True, intervals=2)
        assert "12 samples; published numbers use 50000" in capfd.readouterr().err
        for name, value in expected["metrics"].items():
            assert found[name] == (None if value is None else pytest.approx(value, rel=1e-6)), name
        assert found["floor"]["metrics"] == pytest.approx(expected["floor"]["metrics"], rel=1e-6)
        assert found["intervals"]["resamples"] == 2
    assert evaluate(files / "reference.npz", str(files / "samples.npz")) == expected["metrics"]
    assert torch.backends.cudnn.allow_tf32 == tf32 and not torch.is_inference_mode_enabled()
    for wrong, message in (
        (images, r"images: a batch is torch.uint8 \(48, 48, 3\), but batches are uint8"),
        ([], "at least 2 images, got 0"),
        ([images[:3]], "images: has 3 images; precision and recall need 4"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(files / "reference.npz", wrong)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pr_dtype": "float64"}, "--pr-dtype: invalid choice: 'float64'"),
        ({"pr_dtype": None}, "--pr-dtype: invalid choice: 'None'"),
        ({"backend": "jax"}, "--backend: invalid choice: 'jax'"),
        ({"cache_features": "yes"}, "--cache-features: ignored explicit argument 'yes'"),
        ({"tf32": True}, "--tf32 needs --backend torch and a CUDA GPU"),
        ({"batch_size": 0}, "--batch-size: 0 must be at least 1"),
        ({"batch_size": -3}, "--batch-size: -3 must be at least 1"),
        ({"batch_size": 2.5}, "--batch-size: 2.5 is no whole number"),
        ({"batch_size": "2"}, "--batch-size: '2' is no whole number"),
        ({"floor": ""}, "--floor: has an empty name"),
        ({"intervals": 1}, "--intervals: 1 must be at least 2"),
        ({"intervals": -5}, "--intervals: -5 must be at least 2"),
        ({"intervals": 2.5}, "--intervals: 2.5 is no whole number"),
        ({"intervals": True}, "--intervals: True is no whole number"),
        ({"intervals": "3"}, "--intervals: '3' is no whole number"),
    ],
)
def test_in_python_settings_are_held_to_the_rules_of_their_flags(files, instant, monkeypatch, settings, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        evaluate(files / "reference.npz", str(files / "samples.npz"), **settings)
    assert "\n" not in str(error.value) and instant.images == 0


def test_in_python_settings_do_what_their_flags_do(files, tmp_path, monkeypatch, instant):
    monkeypatch.chdir(tmp_path)
    real = Path("@real a.npz")  # on a command line, @ names a file of flags
    real.write_bytes((files / "reference.npz").read_bytes())
    found = evaluate(
        files / "reference.npz", str(files / "samples.npz"), floor=real, batch_size=np.int64(3), cache_features=False
    )
    assert found["floor"]["real"]["path"] == str(real) and max(instant.batches) == 3
    assert "floor" not in evaluate(files / "reference.npz", str(files / "samples.npz"), floor=None)


@pytest.mark.parametrize("flags", [(), ("--cache-features",)])
def test_a_damaged_byte_in_a_stored_file_is_noticed(files, tmp_path, instant, capfd, flags):
    data = bytearray((files / "samples.npz").read_bytes())
    assert data.find(b"arr_0") < 100  # the images begin near the file's start
    data[500] ^= 1
    (tmp_path / "samples.npz").write_bytes(data)
    assert run(files / "reference.npz", tmp_path / "samples.npz", *flags) == 2
    assert "samples.npz: arr_0 does not agree with its checksum" in capfd.readouterr().err


def test_too_few_images_are_refused_before_the_network_runs(files, tmp_path, instant, capfd):
    np.savez(tmp_path / "three.npz", arr_0=NpzReader(files / "samples.npz").read(0, 3))
    assert run(files / "reference.npz", tmp_path / "three.npz") == 2
    assert "three.npz: has 3 images; precision and recall need 4" in capfd.readouterr().err
    assert instant.images == 0


def test_ctrl_c_is_one_line_and_writes_nothing(files, tmp_path, instant, capfd, monkeypatch):
    (tmp_path / "samples.npz").write_bytes((files / "samples.npz").read_bytes())

    monkeypatch.setattr(frechet, "frechet_distance", lambda *_: signal.raise_signal(signal.SIGINT))
    assert run(files / "reference.npz", tmp_path / "samples.npz") == 130
    out, err = capfd.readouterr()
    assert out == "" and "evaluator.py: stopped; no numbers were written" in err
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]


def test_ctrl_c_while_it_starts_leaves_no_traceback(tmp_path):
    """Within the seconds of imports, before the handlers of utils.script are there."""
    process = subprocess.Popen([sys.executable, "-X", "importtime", "evaluator.py", "a", "b"], cwd=ROOT, text=True,
                               stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip
    for line in process.stderr:
        if "numpy" in line:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and "Traceback" not in err and "evaluator.py" not in err


def test_any_file_name_will_do_and_none_reaches_the_terminal_as_it_is(files, tmp_path, instant, capfd):
    samples = tmp_path / "s\udcffmples\x1b[31m.npz"  # bytes that are no UTF-8, and a terminal's command
    samples.write_bytes((files / "samples.npz").read_bytes())
    assert run(files / "reference.npz", samples) == 0
    assert evaluation(samples)["samples"]["path"] == str(samples)
    assert "\x1b[31m" not in capfd.readouterr().err
    assert run(samples.with_suffix(".json"), samples) == 2
    err = capfd.readouterr().err
    assert "s\\udcffmples\\x1b[31m.json" in err and "\x1b" not in err


def test_torchs_own_warnings_are_shown(files, instant, monkeypatch):
    """Such as that no GPU is found because the driver is too old."""

    def is_available():
        warnings.warn_explicit("CUDA initialization: too old", UserWarning, "torch/cuda.py", 1, module="torch.cuda")
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    with pytest.warns(UserWarning, match="too old"):
        assert run(files / "reference.npz", files / "samples.npz") == 0


def test_features_that_are_not_finite_are_an_error(files, instant, capfd):
    instant.pool[0] = torch.nan
    assert run(files / "reference.npz", files / "samples.npz") == 2
    assert "not finite" in capfd.readouterr().err


def test_sorted_labels_are_said_where_the_score_has_several_blocks(files, instant, capfd, monkeypatch):
    for block, warned in ((12, False), (11, True)):
        monkeypatch.setattr(frechet, "INCEPTION_SCORE_BLOCK", block)
        assert run(files / "reference.npz", files / "samples.npz") == 0
        assert ("labels look sorted" in capfd.readouterr().err) == warned


# ---- bad input ---------------------------------------------------------------------------------------------------


def good():
    return random_images(5, 8).numpy()


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
    "it is empty": lambda path: path.write_bytes(b""),
    "it is a web page": lambda path: path.write_bytes(b"<!doctype html>\n<html>"),
    "it is a Git-LFS pointer": lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
    "no such file": lambda path: None,
    "Fortran": lambda path: np.savez(path, np.asfortranarray(good())),
    "only one of mu and sigma": lambda path: np.savez(path, mu=np.zeros(2048)),
    "mu is float64 of shape": lambda path: np.savez(path, mu=np.zeros(3), sigma=np.zeros((3, 3))),
    "is a folder without PNG files": lambda path: path.mkdir(),
    "sigma is no covariance": lambda path: np.savez(path, mu=np.zeros(2048), sigma=-np.eye(2048)),
    "sigma is no covariance: not": lambda path: np.savez(path, mu=np.zeros(2048), sigma=np.tri(2048)),
    "sigma is no covariance: not symmetric": lambda path: np.savez(
        path, mu=np.zeros(2048), sigma=np.eye(2048) + 2 * np.eye(2048)[::-1]
    ),
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


def test_images_beyond_the_memory_are_refused_before_one_is_read(files, instant, capfd, monkeypatch):
    def never(*_):
        raise AssertionError("an image was read")

    monkeypatch.setattr(NpzReader, "read", never)
    for memory, remedy in ((4 * 3 * 48 * 48, "take --batch-size 1"), (10, "scale them down first")):
        monkeypatch.setattr(evaluation_features, "MEMORY", memory)
        assert run(files / "samples.npz", files / "samples.npz") == 2
        err = capfd.readouterr().err.splitlines()[-1]
        assert f"samples.npz: images of 48 x 48 pixels are too large for batches of 2: {remedy}" in err


def test_bad_options(files, capfd):
    assert run(files / "reference.npz", files / "samples.npz", "--batch-size", 0) == 2
    assert "--batch-size: 0 must be at least 1" in capfd.readouterr().err
    assert run(files / "reference.npz", files / "samples.npz", "--inception", "gone") == 2
    assert "--inception names 'gone'" in capfd.readouterr().err
    if not torch.cuda.is_available():
        assert run(files / "reference.npz", files / "samples.npz", "--tf32") == 2
        assert "--tf32 needs" in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_damage_far_behind_is_told_as_soon_as_the_checksum_finds_it(tmp_path, instant, capfd, kind):
    """Not when the features of all images have been computed, which may take an hour."""
    images, path = random_images(256, 8).numpy(), tmp_path / "samples.npz"
    if kind == "npz":
        np.savez(path, images)
        content = bytearray(path.read_bytes())
        content[-3000] ^= 1
        path.write_bytes(content)
    else:
        path = tmp_path / "png"
        path.mkdir()
        for index, image in enumerate(images):
            write_png(path / f"{index}.png", image)
        (path / "255.png").write_bytes((path / "255.png").read_bytes()[:-20])
    network, instant.pack = instant.__call__, lambda _: lambda images: (time.sleep(0.05), network(images))[1]
    assert run(path, path, "--batch-size", "2") == 2
    assert re.search("checksum|a damaged PNG", capfd.readouterr().err) and instant.images < 200


def test_weights_that_are_not_there_are_told_before_the_warnings(files, capfd):
    assert run(files / "reference.npz", files / "samples.npz", "--inception", "nowhere.pt") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "--inception names 'nowhere.pt'" in line
