"""When a run must stop because its numbers are broken, and what it then says."""

from typing import NoReturn

from utils import distributed
from utils.training.checkpoints import CheckpointFolder
from utils.training.tracker import Tracker


def stop_if_broken(tracker: Tracker, checkpoints: CheckpointFolder, limit: int) -> bool:
    """Whether the newest update was skipped. Raises FloatingPointError after `limit` of them in a row."""
    skipped = tracker.count_skipped()
    if skipped >= limit:
        stop(checkpoints, f"{skipped} updates in a row were not finite (--max-skipped-steps {limit})")
    return skipped > 0


def stop(checkpoints: CheckpointFolder, reason: str) -> NoReturn:
    """Raise FloatingPointError, on every process, that names the last checkpoint and the remedy."""
    checkpoints.wait()
    last = checkpoints.good[-1] if checkpoints.good else "none"
    with distributed.all_or_none():
        raise FloatingPointError(
            f"{reason}; stopped. Last checkpoint, from before them: {last}. The same command with a lower --lr or "
            "--mixed-precision none continues from it"
        )
