"""SIGTERM, SIGINT and SIGUSR1 as a request to stop between steps, with a way out for a step that does not end."""

import os
import signal
import threading
from collections.abc import Callable

import torch
import torch.distributed as dist

from utils import distributed

SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
GRACE_SECONDS = 10.0  # torchrun kills 30 s after its SIGTERM; the checkpoint must be written by then
CLOSED = 0  # the byte that ends the watcher; no signal has this number


class Preemption:
    """Watches for the signals from a thread, so that a main thread inside compilation or a collective is no obstacle.

    Asked between steps, `requested` says whether any process got a signal. When the main thread has not come back to
    it within the grace period, the watcher itself calls `rescue` (on rank 0; the lock `updating` is held, so weights
    and optimizers are those of a whole number of steps) and ends the process. Exit code: `exit_code`.
    Not behind an NCCL collective that never ends: `rescue` then waits for the device, until torchrun kills.
    A context manager: the watcher ends with the block. One that lived on would free the tensors behind `rescue` while
    the interpreter shuts down, which aborts the process.
    """

    def __init__(self, rescue: Callable[[], None], grace_seconds: float = GRACE_SECONDS):
        self.rescue, self.grace_seconds = rescue, grace_seconds
        self.updating = threading.Lock()
        self.received = 0  # signal number
        self.seen = threading.Event()  # the main thread is on its way out
        self.group = dist.new_group(backend="gloo") if distributed.world_size() > 1 else None
        self.pending: tuple[dist.Work, torch.Tensor] | None = None
        self.reader, self.alarm = os.pipe()
        os.set_blocking(self.alarm, False)
        self.previous = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self.previous_wakeup = signal.set_wakeup_fd(self.alarm, warn_on_full_buffer=False)
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()

    @property
    def exit_code(self) -> int:
        return 128 + self.received

    def requested(self) -> bool:
        """Whether to stop now: the same answer on every process, one call late, at no wait for the device."""
        if self.group is None:
            stop = bool(self.received)
        else:
            number = self._finish_pending()
            stop = number > 0
            self.received = self.received or number
            flag = torch.tensor([self.received])
            self.pending = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group, async_op=True), flag
        if stop:
            self.seen.set()
        return stop

    def __enter__(self) -> "Preemption":
        return self

    def __exit__(self, error: type | None, *_: object) -> None:
        """Back to the former handlers. After an error the other processes' answers are not waited for."""
        if error is None:
            self._finish_pending()
        signal.set_wakeup_fd(self.previous_wakeup)
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.seen.set()
        os.write(self.alarm, bytes([CLOSED]))  # closing would not do: loader workers hold copies of the pipe
        self.watcher.join()
        os.close(self.alarm)
        os.close(self.reader)

    def _finish_pending(self) -> int:
        if self.pending is None:
            return 0
        work, flag = self.pending
        self.pending = None
        work.wait()
        return int(flag)

    def _watch(self) -> None:
        while self.received not in SIGNALS:
            (number,) = os.read(self.reader, 1)
            if number == CLOSED:
                return
            if number in SIGNALS:
                self.received = number
        is_main = distributed.is_main()
        if self.seen.wait(self.grace_seconds if is_main else 2 * self.grace_seconds):
            return
        if is_main:
            self.updating.acquire(timeout=self.grace_seconds)
            self.rescue()
        os._exit(self.exit_code)
