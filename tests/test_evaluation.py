"""Evaluation while training: it changes nothing, is done once per step, and equals what the scripts give."""

import json

import numpy as np
import pytest
import torch

from models import SamplingSettings
from tests.helpers import small_run
from tests.helpers.evaluation import Instant, random_images, use_instant
from tests.helpers.small_run import differences, flags, run_here
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


def test_mean_does_not_depend_on_who_computes_it(monkeypatch):
    losses = torch.tensor([0.1, 1e8, -1e8, 0.7, 0.2])
    shares = [[(1, {"loss": float(losses[i])}) for i in order] for order in ([0, 2], [1, 3, 4])]
    alone = mean_over_images(lambda part: {"loss": losses[part.start]}, [range(i, i + 1) for i in range(5)])
    monkeypatch.setattr("utils.training.evaluation.gather_objects", lambda mine: shares)
    assert mean_over_images(lambda part: {}, []) == alone
    assert alone["loss"] == pytest.approx(0.2, abs=1e-8)
