"""The order of training: which images each process sees at which step, from any step on; and the worker processes.

The global batch of a step is a slice of the permutation of (seed, epoch); each process takes its contiguous share.
Nothing depends on the number of workers, and the global order on nothing but (seed, step).
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from dataset.draws import epoch_order
from dataset.imagenet import MAX_BAD_SHARE, CropKey, ImageDataset, Sample

PREFETCH_BATCHES = 4  # per worker
NOTHING = np.empty(0, int)
MAX_WORKERS = 1024
WORKER_DIED = "DataLoader worker (pid", "Pin memory thread exited"  # how torch's RuntimeErrors about that begin


def crop_probability(epoch: int, decay_start: int, decay_end: int) -> float:
    """Probability of a random crop: 1 before `decay_start`, falling linearly to 0 at `decay_end`, 0 from there on."""
    if epoch >= decay_end:
        return 0.0
    return 1.0 if epoch < decay_start else (decay_end - epoch) / (decay_end - decay_start)


@dataclass
class TrainLoader:
    """Iterates over the micro-batches (Samples of batches) of one process; make it with `train_loader`."""

    dataset: ImageDataset
    sampler: "_StepSampler"
    max_bad_share: float
    num_workers: int
    pin_memory: bool
    report: Callable[[str], None]
    num_replaced: int = 0  # images, since the start of this process
    _named: set[str] = field(default_factory=set)

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.steps_per_epoch

    @property
    def batches_per_step(self) -> int:
        return self.sampler.share // self.sampler.batch_size

    def __iter__(self) -> Iterator[Sample]:
        batches = read_batches(self.dataset, self.sampler, self.num_workers, self.pin_memory)
        batches_per_epoch = self.steps_per_epoch * self.batches_per_step
        allowed = max(1, int(self.max_bad_share * batches_per_epoch * self.sampler.batch_size))
        bad_in_epoch = 0
        for number, batch in enumerate(batches, self.sampler.steps.start * self.batches_per_step):
            if number % batches_per_epoch == 0:
                bad_in_epoch = 0
            for text in filter(None, batch.bad):
                self.num_replaced += 1
                bad_in_epoch += 1
                if text not in self._named:
                    self._named.add(text)
                    self.report(f"bad image replaced ({len(self._named)} so far): {text}")
            if bad_in_epoch > allowed:
                raise ValueError(
                    f"{bad_in_epoch} bad images in one epoch, more than --max-bad-share {self.max_bad_share} allows "
                    f"({allowed} per process), the last {text}; run python -m dataset.check, or raise --max-bad-share"
                )
            yield batch


@dataclass
class _StepSampler:
    """Lists of CropKeys, one per micro-batch: rows first .. first + share - 1 of each step's global batch."""

    dataset: ImageDataset
    seed: int
    steps: range
    global_batch_size: int
    batch_size: int
    first: int
    share: int
    aug_decay: tuple[int, int]
    held_out: np.ndarray

    @property
    def steps_per_epoch(self) -> int:
        return (len(self.dataset) - len(self.held_out)) // self.global_batch_size

    def __iter__(self) -> Iterator[list[CropKey]]:
        current = None
        for step in self.steps:
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if epoch != current:
                current, order = epoch, epoch_order(self.seed, epoch, len(self.dataset))
                order = order[~np.isin(order, self.held_out)]
                probability = crop_probability(epoch, *self.aug_decay)
            first = step_in_epoch * self.global_batch_size + self.first
            for start in range(first, first + self.share, self.batch_size):
                yield [CropKey(epoch, int(index), probability) for index in order[start : start + self.batch_size]]


def train_loader(
    dataset: ImageDataset,
    *,
    global_batch_size: int,
    batch_size: int,
    seed: int,
    num_steps: int,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    aug_decay_start: int = 350,
    aug_decay_end: int = 375,
    held_out: np.ndarray = NOTHING,
    max_bad_share: float = MAX_BAD_SHARE,
    pin_memory: bool = False,
    report: Callable[[str], None] = print,
) -> TrainLoader:
    """Micro-batches of `batch_size` images for steps start_step .. num_steps - 1 (incomplete ones left out).

    global_batch_size = world_size * batch_size * gradient accumulation, at most the images there are. `report` gets
    one line per bad image. The images at the places `held_out` are left out. Raises ValueError, naming the flag, for
    steps or epochs in the wrong order; while iterating, when too many images are bad.
    """
    if not 0 <= start_step <= num_steps:
        raise ValueError(f"start step {start_step} is not within 0 .. {num_steps} steps; raise --epochs or --max-steps")
    if aug_decay_end < aug_decay_start:
        raise ValueError(
            f"--aug-decay-end-epoch {aug_decay_end} lies before --aug-decay-start-epoch {aug_decay_start}; "
            "set it to the same epoch or a later one"
        )
    share = global_batch_size // world_size
    sampler = _StepSampler(
        dataset,
        seed,
        range(start_step, num_steps),
        global_batch_size,
        batch_size,
        rank * share,
        share,
        (aug_decay_start, aug_decay_end),
        held_out,
    )
    return TrainLoader(dataset, sampler, max_bad_share, num_workers, pin_memory, report)


# ---- worker processes --------------------------------------------------------------------------------------------


def read_batches(
    dataset: Dataset, batches_of_keys: Iterable[list], num_workers: int, pin_memory: bool = False
) -> Iterator:
    """The collated batch of dataset[key] for each list of keys, in order, read by `num_workers` processes beside us.

    An error in a worker is raised here as it was raised there. OSError when a worker was killed.
    """
    loader = DataLoader(
        _Batches(dataset),
        sampler=batches_of_keys,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_obey_only_the_parent,
        generator=torch.Generator(),  # else starting to iterate takes a draw from the trainer's stream
        prefetch_factor=PREFETCH_BATCHES if num_workers else None,
    )
    batches = _iterate(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, EOFError, ConnectionError) as error:
            if isinstance(error, RuntimeError) and not str(error).startswith(WORKER_DIED):
                raise
            raise OSError(
                f"--num-workers {num_workers}: a process that loads images was killed, mostly for want of memory; "
                f"start again, with fewer of them if so ({error})"
            ) from None
        if isinstance(batch, Exception):
            raise batch
        yield batch


@dataclass
class _Batches(Dataset):
    """Batches by their keys. Errors are values here: torch would bring a raised one as the text of a traceback."""

    dataset: Dataset

    def __getitem__(self, keys: list) -> object:
        try:
            return default_collate([self.dataset[key] for key in keys])
        except (ValueError, OSError) as error:
            return error


def _as_it_is(batch: object) -> object:
    return batch


def _iterate(loader: DataLoader) -> Iterator:
    """iter(loader), without torch's SIGCHLD handler: it would raise a worker's death in the midst of an update.

    Without it a death is noticed within seconds where a batch is waited for.
    """
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
    return batches


def _obey_only_the_parent(worker: int) -> None:
    """A worker's signals: SIGTERM counts when its parent sends it; when the parent is gone, the worker goes too.

    Ctrl-C and SLURM signal the whole group, and the trainer still needs batches until its checkpoint is written.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # not on macOS: there any SIGTERM ends a worker, and torch looks for the parent
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_the_parent(parent: int) -> None:
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, 1)
        if received is not None and received.si_pid == multiprocessing.parent_process().pid:
            break
    os._exit(0)
