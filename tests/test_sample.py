"""sample_ddp.py: one result whatever the machine, never lost, clear errors. A random SphereAR-Nano stands in."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample_ddp
from models import PRESETS, SphereAR, checkpoint_state, config_to_dict
from utils.noise import Purpose, normals
from utils.sampling.run_folder import open_run

ROOT = Path(__file__).parents[1]
BRIEF = ["--num-sampling-steps", "3", "--cfg-scale", "1.5", "--class-ids", "1,8,3"]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    torch.manual_seed(0)
    model = SphereAR(PRESETS["SphereAR-Nano"])
    for parameter in model.parameters():
        if not parameter.any():  # a fresh head is exactly 0
            torch.nn.init.normal_(parameter, std=0.05)
    path = tmp_path_factory.mktemp("ckpt") / "nano.pt"
    torch.save({"model": checkpoint_state(model), "config": config_to_dict(model.config)}, path)
    return path


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """As under torchrun, so that results compare bit for bit; and pytest keeps its signal handlers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(sample_ddp, "raise_on_signals", lambda: None)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def sample(ckpt, tmp_path, monkeypatch):
    """sample(folder, flags...) runs the script in this process -> (exit code, folder)."""
    monkeypatch.chdir(tmp_path)

    def run(folder, *flags):
        argv = ["--ckpt", str(ckpt), "--sample-dir", str(folder), *BRIEF, *map(str, flags)]
        return sample_ddp.main(argv), tmp_path / folder

    return run


