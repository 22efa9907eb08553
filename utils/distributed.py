"""Processes: start, rank, reductions, and how they agree. Every function is a no-op on one process."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
DEVICES = Path("/dev")
TOLD = ValueError, OSError, FloatingPointError  # errors that processes tell each other; the first that fits is raised


def init(timeout_minutes: int = 30, *, cpu: bool = False) -> torch.device:
    """Join the torchrun job when there is one, and return this process's device, with `cpu` never a GPU.

    NCCL on GPUs, Gloo on CPUs; without torchrun (no WORLD_SIZE in the environment) nothing is started.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    use_cuda = torch.cuda.is_available() and not cpu
    if use_cuda:
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {local_rank} of this node has no GPU: {torch.cuda.device_count()} are visible; "
                "lower --nproc_per_node or widen CUDA_VISIBLE_DEVICES"
            )
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if not (use_cuda or cpu):
        _tell_of_unused_gpu()
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        with _default_signals():
            dist.init_process_group(
                "nccl" if use_cuda else "gloo",
                timeout=timedelta(minutes=timeout_minutes),
                device_id=device if use_cuda else None,
            )
    return device


@contextmanager
def _default_signals() -> Iterator[None]:
    """SIGTERM and SIGINT end the process at once: no handler in Python runs while it waits for the others in C++."""
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _has_nvidia_gpu() -> bool:
    """Whether this machine shows one to us, as far as its files tell."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and any(DEVICES.glob("nvidia[0-9]*"))


def _tell_of_unused_gpu() -> None:
    """Say it where torch cannot use this machine's GPU. ValueError where several processes would share its CPU."""
    if torch.version.cuda is None or not _has_nvidia_gpu():
        return
    try:
        torch.cuda.init()
        reason = "no reason is given"
    except RuntimeError as error:  # such as a driver older than its CUDA
        reason = str(error).strip().splitlines()[0]
    text = (
        f"this machine has an NVIDIA GPU, but torch {torch.__version__} cannot use it: {reason}. "
        "Install the torch build of your driver's CUDA, or set CUDA_VISIBLE_DEVICES=-1 to mean the CPU"
    )
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        error = ValueError(text)
        error.is_shared = True  # it is the machine's
        raise error
    print(f"WARNING: running on the CPU; {text}", file=sys.stderr, flush=True)


def lost_another(error: BaseException) -> bool:
    """Whether this is how torch tells a process that another one of the job has ended."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def cleanup() -> None:
    """Leave the job, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number in the job; known from the environment before the job is joined."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def print0(*values: object, **options: object) -> None:
    """Print on rank 0 only, flushed."""
    if is_main():
        print(*values, flush=True, **options)


def barrier() -> None:
    """Wait for every process."""
    if dist.is_initialized():
        dist.barrier()


def reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """Sum of `value` over processes, as a new tensor on every one of them."""
    value = value.clone()
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def my_parts(count: int, length: int) -> Iterator[range]:
    """This process's parts of `count` things, one in every turn; the last parts have fewer than `length`, or none."""
    for turn in range(0, count, world_size() * length):
        start = turn + rank() * length
        yield range(min(start, count), min(start + length, count))


def gather(value: torch.Tensor) -> torch.Tensor:
    """`value` of every process, of one shape everywhere, by rank and on every process: (processes, ...)."""
    if not dist.is_initialized():
        return value[None]
    values = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(values, value)
    return torch.stack(values)


def gather_objects(value: object) -> list:
    """`value` of every process, by rank, on every process. Only for small objects of our own."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(function: Callable[[], T]) -> T:
    """`function()` of rank 0, as result or as error, on every process. Only for small results.

    An error that comes out of here is the same everywhere (`is_shared`).
    """
    result = None
    with all_or_none():
        if is_main():
            result = function()
    return gather_objects(result)[0]


@contextmanager
def all_or_none() -> Iterator[None]:
    """An error of any process inside the block is raised on all of them: none is left waiting for the others.

    The block itself must not communicate. The error with the lowest rank counts; on the others it comes as one of
    TOLD with the same text. An error that comes out of here is the same everywhere (`is_shared`).
    """
    mine = None
    try:
        yield
    except Exception as error:
        if not isinstance(error, TOLD):
            raise  # a fault of the program, not of its input: torchrun ends the others
        mine = error
    told = None if mine is None else (next(i for i, kind in enumerate(TOLD) if isinstance(mine, kind)), str(mine))
    first = next(filter(None, gather_objects(told)), None)
    if first is None:
        return
    error = mine if mine is not None and told == first else TOLD[first[0]](first[1])
    error.is_shared = True
    raise error


def is_shared(error: BaseException) -> bool:
    """Whether every process of the job has raised this same error."""
    return getattr(error, "is_shared", False)
