"""The ablation's driver: a finished run is not repeated, a broken one continues; its table and pictures."""

import json
import threading
from concurrent.futures import Executor, Future
from dataclasses import replace

import numpy as np
import pytest

import sample_ddp
import train
from benchmarks import ablation, ablation_report
from dataset.reference import main as write_reference
from examples import collapse
from models import PRESETS
from models.posteriors import POSTERIORS
from models.svae import PROJECTIONS
from tests.helpers import small_run
from utils.training.options import parse_args, svae_config


class Inline(Executor):
    """A pool without threads: signals, which the scripts handle, are the main thread's."""

    def __init__(self, jobs):
        pass

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


class InThisProcess:
    """Runs the commands here, and notes them; the one in `broken` fails."""

    def __init__(self, broken=""):
        self.names, self.broken = [], broken

    def __call__(self, log, *command):
        name, *flags = [str(word) for word in command if word != "-m"]
        self.names.append(name)
        if name == self.broken:
            raise RuntimeError(f"{name} ended with 137")
        mains = {"train.py": train.main, "sample_ddp.py": sample_ddp.main, "dataset.reference": write_reference}
        assert {**mains, "examples.collapse": collapse.main}[name](flags) == 0

    def stop(self):
        pass


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The command on a suite of two steps and eight images; the commands that it ran, by name, and its exit code."""
    size = "--model SphereAR-Nano --num-classes 4 --global-batch-size 8 --num-workers 0 --sample-every 0 --max-steps 2 "
    size += "--warmup-steps -1 --decay-start -1 --log-every 1"
    suite = ablation.Suite(
        lambda folder: small_run.write_tar(folder / "train.tar"),
        svae=f"--vae-only --perceptual-weight 0 --disc-weight 0 {size}",
        ar=size,
        sampling="--labels balanced --sampler midpoint --num-sampling-steps 1",
        num_images=8,
        guidance=(1, 3),
        inception_at=(),
        num_inception=4,
        probe="--cfg-scales 1 --num-images 2 --num-sampling-steps 1",
    )
    monkeypatch.setitem(ablation.SUITES, "digits", suite)
    monkeypatch.setattr(ablation, "ThreadPoolExecutor", Inline)
    monkeypatch.setattr(ablation, "PICTURES", tmp_path)
    monkeypatch.setattr(ablation, "DOCUMENT", tmp_path / "ablation.md")
    (tmp_path / "ablation.md").write_text("before <!-- digits --> old <!-- end of digits --> after")

    def run(*flags, broken=""):
        commands = InThisProcess(broken)
        monkeypatch.setattr(ablation, "Commands", lambda: commands)
        folders = ["--work", tmp_path / "work", "--out", tmp_path / "out", "--variants", "G-04", "--seeds", 3]
        code = ablation.main([str(word) for word in [*folders, "--jobs", 1, *flags]])
        return commands.names, code

    return run


def test_a_broken_run_continues_and_a_finished_one_is_not_repeated(run, tmp_path, capsys):
    result = tmp_path / "out" / "digits" / "G-04_seed3.json"
    names, code = run(broken="examples.collapse")
    assert code == 2 and not result.exists()  # nothing to report yet
    assert "G-04_seed3: examples.collapse ended with 137" in capsys.readouterr().err
    assert names == ["dataset.reference", "train.py", "train.py", "sample_ddp.py", "sample_ddp.py", "examples.collapse"]
    trained = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "work").rglob("*.pt"))

    names, code = run()
    assert code == 0 and "dataset.reference" not in names
    assert trained == sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "work").rglob("*.pt"))
    record = json.loads(result.read_text())
    assert (record["variant"], record["seed"], record["kl_weight"], record["threads"]) == ("G-04", 3, 0.004, 1)
    assert record["nats_per_token"] > 0 and record["recon_loss"] > 0 and record["ar_loss"] > 0
    assert record["latents"].startswith("mean ") and "--posterior gaussian" in record["flags"]["svae"]
    assert [point["cfg_scale"] for point in record["points"]] == [1, 3]
    floor = json.loads((result.parent / "floor.json").read_text())
    assert floor["pixel_frechet"] > 0 and record["points"][0]["pixel_frechet"] > 0
    assert len(record["probe"][0]["norm"]) == 16
    assert (tmp_path / "ablation_digits.png").exists() and (tmp_path / "ablation_digits_G-04.png").exists()
    document = (tmp_path / "ablation.md").read_text()
    assert "| G-04 | 1 | 0.004 |" in document and "old" not in document
    assert document.startswith("before ") and document.endswith(" after")

    assert run() == ([], 0)


def test_a_result_of_other_flags_is_not_taken_for_this_one(run, tmp_path, monkeypatch, capsys):
    path = tmp_path / "out" / "digits" / "G-04_seed3.json"
    path.parent.mkdir(parents=True)
    suite = ablation.SUITES["digits"]
    ablation.write_result(path, {"flags": ablation.flags_of(suite, "G-04", 3)})
    assert ablation.is_finished(path, ablation.flags_of(suite, "G-04", 3))
    monkeypatch.setitem(ablation.SUITES, "digits", replace(suite, ar=suite.ar + " --lr 1e-4"))
    assert run() == ([], 2)
    assert "G-04_seed3.json: is the result of other flags" in capsys.readouterr().err


def test_a_command_that_fails_is_told_with_its_last_line(tmp_path):
    commands = ablation.Commands()
    commands(tmp_path / "log.txt", "-c", "import os; print(os.environ['OMP_NUM_THREADS'], 'thread')")
    with pytest.raises(RuntimeError, match=r"-c ended with 1, see .*log.txt: it broke"):
        commands(tmp_path / "log.txt", "-c", "raise SystemExit('it broke')")
    assert (tmp_path / "log.txt").read_text() == "1 thread\nit broke\n"


def test_stop_ends_what_runs_and_lets_nothing_begin(tmp_path):
    commands, ended = ablation.Commands(), []

    def sleep():
        with pytest.raises(RuntimeError, match="ended with -15"):
            commands(tmp_path / "log.txt", "-c", "import time; print('on', flush=True); time.sleep(60)")
        ended.append(True)

    thread = threading.Thread(target=sleep)
    thread.start()
    while not (tmp_path / "log.txt").exists() or not (tmp_path / "log.txt").read_text():
        thread.join(0.01)
    commands.stop()
    thread.join(30)
    assert ended == [True]
    with pytest.raises(RuntimeError, match="stopped"):
        commands(tmp_path / "log.txt", "-c", "pass")


@pytest.mark.parametrize("suite", list(ablation.SUITES))
def test_the_flags_of_every_variant_are_understood(suite, capsys):
    suite = ablation.SUITES[suite]
    choices = None, list(PRESETS), list(POSTERIORS), list(PROJECTIONS)
    configs = set()
    for variant in suite.variants:
        flags = {script: words.split() for script, words in ablation.flags_of(suite, variant, 1).items()}
        args = parse_args([*flags["svae"], "--data-path", "tar"], *choices)
        assert args.vae_only and args.global_seed == 1
        config = svae_config(args, PRESETS[args.model].svae)
        assert config.image_size == suite.image_size
        configs.add((config, args.kl_weight))
        assert not parse_args([*flags["ar"], "--data-path", "tar", "--trained-vae", "svae.pt"], *choices).vae_only
    assert len(configs) == len(suite.variants)
    assert sample_ddp.main([*flags["sampling"], "--cfg-scale", "3", "--ckpt", "nowhere.pt"]) == 2
    assert collapse.main([*flags["probe"], "--ckpt", "nowhere.pt"]) == 2
    assert capsys.readouterr().err.count("nowhere.pt") == 2


# ---- the report, from made-up results


def made_up(variant, seed, distances=(1.0, 2.0, 4.0), agreements=(0.8, 0.9, 0.98)):
    flags = {"svae": ablation.VARIANTS[variant]}
    points = [
        {
            "cfg_scale": scale,
            "class_agreement": agreement,
            "pixel_frechet": distance + 0.1 * seed,
            "inception_mind": 30.0,
        }
        for scale, agreement, distance in zip((1, 3, 6), agreements, distances)
    ]
    probe = [
        {"cfg_scale": scale, "projection": name, "norm": [2.8, scale], "sd": [1.0, 1.0], "cosine": [1.0, 0.9]}
        for scale in (1.0, 9.0) for name in ("all", "none")
    ]  # fmt: skip
    return {"variant": variant, "seed": seed, "flags": flags, "kl_weight": 0.004, "nats_per_token": 4.0 + seed,
            "recon_loss": 0.05, "points": points, "probe": probe}  # fmt: skip


FLOOR = {"class_agreement": 0.97, "pixel_frechet": 0.5, "inception_mind": 10.0}


def test_the_distance_at_equal_agreement_lies_between_guidance_scales():
    assert ablation_report.distance_at_level(made_up("S-04", 0), 0.85) == pytest.approx(1.5)
    assert ablation_report.distance_at_level(made_up("S-04", 0), 0.94) == pytest.approx(3.0)
    assert ablation_report.distance_at_level(made_up("S-04", 0), 0.5) == 1.0
    assert np.isnan(ablation_report.distance_at_level(made_up("S-04", 0), 0.99))


def test_the_table_has_means_and_deviations_of_seeds_and_says_what_is_missing():
    few = made_up("G-04", 0, agreements=(0.1, 0.2, 0.3))
    text = ablation_report.table({"S-04": [made_up("S-04", seed) for seed in range(3)], "G-04": [few]}, FLOOR, 0.9)
    head, _, g, s, real = text.splitlines()
    assert len({line.count("|") for line in text.splitlines()}) == 1 and "guidance 6" in head
    assert s.startswith("| S-04 | 3 | 0.004 | 5.00 ± 1.00 | 0.0500 ± 0.0000 | 80.0 ± 0.0, 1.10 ± 0.10 |")
    assert g.startswith("| G-04 | 1 | 0.004 | 4.00 | 0.0500 | 10.0, 1.00 |") and "| – |" in g
    assert "| 2.80 → 9.00 |" in s and real.startswith("| real images |") and "97.0, 0.50" in real


@pytest.mark.filterwarnings("error")
def test_a_picture_of_any_number_of_seeds_and_variants(tmp_path):
    results = {name: [made_up(name, seed) for seed in range(seeds)] for name, seeds in (("S-04", 3), ("G-16", 1))}
    ablation_report.draw(tmp_path / "out.png", results, FLOOR, 0.9)
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"


def test_a_document_without_the_place_for_the_table_is_left_alone(tmp_path):
    (tmp_path / "doc.md").write_text("nothing")
    with pytest.raises(ValueError, match=r"doc.md: has no lines <!-- digits -->"):
        ablation_report.write_between(tmp_path / "doc.md", "digits", "table")
    assert (tmp_path / "doc.md").read_text() == "nothing"
