"""A run that has done its work ends with exit code 0: no thread lives on that could free tensors at the shutdown."""

import json
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest

import train
from tests.helpers import small_run
from utils.training import optim
from utils.training.preemption import Preemption

ROOT = Path(__file__).resolve().parent.parent

# Forks after the imports: every child trains, then goes through the whole shutdown of an interpreter of its own.
ENDINGS = """
import os, sys
import torch
torch.set_num_threads(1)
import torch._dynamo, train
folder, count, *command = sys.argv[1:]
statuses = []
for number in range(int(count)):
    if (child := os.fork()) == 0:
        sys.exit(train.main([*command, "--results-dir", f"{folder}/{number}"]))
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(statuses)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("endings")
    return small_run.write_tar(folder / "train.tar"), small_run.write_svae(folder / "svae.pt")


def statuses(files, folder: Path, stage: str, count: int) -> list[int]:
    """Exit codes of `count` short runs of a stage."""
    data, svae = files
    command = small_run.flags(data, folder, "--max-steps", 3, svae=svae if stage == "ar" else None)
    result = subprocess.run(
        [sys.executable, "-c", ENDINGS, str(folder), str(count), *command],
        cwd=ROOT, text=True, capture_output=True, timeout=120 * count, check=True,
    )  # fmt: skip
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("stage", ["svae", "ar"])
def test_runs_end_with_0(files, tmp_path, stage):
    assert statuses(files, tmp_path, stage, 4) == [0] * 4


@pytest.mark.faults
@pytest.mark.parametrize("stage", ["svae", "ar"])
def test_50_runs_end_with_0(files, tmp_path, stage):
    assert statuses(files, tmp_path, stage, 50) == [0] * 50


def test_the_watcher_ends_with_its_block_and_keeps_nothing_alive():
    class Stage:
        def rescue(self):
            raise AssertionError

    for _ in range(200):
        stage = Stage()
        before, kept = set(threading.enumerate()), weakref.ref(stage)
        with Preemption(rescue=stage.rescue) as preemption:
            assert not preemption.requested()
        assert set(threading.enumerate()) == before
        del preemption, stage
        assert kept() is None


@pytest.mark.parametrize("broken", [False, True])
def test_no_thread_outlives_a_run(files, tmp_path, monkeypatch, broken):
    def failing(*_, **__):
        raise FloatingPointError("broken on purpose")

    before = set(threading.enumerate())
    command = small_run.flags(files[0], tmp_path, "--max-steps", 2, "--save-every", 1, svae=files[1])
    if broken:
        monkeypatch.setattr(optim, "update", failing)
        assert train.main(command) == 1
    else:
        assert train.main(command) == 0
    alive = [thread for thread in set(threading.enumerate()) - before if type(thread).__name__ != "TMonitor"]
    assert not alive  # TMonitor is tqdm's, owns no tensor, and is ended by tqdm's own exit handler
