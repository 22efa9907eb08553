"""When a run must stop because its numbers are broken, and what it then says."""

from typing import NoReturn

from utils import distributed
from utils.training.checkpoints import CheckpointFolder
from utils.training.tracker import Tracker


def stop_if_broken(tracker: Tracker, checkpoints: CheckpointFolder, limit: int, precision: str) -> bool:
    """Whether the newest update was skipped. Raises FloatingPointError after `limit` of them in a row, and at the end
    of a run in which no other was made."""
    skipped = tracker.count_skipped()
    if skipped >= limit:
        stop(checkpoints, f"{skipped} updates in a row were not finite (--max-skipped-steps {limit})", precision)
    if tracker.progress.is_done and skipped >= tracker.progress.step - tracker.started_at > 0:
        stop(checkpoints, f"no update was made: all {skipped} were not finite", precision)
    return skipped > 0


def stop(checkpoints: CheckpointFolder, reason: str, precision: str) -> NoReturn:
    """Raise FloatingPointError, on every process, that names the last checkpoint and the remedy.

    precision: the run's --mixed-precision.
    """
    checkpoints.wait()
    last = checkpoints.good[-1] if checkpoints.good else "none"
    with distributed.all_or_none():
        raise FloatingPointError(
            f"{reason}; stopped. Last checkpoint, from before them: {last}. The same command with a lower --lr "
            f"{'' if precision == 'none' else 'or --mixed-precision none '}continues from it"
        )
