"""Training as a whole, in this process: resume, accumulation, bad numbers, wrong flags."""

import argparse
import re
import shutil
import signal
import tarfile
import time

import pytest
import torch

import train
from models import SVAE, SphereAR, from_checkpoint
from models.discriminator import PatchDiscriminator
from tests.helpers import small_run
from tests.helpers.small_run import (
    BATCH,
    STEPS_PER_EPOCH,
    assert_refused,
    differences,
    flags,
    largest_difference,
    run_here,
)
from utils import checkpoint_file
from utils.checkpoint_file import read
from utils.training import optim
from utils.training.checkpoints import CheckpointFolder
from utils.training.preemption import Preemption
from utils.training.tracker import Tracker


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return small_run.write_tar(folder / "train.tar"), small_run.write_svae(folder / "svae.pt")


@pytest.fixture(params=["svae", "ar"])
def command(request, files, tmp_path):
    """command(name, *flags): the command line of a run of either stage in a folder of that name."""
    data, svae = files

    def make(name, *extra):
        return flags(data, tmp_path / name, *extra, svae=svae if request.param == "ar" else None)

    make.stage = request.param
    return make


@pytest.fixture
def ar(files, tmp_path):
    return lambda name, *extra: flags(files[0], tmp_path / name, *extra, svae=files[1])


def test_a_run_leaves_a_model_that_loads(command, tmp_path, capsys):
    state = run_here(*command("run", "--max-steps", STEPS_PER_EPOCH + 1, "--keep-freq", 1))
    names = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert names == {"last.pt", "step_00000006_epoch_0001.pt", "step_00000007.pt"}
    assert (state["step"], state["epochs"], state["step_in_epoch"]) == (7, 1, 1)
    assert state["ema"].keys() == state["model"].keys()
    model = checkpoint_file.load(tmp_path / "run/checkpoints/last.pt", from_checkpoint)
    assert type(model) is (SVAE if command.stage == "svae" else SphereAR)
    lines = [line for line in (tmp_path / "run/log.txt").read_text().splitlines() if line.startswith("step")]
    assert len(lines) == 7
    assert all("grad_norm" in line and "images/s" in line and " lr " in line for line in lines)
    loss = "recon_loss" if command.stage == "svae" else "ar_loss"
    assert all(loss in line for line in lines)
    assert list((tmp_path / "run/tensorboard").iterdir())


def test_no_epoch_is_kept_and_no_average_made_where_they_are_turned_off(ar, tmp_path):
    state = run_here(*ar("run", "--max-steps", STEPS_PER_EPOCH + 2, "--keep-freq", 0, "--ema", -1))
    names = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert "ema" not in state and not any("epoch" in name for name in names)


def test_resume_is_bit_identical(command):
    """Interrupted in an epoch, at its end, and in the next: nothing shows it."""
    steps = STEPS_PER_EPOCH + 3
    for interruption in (3, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 2):
        run_here(*command("parts", "--max-steps", interruption))
    parts = run_here(*command("parts", "--max-steps", steps))
    whole = run_here(*command("whole", "--max-steps", steps))
    assert differences(whole, parts) == []
    assert whole["step"] == parts["step"] == steps


def test_a_complete_run_is_left_alone(ar, tmp_path):
    command = ar("run", "--max-steps", 3)
    run_here(*command)
    written = (tmp_path / "run/checkpoints/last.pt").stat().st_mtime_ns
    run_here(*command)
    assert (tmp_path / "run/checkpoints/last.pt").stat().st_mtime_ns == written


def gradients(state):
    """The first moments: sums of the gradients of all steps, each over its whole batch."""
    return [moments["exp_avg"] for moments in state["optimizer"]["state"].values()]


def test_accumulation_is_the_same_update(ar):
    whole = run_here(*ar("whole", "--max-steps", 3))
    parts = run_here(*ar("parts", "--max-steps", 3, "--grad-accum-steps", 4))
    assert largest_difference(gradients(whole), gradients(parts)) < 1e-5
    assert differences(whole["model"], parts["model"]) != []  # it did run in parts


def test_accumulation_of_the_svae_without_batch_norms(files, tmp_path):
    extra = "--max-steps", 3, "--disc-weight", 0
    whole = run_here(*flags(files[0], tmp_path / "whole", *extra))
    parts = run_here(*flags(files[0], tmp_path / "parts", *extra, "--grad-accum-steps", 2))
    assert largest_difference(gradients(whole), gradients(parts)) < 1e-5


