"""metrics.jsonl: whole lines, each step once, and nobody else's file is touched."""

import json
import math

import pytest

from utils.training.metrics_file import MetricsFile, read_metrics


def steps(path):
    return [(record["kind"], record["step"]) for record in read_metrics(path)]


@pytest.fixture
def path(tmp_path):
    """Steps 1 to 4, evaluated at 2 and 4."""
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    for step in range(1, 5):
        file.append("training", step, {"loss": 1 / step})
        if step % 2 == 0:
            file.append("evaluation", step, {"FID": math.nan, "receipt": {"values": (1, math.inf)}})
    file.close()
    return tmp_path / "metrics.jsonl"


def test_every_line_is_json_for_everybody(path):
    records = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert records[0] == {"kind": "training", "step": 1, "time": records[0]["time"], "loss": 1.0}
    assert records[2]["FID"] is None and records[2]["receipt"] == {"values": [1, None]}


def test_a_resumed_run_takes_out_what_it_will_do_again(path):
    before = path.read_bytes()
    file = MetricsFile(path, 3)
    assert steps(path) == [("training", 1), ("training", 2), ("evaluation", 2), ("training", 3)]
    assert before.startswith(path.read_bytes())
    assert file.evaluated == {2}
    file.append("evaluation", 4, {})
    file.close()
    assert file.evaluated == {2, 4} and steps(path)[-1] == ("evaluation", 4)


def test_half_a_last_line_is_taken_out(path):
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "training", "st')
    assert steps(path)[-1] == ("evaluation", 4)
    file = MetricsFile(path, 4)
    file.append("training", 5, {})
    file.close()
    assert path.read_bytes().startswith(whole) and steps(path)[-1] == ("training", 5)


class Full:
    """A file on a disk that has room for ten bytes more."""

    def __init__(self, file):
        self.file = file

    def write(self, data):
        return self.file.write(data[:10])

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_full_disk_leaves_no_half_line(path):
    before, file = path.read_bytes(), MetricsFile(path, 4)
    real, file.file = file.file, Full(file.file)
    with pytest.raises(OSError, match="No space left"):
        file.append("evaluation", 5, {"FID": 1.0})
    assert path.read_bytes() == before and 5 not in file.evaluated
    file.file = real
    file.append("evaluation", 5, {"FID": 1.0})
    file.close()
    assert steps(path)[-1] == ("evaluation", 5)


@pytest.mark.parametrize(
    "content",
    [
        b"hello\n", b"[1]\n", b'{"step": "1", "kind": "run"}\n', b'{"kind": "run"}\n',
        b"no end of a line", b'{"loss": 0.5}', b"\x80\x00\xff", b"[" * 100_000, b"[" * 100_000 + b"\n",
    ],
    ids=range(9),
)  # fmt: skip
def test_files_of_other_programs_are_left_alone(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="line 1 is no record of a run; move the file away"):
        MetricsFile(path, 0)
    assert path.read_bytes() == content


def test_what_another_run_measured_is_kept_aside(path):
    """A run from the start on, in a folder whose checkpoints are gone: nothing is lost, however often."""
    path.write_text('{"kind": "run", "step": 0}\n' + path.read_text())
    for n in (1, 2):
        said, before = [], path.read_bytes()
        file = MetricsFile(path, 0, said.append)
        aside = path.with_name(f"metrics.{n}.jsonl")
        assert path.read_bytes() == b"" and aside.read_bytes() == before and file.evaluated == set()
        assert len(said) == 1 and said[0].endswith(f"it is now {aside}")
        file.append("training", 1, {"loss": 1 / n})
        file.close()


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ValueError, match="is no file"):
        MetricsFile(tmp_path / "metrics.jsonl", 0)