def start(ckpt, folder, *flags, processes=0):
    """The script as a process, or as torchrun's processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    return subprocess.Popen(
        [sys.executable, *launcher, "sample_ddp.py", "--ckpt", ckpt, "--sample-dir", folder, *BRIEF, *map(str, flags)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def load(folder):
    with np.load(folder / "samples.npz", allow_pickle=False) as archive:
        return archive["arr_0"], archive["arr_1"]


def wait_for_first_shard(folder, process):
    while not list((folder / "shards").glob("*.npy")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


# ---- one result ------------------------------------------------------------------------------------------------------


def test_a_run_leaves_exactly_its_images(sample, capsys):
    code, folder = sample("run", "--num-fid-samples", 5, "--per-proc-batch-size", 2, "--to-npz", "--save-images", "png")
    images, labels = load(folder)
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
    three, labels3 = load(sample("three", *flags, "--per-proc-batch-size", 3)[1])
    eight, labels8 = load(sample("eight", *flags, "--per-proc-batch-size", 8)[1])
    assert (labels3 == labels8).all()
    assert np.abs(three.astype(int) - eight).max() <= 1
    assert (three == eight).mean() > 0.99


def test_the_receipt_names_the_linear_layers_ways(sample, monkeypatch):
    monkeypatch.setattr(sample_ddp, "LARGE", 0)
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


def test_noise_is_addressed_by_image_token_and_step():
    noise = sample_ddp.image_noise(5, torch.tensor([3, 9]), num_steps=4, channels=8)
    both, one = noise(0, 4), noise(2, 2)
    assert both.shape == (5, 4, 8) and one.shape == (5, 2, 8)
    assert torch.equal(one[3, 1], normals(5, Purpose.SAMPLING, 9, step=3, token=2, count=8))
    assert torch.equal(both[3, 1], normals(5, Purpose.SAMPLING, 9, step=3, token=0, count=8))
    assert torch.equal(both[3, 3], normals(5, Purpose.SAMPLING_NULL, 9, step=3, token=0, count=8))


def test_batches_are_dealt_out_once():
    missing = [(0, 7), (9, 11)]
    shares = [sample_ddp.batches_of(missing, 3, rank, 2) for rank in range(2)]
    assert shares == [[(0, 3), (6, 7)], [(3, 6), (9, 11)]]
    assert sample_ddp.batches_of(missing, 16, 0, 1) == missing


def labels_of(count, num_classes, *flags):
    args = sample_ddp.parse_args(["--ckpt", "x", "--num-fid-samples", str(count), *flags])
    args.class_ids = [4, 2] if args.class_ids else None
    return sample_ddp.make_labels(args, num_classes)


def test_labels():
    balanced = labels_of(5000, 100, "--labels", "balanced")
    assert (np.bincount(balanced) == 50).all()
    assert (np.bincount(balanced[:500], minlength=100) > 0).mean() > 0.95  # shuffled: no class is all in one block
    assert (balanced != labels_of(5000, 100, "--labels", "balanced", "--global-seed", "1")).any()
    random = labels_of(5000, 100)
    assert random.dtype == np.int64 and random.min() == 0 and random.max() == 99
    assert (random[:300] == labels_of(300, 100)).all()  # by image, not by count
    assert 60 < ((np.bincount(random) - 50.0) ** 2 / 50).sum() < 150  # chi square, 99 degrees of freedom
    assert labels_of(5, 10, "--class-ids", "4,2").tolist() == [4, 2, 4, 2, 4]


def test_uint8_conversion_and_chunked_decoding(monkeypatch):
    values = torch.tensor([-2, -1, -0.5, 0, 0.9999, 1, 2]).view(1, 1, 1, 7).expand(1, 3, 1, 7)
    assert sample_ddp.to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 64, 128, 255, 255, 255]
    model = SphereAR(PRESETS["SphereAR-Nano"]).eval()
    tokens = torch.randn(5, 16, 8)
    with torch.no_grad():
        whole = sample_ddp.decode(model, tokens)
        monkeypatch.setitem(sample_ddp.DECODE_PIXELS, "cpu", 2 * 32 * 32)
        parts = sample_ddp.decode(model, tokens)
    assert np.abs(whole.astype(int) - parts).max() <= 1


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

    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sample_ddp, "write_shard", lambda *a, write=sample_ddp.write_shard: (made.append(a[1]), write(*a))
        )
        assert sample("killed", *flags)[0] == 0
    assert len(made) == 12 - len(finished)
    assert (killed / "samples.npz").read_bytes() == (unbroken / "samples.npz").read_bytes()


def test_resumes_with_another_batch_size(sample, monkeypatch):
    flags = "--num-fid-samples", 7, "--to-npz"
    unbroken, labels = load(sample("unbroken", *flags)[1])

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        write = sample_ddp.write_shard
        patch.setattr(sample_ddp, "write_shard", lambda *a: write(*a) if a[1] == 0 else full())
        assert sample("broken", *flags, "--per-proc-batch-size", 3)[0] == 1
    code, folder = sample("broken", *flags, "--per-proc-batch-size", 5)
    assert code == 0
    images, same = load(folder)
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


# ---- clear errors ----------------------------------------------------------------------------------------------------


def test_another_setting_in_the_same_folder_is_refused_by_name(sample, capsys):
    assert sample("run", "--num-fid-samples", 2)[0] == 0
    code, folder = sample("run", "--num-fid-samples", 2, "--global-seed", 3, "--sampler", "ode")
    message = capsys.readouterr().err
    assert code == 1 and len(list((folder / "shards").iterdir())) == 1
    assert "--global-seed: 0 there, 3 now" in message and "--sampler: sde there, ode now" in message
    assert "--cfg-scale" not in message
    code, folder = sample("run", "--num-fid-samples", 2, "--to-npz", "--per-proc-batch-size", 1)  # no such setting
    assert code == 0 and load(folder)[0].shape == (2, 32, 32, 3)


def test_a_run_without_images_gives_way(sample, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(sample_ddp, "sample_batch", lambda *_: 1 / 0)
        sample("run", "--num-fid-samples", 2)
    assert sample("run", "--num-fid-samples", 2, "--save-images", __file__)[0] == 1
    code, folder = sample("run", "--num-fid-samples", 2, "--global-seed", 3)
    assert code == 0 and json.loads((folder / "run.json").read_text())["--global-seed"] == 3


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    leftovers = [tmp_path / ".samples.npz.12-34.tmp", tmp_path / "shards" / ".00000000-00000002.npy.12-34.tmp"]
    (tmp_path / "shards").mkdir()
    for path in leftovers:
        path.write_bytes(b"half")
    with ExitStack() as stack, ExitStack() as other:
        open_run(tmp_path, {}, stack)
        assert not any(path.exists() for path in leftovers)
        leftovers[0].write_bytes(b"being written")
        with pytest.raises(ValueError, match="in use"):
            open_run(tmp_path, {}, other)
        assert leftovers[0].exists()


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff"])
def test_a_damaged_run_json_is_named(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    (tmp_path / "samples.npz").touch()
    with ExitStack() as stack, pytest.raises(ValueError, match="is damaged"):
        open_run(tmp_path, {}, stack)


def test_two_runs_do_not_share_a_folder(sample, ckpt, capsys):
    _, folder = sample("run", "--num-fid-samples", 2)
    process = start(ckpt, folder.parent / "other", "--num-fid-samples", 2000, "--per-proc-batch-size", 2)
    wait_for_first_shard(folder.parent / "other", process)
    assert sample("other", "--num-fid-samples", 2000)[0] == 1
    assert "in use" in capsys.readouterr().err
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--cfg-scale", "0.5"], "--cfg-scale 0.5 must be at least 1"),
        (["--cfg-scale", "inf"], "--cfg-scale inf must be at least 1"),
        (["--class-ids", "10"], "--class-ids 10 must lie in 0 to 9"),
        (["--class-ids", "dog"], "--class-ids dog must be numbers"),
        (["--num-fid-samples", "0"], "--num-fid-samples 0"),
        (["--per-proc-batch-size", "0"], "--per-proc-batch-size 0"),
        (["--global-seed", "-1"], "--global-seed -1"),
        (["--model", "SphereAR-B"], "--model SphereAR-B does not fit"),
        (["--ckpt", "missing.pt"], "missing.pt: no such checkpoint"),
        (["--ckpt", __file__], "not a readable checkpoint"),
        (["--sample-dir", __file__], "test_sample.py"),
    ],
)
def test_bad_values_are_one_clear_line(sample, capsys, flags, message):
    code, folder = sample("run", "--num-fid-samples", 2, *flags)
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 1
    assert len(lines) == 1 and lines[0].startswith("sample_ddp.py: error: ") and message in lines[0]
    assert not folder.exists()


def test_an_svae_checkpoint_is_refused(sample, tmp_path, capsys):
    vae = SphereAR(PRESETS["SphereAR-Nano"]).vae
    torch.save({"model": checkpoint_state(vae), "config": config_to_dict(vae.config)}, tmp_path / "vae.pt")
    assert sample("run", "--ckpt", tmp_path / "vae.pt")[0] == 1
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
    def broken(self, *args, generate=SphereAR.generate_tokens, **options):
        tokens = generate(self, *args, **options)
        tokens[1, 5, 0] = value
        return tokens

    monkeypatch.setattr(SphereAR, "generate_tokens", broken)
    code, folder = sample("run", "--num-fid-samples", 3)
    message = capsys.readouterr().err.splitlines()[-1]
    assert code == 1 and not list((folder / "shards").iterdir())
    assert "nano.pt: image 1 has values that are not finite; use --mixed-precision none" in message


def test_contact_sheet_names_imagenet_classes(tmp_path):
    from utils.images import class_names, layout, write_contact_sheet

    assert class_names(1000)[207] == "golden retriever" and class_names(10)[3] == "3"
    rows = layout(np.arange(50000) % 1000)
    assert len(rows) == 10 and all(len(indices) == 8 for indices in rows.values()) and {0, 999} <= set(rows)
    image = np.full((32, 32, 3), (7, 8, 9), np.uint8)
    write_contact_sheet(tmp_path / "sheet.png", {207: [image] * 3, 360: [image]}, 1000)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[0] == 2 * 66 + 2 and (sheet == (7, 8, 9)).all(-1).sum() == 4 * 64 * 64
