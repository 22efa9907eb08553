"""metrics.jsonl: all numbers that a run reports, one JSON object a line, each step once however often it was resumed.

Every line has `kind` ("run", "training" or "evaluation"), `step` and `time` (seconds since 1970), and the values by
name; a value that is not finite is null.
"""

import errno
import json
import math
import os
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

from utils.files import atomic_file, sync

NAME = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict]:
    """The records of a run in their order; the half of a last line that a killed process left is none.

    Raises ValueError where another program wrote to the file.
    """
    *lines, half = path.read_bytes().split(b"\n")
    if half and not lines:  # nothing before it says that the file is ours
        lines = [half]
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int) or "kind" not in record:
            raise ValueError(f"{path}: line {number} is no record of a run; move the file away")
        records.append(record)
    return records


class MetricsFile:
    """The file of a run that continues from `step`: what an interrupted run wrote beyond is taken out first.

    A run from the start on may stand where a finished one's checkpoints were: then the whole file is kept aside, and
    that reported. Raises ValueError where the file is no run's, or no file.
    """

    def __init__(self, path: Path, step: int, report: Callable[[str], None] = print):
        self.name = str(path)
        if path.exists() and not path.is_file():  # a pipe would wait for ever
            raise ValueError(f"{path}: is no file; move it away")
        known = read_metrics(path) if path.exists() else []
        if step == 0 and any(record["step"] > 0 for record in known):
            aside = next(name for n in count(1) if not os.path.lexists(name := path.with_suffix(f".{n}.jsonl")))
            path.rename(aside)
            report(f"{path} had steps of an earlier run, which has no checkpoint here; it is now {aside}")
            known = []
        records = [record for record in known if record["step"] <= step]
        if path.exists():
            content = path.read_bytes()
            kept = b"".join(line + b"\n" for line, record in zip(content.split(b"\n"), known) if record["step"] <= step)
            if kept != content:
                with atomic_file(path) as file:
                    file.write(kept)
        self.evaluated = {record["step"] for record in records if record["kind"] == "evaluation"}
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115
        sync(path.parent)

    def append(self, kind: str, step: int, values: dict) -> None:
        """One line, on the disk when this returns. An OSError leaves the file as it was."""
        line = as_line({"kind": kind, "step": step, "time": round(time.time(), 3), **values})
        end = self.file.seek(0, os.SEEK_END)
        try:
            if self.file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)
            os.fsync(self.file.fileno())
        except OSError:
            self.file.truncate(end)
            raise
        if kind == "evaluation":
            self.evaluated.add(step)

    def close(self) -> None:
        self.file.close()


def as_line(record: dict) -> bytes:
    return json.dumps(finite(record)).encode() + b"\n"


def finite(value: object) -> object:
    """Nested plain values with None for the floats that JSON does not know."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
