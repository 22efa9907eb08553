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
        (None, ["--data-path", "nowhere"], "--data-path nowhere"),
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
    assert "Traceback" not in output.partition("ChildFailedError")[0].rpartition("Traceback")[0], output
