"""A run that may be stopped and continued: the signals that stop it, and the folder and settings that it keeps to."""

import fcntl
import json
import os
import signal
from contextlib import ExitStack
from pathlib import Path

from utils.files import atomic_file

END_WITHIN_SECONDS = 20  # of a signal; torchrun kills after 30


class Stopped(BaseException):
    """SIGTERM or SIGINT. No Exception, so that nothing on the way takes it for an error and carries on."""

    def __init__(self, signum: int):
        self.signum = signum


def raise_on_signals() -> None:
    """From now on SIGTERM and SIGINT raise Stopped, once; a process that hangs over its end is ended by SIGALRM."""

    def stop(signum, _frame):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        signal.alarm(END_WITHIN_SECONDS)
        raise Stopped(signum)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def open_run(folder: Path, settings: dict, stack: ExitStack) -> dict:
    """Make the folder this run's, or see that it is, and lock it until `stack` closes.

    What a killed run left half-written is removed, and a run that made no image gives way. Returns the content of the
    folder's run.json. ValueError says which settings differ from those of the run in it, or that the file is damaged.
    """
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    path, locked = folder / "run.json", lock(folder, stack)
    if locked:
        for leftover in [*folder.glob(".*.tmp"), *folder.glob("shards/.*.tmp")]:
            leftover.unlink()
    unused = locked and not (folder / "samples.npz").exists() and not any(folder.glob("shards/*.npy"))
    if unused or not path.exists():
        write_json(path, settings)
        return settings
    before = read_json(path)
    differing = [name for name in settings if before.get(name) != settings[name]]
    if differing:
        change = "; ".join(f"{name}: {before.get(name)} there, {settings[name]} now" for name in differing)
        raise ValueError(f"--sample-dir {folder} holds images of another run ({change}); choose or empty a folder")
    return before


def lock(folder: Path, stack: ExitStack) -> bool:
    """Lock the folder until `stack` closes; False on a file system without locks. ValueError: another run has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--sample-dir {folder} is in use by another run; wait for it or choose another") from None
    except OSError:
        return False
    return True


def read_json(path: Path, remedy: str = "it does not say which run this is; choose or empty a folder") -> dict:
    """What write_json wrote. ValueError names a file that holds something else, and the remedy."""
    try:
        values = json.loads(path.read_text())
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged, no JSON object: {remedy}")
    return values


def write_json(path: Path, values: dict) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(values, indent=2).encode() + b"\n")
