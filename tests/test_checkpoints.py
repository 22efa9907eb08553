"""Files that cannot be lost: damage is found, the one before is taken, nothing in a file is executed."""

import argparse
import errno
import os
import random
import resource
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from tests.helpers.states import is_whole, state
from utils import checkpoint_file
from utils.checkpoint_file import read
from utils.training.checkpoints import CheckpointFolder, Entry, read_back, snapshot


@pytest.fixture
def folder(tmp_path):
    reports = []
    made = CheckpointFolder(tmp_path / "checkpoints", reports.append)
    made.reports = reports
    clean(made)
    return made


def clean(folder: CheckpointFolder) -> None:
    """What it finds at the start of a run is cleaned; the folder then is there, if empty."""
    folder.folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        folder.open(stack)


def names(folder: CheckpointFolder) -> set[str]:
    return {path.name for path in folder.folder.iterdir()}


def test_saved_is_read_back_and_last_points_to_it(folder):
    folder.save(state(7), 7)
    assert folder.wait()
    assert names(folder) == {"step_00000007.pt", "last.pt"}
    saved = read(folder.folder / "last.pt")
    assert is_whole(saved) and saved["args"] == argparse.Namespace(lr=1e-4, model="SphereAR-B")
    assert saved["config"]["stem"] == (1, 2)
    assert read(folder.newest_good())["step"] == 7


def test_two_newest_and_epochs_stay(folder):
    for step in range(1, 7):
        folder.save(state(step), step, epoch=step // 2 if step in (2, 4) else None)
    folder.wait()
    kept = {"step_00000002_epoch_0001.pt", "step_00000004_epoch_0002.pt"}
    assert names(folder) == {"last.pt", "step_00000005.pt", "step_00000006.pt"} | kept


def test_the_copy_is_taken_at_once_and_keeps_shared_memory(folder):
    live = state(1)
    copied = snapshot(live)
    assert copied["model"]["a"].data_ptr() == copied["ema"]["a"].data_ptr() != live["model"]["a"].data_ptr()
    folder.save(live, 1)
    live["model"]["a"].fill_(99)
    folder.wait()
    assert is_whole(read(folder.newest_good()))


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.7, 0.99, 0.9999])
def test_truncated_newest_is_skipped(folder, share):
    for step in (1, 2):
        folder.save(state(step), step)
    folder.wait()
    newest = folder.folder / "step_00000002.pt"
    content = newest.read_bytes()
    newest.write_bytes(content[: int(share * len(content))])
    path = folder.newest_good()
    assert path.name == "step_00000001.pt" and is_whole(read(path))
    assert len(folder.reports) == 1 and "step_00000002.pt" in folder.reports[0]
    folder.continue_from(path)
    assert read(folder.folder / "last.pt")["step"] == 1


