"""What a run reports: losses that stay on the device between log lines; log.txt, metrics.jsonl, TensorBoard, sheets."""

import errno
import os
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from utils import distributed
from utils.files import atomic_file
from utils.images import to_uint8
from utils.training.metrics_file import NAME, MetricsFile

SHEETS = "sheets"  # folder of the images by step
SIGNED = b"SphereAR train.py"  # stands at the beginning of each sheet and report, so that no other file is replaced


def require_ours(path: Path) -> None:
    """FileExistsError where something is at `path` that is no sheet and no report of a run."""
    if os.path.lexists(path):
        if path.is_file():
            with open(path, "rb") as file:
                if SIGNED in file.read(256):
                    return
        raise FileExistsError(errno.EEXIST, f"{path.name} was not written by train.py; move it away", str(path))


def write_sheet(path: Path, image: np.ndarray) -> None:
    """An image (uint8, H W 3) as a signed PNG, atomically; in the place of an earlier one, and of no other file."""
    require_ours(path)
    signature = PngInfo()
    signature.add_text("Software", SIGNED.decode())
    with atomic_file(path) as file:
        Image.fromarray(image).save(file, format="PNG", pnginfo=signature)


def summary_writer(folder: Path, step: int):
    """TensorBoard's writer for steps from `step` on; what an interrupted run wrote beyond is hidden.

    TensorBoard imports the whole of TensorFlow where it is installed (7 s and a page of warnings) unless this module
    of its own exists, which selects its built-in file system code.
    """
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step)


def without_tensorboards(print_error: Callable) -> Callable:
    """threading.excepthook without the tracebacks of TensorBoard's thread, whose errors the writer raises again."""

    def print_others(error: threading.ExceptHookArgs) -> None:
        if type(error.thread).__module__.partition(".")[0] != "tensorboard":
            print_error(error)

    return print_others


def add_to(totals: dict[str, torch.Tensor], share: float, **values: torch.Tensor) -> None:
    """Add values of one part of a step, times its share, to the step's."""
    for name, value in values.items():
        value = value.detach() * share
        totals[name] = totals[name] + value if name in totals else value


@dataclass
class Progress:
    """Where a run stands."""

    total_steps: int
    steps_per_epoch: int
    step: int = 0  # updates made

    @property
    def epoch(self) -> int:
        """Complete epochs."""
        return self.step // self.steps_per_epoch

    @property
    def step_in_epoch(self) -> int:
        return self.step % self.steps_per_epoch

    @property
    def is_done(self) -> bool:
        return self.step >= self.total_steps


