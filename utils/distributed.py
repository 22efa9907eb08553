"""Processes: start, rank, reductions. Every function is a no-op on one process."""

import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist


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
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group(
            "nccl" if use_cuda else "gloo",
            timeout=timedelta(minutes=timeout_minutes),
            device_id=device if use_cuda else None,
        )
    return device


def cleanup() -> None:
    """Leave the job, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


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


def reduce_mean(value: torch.Tensor) -> torch.Tensor:
    """Mean of `value` over processes, as a new tensor on every one of them."""
    return reduce_sum(value) / world_size()


def gather_objects(value: object) -> list:
    """`value` of every process, by rank, on every process. Only for small objects of our own."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def main_first():
    """Run the block on rank 0 while the others wait, then on the others (who find its result ready)."""
    if not is_main():
        barrier()
    try:
        yield
    finally:
        if is_main():
            barrier()