def test_workers_do_not_change_the_run(ar):
    here = run_here(*ar("here", "--max-steps", 2))
    workers = run_here(*ar("workers", "--max-steps", 2, "--num-workers", 2))
    assert differences(here, workers) == []


def test_frozen_svae_stays_and_ema_is_whole(ar, files):
    state, svae = run_here(*ar("run", "--max-steps", 2)), read(files[1])["model"]
    for name, value in svae.items():
        assert torch.equal(state["model"][name], value)
        assert torch.equal(state["ema"][name], value)
    moved = [name for name in state["model"] if not torch.equal(state["model"][name], state["ema"][name])]
    assert moved and not any(name.startswith("vae.") for name in moved)


def test_discriminator_starts_when_told_and_is_spared_in_the_generators_pass(files, tmp_path, monkeypatch):
    calls = []
    forward = PatchDiscriminator.forward

    def spy(self, images):
        calls.append((len(seen) + 1, next(self.parameters()).requires_grad))
        return forward(self, images)

    seen = []
    add = Tracker.add
    monkeypatch.setattr(PatchDiscriminator, "forward", spy)
    monkeypatch.setattr(Tracker, "add", lambda *a, **named: (seen.append(1), add(*a, **named))[1])
    state = run_here(*flags(files[0], tmp_path / "run", "--max-steps", 3, "--disc-start", 3))
    assert calls == [(3, False), (3, True), (3, True)]  # step index 2: 2 + 1 >= 3; generator, then real and fake
    assert state["discriminator"]


def unpack(tar, folder):
    """A tar of class tars as a folder of class folders."""
    with tarfile.open(tar) as outer:
        for member in outer:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                inner.extractall(folder / member.name.removesuffix(".tar"), filter="data")
    return folder


def poison(monkeypatch, steps):
    """Make the AR loss of chosen steps (by index, of one run from its start) infinite."""
    forward, calls = SphereAR.forward, iter(range(1000))

    def poisoned(*inputs):
        return forward(*inputs) * (float("inf") if next(calls) in steps else 1)

    monkeypatch.setattr(SphereAR, "forward", poisoned)


def test_a_bad_step_is_skipped_and_named(ar, tmp_path, monkeypatch):
    before = run_here(*ar("before", "--max-steps", 2))
    with monkeypatch.context() as patch:
        poison(patch, {2})
        skipped = run_here(*ar("skipped", "--max-steps", 3))
    assert differences(before["model"], skipped["model"]) == []
    assert differences(before["optimizer"]["state"], skipped["optimizer"]["state"]) == []
    log = (tmp_path / "skipped/log.txt").read_text()
    line = next(line for line in log.splitlines() if "skipped" in line)
    assert line.startswith("step 3:")
    assert len(set(line.split("[")[1].rstrip("]").split(", "))) == BATCH


def test_too_many_bad_steps_stop_with_a_checkpoint_from_before(ar, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {1, 3, 4, 5, 6})
    assert train.main(ar("run", "--max-steps", 20, "--max-skipped-steps", 3, "--save-every", 1)) == 1
    assert re.search(r"3 updates in a row.*step_00000003\.pt", capsys.readouterr().err)
    state = read(tmp_path / "run/checkpoints/last.pt")
    assert state["step"] == 3
    assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--global-batch-size", 9, "--grad-accum-steps", 2], r"--global-batch-size 9 must be a multiple.* 8 would do"),
        (["--global-batch-size", 64], "--global-batch-size 64"),
        (["--warmup-steps", 21, "--max-steps", 20], r"--warmup-steps 21: the run has only 20 steps; lower it"),
        (["--trained-vae", "nowhere.pt"], r"--trained-vae .*nowhere.pt: no such checkpoint"),
        (["--vae-only"], "--trained-vae .* leave it"),
        (["--latent-dim", 16], r"--latent-dim 16: the S-VAE .* was trained with 8"),
        (["--image-size", 64], r"--image-size 64: the S-VAE .* was trained with 32"),
        (["--mixed-precision", "fp16"], "--mixed-precision fp16"),
        (["--ema", 1.0], r"--ema: 1.0 must lie in \[0, 1\), or be -1 for none"),
        (["--num-classes", 5], "--num-classes"),
        (["--decay-start", 1, "--warmup-steps", 2], "--decay-start 1: must not be before"),
        (["--data-path", "nowhere.tar"], "nowhere.tar: no such file or folder"),
        (["--weight-decay", -1], "--weight-decay: -1 must be at least 0"),
        (["--sample-every", -5], "--sample-every: -5"),
        (["--beta1", 2], r"--beta1: 2 must lie in \[0.0, 1.0\)"),
        (["--class-dropout", 2], "--class-dropout: 2"),
        (["--patch-size", 3], "--patch-size: .*3"),
        (["--cls-token-num", 0], "--cls-token-num: 0"),
        (["--global-seed", -1], "--global-seed/--seed: -1"),
        (["--results-dir", "/proc/nowhere"], "--results-dir /proc/nowhere: cannot be written"),
    ],
)
def test_wrong_flags_are_refused_with_the_remedy(ar, capsys, extra, message):
    assert_refused(capsys, message, ar("run", *extra))


