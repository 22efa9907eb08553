"""Training on several processes: the same numbers, exact resume, signals, and two nodes on one machine."""

import os
import random
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.helpers import small_run
from tests.helpers.small_run import differences, finish, flags, largest_difference, last, run_here, start
from utils.checkpoint_file import read


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return small_run.write_tar(folder / "train.tar"), small_run.write_svae(folder / "svae.pt")


def moments(state):
    return [value["exp_avg"] for value in state["optimizer"]["state"].values()]


def test_two_processes_make_the_update_of_one(files, tmp_path):
    """In two parts each, so that gradients are held back once and then reduced."""
    one = run_here(*flags(files[0], tmp_path / "one", "--max-steps", 2, svae=files[1]))
    command = flags(files[0], tmp_path / "two", "--max-steps", 2, "--grad-accum-steps", 2, svae=files[1])
    output = finish(start(*command, processes=2))
    assert "2 processes" in output and output.count("step 1/2") == 1
    two = last(command)
    assert largest_difference(moments(one), moments(two)) < 1e-5
    assert two["model"].keys() == one["model"].keys()


def test_killed_svae_run_on_two_processes_resumes_bit_for_bit(files, tmp_path):
    """With the discriminator, under its own DistributedDataParallel; SIGKILL at a random moment."""
    extra = "--max-steps", 7, "--save-every", 1
    whole = flags(files[0], tmp_path / "whole", *extra)
    finish(start(*whole, processes=2))
    killed = flags(files[0], tmp_path / "killed", *extra)
    process = start(*killed, processes=2)
    small_run.wait_for(process, f"step {random.Random(0).randrange(2, 6)}/")
    time.sleep(random.Random(1).uniform(0, 0.3))
    kill_tree(process)
    output = finish(start(*killed, processes=2))
    assert " 0 of 7 steps done" not in output
    assert differences(last(whole), last(killed)) == []


def kill_tree(process) -> None:
    """SIGKILL a command and all that it started."""
    for pid in (process.pid, *descendants(process.pid)):
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def descendants(pid: int) -> list[int]:
    """Processes started by a process, and by those (torchrun gives its workers sessions of their own)."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        children = [int(child) for child in file.read().split()]
    return children + [later for child in children for later in descendants(child)]


def test_a_signal_to_one_process_stops_all(files, tmp_path):
    command = flags(files[0], tmp_path / "run", "--max-steps", 1000, svae=files[1])
    process = start(*command, processes=2)
    small_run.wait_for(process, " 2/1000")
    sent = time.monotonic()
    workers = [pid for pid in descendants(process.pid) if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[-1], signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert "stopped by a signal" in output
    assert time.monotonic() - sent < 25
    state = last(command)
    assert 2 <= state["step"] < 100 and read(tmp_path / "run/checkpoints/last.pt")["epochs"] == state["step"] // 6


def test_two_nodes_of_two_processes(files, tmp_path):
    """Two torchrun agents that meet at one rendezvous, as on two machines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = flags(files[0], tmp_path / "nodes", "--max-steps", 2, svae=files[1])
    agents = [
        start(*command, launcher=(
            "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={node}", "--nproc_per_node=2",
            "--rdzv_backend=static", "--master_addr=127.0.0.1", f"--master_port={port}",
        ))
        for node in range(2)
    ]  # fmt: skip
    outputs = [finish(agent) for agent in agents]
    assert "4 processes" in outputs[0] and "step 2/2" in outputs[0]
    one = run_here(*flags(files[0], tmp_path / "one", "--max-steps", 2, svae=files[1]))
    assert largest_difference(moments(one), moments(last(command))) < 1e-5


def no_checkpoint_is_readable(folder: Path) -> None:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/step_00000001.pt").write_bytes(b"nonsense")


@pytest.mark.parametrize(
    ("prepare", "extra", "message"),
    [
        (None, ["--results-dir", "/proc/nowhere"], "--results-dir /proc/nowhere: cannot be written"),  # rank 0's alone
        (no_checkpoint_is_readable, [], "none of the 1 checkpoints"),  # rank 0's alone
        (None, ["--beta1", "2"], "--beta1: 2 must lie in"),
        (None, ["--data-path", "nowhere"], "nowhere: no such file or folder"),
    ],
)
def test_an_error_of_one_process_ends_all_with_one_line(files, tmp_path, prepare, extra, message):
    if prepare:
        prepare(tmp_path / "run")
    process = start(*flags(files[0], tmp_path / "run", "--max-steps", 2, *extra, svae=files[1]), processes=2)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    lines = [line for line in output.splitlines() if "train.py: error" in line]
    assert len(lines) == 1 and message in lines[0], output
    assert "(process " not in lines[0]  # it is an error of all
    assert "Traceback" not in output.partition("ChildFailedError")[0].rpartition("Traceback")[0], output


def process_of(pid: int, name: str) -> list[int]:
    """Those of what a process started whose command line has a name."""
    return [child for child in descendants(pid) if name.encode() in Path(f"/proc/{child}/cmdline").read_bytes()]


def lives(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def lose_a_worker(process, data: Path) -> None:
    """SIGKILL one of the processes that load images, as the system does when memory is short."""
    trainers = process_of(process.pid, "train.py") or [process.pid]
    trainer = next(pid for pid in (process.pid, *trainers) if len(descendants(pid)) == 2)
    os.kill(descendants(trainer)[-1], signal.SIGKILL)


def lose_the_data(process, data: Path) -> None:
    data.rename(data.with_suffix(".gone"))
    data.with_suffix(".gone").write_bytes(b"")  # the open file is cut short


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize(("lose", "says"), [(lose_a_worker, "was killed"), (lose_the_data, "train.tar")])
def test_a_loader_that_fails_ends_all_within_seconds_and_keeps_the_checkpoint(tmp_path, files, processes, lose, says):
    data = tmp_path / "train.tar"
    data.write_bytes(files[0].read_bytes())
    command = flags(data, tmp_path / "run", "--max-steps", 1000, "--num-workers", 2, "--save-every", 2, svae=files[1])
    process = start(*command, processes=processes)
    small_run.wait_for(process, " 4/1000")
    everybody = [process.pid, *descendants(process.pid)]
    lost = time.monotonic()
    lose(process, data)
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - lost < 20
    assert process.returncode not in (0, 134), output
    lines = [line for line in output.splitlines() if line.startswith("train.py: error")]
    assert len(lines) >= 1 and all(says in line for line in lines), output
    assert output.count("Traceback") == bool(processes), output  # torchrun's own
    assert last(command)["step"] >= 2
    time.sleep(1.5)  # a loader's worker looks for its parent once a second
    assert not [pid for pid in everybody if lives(pid)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_what_torchrun_started_ends_with_it(files, tmp_path, number):
    """SIGUSR1 ends torchrun itself at once, as it does any Python without a handler."""
    command = flags(files[0], tmp_path / "run", "--max-steps", 1000, "--num-workers", 1, svae=files[1])
    process = start(*command, processes=2)
    small_run.wait_for(process, " 2/1000")
    everybody = descendants(process.pid)
    process.send_signal(number)
    ended = time.monotonic()
    output, _ = process.communicate(timeout=60)  # until the last of them has closed it
    assert time.monotonic() - ended < 25
    assert process.returncode == -number
    assert "stopped by a signal after step" in output
    assert last(command)["step"] >= 2
    time.sleep(1.5)  # a loader's worker looks for its parent once a second
    assert not [pid for pid in everybody if lives(pid)]