def test_none_good_is_an_error_and_none_at_all_is_not(folder):
    assert folder.newest_good() is None
    (folder.folder / "step_00000001.pt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        folder.newest_good()


def test_a_file_of_another_kind_is_told_and_left_alone(folder):
    """Such as a published one, whatever its name; last.pt does not point to it."""
    for step in (1, 2):
        folder.save(state(step), step)
    folder.wait()
    published = folder.folder / "step_00000003.pt"
    torch.save({"model": state(3)["model"]}, published)
    again = CheckpointFolder(folder.folder, folder.reports.append)
    assert again.newest_good().name == "step_00000002.pt"
    assert "no checkpoint of a run" in folder.reports[0] and "no args, config, optimizer, step" in folder.reports[0]
    assert os.readlink(folder.folder / "last.pt") == "step_00000002.pt"
    for step in (4, 5, 6):
        again.save(state(step), step)
    again.wait()
    assert names(again) == {"last.pt", "step_00000003.pt", "step_00000005.pt", "step_00000006.pt"}


def test_last_stays_where_it_is_until_a_checkpoint_is_continued(folder):
    folder.save(state(1), 1)
    folder.wait()
    (folder.folder / "last.pt").unlink()
    path = CheckpointFolder(folder.folder).newest_good()
    assert not (folder.folder / "last.pt").exists()
    CheckpointFolder(folder.folder).continue_from(path)
    assert os.readlink(folder.folder / "last.pt") == path.name


def test_only_our_own_leftovers_are_removed(folder):
    ours = ".step_00000007.pt.12-34.tmp", "step_00000007_epoch_0001.pt.12-34.tmp", "last.pt.12.tmp"
    others = "notes.tmp", ".backup.tmp", "step_7.pt.tmp", "last.pt.tmp"
    others += ("last.pt.13.tmp",)  # ours is a link
    for name in (*ours[:-1], *others):
        (folder.folder / name).write_bytes(b"")
    (folder.folder / ours[-1]).symlink_to("step_00000007.pt")
    clean(folder)
    assert names(folder) == set(others)


def test_folders_that_stay_empty_go_again(tmp_path):
    for made in (tmp_path / "new" / "checkpoints", tmp_path / "there" / "checkpoints"):
        (tmp_path / "there").mkdir(exist_ok=True)
        with ExitStack() as stack:
            CheckpointFolder(made).open(stack)
            assert made.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["there"] and not list((tmp_path / "there").iterdir())


@pytest.mark.parametrize("kind", ["file", "folder", "link elsewhere"])
def test_a_last_pt_that_is_not_ours_is_refused_and_left_alone(folder, kind):
    last = folder.folder / "last.pt"
    if kind == "file":
        last.write_bytes(b"precious")
    elif kind == "folder":
        last.mkdir()
    else:
        last.symlink_to("../best.pt")
    with pytest.raises(
        ValueError, match=r"^--results-dir .*last\.pt is no link to a checkpoint beside it.*move it away"
    ):
        clean(folder)
    assert last.is_symlink() == (kind == "link elsewhere") and names(folder) == {"last.pt"}


@pytest.mark.parametrize("step", [1, "2", 2.0, True, None, [2]])
def test_a_file_that_holds_another_step_than_its_name_is_no_checkpoint(folder, step):
    folder.save(state(1), 1)
    folder.wait()
    checkpoint_file.write({**state(2), "step": step}, folder.folder / "step_00000002.pt")
    assert folder.newest_good().name == "step_00000001.pt"
    assert "step_00000002.pt holds step " in folder.reports[0]


@pytest.mark.parametrize(
    ("value", "error"),
    [(5, TypeError("not a tensor")), ({}, KeyError("scale")), (None, RuntimeError("of another shape\nmore"))],
)
def test_an_entry_that_does_not_fit_is_one_line(value, error):
    def read(_):
        raise error

    with pytest.raises(
        ValueError, match=r"^x\.pt: its rng does not fit this run \(.+\); move it away to continue from"
    ):
        read_back({"rng": Entry(None, read), "for people": Entry(None)}, {"rng": value}, Path("x.pt"))
    with pytest.raises(ValueError, match=r"^x\.pt: lacks rng"):
        read_back({"rng": Entry(None, read)}, {}, Path("x.pt"))


def test_a_folder_that_vanishes_costs_the_checkpoint_but_not_the_run(folder):
    folder.folder.rmdir()
    folder.save(state(1), 1)
    assert not folder.wait()
    assert "could not save" in folder.reports[0] and "training goes on" in folder.reports[0]


def test_two_runs_in_one_folder_are_refused(folder):
    with ExitStack() as one, ExitStack() as two:
        folder.open(one)
        (folder.folder / "last.pt.12.tmp").symlink_to("step_00000012.pt")
        with pytest.raises(ValueError, match=rf"--results-dir .* is in use by process {os.getpid()} on "):
            CheckpointFolder(folder.folder).open(two)
        assert names(folder) == {"last.pt.12.tmp"}


class Malicious:
    def __reduce__(self):
        return os.system, (f"touch {Malicious.trace}",)


def test_hostile_files_are_refused_unexecuted(folder, tmp_path):
    Malicious.trace = tmp_path / "executed"
    folder.save(state(1), 1)
    folder.wait()
    torch.save({**state(2), "extra": Malicious()}, folder.folder / "step_00000002.pt")
    torch.save(
        {**state(3), "args": Malicious()}, folder.folder / "step_00000003.pt", _use_new_zipfile_serialization=False
    )
    assert folder.newest_good().name == "step_00000001.pt"
    assert len(folder.reports) == 2
    assert not Malicious.trace.exists()
    torch.load(folder.folder / "step_00000002.pt", weights_only=False)  # the file does harm where it is trusted
    assert Malicious.trace.exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write failed")])
def test_a_failed_save_is_reported_and_costs_nothing(folder, monkeypatch, error):
    folder.save(state(1), 1)
    folder.wait()

    def fail(value, file):
        file.write(b"half of it")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_file.torch, "save", fail)
        folder.save(state(2), 2)
        assert not folder.wait()
    assert len(folder.reports) == 1
    assert "step_00000002.pt" in folder.reports[0] and "step_00000001.pt" in folder.reports[0]
    assert names(folder) == {"last.pt", "step_00000001.pt"}
    assert read(folder.folder / "last.pt")["step"] == 1
    folder.save(state(3), 3)
    assert folder.wait()
    assert names(folder) == {"last.pt", "step_00000001.pt", "step_00000003.pt"}