def test_ar_needs_an_svae(files, tmp_path, capsys):
    command = flags(files[0], tmp_path, svae=files[1])
    where = command.index("--trained-vae")
    del command[where : where + 2]
    assert_refused(capsys, "--trained-vae: AR training needs", command)


def test_another_run_in_the_same_folder_is_refused(ar, files, tmp_path, capsys):
    run_here(*ar("run", "--max-steps", 1))
    assert_refused(capsys, r"ema was 0.9, now 0.5", ar("run", "--max-steps", 2, "--ema", 0.5))
    assert_refused(
        capsys, "architecture: num_class_tokens was 4, now 2", ar("run", "--max-steps", 2, "--cls-token-num", 2)
    )
    assert_refused(capsys, "vae_only was False, now True", flags(files[0], tmp_path / "run", "--max-steps", 2))
    other = read(files[1])
    torch.save({**other, "model": {name: value + 1 for name, value in other["model"].items()}}, tmp_path / "other.pt")
    assert_refused(
        capsys,
        r"--trained-vae .*other.pt: other weights",
        ar("run", "--max-steps", 2, "--trained-vae", tmp_path / "other.pt"),
    )
    shutil.copytree(unpack(files[0], tmp_path / "folder"), tmp_path / "fewer")
    next((tmp_path / "fewer").glob("*/*")).unlink()
    assert_refused(
        capsys, "the number of images was 52, now 51", ar("run", "--max-steps", 2, "--data-path", tmp_path / "fewer")
    )


def test_a_lower_learning_rate_may_continue_a_run(ar, capsys):
    run_here(*ar("run", "--max-steps", 1))
    run_here(*ar("run", "--max-steps", 2, "--lr", 1e-4))
    assert "continuing with another --lr: 0.0001 instead of 0.001" in capsys.readouterr().out


def test_skipped_steps_do_not_cost_an_epochs_checkpoint(ar, tmp_path, monkeypatch):
    poison(monkeypatch, {STEPS_PER_EPOCH - 1})
    run_here(*ar("run", "--max-steps", STEPS_PER_EPOCH + 1, "--keep-freq", 1))
    assert read(tmp_path / f"run/checkpoints/step_{STEPS_PER_EPOCH:08d}_epoch_0001.pt")["step"] == STEPS_PER_EPOCH


