"""The checkpoints of a run: written in the background, verified before they are trusted, the newest ones kept.

They are named step_00001234.pt, or step_00001234_epoch_0050.pt where one is kept for good. `last.pt` is a symbolic
link to the newest complete one.
"""

import errno
import os
import re
import shutil
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import torch

from utils import checkpoint_file
from utils.files import lock, remove_leftovers, sync

NAME = re.compile(r"step_(\d{8,})(_epoch_\d{4,})?\.pt")
LEFTOVER = re.compile(rf"last\.pt\.\d+\.tmp|{NAME.pattern}\.\d+-\d+\.tmp")  # a link's, and of earlier versions
KEYS = {"model", "optimizer", "step", "args", "config"}  # of every run's checkpoint, since the first version


LINK = "last.pt"


class Entry(NamedTuple):
    """One entry of a checkpoint: how it is written, and how it is read back where it is."""

    write: Callable[[], object]
    read: Callable[[object], object] | None = None  # None: it is there for people, or compared elsewhere


def read_back(entries: dict[str, Entry], state: dict, path: Path) -> None:
    """Hand every entry of a checkpoint's state to what reads it. ValueError names the file and what does not fit."""
    remedy = "move it away to continue from the one before"
    needed = {name: entry.read for name, entry in entries.items() if entry.read is not None}
    if missing := sorted(needed.keys() - state.keys()):
        raise ValueError(f"{path}: lacks {', '.join(missing)}; {remedy}")
    for name, read in needed.items():
        try:
            read(state[name])
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"{path}: its {name} does not fit this run ({reason}); {remedy}") from None