def test_a_write_that_the_system_refuses_half_way(folder):
    """A real one: files of this process may not grow beyond 20 kB."""
    folder.save(state(1), 1)
    folder.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        folder.save(state(2, size=100_000), 2)
        assert not folder.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert len(folder.reports) == 1
    assert names(folder) == {"last.pt", "step_00000001.pt"}


def save_without_pause(path: Path, first: int, size: int, acknowledgements: int) -> None:
    folder = CheckpointFolder(path)
    for step in range(first, 2**31):
        folder.save(state(step, size), step)
        folder.wait()
        os.write(acknowledgements, f"{step} ".encode())


def kill_savers(folder: CheckpointFolder, kills: int, size: int) -> tuple[int, int]:
    """SIGKILL a process that saves without pause at `kills` random moments; saves that were cut, checkpoints lost."""
    draws, done, cut, lost = random.Random(0), 0, 0, 0
    for _ in range(kills):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            save_without_pause(folder.folder, done + 1, size, writer)
        os.close(writer)
        time.sleep(draws.uniform(0.01, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with open(reader) as file:
            acknowledged = int((file.read().split() or [done])[-1])
        cut += any(path.suffix == ".tmp" for path in folder.folder.iterdir())
        good = folder.newest_good()
        state = read(good) if good else None
        step = state["step"] if good and is_whole(state) else 0
        last = folder.folder / "last.pt"
        lost += step < acknowledged or folder.reports != [] or (last.exists() and read(last)["step"] < acknowledged)
        done = step
        clean(folder)
        if good:  # as the next run does: the kill may have come between a checkpoint and last.pt, which tells no loss
            folder.continue_from(good)
    return cut, lost


def test_killed_while_saving_loses_nothing(folder):
    _, lost = kill_savers(folder, kills=10, size=1_000_000)
    assert lost == 0


def test_older_files_that_are_no_checkpoints_of_a_run_are_never_deleted(folder):
    foreign = folder.folder / "step_00000000.pt"
    checkpoint_file.write({"model": {"vae.a": torch.ones(2)}}, foreign)
    (folder.folder / "step_00000001.pt").write_text("my notes")
    (folder.folder / "step_00000002.pt").mkdir()
    for step in range(3, 7):
        folder.save(state(step), step)
        assert folder.wait()
    left = sorted(path.name for path in folder.folder.glob("step_*.pt"))
    assert left == [f"step_{step:08d}.pt" for step in (0, 1, 2, 5, 6)]
