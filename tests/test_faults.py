"""Long fault injection (make test-faults): what the default tests do briefly, often enough to count."""

import random
import subprocess
import time

import pytest

from tests.helpers import small_run
from tests.helpers.small_run import differences, finish, flags, last, start
from tests.helpers.states import is_whole, state
from tests.test_checkpoints import CheckpointFolder, clean, folder, kill_savers  # noqa: F401
from tests.test_train_distributed import kill_tree
from utils.checkpoint_file import read

pytestmark = pytest.mark.faults


def test_killed_200_times_while_saving(folder, capsys):  # noqa: F811
    cut, lost = kill_savers(folder, kills=200, size=4_000_000)
    with capsys.disabled():
        print(f"\n200 SIGKILLs, {cut} of them inside a save: {lost} lost")
    assert lost == 0 and cut > 20


def test_a_disk_that_is_full(tmp_path, capsys):
    """ENOSPC from a real file system of 8 MB (needs the right to mount)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs")
    try:
        reports = []
        checkpoints = CheckpointFolder(disk / "checkpoints", reports.append)
        clean(checkpoints)
        for step in range(1, 6):
            checkpoints.save(state(step, size=400_000 if step != 3 else 2_000_000), step)
            assert checkpoints.wait() == (step != 3)
            assert is_whole(read(checkpoints.newest_good()))
        assert len(reports) == 1
        with capsys.disabled():
            print(f"\n{reports[0]}")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("stage", ["svae", "ar"])
def test_a_run_killed_again_and_again_ends_bit_for_bit_the_same(tmp_path, stage, processes, capsys):
    data, svae = small_run.write_tar(tmp_path / "train.tar"), small_run.write_svae(tmp_path / "svae.pt")
    extra = "--max-steps", 60, "--save-every", 3, "--grad-accum-steps", 1 if stage == "svae" else 2
    whole, killed = (
        flags(data, tmp_path / name, *extra, svae=svae if stage == "ar" else None) for name in ("whole", "killed")
    )
    finish(start(*whole, processes=processes))
    draws, kills, process = random.Random(0), 0, start(*killed, processes=processes)
    while kills < 8:
        small_run.wait_for(process, "steps done;")  # the run's first line
        time.sleep(draws.uniform(0, 1.5))
        if process.poll() is not None:
            break
        kill_tree(process)
        kills += 1
        process = start(*killed, processes=processes)
    finish(process)
    with capsys.disabled():
        print(f"\n{stage} on {max(1, processes)}: killed {kills} times")
    assert kills > 2
    assert differences(last(whole), last(killed)) == []