def snapshot(value: object, copies: dict | None = None) -> object:
    """A copy of nested dicts, lists and tuples with every tensor on the CPU; tensors that share memory still do."""
    copies = {} if copies is None else copies
    if isinstance(value, torch.Tensor):
        key = value.device, value.data_ptr(), value.dtype, value.shape, value.stride()
        if value.numel() == 0 or key not in copies:
            copies[key] = value.detach().to("cpu", copy=True)
        return copies[key]
    if isinstance(value, dict):
        return {name: snapshot(item, copies) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(snapshot(item, copies) for item in value)
    return value


class CheckpointFolder:
    """The checkpoints of one run, written by one process.

    The newest complete one and the one before it stay, and all that were saved with an epoch; older ones go.
    `report` takes one line of text: files that were skipped, saves that failed. A context manager: no save goes on
    behind the block.
    """

    def __init__(self, folder: Path, report: Callable[[str], None] = print):
        self.folder, self.report = folder, report
        self.good: list[Path] = []  # complete ones that this process wrote or loaded, oldest first
        self.foreign: set[Path] = set()  # readable, but no run's: left alone
        self.failed = False  # whether the newest save failed
        self.writer: threading.Thread | None = None

    def __enter__(self) -> "CheckpointFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def found(self) -> list[tuple[int, Path]]:
        """(step, path) of all checkpoints by name, newest first."""
        matches = [(NAME.fullmatch(path.name), path) for path in self.folder.glob("step_*.pt")]
        return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)

    def newest_good(self) -> Path | None:
        """The newest checkpoint of a run whose bytes all agree with their checksums; newer others are reported.

        Raises ValueError when there are checkpoints and none of them is good.
        """
        found = self.found()
        for step, path in found:
            try:
                state = checkpoint_file.read(path, verify=True)
            except ValueError as error:
                self.report(f"skipped a checkpoint: {error}")
                continue
            if why := _why_foreign(state, step):
                self.foreign.add(path)
                self.report(f"skipped a file that is no checkpoint of a run: {path} {why}")
            else:
                return path
        if found:
            raise ValueError(
                f"--results-dir: none of the {len(found)} checkpoints in {self.folder} is readable and a run's; "
                "move them away to start anew"
            )
        return None

    def continue_from(self, path: Path) -> None:
        """The run goes on from this checkpoint."""
        self.good.append(path)
        self._point_last_to(path)  # an interrupted save may have left it one behind, or at a damaged file

    def open(self, stack: ExitStack) -> None:
        """Make the folder, lock the run's until `stack` closes, and remove what an interrupted save left.

        Folders that are still empty in the end go again. Raises ValueError where another run has it, it cannot be
        written, or something stands where last.pt is to come.
        """
        results = self.folder.parent
        for made in (results, self.folder):
            if not made.exists():
                stack.callback(_remove_if_empty, made)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if lock(results, stack, "--results-dir"):
                remove_leftovers(self.folder, NAME.pattern)
                for path in self.folder.glob("*.tmp"):
                    if LEFTOVER.fullmatch(path.name) and path.is_symlink() == path.name.startswith(LINK):
                        path.unlink(missing_ok=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ValueError(f"--results-dir {results}: cannot be written ({error}); choose another folder") from None
        self._require_own_link()

    def save(self, state: dict, step: int, epoch: int | None = None) -> None:
        """Copy `state` now, write it in the background; with `epoch`, for good. A failure is reported, not raised.

        Waits for the save before, so at most one copy is in memory.
        """
        self.wait()
        suffix = "" if epoch is None else f"_epoch_{epoch:04d}"
        path = self.folder / f"step_{step:08d}{suffix}.pt"
        self.writer = threading.Thread(target=self._write, args=(snapshot(state), path))
        self.writer.start()

    def wait(self) -> bool:
        """Wait for the save under way; whether the newest save succeeded."""
        if self.writer is not None:
            self.writer.join()
            self.writer = None  # and with it the copy that it wrote
        return not self.failed

    def _write(self, state: dict, path: Path) -> None:
        try:
            checkpoint_file.write(state, path)
            self._point_last_to(path)
        except (OSError, RuntimeError) as error:
            self.failed = True
            kept = self.good[-1] if self.good else "none yet"
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            free = ""  # torch's error does not tell a full disk
            with suppress(OSError):  # the folder has gone
                free = f" ({shutil.disk_usage(self.folder).free / 1e9:.3g} GB free there)"
            self.report(f"could not save {path}: {reason}{free}; training goes on, last good one: {kept}")
            return
        self.failed = False
        self.good = [*(good for good in self.good[-1:] if good != path), path]
        self._prune(path)

    def _require_own_link(self) -> None:
        """ValueError where last.pt is not a link to a checkpoint beside it, as ours is: that is not replaced."""
        last = self.folder / LINK
        if os.path.lexists(last) and not (last.is_symlink() and NAME.fullmatch(os.readlink(last))):
            raise ValueError(
                f"--results-dir {self.folder.parent}: {last} is no link to a checkpoint beside it, as this program "
                "makes it; move it away"
            )

    def _point_last_to(self, path: Path) -> None:
        link = self.folder / f"{LINK}.{os.getpid()}.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(path.name)
        os.replace(link, self.folder / LINK)
        sync(self.folder)

    def _prune(self, newest: Path) -> None:
        newest_step = int(NAME.fullmatch(newest.name)[1])
        for step, path in self.found():
            is_kept = path in self.good or path in self.foreign or NAME.fullmatch(path.name)[2]
            if step < newest_step and not is_kept and self._is_of_a_run(path):
                path.unlink(missing_ok=True)

    def _is_of_a_run(self, path: Path) -> bool:
        """Whether this is a checkpoint of a run, not just called like one; asked before it is deleted."""
        with suppress(ValueError):
            if not _why_foreign(checkpoint_file.read(path), int(NAME.fullmatch(path.name)[1])):
                return True
        self.foreign.add(path)
        return False


def _why_foreign(state: dict, step: int) -> str:
    """Why the content of a file is no checkpoint of a run at this step; "" where it is one."""
    if missing := sorted(KEYS - state.keys()):
        return f"has no {', '.join(missing)}"
    if type(state["step"]) is not int or state["step"] != step:
        return f"holds step {str(state['step'])[:40]}, not that of its name"
    return ""


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
