"""The one way in which a script ends: exit code, one line, the same in torchrun's summary."""

import argparse
import json
import os
import signal
import time

import pytest
import torch

from utils import script


def run(body, parse=lambda argv: argparse.Namespace()) -> int:
    return script.run("x.py", parse, body, [], when_stopped="run it again", out_of_memory="Take less.")


def failing(error):
    def body(args):
        raise error

    return body


def test_a_run_that_ends_well_says_nothing(capsys):
    assert run(lambda args: 0) == 0 and run(lambda args: 7) == 7
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("--x 3: too large"), 2, "x.py: error: --x 3: too large"),
        (OSError(2, "No such file", "y"), 2, "x.py: error: [Errno 2] No such file: 'y'"),
        (OSError(28, "No space left", "y"), 1, "x.py: error: [Errno 28] No space left: 'y'"),
        (FloatingPointError("loss"), 1, "x.py: error: loss"),
        (torch.OutOfMemoryError("Tried 3 GiB.\nmore"), 1, "x.py: error: Tried 3 GiB. Take less."),
        (
            RuntimeError("[/torch/gloo/transport/tcp/pair.cc:5] Connection closed by peer\nmore"), 1,
            "x.py: process 0 ends because another one has: [/torch/gloo/transport/tcp/pair.cc:5] Connection closed by "
            "peer",
        ),
    ],
)  # fmt: skip
def test_an_error_is_one_line_and_a_code(capsys, error, code, line):
    assert run(failing(error)) == code
    assert capsys.readouterr().err.splitlines() == [line]


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes"):
        run(failing(RuntimeError("shapes")))


def test_torchruns_summary_has_the_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert run(failing(ValueError("--x 3: too large"))) == 2
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "--x 3: too large"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_one_line_and_the_handlers_come_back(capsys, number):
    def stopped(args):
        os.kill(os.getpid(), number)
        time.sleep(5)

    before = signal.getsignal(number)
    assert run(stopped) == 128 + number
    assert signal.getsignal(number) == before
    assert capsys.readouterr().err.strip() == "x.py: stopped; run it again"


def test_a_file_stands_for_its_flags(tmp_path):
    (tmp_path / "recipe.txt").write_text("# a comment\n--steps 3  # and another\n\n--name 'two words'\n")
    parser = script.Parser()
    parser.add_argument("--steps", type=script.at_least(1))
    parser.add_argument("--name")
    args = parser.parse_args([f"@{tmp_path}/recipe.txt", "--steps", "4"])
    assert (args.steps, args.name) == (4, "two words")
    with pytest.raises(ValueError, match=r"nowhere\.txt"):
        parser.parse_args(["@nowhere.txt"])


@pytest.mark.parametrize(
    ("kind", "word", "message"),
    [
        (script.at_least(1), "1" + "0" * 22, "is too large: 2147483647 at most"),
        (script.at_least(1), "9" * 500, "is too large"),
        (script.at_least(1), "9" * 5000, "is no whole number"),
        (script.number(int, lambda value: value >= -1, "be"), "1" + "0" * 22, "is too large"),
        (script.above(0), "1e308", r"is too large: 3.4e\+38 at most"),
        (script.at_least(0.0), "1e400", "must be at least 0"),
        (script.SEED, str(2**64), "must lie in"),
    ],
    ids=range(7),
)
def test_numbers_have_an_upper_bound(kind, word, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        kind(word)
    assert script.SEED(str(2**64 - 1)) == 2**64 - 1


def test_a_device_is_no_file_of_flags():
    with pytest.raises(ValueError, match="@/dev/zero: is no file of flags"):
        script.Parser().parse_args(["@/dev/zero"])