@pytest.mark.parametrize("disk_full", [False, True])
def test_a_signal_in_a_skipped_step_still_saves_and_says_from_where_to_continue(
    ar, tmp_path, monkeypatch, capsys, disk_full
):
    poison(monkeypatch, {2})
    requested = Preemption.requested
    monkeypatch.setattr(Preemption, "requested", lambda self: requested(self) or self.calls() == 3)
    calls = iter(range(1, 100))
    monkeypatch.setattr(Preemption, "calls", lambda self: next(calls), raising=False)
    if disk_full:
        monkeypatch.setattr(checkpoint_file, "write", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    train.main(ar("run", "--max-steps", 9, "--save-every", 9))
    assert f"continues from {'the start' if disk_full else 'step 3'}" in capsys.readouterr().out
    assert (tmp_path / "run/checkpoints/step_00000003.pt").exists() is not disk_full


def test_foreign_vgg_weights_are_refused(files, tmp_path, capsys):
    assert_refused(
        capsys, "--vgg-weights", flags(files[0], tmp_path / "run", "--perceptual-weight", 1, "--vgg-weights", files[1])
    )


def test_damaged_newest_checkpoint_gives_way_to_the_one_before(ar, tmp_path, capsys):
    whole = run_here(*ar("whole", "--max-steps", 5))
    run_here(*ar("run", "--max-steps", 4, "--save-every", 1))
    newest = tmp_path / "run/checkpoints/step_00000004.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert differences(whole, run_here(*ar("run", "--max-steps", 5))) == []
    assert "skipped a checkpoint" in capsys.readouterr().err


def test_full_disk_does_not_stop_training(ar, tmp_path, monkeypatch, capsys):
    write = CheckpointFolder._write

    def full(folder, state, path):
        if state["step"] in (2, 3):
            monkeypatch.setattr("utils.checkpoint_file.torch.save", disk_full)
        else:
            monkeypatch.undo()
        write(folder, state, path)

    def disk_full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointFolder, "_write", full)
        run_here(*ar("run", "--max-steps", 4, "--save-every", 1))
    error = capsys.readouterr().err
    assert error.count("could not save") == 2
    assert "step_00000001.pt" in error
    assert {p.name for p in (tmp_path / "run/checkpoints").iterdir()} == {
        "last.pt", "step_00000001.pt", "step_00000004.pt",
    }  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_leaves_a_checkpoint_and_the_same_command_continues(ar, tmp_path, number):
    command = ar("run", "--max-steps", 1000)
    process = small_run.start(*command)
    small_run.wait_for(process, "   2/1000")
    sent = time.monotonic()
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - sent < 25
    assert process.returncode == 128 + number, output
    stopped_at = read(tmp_path / "run/checkpoints/last.pt")["step"]
    assert 2 <= stopped_at < 100
    parts = run_here(*ar("run", "--max-steps", stopped_at + 2))
    assert differences(parts, run_here(*ar("whole", "--max-steps", stopped_at + 2))) == []


def test_a_signal_in_a_step_that_does_not_end(ar, tmp_path):
    """As in compilation: the watcher saves the last whole step and ends the process."""
    code = (
        "import sys, time, train, utils.training.preemption as p\n"
        "from models import SphereAR\n"
        "p.Preemption.__init__.__defaults__ = (1.0,)\n"
        "forward, steps = SphereAR.forward, iter(range(9))\n"
        "def slow(*inputs):\n"
        "    if next(steps) == 3:\n"
        "        print('stuck', flush=True); time.sleep(100)\n"
        "    return forward(*inputs)\n"
        "SphereAR.forward = slow\n"
        "sys.exit(train.main(sys.argv[2:]))\n"
    )
    command = ar("run", "--max-steps", 5)
    process = small_run.start(*command, launcher=("-c", code))
    small_run.wait_for(process, "stuck")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert read(tmp_path / "run/checkpoints/last.pt")["step"] == 3
    assert differences(run_here(*command), run_here(*ar("whole", "--max-steps", 5))) == []


def test_previews_do_not_disturb_training(command):
    plain = run_here(*command("plain", "--max-steps", 2))
    with_previews = run_here(*command("previews", "--max-steps", 2, "--sample-every", 1))
    assert differences(plain, with_previews) == []


def test_bf16_trains(command):
    state = run_here(*command("run", "--max-steps", 3, "--mixed-precision", "bf16"))
    assert all(value.isfinite().all() for value in state["model"].values() if value.is_floating_point())


def test_weights_that_are_not_finite_are_never_a_checkpoint(ar, tmp_path, monkeypatch, capsys):
    """Their gradients may have been, as with a learning rate that is far too high."""
    add, steps = Tracker.add, iter(range(1, 9))

    def overflow(tracker, *metrics, **named):
        if next(steps) == 3:
            optimizers[0].param_groups[0]["params"][0].data[0] = float("inf")
        add(tracker, *metrics, **named)

    optimizers, update = [], optim.update
    monkeypatch.setattr(
        optim, "update", lambda optimizer, *a, **n: (optimizers.append(optimizer), update(optimizer, *a, **n))[1]
    )
    monkeypatch.setattr(Tracker, "add", overflow)
    assert train.main(ar("run", "--max-steps", 5, "--save-every", 1)) == 1
    assert re.search(r"weights are not finite after step 3.*step_00000002\.pt", capsys.readouterr().err)
    assert read(tmp_path / "run/checkpoints/last.pt")["step"] == 2


