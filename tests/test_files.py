"""Files that are complete and on the disk, or not there; leftovers, and locks that say who holds them."""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from utils.files import atomic_file, lock, read_json, remove_leftovers

ROOT = Path(__file__).resolve().parent.parent


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"), atomic_file(path) as file:
        file.write(b"half")
        raise OSError("disk full")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_a_failed_write_says_why_and_where(tmp_path):
    with (
        pytest.raises(OSError, match=r"No space left on device \(\d+ MB free\): '.*file'"),
        atomic_file(tmp_path / "file"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError, match="absent/file'"), atomic_file(tmp_path / "absent" / "file"):
        pass
    with pytest.raises(OSError, match="other"), atomic_file(tmp_path / "file"):
        raise OSError(errno.EIO, "Input/output error", "other")  # the fault of a file that was read


@pytest.mark.parametrize("meanwhile", [False, True])
def test_a_new_file_replaces_none(tmp_path, meanwhile):
    path = tmp_path / "file"
    if not meanwhile:
        path.symlink_to("nowhere")
    with pytest.raises(FileExistsError, match=r"is there already; remove it.*file'"), atomic_file(path, new=True):
        assert meanwhile
        path.write_bytes(b"theirs")
    assert path.read_bytes() == b"theirs" if meanwhile else path.is_symlink()
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_only_leftovers_of_our_own_names_are_removed(tmp_path):
    ours = [".samples.npz.12-345.tmp", ".samples.json.1-2.tmp"]
    others = [".notes.npz.12-345.tmp", ".samples.npz.tmp", ".x.samples.npz.1-2.tmp", "samples.npz.1-2.tmp", ".a.tmp"]
    for name in [*ours, *others]:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, r"samples\.(npz|json)")
    assert sorted(os.listdir(tmp_path)) == sorted(others)


def test_a_lock_names_its_holder_and_leaves_nothing(tmp_path):
    who = rf"process {os.getpid()} on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
    with ExitStack() as stack:
        assert lock(tmp_path, stack, "--x")
        with ExitStack() as other, pytest.raises(ValueError, match=f"^--x {tmp_path} is in use by {who}; wait for it"):
            lock(tmp_path, other, "--x")
        with ExitStack() as other, pytest.raises(ValueError, match="is in use by process"):
            lock(tmp_path, other, "--x")  # the refused one has taken nothing away
    assert not os.listdir(tmp_path)
    with ExitStack() as stack:
        assert lock(tmp_path, stack, "--x")


def start(code: str, *arguments: object) -> subprocess.Popen:
    code = f"import sys, time\nfrom contextlib import ExitStack\nfrom pathlib import Path\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def test_a_killed_holder_holds_nothing(tmp_path):
    code = "from utils.files import lock; stack = ExitStack(); lock(Path(sys.argv[1]), stack, '--x')\n"
    process = start(code + "print('locked', flush=True); time.sleep(60)", tmp_path)
    assert process.stdout.readline() == "locked\n"
    with ExitStack() as stack, pytest.raises(ValueError, match=f"in use by process {process.pid} on "):
        lock(tmp_path, stack, "--x")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / ".lock").exists()
    with ExitStack() as stack:
        assert lock(tmp_path, stack, "--x")
        assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()


def test_a_killed_holders_children_hold_nothing(tmp_path):
    """Such as a loader's worker, which lives on for a moment."""
    code = "from utils.files import lock; import os; stack = ExitStack(); lock(Path(sys.argv[1]), stack, '--x')\n"
    process = start(code + "if not os.fork(): print(os.getpid(), flush=True)\ntime.sleep(60)", tmp_path)
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    try:
        with ExitStack() as stack:
            assert lock(tmp_path, stack, "--x")
        os.kill(child, 0)  # it does live
    finally:
        os.kill(child, signal.SIGKILL)


CONTEST = """
from utils.files import lock
folder, me, taken, end = Path(sys.argv[1]), sys.argv[2], 0, time.monotonic() + 1.5
while time.monotonic() < end:
    with ExitStack() as stack:
        try:
            lock(folder, stack, "--x")
        except ValueError:
            continue
        (folder / "owner").write_text(me)
        time.sleep(0.0002)
        assert (folder / "owner").read_text() == me
        taken += 1
print(taken)
"""


def test_two_never_hold_a_lock_at_once(tmp_path):
    """Processes that take and give up the lock as fast as they can; each writes its number, and reads it back."""
    processes = [start(CONTEST, tmp_path, number) for number in range(3)]
    taken = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sum(map(int, taken)) > 20


def test_a_lock_that_is_not_ours_is_left_alone(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("data")
    folders = [tmp_path / name for name in ("link", "text", "pipe")]
    for folder in folders:
        folder.mkdir()
    (folders[0] / ".lock").symlink_to(precious)
    (folders[1] / ".lock").write_text("my notes")
    os.mkfifo(folders[2] / ".lock")
    for folder in folders:
        with ExitStack() as stack, pytest.raises((ValueError, OSError), match="no lock of ours"):
            lock(folder, stack, "--x")
    assert precious.read_text() == "data" and (folders[1] / ".lock").read_text() == "my notes"


@pytest.mark.parametrize("kind", ["pipe", "deep", "sparse"])
def test_json_that_cannot_be_read_is_named(tmp_path, kind):
    path = tmp_path / "run.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "sparse":  # of 30 GB: not read
        path.touch()
        os.truncate(path, 30 * 10**9)
    else:
        path.write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"run\.json is damaged, no JSON object: do this"):
        read_json(path, "do this")
