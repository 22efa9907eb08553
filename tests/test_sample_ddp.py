"""sample_ddp.py as a command: one result whatever the machine, never lost, clear errors."""

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import models
import sample_ddp
from models import PRESETS, SamplingSettings, SphereAR, checkpoint_state, config_to_dict
from sample_ddp import decode, encode, generate, load, main
from tests.helpers.nano import stirred_nano
from tests.helpers.sampling import (
    calm_nano,
    load_images,
    sample_here,
    start,
    wait_for_first_shard,
    write_checkpoint,
)
from utils import checkpoint_file
from utils.files import sha256
from utils.sampling import few_rows, shards
from utils.sampling.draws import compiled_normals
from utils.sampling.run_folder import key_of


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("ckpt") / "nano.pt")


@pytest.fixture(autouse=True)
def one_thread():
    """As under torchrun, so that results compare bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def sample(ckpt, tmp_path, monkeypatch):
    """sample(folder, flags...) runs the script in this process -> (exit code, folder)."""
    monkeypatch.chdir(tmp_path)

    def run(folder, *flags):
        return sample_here(ckpt, folder, *flags), tmp_path / folder

    return run


# ---- one result ------------------------------------------------------------------------------------------------------


def test_a_run_leaves_exactly_its_images(sample, capsys):
    code, folder = sample("run", "--num-fid-samples", 5, "--per-proc-batch-size", 2, "--to-npz", "--save-images", "png")
    images, labels = load_images(folder)
    assert code == 0
    assert images.shape == (5, 32, 32, 3) and images.dtype == np.uint8
    assert labels.tolist() == [1, 8, 3, 1, 8]
    assert len(np.unique(images.reshape(5, -1), axis=0)) == 5
    assert sorted(path.name for path in folder.iterdir()) == [
        "contact_sheet.png",
        "run.json",
        "samples.json",
        "samples.npz",
    ]
    for index, image in enumerate(images):
        assert (np.asarray(Image.open(folder.parent / "png" / f"{index:06d}.png")) == image).all()
    receipt = json.loads((folder / "samples.json").read_text())
    assert receipt["settings"]["--cfg-scale"] == 1.5 and receipt["images_in_last_run"] == 5
    assert receipt["settings"]["--tf32"] is False and receipt["compile"] is False and receipt["linear_ways"] == {}
    assert receipt["images_per_second"] > 0 and receipt["versions"]["torch"] == torch.__version__
    assert "5 images" in capsys.readouterr().out
    assert sample("run", "--num-fid-samples", 5, "--save-images", "later")[0] == 0
    assert "already complete" in capsys.readouterr().out
    for path in (folder.parent / "png").iterdir():
        assert (folder.parent / "later" / path.name).read_bytes() == path.read_bytes()


def test_the_batch_size_changes_nothing_but_rounding(sample):
    flags = "--num-fid-samples", 8, "--to-npz"
    three, labels3 = load_images(sample("three", *flags, "--per-proc-batch-size", 3)[1])
    eight, labels8 = load_images(sample("eight", *flags, "--per-proc-batch-size", 8)[1])
    assert (labels3 == labels8).all()
    assert np.abs(three.astype(int) - eight).max() <= 1
    assert (three == eight).mean() > 0.99


def test_annealed_steps_are_recorded_as_they_were_asked_for(sample, capsys):
    code, folder = sample("run", "--num-fid-samples", 2, "--num-sampling-steps", "4:2", "--sampler", "ab2", "--to-npz")
    assert code == 0
    assert json.loads((folder / "samples.json").read_text())["settings"]["--num-sampling-steps"] == "4:2"
    code, other = sample("other", "--num-fid-samples", 2, "--num-sampling-steps", 4, "--sampler", "ab2", "--to-npz")
    assert code == 0 and (load_images(folder)[0] != load_images(other)[0]).any()
    assert sample("run", "--num-fid-samples", 2, "--num-sampling-steps", "4:3", "--sampler", "ab2")[0] == 2
    assert "--num-sampling-steps: 4:2 there, 4:3 now" in capsys.readouterr().err


def test_the_released_conversion_to_bytes_is_asked_for(sample, capsys):
    ours, released = (
        load_images(sample(name, "--num-fid-samples", 4, "--to-npz", *flags)[1])[0].astype(int)
        for name, flags in (("ours", ()), ("released", ("--reference-uint8",)))
    )
    assert np.abs(released - ours).max() <= 1 and 0.05 < (released - ours).mean() < 0.6
    assert sample("ours", "--num-fid-samples", 4, "--reference-uint8")[0] == 2
    assert "--reference-uint8: False there, True now" in capsys.readouterr().err


def test_the_receipt_names_the_linear_layers_ways(sample, monkeypatch):
    monkeypatch.setattr(few_rows, "LARGE", 0)
    code, folder = sample("run", "--num-fid-samples", 2)
    ways = json.loads((folder / "samples.json").read_text())["linear_ways"]
    assert code == 0 and list(ways) == ["4"] and ways == json.loads((folder / "run.json").read_text())["linear_ways"]


def test_bf16_on_a_cpu_prints_no_warning(sample, recwarn):
    torch.set_warn_always(True)  # otherwise PyTorch warns once per process
    try:
        assert sample("run", "--num-fid-samples", 1, "--mixed-precision", "bf16")[0] == 0
    finally:
        torch.set_warn_always(False)
    assert not [warning for warning in recwarn if "Mismatch dtype" in str(warning.message)]


def test_two_processes_give_the_bytes_of_one(ckpt, sample):
    flags = "--num-fid-samples", 7, "--per-proc-batch-size", 2, "--to-npz"
    _, one = sample("one", *flags)
    two = one.parent / "two"
    process = start(ckpt, two, *flags, processes=2)
    errors = process.communicate(timeout=100)[1]
    assert process.returncode == 0, errors
    assert (two / "samples.npz").read_bytes() == (one / "samples.npz").read_bytes()
    assert json.loads((two / "samples.json").read_text())["processes"] == 2


# ---- in Python -------------------------------------------------------------------------------------------------------

FEW = SamplingSettings(cfg_scale=1.5, num_sampling_steps=3)  # as tests.helpers.sampling.BRIEF


def real_images(count=3, size=32):
    rng = np.random.default_rng(0)
    return np.repeat(np.repeat(rng.integers(0, 256, (count, size // 8, size // 8, 3), np.uint8), 8, 1), 8, 2)


def test_five_lines_of_python_give_the_commands_images(sample, ckpt):
    images, labels = load_images(sample("run", "--num-fid-samples", 3, "--to-npz", "--global-seed", 7)[1])
    model = load(ckpt)
    assert (generate(model, [1, 8, 3], FEW, seed=7) == images).all() and labels.tolist() == [1, 8, 3]
    assert (generate(model, torch.tensor(labels), FEW, seed=8) != images).any()
    for wrong in (-1, 11):
        with pytest.raises(ValueError, match="labels must lie in 0 to 10"):
            generate(model, [wrong], FEW)
    for wrong in ([], [0.5], [[1]]):
        with pytest.raises(ValueError, match="labels must be whole numbers"):
            generate(model, wrong, FEW)


def test_images_become_tokens_and_back(ckpt):
    model, images = load(ckpt), real_images()
    tokens = encode(model, images)
    assert tokens.shape == (3, 16, 8) and torch.allclose(tokens.norm(dim=-1), torch.tensor(8**0.5))
    assert torch.equal(tokens, models.encode(model, torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1))
    again = decode(model, tokens)
    assert again.dtype == np.uint8 and (again == decode(model.vae, encode(model.vae, images))).all()
    for wrong in (images / 255, images[0]):
        with pytest.raises(ValueError, match=r"images must be uint8 \(B, S, S, 3\)"):
            encode(model, wrong)
    with pytest.raises(FloatingPointError, match="image 1 has values that are not finite"):
        decode(model, torch.cat([tokens[:1], tokens[1:] * torch.nan]))


def test_importing_and_loading_changes_nothing_and_brings_nothing_slow(ckpt):
    code = (
        "import signal, sys\n"
        "before = signal.getsignal(signal.SIGINT)\n"
        "from sample_ddp import load, generate, encode, decode\n"
        "load(sys.argv[1])\n"
        "assert signal.getsignal(signal.SIGINT) is before\n"
        "slow = {'torch._dynamo', 'torchvision', 'scipy', 'matplotlib', 'huggingface_hub', 'safetensors'}\n"
        "assert not slow & sys.modules.keys(), slow & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code, ckpt], cwd=Path(__file__).parents[1], check=True)


# ---- completion ------------------------------------------------------------------------------------------------------


def test_real_images_are_continued_from_their_first_tokens(sample, ckpt, tmp_path):
    """All tokens kept is the reconstruction, none is plain sampling, some is what the API gives."""
    np.savez(tmp_path / "real.npz", arr_0=real_images(), arr_1=np.array([1, 8, 3]))  # the classes of BRIEF
    model, tokens = load(ckpt), encode(load(ckpt), real_images())
    plain = load_images(sample("plain", "--num-fid-samples", 3, "--to-npz")[1])[0]

    def completed(name, keep, *flags):
        code, folder = sample(name, "--init-images", tmp_path / "real.npz", "--keep-tokens", keep, "--to-npz", *flags)
        assert code == 0
        return load_images(folder)

    assert (completed("all", 16)[0] == decode(model, tokens)).all()
    assert (completed("none", 0)[0] == plain).all()
    images, labels = completed("some", 6)
    assert (images == generate(model, [1, 8, 3], FEW, prompt=tokens[:, :6])).all() and labels.tolist() == [1, 8, 3]
    assert (images != plain).any() and (images != decode(model, tokens)).any()
    twice, labels = completed("twice", 6, "--num-fid-samples", 5, "--per-proc-batch-size", 3)
    assert (twice[:3] == images).all() and labels.tolist() == [1, 8, 3, 1, 8]
    assert (twice[3] != twice[0]).any()  # the same beginning, other noise
    settings = json.loads((tmp_path / "some" / "run.json").read_text())
    assert settings["--keep-tokens"] == 6 and settings["--init-images sha256"] == sha256(tmp_path / "real.npz")


def test_a_folder_of_pngs_has_no_labels_and_gets_those_asked_for(sample, tmp_path):
    (tmp_path / "png").mkdir()
    for i, image in enumerate(real_images()):
        Image.fromarray(image).save(tmp_path / "png" / f"{i}.png")
    np.savez(tmp_path / "real.npz", arr_0=real_images(), arr_1=np.array([5, 5, 5]))
    results = [
        load_images(sample(f"from-{name}", "--init-images", tmp_path / name, "--keep-tokens", 6, "--to-npz")[1])
        for name in ("png", "real.npz")
    ]
    assert (results[0][0] == results[1][0]).all() and results[0][1].tolist() == results[1][1].tolist() == [1, 8, 3]


@pytest.mark.parametrize("name", ["real.npz", "png"])
def test_real_images_that_change_meanwhile_are_refused(sample, tmp_path, monkeypatch, capsys, name):
    """The checksum in run.json would be of others than those that were continued."""
    np.savez(tmp_path / "real.npz", arr_0=real_images())
    (tmp_path / "png").mkdir()
    for i, image in enumerate(real_images()):
        Image.fromarray(image).save(tmp_path / "png" / f"{i}.png")

    def touch_after(*arguments, read=sample_ddp.first_tokens):
        tokens = read(*arguments)
        os.utime(tmp_path / "real.npz", ns=(1, 1))  # as if it were written to
        os.utime(tmp_path / "png" / "2.png", ns=(1, 1))
        return tokens

    monkeypatch.setattr(sample_ddp, "first_tokens", touch_after)
    flags = "--init-images", tmp_path / name, "--keep-tokens", 6, "--per-proc-batch-size", 2
    assert sample("run", *flags)[0] == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"(real\.npz|2\.png): is no longer the file that was opened", error)


def test_images_that_come_with_labels_keep_them(ckpt, tmp_path):
    np.savez(tmp_path / "real.npz", arr_0=real_images(), arr_1=np.array([5, 0, 9], np.int32))
    flags = "--ckpt", ckpt, "--sample-dir", tmp_path / "run", "--init-images", tmp_path / "real.npz", "--keep-tokens", 6
    assert main([*map(str, flags), "--num-fid-samples", "4", "--sample-steps", "2", "--to-npz"]) == 0
    images, labels = load_images(tmp_path / "run")
    assert labels.tolist() == [5, 0, 9, 5] and labels.dtype == np.int64 and images.shape == (4, 32, 32, 3)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["--labels"] == "arr_1"


@pytest.mark.parametrize(
    "size, flags, message",
    [
        (32, ["--keep-tokens", "4"], "--init-images and --keep-tokens: give both"),
        (32, ["--init-images", "real.npz"], "--init-images and --keep-tokens: give both"),
        (32, ["--init-images", "real.npz", "--keep-tokens", "17"], "--keep-tokens 17: an image has 16 tokens"),
        (40, ["--init-images", "real.npz", "--keep-tokens", "4"], "has 3 images of 40 x 40; the model's are 32 x 32"),
        (32, ["--init-images", "none.npz", "--keep-tokens", "4"], "none.npz: there is no such file"),
        (0, ["--init-images", "real.npz", "--keep-tokens", "4"], "its labels must lie in 0 to 9"),
    ],
)
def test_images_that_cannot_be_continued_are_one_clear_line(sample, tmp_path, capsys, size, flags, message):
    np.savez(tmp_path / "real.npz", arr_0=real_images(size=size or 32), arr_1=np.array([1, 2, 3 if size else 10]))
    assert sample("run", *flags)[0] == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0] and not (tmp_path / "run" / "shards").exists()


# ---- names that users of the released scripts type ------------------------------------------------------------------


def test_released_names_of_flags_mean_the_same(sample, tmp_path):
    ours = load_images(sample("a", "--num-fid-samples", 2, "--to-npz", "--global-seed", 5)[1])[0]
    theirs = load_images(sample("b", "--num-fid-samples", 2, "--to-npz", "--seed", 5, "--sample-steps", 3)[1])[0]
    assert (ours == theirs).all()
    assert (tmp_path / "a" / "run.json").read_text() == (tmp_path / "b" / "run.json").read_text()


def test_the_raw_weights_are_sampled_only_when_asked_for(sample, ckpt, tmp_path):
    averaged = {name: value * 1.1 for name, value in checkpoint_state(calm_nano()).items()}
    both = write_checkpoint(tmp_path / "both.pt", ema=averaged)
    raw = load_images(sample("raw", "--num-fid-samples", 2, "--to-npz")[1])[0]
    images = load_images(sample("no-ema", "--num-fid-samples", 2, "--to-npz", "--ckpt", both, "--no-ema")[1])[0]
    default = load_images(sample("ema", "--num-fid-samples", 2, "--to-npz", "--ckpt", both)[1])[0]
    assert (images == raw).all() and (default != raw).any()
    assert json.loads((tmp_path / "no-ema" / "run.json").read_text())["--no-ema"] is True
    assert "--no-ema" not in json.loads((tmp_path / "ema" / "run.json").read_text())


# ---- never lost ------------------------------------------------------------------------------------------------------


def test_killed_and_resumed_gives_the_bytes_of_an_unbroken_run(ckpt, sample):
    flags = "--num-fid-samples", 24, "--per-proc-batch-size", 2, "--to-npz"
    _, unbroken = sample("unbroken", *flags)
    killed = unbroken.parent / "killed"
    process = start(ckpt, killed, *flags)
    wait_for_first_shard(killed, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    finished = {path: path.stat().st_mtime_ns for path in (killed / "shards").glob("*.npy")}
    assert 0 < len(finished) < 12 and not (killed / "samples.npz").exists()

    write, made = shards.atomic_file, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "atomic_file", lambda path: made.append(path) or write(path))
        assert sample("killed", *flags)[0] == 0
    assert len(made) == 12 - len(finished) + 1  # shards, and the .npz
    assert (killed / "samples.npz").read_bytes() == (unbroken / "samples.npz").read_bytes()


def test_resumes_with_another_batch_size(sample, monkeypatch):
    flags = "--num-fid-samples", 7, "--to-npz"
    unbroken, labels = load_images(sample("unbroken", *flags)[1])

    write = shards.atomic_file

    def full(path):
        if "00000000-" not in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "atomic_file", full)
        assert sample("broken", *flags, "--per-proc-batch-size", 3)[0] == 1
    code, folder = sample("broken", *flags, "--per-proc-batch-size", 5)
    assert code == 0
    images, same = load_images(folder)
    assert (same == labels).all() and np.abs(images.astype(int) - unbroken).max() <= 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_cleanly_and_keep_what_was_finished(ckpt, tmp_path, number):
    process = start(ckpt, tmp_path, "--num-fid-samples", 2000, "--per-proc-batch-size", 2)
    wait_for_first_shard(tmp_path, process)
    sent = time.monotonic()
    process.send_signal(number)
    errors = process.communicate(timeout=25)[1]
    assert time.monotonic() - sent < 10
    assert process.returncode == 128 + number
    assert "finished batches are kept" in errors and "Traceback" not in errors
    assert list((tmp_path / "shards").glob("*.npy")) and not list(tmp_path.rglob(".*.tmp"))


def test_a_contact_sheet_that_fails_costs_no_npz(sample, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("utils.images.class_names", lambda _: 1 / 0)
        sample("run", "--num-fid-samples", 2, "--to-npz")
    code, folder = sample("run", "--num-fid-samples", 2, "--to-npz")
    assert code == 0 and (folder / "contact_sheet.png").exists()
    assert json.loads((folder / "samples.json").read_text())["images_in_last_run"] == 2  # of the first run


def maps(process):
    return Path(f"/proc/{process.pid}/maps").read_text() if process.poll() is None else ""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ctrl_c_in_the_first_seconds_prints_no_traceback(ckpt, tmp_path):
    process = start(ckpt, tmp_path, "--num-fid-samples", 2000)
    while "libtorch" not in maps(process):  # is being imported
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate(timeout=25)[1]
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT)


def children(pid):
    """Processes that a process has started."""
    stats = [path.read_text() for path in Path("/proc").glob("[0-9]*/stat") if path.exists()]
    parents = {int(stat.split()[0]): int(stat.rpartition(")")[2].split()[1]) for stat in stats}
    return [child for child, parent in parents.items() if parent == pid]


@pytest.mark.skipif(sys.platform != "linux", reason="processes end with their parent on Linux only")
def test_when_torchrun_is_killed_its_processes_end_and_the_folder_is_free(sample, ckpt, tmp_path):
    flags = "--num-fid-samples", 2000, "--per-proc-batch-size", 2
    torchrun = start(ckpt, tmp_path / "run", *flags, processes=2)
    wait_for_first_shard(tmp_path / "run", torchrun)
    workers = children(torchrun.pid)
    assert len(workers) == 2
    torchrun.send_signal(signal.SIGKILL)
    torchrun.wait()
    end = time.monotonic() + 20
    while (alive := [pid for pid in workers if Path(f"/proc/{pid}").exists()]) and time.monotonic() < end:
        time.sleep(0.1)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    assert not alive
    again = start(ckpt, tmp_path / "run", *flags)
    count = len(list((tmp_path / "run" / "shards").glob("*.npy")))
    while len(list((tmp_path / "run" / "shards").glob("*.npy"))) <= count:  # it continues
        assert again.poll() is None, again.stderr.read()
        time.sleep(0.05)
    again.kill()
    again.communicate()


@pytest.mark.faults
@pytest.mark.parametrize("processes", [0, 2])
def test_killed_again_and_again_gives_the_bytes_of_an_unbroken_run(ckpt, sample, processes, capsys):
    flags = "--num-fid-samples", 120, "--per-proc-batch-size", 2, "--to-npz"
    _, unbroken = sample("unbroken", *flags)
    broken, draws, kills = unbroken.parent / "broken", random.Random(0), 0
    while True:
        process = start(ckpt, broken, *flags, processes=processes)
        while process.poll() is None and not (broken / ".lock").exists():
            time.sleep(0.01)
        time.sleep(draws.uniform(0, 2))
        pids = [process.pid, *children(process.pid)]
        if process.poll() is not None or kills == 12:
            break
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        process.communicate()
        kills += 1
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors
    with capsys.disabled():
        print(f"\nkilled {kills} times on {max(1, processes)}")
    assert (broken / "samples.npz").read_bytes() == (unbroken / "samples.npz").read_bytes()
    assert sorted(path.name for path in broken.iterdir()) == sorted(path.name for path in unbroken.iterdir())


@pytest.mark.faults
def test_a_disk_that_is_full_costs_nothing_that_was_finished(ckpt, sample, tmp_path, capsys):
    """ENOSPC from a real file system of 1 MB (needs the right to mount)."""
    flags = "--num-fid-samples", 400, "--per-proc-batch-size", 20, "--to-npz"
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs")
    try:
        assert sample("disk/run", *flags)[0] == 1
        assert "No space left on device" in capsys.readouterr().err
        assert len(list((disk / "run" / "shards").glob("*.npy"))) > 10 and not list(disk.rglob(".*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        code, folder = sample("disk/run", *flags)
        assert code == 0 and load_images(folder)[0].shape == (400, 32, 32, 3)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ---- nothing of another run, and nothing taken away ------------------------------------------------------------------


def test_another_runs_pngs_are_not_kept_as_this_runs(sample, tmp_path, capsys):
    assert sample("one", "--num-fid-samples", 2, "--save-images", "png")[0] == 0
    before = (tmp_path / "png" / "000000.png").read_bytes()
    assert sample("two", "--num-fid-samples", 2, "--global-seed", 1, "--save-images", "png")[0] == 2
    assert "--save-images png holds images of another run (--global-seed: 0 there, 1 now)" in capsys.readouterr().err
    assert (tmp_path / "png" / "000000.png").read_bytes() == before
    (tmp_path / "png" / "run.json").unlink()
    assert sample("one", "--num-fid-samples", 2, "--save-images", "png")[0] == 2
    assert "--save-images png holds images, and no run.json" in capsys.readouterr().err


def test_pngs_may_lie_in_the_sample_folder(sample):
    for flags in ((), ("--to-npz",)):
        code, folder = sample("run", "--num-fid-samples", 2, "--save-images", "run", *flags)
        assert code == 0 and (folder / "000001.png").exists()


def test_a_changed_shard_is_made_again(sample, capsys):
    flags = "--num-fid-samples", 4, "--per-proc-batch-size", 2
    _, whole = sample("whole", *flags, "--to-npz")
    _, folder = sample("run", *flags)
    shard = folder / "shards" / "00000002-00000004.npy"
    shard.write_bytes(shard.read_bytes().replace(b"\x80", b"\x81", 1))
    assert sample("run", *flags, "--to-npz")[0] == 0
    assert "00000002-00000004.npy.rejected: damaged, or of another run" in capsys.readouterr().out
    assert (folder / "samples.npz").read_bytes() == (whole / "samples.npz").read_bytes()
    assert [path.name for path in (folder / "shards").iterdir()] == ["00000002-00000004.npy.rejected"]


@pytest.mark.parametrize("content", [b"", b"PK", "another run's"])
def test_a_foreign_or_damaged_npz_is_not_complete(sample, capsys, content):
    _, folder = sample("run", "--num-fid-samples", 2, "--to-npz")
    other = sample("other", "--num-fid-samples", 2, "--global-seed", 1, "--to-npz")[1] / "samples.npz"
    whole = (folder / "samples.npz").read_bytes()
    (folder / "samples.npz").write_bytes(other.read_bytes() if isinstance(content, str) else content)
    capsys.readouterr()
    assert sample("run", "--num-fid-samples", 2, "--to-npz")[0] == 2
    assert "run/samples.npz is damaged, or this run did not make it; move it away" in capsys.readouterr().err
    (folder / "samples.npz").unlink()
    assert sample("run", "--num-fid-samples", 2, "--to-npz")[0] == 0
    assert (folder / "samples.npz").read_bytes() == whole


def test_a_foreign_shards_folder_is_left_alone(sample, tmp_path):
    foreign = tmp_path / "run" / "shards" / "train-00000.tar", tmp_path / "run" / ".cache.tmp"
    foreign[0].parent.mkdir(parents=True)
    for path in foreign:
        path.write_bytes(b"mine")
    for _ in range(2):
        code, folder = sample("run", "--num-fid-samples", 2, "--to-npz")
        assert code == 0 and all(path.read_bytes() == b"mine" for path in foreign)
        assert list((folder / "shards").iterdir()) == [foreign[0]]


# ---- the checkpoint --------------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_the_checkpoint_is_found(sample, ckpt, tmp_path, capsys):
    content = bytearray(ckpt.read_bytes())
    content[len(content) // 3] ^= 1
    (tmp_path / "flipped.pt").write_bytes(content)
    assert sample("run", "--num-fid-samples", 2, "--ckpt", tmp_path / "flipped.pt")[0] == 2
    assert "flipped.pt: not a readable checkpoint" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_link_that_moves_on_changes_nothing(sample, ckpt, tmp_path, monkeypatch):
    _, direct = sample("direct", "--num-fid-samples", 2, "--to-npz")
    link = tmp_path / "last.pt"
    link.symlink_to(ckpt)
    other = write_checkpoint(tmp_path / "other.pt", model=checkpoint_state(stirred_nano()))

    def hash_and_move(path, hash=checkpoint_file.sha256):
        digest = hash(path)
        link.unlink()
        link.symlink_to(other)
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_file, "sha256", hash_and_move)
        code, folder = sample("run", "--num-fid-samples", 2, "--to-npz", "--ckpt", link)
    assert code == 0 and (folder / "samples.npz").read_bytes() == (direct / "samples.npz").read_bytes()
    receipts = [json.loads((folder / "samples.json").read_text()) for folder in (direct, folder)]
    assert receipts[0]["settings"] == receipts[1]["settings"]
    assert receipts[1]["checkpoint"] == str(ckpt.resolve())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("precision", ["none", "bf16"])
def test_checkpoints_of_other_dtypes_are_sampled_from_in_float32(sample, tmp_path, dtype, precision):
    state = checkpoint_state(calm_nano())
    other = {name: value.to(dtype) for name, value in state.items()}
    write_checkpoint(tmp_path / "other.pt", model=other)
    write_checkpoint(tmp_path / "float32.pt", model={name: value.float() for name, value in other.items()})
    flags = "--num-fid-samples", 2, "--to-npz", "--mixed-precision", precision, "--ckpt"
    images = [load_images(sample(name, *flags, tmp_path / f"{name}.pt")[1])[0] for name in ("other", "float32")]
    assert (images[0] == images[1]).all()


# ---- clear errors ----------------------------------------------------------------------------------------------------


def test_another_setting_in_the_same_folder_is_refused_by_name(sample, capsys):
    assert sample("run", "--num-fid-samples", 2)[0] == 0
    code, folder = sample("run", "--num-fid-samples", 2, "--global-seed", 3, "--sampler", "ode")
    message = capsys.readouterr().err
    assert code == 2 and len(list((folder / "shards").iterdir())) == 1
    assert "--global-seed: 0 there, 3 now" in message and "--sampler: sde there, ode now" in message
    assert "--cfg-scale" not in message
    code, folder = sample("run", "--num-fid-samples", 2, "--to-npz", "--per-proc-batch-size", 1)  # no such setting
    assert code == 0 and load_images(folder)[0].shape == (2, 32, 32, 3)


def test_a_run_without_images_gives_way(sample, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(models, "generate_tokens", lambda *_: 1 / 0)
        sample("run", "--num-fid-samples", 2)
    assert sample("run", "--num-fid-samples", 2, "--save-images", __file__)[0] == 2
    code, folder = sample("run", "--num-fid-samples", 2, "--global-seed", 3)
    assert code == 0 and json.loads((folder / "run.json").read_text())["--global-seed"] == 3


def test_two_runs_do_not_share_a_folder(sample, ckpt, capsys):
    _, folder = sample("run", "--num-fid-samples", 2)
    process = start(ckpt, folder.parent / "other", "--num-fid-samples", 2000, "--per-proc-batch-size", 2)
    wait_for_first_shard(folder.parent / "other", process)
    assert sample("other", "--num-fid-samples", 2000)[0] == 2
    assert f"--sample-dir other is in use by process {process.pid} on " in capsys.readouterr().err
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--cfg-scale", "0.5"], "--cfg-scale: 0.5 must be at least 1"),
        (["--cfg-scale", "inf"], "--cfg-scale: inf must be at least 1"),
        (["--class-ids", "10"], "--class-ids 10 must lie in 0 to 9"),
        (["--class-ids", "dog"], "--class-ids: dog must be numbers"),
        (["--num-fid-samples", "0"], "--num-fid-samples: 0 must lie in [1, 10000000]"),
        (["--per-proc-batch-size", "0"], "--per-proc-batch-size: 0 must be at least 1"),
        (["--global-seed", "-1"], "--global-seed/--seed: -1 must lie in 0 to 2^64 - 1"),
        (["--model", "SphereAR-B"], "--model SphereAR-B does not fit"),
        (["--ckpt", "missing.pt"], "missing.pt: no such checkpoint"),
        (["--ckpt", __file__], "not a readable checkpoint"),
        (["--num-fid-samples", "99999999999"], "--num-fid-samples: 99999999999 must lie in [1, 10000000]"),
        (
            ["--num-sampling-steps", "1000000000"],
            "/--sample-steps: 1000000000 must lie in [1, 10000]",
        ),
        (["--num-sampling-steps", "50:0"], "/--sample-steps: 0 must lie in [1, 10000]"),
        (["--num-sampling-steps", "50:20:5"], "/--sample-steps: 20:5 is no whole number"),
        (["--labels", "balanced"], "--labels: not allowed with argument --class-ids"),
        (["--global-seed", str(2**64)], f"--global-seed/--seed: {2**64} must lie in 0 to 2^64 - 1"),
        (["--sample-dir", __file__], "test_sample_ddp.py"),
    ],
)
def test_bad_values_are_one_clear_line(sample, capsys, flags, message):
    code, folder = sample("run", "--num-fid-samples", 2, *flags)
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(lines) == 1 and lines[0].startswith("sample_ddp.py: error: ") and message in lines[0]
    assert not folder.exists()


def test_an_svae_checkpoint_is_refused(sample, tmp_path, capsys):
    vae = SphereAR(PRESETS["SphereAR-Nano"]).vae
    torch.save({"model": checkpoint_state(vae), "config": config_to_dict(vae.config)}, tmp_path / "vae.pt")
    assert sample("run", "--ckpt", tmp_path / "vae.pt")[0] == 2
    assert "is an S-VAE" in capsys.readouterr().err


def test_a_full_disk_damages_nothing(sample, monkeypatch, capsys):
    def full(file, _):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("utils.sampling.shards.np.lib.format.write_array_header_1_0", full)
    code, folder = sample("run", "--num-fid-samples", 2)
    assert code == 1 and "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert not list((folder / "shards").iterdir())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_become_no_images(sample, monkeypatch, capsys, value):
    def broken(*args, generate=models.generate_tokens):
        tokens = generate(*args)
        tokens[1, 5, 0] = value
        return tokens

    monkeypatch.setattr(models, "generate_tokens", broken)
    code, folder = sample("run", "--num-fid-samples", 3)
    message = capsys.readouterr().err.splitlines()[-1]
    assert code == 1 and not list((folder / "shards").iterdir())
    assert message.endswith("nano.pt: image 1 has values that are not finite; use another checkpoint")
    assert sample("run", "--num-fid-samples", 3, "--mixed-precision", "bf16")[0] == 1
    assert "use --mixed-precision none or another checkpoint" in capsys.readouterr().err


def test_pixels_that_are_not_finite_become_no_images(sample, monkeypatch, capsys):
    def broken(model, tokens, decode=models.decode):
        for part in decode(model, tokens):
            part[-1, 0, 3, 3] = torch.nan
            yield part

    monkeypatch.setattr(models, "decode", broken)
    monkeypatch.setattr("models.generation.PIXELS_AT_ONCE", {"cpu": 2 * 32 * 32})
    code, folder = sample("run", "--num-fid-samples", 3)
    assert code == 1 and not list((folder / "shards").iterdir())
    assert "image 1 has values that are not finite" in capsys.readouterr().err


# ---- faster ways to the same images ----------------------------------------------------------------------------------


def brief(sample, folder, *flags):
    code, folder = sample(folder, "--num-fid-samples", 5, "--per-proc-batch-size", 3, "--to-npz", *flags)
    assert code == 0
    return load_images(folder)[0].astype(int)


def test_the_script_compiles_once_and_fills_up_the_last_batch(sample, monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    compiled_normals.cache_clear()
    compiled = brief(sample, "compiled", "--compile")
    # as in test_graphs; noise for either purpose; the decoder: block, stem, last convolution; none for the last batch
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 8 + 2 + 3
    assert np.abs(compiled - brief(sample, "plain", "--no-compile")).max() <= 1
    compiled_normals.cache_clear()


def test_a_run_keeps_to_the_linear_ways_it_chose(sample, tmp_path, monkeypatch):
    asked, way = [], {"way": "columns"}
    monkeypatch.setattr(few_rows, "LARGE", 0)
    monkeypatch.setattr(few_rows, "fastest_way", lambda linears, rows: asked.append(rows) or (way["way"], {}))
    images = brief(sample, "run")
    assert set(asked) == {6}
    stored = json.loads((tmp_path / "run" / "run.json").read_text())["linear_ways"]
    assert list(stored) == ["6"] and set(stored["6"].values()) == {"columns"}
    (tmp_path / "run" / "samples.npz").unlink()
    (tmp_path / "run" / "shards").mkdir()
    run = json.loads((tmp_path / "run" / "samples.json").read_text())["settings"]
    shards.write_shard(tmp_path / "run" / "shards", 3, images[3:].astype(np.uint8), key_of(run))  # as if killed
    asked.clear()
    assert (brief(sample, "run") == images).all() and not asked
    assert np.abs(brief(sample, "plain", "--no-compile") - images).max() <= 1 and not asked


def test_too_large_a_batch_for_the_memory_is_one_line(sample, monkeypatch, capsys):
    def allocate(*_):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 221184000000 bytes. Error code 12 (Cannot allocate memory)\nmore lines"
        )

    monkeypatch.setattr(models, "generate_tokens", allocate)
    assert sample("run", "--num-fid-samples", 2)[0] == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "sample_ddp.py: error: can't allocate memory: you tried to allocate 221184000000 bytes. Error code 12 (Cannot "
        "allocate memory). Lower --per-proc-batch-size."
    )


def test_cuda_graphs_need_a_gpu_and_are_no_part_of_compile(sample, capsys):
    assert sample("run", "--num-fid-samples", 1, "--cuda-graphs")[0] == 2
    assert "--cuda-graphs: needs a GPU; leave it out" in capsys.readouterr().err
    code, folder = sample("run", "--num-fid-samples", 1, "--no-cuda-graphs", "--no-compile")
    assert code == 0 and json.loads((folder / "samples.json").read_text())["cuda_graphs"] is False


def test_the_receipt_names_labels_or_classes(sample, ckpt, capsys):
    settings = json.loads((sample("run", "--num-fid-samples", 1)[1] / "samples.json").read_text())["settings"]
    assert settings["--labels"] is None and settings["--class-ids"] == [1, 8, 3]
