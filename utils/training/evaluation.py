"""What is measured once in a while: the loss of images that training leaves out, and how good the images are it makes.

Nothing of training changes by it, and no number depends on the number of processes. Also a run that was stopped between
a step and its evaluation has every one: it is due as long as metrics.jsonl lacks it.
"""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

from torch import Tensor, nn

from utils.distributed import from_main, gather_objects, my_parts
from utils.provenance import provenance
from utils.training.draws import StepDraws
from utils.training.tracker import Tracker

AT_ONCE = 32  # images left out, whatever the number of processes
SEED = 0  # of the draws for images left out, whatever a run's own: losses of different runs are comparable


class Evaluation:
    """Every `every` steps and at the end (0: never) what `stage` knows to measure, with the model of `averaged()`.

    `left_out`: images by number (count, batch), as dataset.HeldOut; `comparison` is handed to stage.quality.
    """

    def __init__(self, stage, left_out, comparison: object | None, tracker: Tracker,
                 averaged: Callable[[], AbstractContextManager[nn.Module]], every: int):  # fmt: skip
        self.stage, self.left_out, self.comparison = stage, left_out, comparison
        self.tracker, self.averaged, self.every = tracker, averaged, every

    def is_due(self) -> bool:
        """Whether the newest step is to be evaluated; the same on every process."""
        progress = self.tracker.progress
        if not self.every or not progress.step or (progress.step % self.every and not progress.is_done):
            return False
        return not from_main(lambda: progress.step in self.tracker.metrics.evaluated)

    def run(self) -> None:
        """Evaluate the newest step."""
        start, found, receipt = time.perf_counter(), {}, {}
        with self.tracker.pause(), self.averaged() as model:
            if self.left_out.count:
                losses = mean_over_images(
                    lambda part: self.stage.held_out_losses(model, self.left_out.batch(part)),
                    my_parts(self.left_out.count, AT_ONCE),
                )
                found |= {f"held_out_{name}": value for name, value in losses.items()}
                receipt["held_out"] = self.left_out.count
            if self.comparison is not None:
                found |= self.stage.quality(model, self.comparison)
                receipt |= self.comparison.receipt
        receipt |= provenance(self.stage.device)
        self.tracker.evaluation(found, receipt, time.perf_counter() - start)


def draws(index: Tensor) -> StepDraws:
    """Those of the images left out, the same at every step."""
    return StepDraws(SEED, 0, index)


def mean_over_images(losses: Callable[[range], dict[str, Tensor]], parts: Iterable[range]) -> dict[str, float]:
    """Means over all images of losses(part), by name, each the mean of a part: images by their numbers.

    `parts` are this process's; between them the processes hold every image once. When parts do not depend on the
    number of processes, neither does the result.
    """
    mine = [(len(part), {name: float(value) for name, value in losses(part).items()}) for part in parts if part]
    everybody = [found for share in gather_objects(mine) for found in share]
    count = sum(images for images, _ in everybody)
    names = everybody[0][1]
    return {name: math.fsum(images * found[name] for images, found in everybody) / count for name in names}