def test_a_log_that_cannot_be_written_stops_nothing(ar, tmp_path, monkeypatch, capsys):
    """log.txt on a full disk (told once), and TensorBoard's thread ended by one."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.txt").symlink_to("/dev/full")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
    assert train.main(ar("run", "--max-steps", 4)) == 0
    error = capsys.readouterr().err
    assert error.count("log.txt: No space left on device; training goes on") == 1
    assert error.count("could not write for TensorBoard") == 1


def test_two_runs_in_one_folder_are_refused(ar, tmp_path, capsys):
    process = small_run.start(*ar("run", "--max-steps", 1000, "--num-workers", 1))
    small_run.wait_for(process, " 2/1000")
    assert_refused(capsys, rf"--results-dir .* is in use by process {process.pid} on ", ar("run", "--max-steps", 3))
    process.kill()  # its loader's worker may outlive it for a moment, but does not hold the folder
    process.communicate()
    assert train.main(ar("run", "--max-steps", 1000, "--epochs", 1)) == 0


@pytest.mark.parametrize("moment", [0.3, 1.0, 2.0, 3.0])
def test_ctrl_c_in_the_first_seconds_leaves_no_traceback(ar, moment):
    process = small_run.start(*ar("run", "--max-steps", 1000))
    time.sleep(moment)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT), output
    assert "Traceback" not in output


def test_a_state_dict_of_another_architecture_is_one_line(ar, files, tmp_path, capsys):
    state = read(files[1])
    state["model"] = {
        name.replace("encoder.layers.0", "encoder.layers.7"): value for name, value in state["model"].items()
    }
    torch.save(state, tmp_path / "other.pt")
    assert_refused(capsys, r"--trained-vae .*other.pt: .* missing", ar("run", "--trained-vae", tmp_path / "other.pt"))


@pytest.mark.parametrize("seed", [2**64 - 1, 2**63])
def test_seeds_of_64_bits(ar, seed):
    run_here(*ar("run", "--max-steps", 1, "--global-seed", seed))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (["--disc-weight", 0.5, "--perceptual-weight", 0], "--image-size 8: the discriminator needs 32"),
        (
            ["--disc-weight", 0, "--perceptual-weight", 1],
            "--image-size 8: LPIPS needs 16; or set --perceptual-weight 0",
        ),
    ],
)
def test_images_too_small_for_a_loss_are_refused(files, tmp_path, weights, message, capsys):
    command = flags(files[0], tmp_path / "run", "--image-size", 8, *weights)
    assert train.main(command) == 2
    assert message in capsys.readouterr().err


def test_a_run_in_which_no_update_was_made_is_no_success(ar, tmp_path, monkeypatch, capsys):
    run_here(*ar("run", "--max-steps", 1))
    poison(monkeypatch, {0, 1, 2})
    assert train.main(ar("run", "--max-steps", 3)) == 1
    error = capsys.readouterr().err
    assert re.search(r"no update was made: all 2 were not finite; stopped.*step_00000001\.pt.*a lower --lr cont", error)
    assert read(tmp_path / "run/checkpoints/last.pt")["step"] == 1


def test_a_refused_command_leaves_no_folder(ar, tmp_path, capsys):
    assert_refused(capsys, "nowhere.tar: no such file", ar("run", "--data-path", "nowhere.tar"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("rng", torch.zeros(3)), ("rng", 5), ("scaler", 5), ("scaler", {"scale": "x"}), ("optimizer", [1]),
        ("ema", {"norm.weight": torch.ones(1)}), ("config", {"num_layers": 2}), ("args", argparse.Namespace()),
        ("model", {"norm.weight": torch.ones(1)}),
    ],
)  # fmt: skip
def test_a_checkpoint_whose_content_does_not_fit_is_one_line(ar, tmp_path, capsys, entry, value):
    path = tmp_path / "run/checkpoints/step_00000001.pt"
    if not (tmp_path.parent / "whole.pt").exists():
        run_here(*ar("run", "--max-steps", 1))
        shutil.copy(path, tmp_path.parent / "whole.pt")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**read(tmp_path.parent / "whole.pt"), entry: value}, path)
    assert_refused(capsys, r"(step_00000001\.pt|--trained-vae)", ar("run", "--max-steps", 2))