class Tracker:
    """Means of what the steps report. Nothing waits for the device until a line is due; then it is one transfer.

    What cannot be written is told to `report` once, and training goes on.
    """

    def __init__(self, folder: Path, progress: Progress, global_batch_size: int, report: Callable[[str], None] = print):
        self.progress, self.global_batch_size, self.report = progress, global_batch_size, report
        step, total_steps = progress.step, progress.total_steps
        self.folder, self.writer, self.file, self.metrics = folder, None, None, None
        self.failing: set[str] = set()  # files that could not be written the last time
        with distributed.all_or_none():
            if distributed.is_main():
                folder.mkdir(parents=True, exist_ok=True)
                if (folder / "log.txt").is_fifo():  # it would be waited for, for ever
                    raise ValueError(f"{folder / 'log.txt'}: is a pipe; move it away")
                self.metrics = MetricsFile(folder / NAME, step, report)
                self.file = open(folder / "log.txt", "ab", buffering=0)  # noqa: SIM115
        self.excepthook = threading.excepthook
        threading.excepthook = without_tensorboards(self.excepthook)
        if self.file is not None:
            with self._tensorboard():
                self.writer = summary_writer(folder / "tensorboard", step)
        self.bar = tqdm(
            total=total_steps, initial=step, unit="step", dynamic_ncols=True,
            disable=None if distributed.is_main() else True,
        )  # fmt: skip
        self.sums: dict[str, torch.Tensor] = {}  # name -> (sum, count) of the finite values
        self.steps: list[int] = []  # since the last read
        self.indices: list[torch.Tensor] = []  # this process's images in each of them
        self.finite: list[torch.Tensor] = []
        self.skipped_in_a_row = 0
        self.logged = self.started_at = step
        self.started = time.perf_counter()

    def add(self, metrics: dict[str, torch.Tensor], *, finite: torch.Tensor, indices: torch.Tensor) -> None:
        """metrics: 0-dim tensors of the newest update; finite: whether it was made; indices: its images here."""
        for name, value in metrics.items():
            value = value.detach().float()
            ok = torch.isfinite(value)
            pair = torch.stack([torch.where(ok, value, 0.0), ok.float()])
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair
        self.steps.append(self.progress.step)
        self.finite.append(finite)
        self.indices.append(indices)
        self.bar.update()

    def count_skipped(self) -> int:
        """Skipped updates in a row up to now, over all steps added. Reports each new one. Waits for the device."""
        if not self.finite:
            return self.skipped_in_a_row
        for step, finite, indices in zip(self.steps, torch.stack(self.finite).tolist(), self.indices):
            self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
            if not finite:
                images = [i for part in distributed.gather_objects(indices.tolist()) for i in part]
                self.print(f"step {step}: loss or gradient not finite, update skipped; images {images}")
        self.steps, self.finite, self.indices = [], [], []
        return self.skipped_in_a_row

    def log(self, lr: float) -> dict[str, float]:
        """One line and one TensorBoard entry for the steps since the last."""
        self.count_skipped()
        step, total_steps = self.progress.step, self.progress.total_steps
        seconds = time.perf_counter() - self.started
        names = list(self.sums)
        pairs = distributed.reduce_sum(torch.stack([self.sums[name] for name in names])).tolist()
        means = {name: total / count if count else float("nan") for name, (total, count) in zip(names, pairs)}
        means["lr"] = lr
        means["images/s"] = (step - self.logged) * self.global_batch_size / seconds
        epoch = (step - 1) // self.progress.steps_per_epoch
        self._scalars(means)
        self.record("training", {"epoch": epoch, **means})
        values = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        self.print(f"step {step:>{len(str(total_steps))}}/{total_steps}  epoch {epoch}  {values}")
        self.sums, self.logged = {}, step
        self.started = time.perf_counter()
        return means

    def evaluation(self, values: dict[str, float], receipt: dict, seconds: float) -> None:
        """What an evaluation of the newest step found, and all that is needed to find it again."""
        self._scalars({f"evaluation/{name}": value for name, value in values.items()})
        self.record("evaluation", {**values, "seconds": round(seconds, 2), "receipt": receipt})
        found = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.print(f"step {self.progress.step}: evaluated in {seconds:.0f} s  {found}")

    def image(self, name: str, images: torch.Tensor) -> None:
        """A grid of images (N, 3, H, W) in [-1, 1] to TensorBoard, and as a PNG of this step's, from rank 0."""
        if self.file is None:
            return
        from torchvision.utils import make_grid

        grid = make_grid(images.detach().float().cpu().clamp(-1, 1) / 2 + 0.5, nrow=8)
        with self._tensorboard():
            if self.writer is not None:
                self.writer.add_image(name, grid, self.progress.step)
        path = self.folder / SHEETS / f"step_{self.progress.step:08d}.png"
        with self._going_on(str(path.parent)):
            path.parent.mkdir(exist_ok=True)
            write_sheet(path, to_uint8(2 * grid[None] - 1)[0])

    def print(self, text: str) -> None:
        """A line above the progress bar and in log.txt, from rank 0."""
        if self.file is not None:
            tqdm.write(text)
            sys.stdout.flush()
            with self._going_on(self.file.name):
                self.file.write(f"{text}\n".encode())

    def record(self, kind: str, values: dict) -> None:
        """A line of metrics.jsonl, from rank 0."""
        if self.metrics is not None:
            with self._going_on(self.metrics.name):
                self.metrics.append(kind, self.progress.step, values)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """The time inside counts for no throughput."""
        started = time.perf_counter()
        yield
        self.started += time.perf_counter() - started

    def _scalars(self, values: dict[str, float]) -> None:
        with self._tensorboard():
            if self.writer is not None:
                for name, value in values.items():
                    self.writer.add_scalar(name, value, self.progress.step)

    @contextmanager
    def _going_on(self, name: str) -> Iterator[None]:
        """Around the writing of a file: where that fails it is told, once until it succeeds again."""
        try:
            yield
            self.failing.discard(name)
        except OSError as error:
            if name not in self.failing:
                self.report(f"could not write to {name}: {error.strerror}; training goes on")
            self.failing.add(name)

    @contextmanager
    def _tensorboard(self) -> Iterator[None]:
        """Around what TensorBoard's writer does: it is given up where it fails, as it then never writes again."""
        try:
            yield
        except Exception as error:  # its thread's own, of any kind
            self.writer = None
            self.report(f"could not write for TensorBoard: {error}; training goes on without it")

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        with self._tensorboard():
            if self.writer is not None:
                self.writer.close()
        threading.excepthook = self.excepthook
        for file in filter(None, (self.file, self.metrics)):
            file.close()
