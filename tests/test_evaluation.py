"""Evaluation while training: it changes nothing, is done once per step, and equals what the scripts give."""

import json
import shutil

import numpy as np
import pytest
import torch

import sample_ddp
from dataset.toy import class_agreement
from models import SamplingSettings
from tests.helpers import small_run
from tests.helpers.evaluation import Instant, evaluation, random_images, run, use_instant
from tests.helpers.small_run import assert_refused, differences, flags, run_here
from utils import checkpoint_file
from utils.checkpoint_file import read
from utils.training.evaluation import mean_over_images

SAMPLES = 33  # more than are made at once on a CPU


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    np.savez(folder / "reference.npz", random_images(16, 32).numpy())
    return small_run.write_tar(folder / "train.tar"), small_run.write_svae(folder / "svae.pt"), folder / "reference.npz"


@pytest.fixture(params=["svae", "ar"])
def command(request, files, tmp_path):
    """command(name, *flags): a run of either stage, in a folder of that name, that holds 4 images out."""
    data, svae, _ = files

    def make(name, *extra):
        extra = "--held-out", 4, *extra
        extra += ("--disc-weight", 0) if request.param == "svae" else ()
        return flags(data, tmp_path / name, *extra, svae=svae if request.param == "ar" else None)

    make.stage = request.param
    make.evaluated = "--eval-every", 2, "--eval-reference", files[2], "--eval-samples", SAMPLES
    return make


@pytest.fixture
def instant(monkeypatch):
    network = Instant()
    use_instant(monkeypatch, network)
    monkeypatch.setattr("train.PREVIEW_SETTINGS", SamplingSettings(cfg_scale=3.0, num_sampling_steps=3))
    return network


def lines(folder, kind="evaluation"):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def values(record):
    """What an evaluation found, without its time."""
    return {name: value for name, value in record.items() if name not in ("time", "seconds", "receipt")}


def test_training_goes_on_bit_for_bit_after_an_evaluation(command, instant, tmp_path):
    plain = run_here(*command("plain", "--max-steps", 3))
    watched = run_here(*command("watched", "--max-steps", 3, *command.evaluated, "--sample-every", 1))
    assert differences(plain, watched) == []
    assert [record["step"] for record in lines(tmp_path / "watched")] == [2, 3]  # and at the end
    names = {"svae": {"rFID", "PSNR", "SSIM", "held_out_loss", "held_out_recon_loss", "held_out_kl_loss"},
             "ar": {"FID", "MIND", "held_out_ar_loss"}}[command.stage]  # fmt: skip
    assert all(names == values(record).keys() - {"kind", "step"} for record in lines(tmp_path / "watched"))
    assert lines(tmp_path / "plain") == []
    assert len(list((tmp_path / "watched/sheets").glob("step_0000000[123].png"))) == 3


def test_a_resumed_run_has_every_evaluation_once(command, instant, tmp_path):
    run_here(*command("whole", "--max-steps", 5, *command.evaluated))
    run_here(*command("parts", "--max-steps", 2))  # as if stopped between an update and its evaluation
    run_here(*command("parts", "--max-steps", 4, "--save-every", 1, *command.evaluated))
    (tmp_path / "parts/checkpoints/step_00000004.pt").unlink()  # as if killed before it was saved
    run_here(*command("parts", "--max-steps", 5, *command.evaluated))
    assert list(map(values, lines(tmp_path / "parts"))) == list(map(values, lines(tmp_path / "whole")))


def test_samples_are_those_of_the_scripts(files, instant, tmp_path):
    """sample_ddp.py and evaluator.py find the same numbers for the checkpoint of the same step."""
    command = flags(
        files[0], tmp_path / "run", "--max-steps", 2, "--eval-every", 2, "--eval-reference", files[2],
        "--eval-samples", SAMPLES, "--eval-cfg-scale", 2, "--eval-judge", files[0], svae=files[1],
    )  # fmt: skip
    run_here(*command)
    sampling = "--ckpt", tmp_path / "run/checkpoints/last.pt", "--sample-dir", tmp_path / "samples", "--cfg-scale", 2
    sampling += "--num-fid-samples", SAMPLES, "--labels", "balanced", "--num-sampling-steps", 3, "--no-compile"
    assert sample_ddp.main([str(word) for word in (*sampling, "--per-proc-batch-size", 32, "--to-npz")]) == 0
    assert run(files[2], tmp_path / "samples/samples.npz") == 0
    expected = evaluation(tmp_path / "samples/samples.npz")["metrics"]
    (found,) = lines(tmp_path / "run")
    assert found["FID"] == pytest.approx(expected["FID"], rel=1e-9)
    assert found["MIND"] == pytest.approx(expected["MIND"], rel=1e-6)
    assert found["receipt"]["samples"]["cfg_scale"] == 2.0
    assert found["class_agreement"] == pytest.approx(class_agreement(files[0], tmp_path / "samples/samples.npz"))


