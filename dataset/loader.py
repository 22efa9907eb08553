"""The order of training: which images each process sees at which step, from any step on.

The global batch of a step is a slice of the permutation of (seed, epoch); each process takes its contiguous share.
Nothing depends on the number of workers, and the global order on nothing but (seed, step).
"""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader

from dataset.draws import epoch_order
from dataset.imagenet import CropKey, ImageDataset, Sample


def crop_probability(epoch: int, decay_start: int, decay_end: int) -> float:
    """Probability of a random crop: 1 before `decay_start`, falling linearly to 0 at `decay_end`, 0 from there on."""
    if epoch >= decay_end:
        return 0.0
    return 1.0 if epoch < decay_start else (decay_end - epoch) / (decay_end - decay_start)


class TrainLoader:
    """Iterates over the micro-batches (Samples of batches) of one process; make it with `train_loader`."""

    def __init__(
        self,
        batches: DataLoader,
        steps_per_epoch: int,
        batches_per_step: int,
        start_step: int,
        max_bad_share: float,
        report: Callable[[str], None],
    ):
        self._batches = batches
        self.steps_per_epoch = steps_per_epoch
        self.batches_per_step = batches_per_step
        self.start_step = start_step
        self.max_bad_share = max_bad_share
        self.report = report
        self.num_replaced = 0  # images, since the start of this process
        self._named: set[str] = set()

    def __iter__(self) -> Iterator[Sample]:
        batches_per_epoch = self.steps_per_epoch * self.batches_per_step
        allowed = max(1, int(self.max_bad_share * batches_per_epoch * self._batches.batch_sampler.batch_size))
        bad_in_epoch = 0
        for number, batch in enumerate(self._batches, self.start_step * self.batches_per_step):
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

    def __len__(self) -> int:
        return len(self.steps) * self.share // self.batch_size

    def __iter__(self) -> Iterator[list[CropKey]]:
        steps_per_epoch = len(self.dataset) // self.global_batch_size
        current = None
        for step in self.steps:
            epoch, step_in_epoch = divmod(step, steps_per_epoch)
            if epoch != current:
                current, order = epoch, epoch_order(self.seed, epoch, len(self.dataset))
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
    max_bad_share: float = 0.001,
    pin_memory: bool = False,
    report: Callable[[str], None] = print,
) -> TrainLoader:
    """Micro-batches of `batch_size` images for steps start_step .. num_steps - 1 (incomplete ones left out).

    global_batch_size = world_size * batch_size * gradient accumulation, at most the images there are. `report` gets
    one line per bad image. Raises ValueError, naming the flag, for steps or epochs in the wrong order; while iterating,
    when too many images are bad.
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
    )
    batches = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # else starting to iterate takes a draw from the trainer's stream
        prefetch_factor=4 if num_workers else None,
    )
    return TrainLoader(
        batches,
        len(dataset) // global_batch_size,
        share // batch_size,
        start_step,
        max_bad_share,
        report,
    )


def _ignore_signals(worker: int) -> None:
    """Ctrl-C and SLURM signal the whole group: the trainer still needs batches until its checkpoint is written."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
