"""What the scripts share: how flags are checked, how precision is chosen, and the one way to end."""

import argparse
import errno
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import torch

from utils import distributed, early
from utils.files import printable

END_WITHIN_SECONDS = 20  # of a signal; torchrun kills after 30
DTYPES = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

MAX_INT, MAX_FLOAT = 2**31 - 1, 3.4e38  # of flags: what C's int and float32 hold
OF_THE_MACHINE = errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE  # no fault of a flag

# Exit codes of every script
DONE, FAILED, BAD_INPUT, BY_SIGNAL = 0, 1, 2, 128  # plus the signal's number


# ---- flags: their ranges stand beside them -----------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are ValueErrors, so that they end like all others; on rank 0 it helps.

    @FILE stands for the flags in a file (a recipe), where # begins a comment.
    """

    def __init__(self, **options: object):
        super().__init__(fromfile_prefix_chars="@", **options)

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else list(args)
        for before, word in pairwise(["the first word", *words]):
            if not word:
                self.error(f"{before}: is followed by nothing, as by a shell variable that is not set")
        return super().parse_known_args(words, namespace)

    def _read_args_from_files(self, words: list[str]) -> list[str]:
        for word in words:
            if word.startswith("@") and os.path.exists(word[1:]) and not os.path.isfile(word[1:]):
                self.error(f"{word}: is no file of flags")  # a device has no end
        return super()._read_args_from_files(words)

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        return shlex.split(line, comments=True)

    def error(self, message: str) -> None:
        raise ValueError(message.removeprefix("argument "))

    def print_help(self, file=None) -> None:
        if distributed.is_main():
            super().print_help(file)


def number(
    kind: type, allowed: Callable[[float], bool], text: str, most: float | None = None
) -> Callable[[str], float]:
    """A flag's `type`: an int or float that is `allowed`, of magnitude `most` at most; `text` says which are."""
    most = most or (MAX_INT if kind is int else MAX_FLOAT)

    def parse(word: str):
        try:
            value = kind(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{word} is no {'whole ' if kind is int else ''}number") from None
        if (kind is float and not math.isfinite(value)) or not allowed(value):
            raise argparse.ArgumentTypeError(f"{word} must {text}")
        if abs(value) > most:
            raise argparse.ArgumentTypeError(f"{word} is too large: {most} at most")
        return value

    return parse


def at_least(least: float) -> Callable[[str], float]:
    """A number from `least` on, of its type."""
    return number(type(least), lambda value: value >= least, f"be at least {least}")


def above(bound: float) -> Callable[[str], float]:
    return number(float, lambda value: value > bound, f"be above {bound:g}")


def within(low: float, high: float, *, open_end: bool = False) -> Callable[[str], float]:
    """A number in [low, high], of low's type; with `open_end` in [low, high)."""
    if open_end:
        return number(type(low), lambda value: low <= value < high, f"lie in [{low}, {high})")
    return number(type(low), lambda value: low <= value <= high, f"lie in [{low}, {high}]")


def one_or_two(parse: Callable[[str], float], word: str) -> float | tuple[float, float]:
    """A flag's value that `parse` takes, or two of them with a colon between, such as 50:20."""
    first, colon, last = word.partition(":")
    return (parse(first), parse(last)) if colon else parse(first)


SEED = number(int, lambda value: 0 <= value < 2**64, "lie in 0 to 2^64 - 1", most=2**64)


# ---- precision ---------------------------------------------------------------------------------------------------


def choose_precision(asked: str | None, device: torch.device) -> str:
    """The value of --mixed-precision: as asked, or bf16 on a GPU and none on a CPU. ValueError for fp16 on a CPU."""
    if asked == "fp16" and device.type != "cuda":
        raise ValueError("--mixed-precision fp16: needs a GPU; take none or bf16")
    return asked or ("bf16" if device.type == "cuda" else "none")


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "none")


def allow_tf32(*, products: bool, convolutions: bool) -> None:
    """TF32 in float32 matrix products and convolutions on a GPU."""
    torch.backends.cuda.matmul.allow_tf32 = products
    torch.backends.cudnn.allow_tf32 = convolutions


# ---- the end -----------------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """SIGTERM or SIGINT. No Exception, so that nothing on the way takes it for an error and carries on."""

    def __init__(self, signum: int):
        self.signum = signum


def raise_on_signals() -> None:
    """From now on SIGTERM and SIGINT raise Stopped, once; a process that hangs over its end is ended by SIGALRM."""

    def stop(signum, _frame):
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)
        signal.alarm(END_WITHIN_SECONDS)
        raise Stopped(signum)

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stop)


def run(
    name: str,
    parse: Callable[[list[str] | None], argparse.Namespace],
    body: Callable[[argparse.Namespace], int],
    argv: list[str] | None,
    *,
    when_stopped: str,
    out_of_memory: str,
) -> int:
    """`body(parse(argv))`, with the exit code of however it ends; an error is one line, said once.

    when_stopped: what to tell somebody whose signal ended it; out_of_memory: the remedy for that.
    """
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    raise_on_signals()
    early.end_with_torchrun()
    try:
        try:
            args = parse(argv)
        except ValueError as error:
            error.is_shared = True  # every process was given the same command line
            raise
        return body(args)
    except (ValueError, OSError) as error:
        _say(name, error)
        return FAILED if isinstance(error, OSError) and error.errno in OF_THE_MACHINE else BAD_INPUT
    except FloatingPointError as error:
        _say(name, error)
        return FAILED
    except torch.OutOfMemoryError as error:
        _say(name, f"{str(error).splitlines()[0]} {out_of_memory}")
        return FAILED
    except RuntimeError as error:
        if "DefaultCPUAllocator: " in str(error):  # what a CPU has instead of an OutOfMemoryError
            _say(name, f"{str(error).splitlines()[0].rpartition('DefaultCPUAllocator: ')[2]}. {out_of_memory}")
            return FAILED
        if not distributed.lost_another(error):
            raise
        warn(f"{name}: process {distributed.rank()} ends because another one has: {str(error).splitlines()[0]}")
        return FAILED
    except Stopped as stopped:
        distributed.print0(f"\n{name}: stopped; {when_stopped}", file=sys.stderr)
        return BY_SIGNAL + stopped.signum
    finally:
        signal.alarm(END_WITHIN_SECONDS)  # NCCL may wait for those that have ended
        distributed.cleanup()
        signal.alarm(0)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def warn(text: str) -> None:
    """A line to stderr, from the process that has it."""
    print(text, file=sys.stderr, flush=True)


def _say(name: str, error: Exception | str) -> None:
    """One error line: from rank 0 alone where every process has the same error, else from whoever has it.

    torchrun's summary at the end repeats it.
    """
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        message = {"message": str(error), "extraInfo": {"timestamp": int(time.time())}}
        with suppress(OSError):
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": message}), encoding="utf-8")
    if distributed.is_main() or not distributed.is_shared(error):
        where = f" (process {distributed.rank()})" if "RANK" in os.environ and not distributed.is_shared(error) else ""
        print(f"{name}: error{where}: {printable(str(error))}", file=sys.stderr, flush=True)