# train.py with a network in no time, for processes of their own
WITH_INSTANT = """
import sys
sys.path.insert(0, ".")
from pytest import MonkeyPatch
import train
from models import SamplingSettings
from tests.helpers.evaluation import Instant, use_instant
use_instant(MonkeyPatch(), Instant())
train.PREVIEW_SETTINGS = SamplingSettings(cfg_scale=3.0, num_sampling_steps=3)
sys.exit(train.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("stage", ["ar", pytest.param("svae", marks=pytest.mark.faults)])
def test_numbers_do_not_depend_on_the_number_of_processes(files, instant, tmp_path, stage):
    """A finished run is evaluated on one process, and its copy on two."""
    data, svae, reference = files
    extra = "--max-steps", 1, "--held-out", 40, *(("--disc-weight", 0) if stage == "svae" else ())
    evaluated = "--eval-every", 1, "--eval-samples", SAMPLES, *(("--eval-reference", reference) * (stage == "ar"))
    one, two = (flags(data, tmp_path / name, *extra, svae=svae if stage == "ar" else None) for name in ("one", "two"))
    run_here(*one)
    shutil.copytree(tmp_path / "one", tmp_path / "two", symlinks=True)
    run_here(*one, *map(str, evaluated))
    script = tmp_path / "instant_train.py"
    script.write_text(WITH_INSTANT)
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)
    small_run.finish(small_run.start(*two, *map(str, evaluated), launcher=launcher), seconds=300)
    (alone,), (together,) = (list(map(values, lines(tmp_path / name))) for name in ("one", "two"))
    assert alone == together
    assert alone["held_out_loss" if stage == "svae" else "held_out_ar_loss"] > 0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--eval-every", 5], "--eval-every 5: nothing to evaluate; add --eval-reference or --held-out"),
        (["--eval-every", 5, "--eval-reference", "nowhere.npz"], ".*nowhere.npz"),
        (["--eval-reference", "nowhere.npz"], "--eval-reference nowhere.npz: has an effect only with --eval-every"),
        (["--held-out", 4, "--eval-every", 5, "--eval-samples", 9], "--eval-samples 9: has an effect only with"),
        (["--held-out", 50], "--global-batch-size 8 is more than the data set holds without --held-out 50"),
    ],
)
def test_wrong_flags_are_refused(files, tmp_path, capsys, extra, message):
    assert_refused(capsys, message, flags(files[0], tmp_path / "run", *extra, svae=files[1]))


def test_another_number_of_images_left_out_is_another_run(files, tmp_path, capsys):
    run_here(*flags(files[0], tmp_path / "run", "--max-steps", 1, svae=files[1]))
    path = tmp_path / "run/checkpoints/last.pt"
    state = read(path)
    del state["args"].held_out  # as of a run from before that flag
    checkpoint_file.write(state, path.resolve())
    command = flags(files[0], tmp_path / "run", "--max-steps", 2, "--held-out", 4, svae=files[1])
    assert_refused(capsys, "held_out was 0, now 4", command)


def test_mean_does_not_depend_on_who_computes_it(monkeypatch):
    losses = torch.tensor([0.1, 1e8, -1e8, 0.7, 0.2])
    shares = [[(1, {"loss": float(losses[i])}) for i in order] for order in ([0, 2], [1, 3, 4])]
    alone = mean_over_images(lambda part: {"loss": losses[part.start]}, [range(i, i + 1) for i in range(5)])
    monkeypatch.setattr("utils.training.evaluation.gather_objects", lambda mine: shares)
    assert mean_over_images(lambda part: {}, []) == alone
    assert alone["loss"] == pytest.approx(0.2, abs=1e-8)
