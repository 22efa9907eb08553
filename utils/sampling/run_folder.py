"""The folder of a run that may be stopped and continued: one run has it at a time, and one set of settings."""

from contextlib import ExitStack
from pathlib import Path

from utils.files import lock, read_json, write_json

REMEDY = "it does not say which run this is; choose or empty a folder"


def open_run(folder: Path, settings: dict, stack: ExitStack) -> dict:
    """Make the folder this run's, or see that it is, and lock it until `stack` closes.

    What a killed run left half-written is removed, and a run that made no image gives way. Returns the content of the
    folder's run.json. ValueError says which settings differ from those of the run in it, or that the file is damaged.
    """
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    path, locked = folder / "run.json", lock(folder, stack, "--sample-dir")
    if locked:
        for leftover in [*folder.glob(".*.tmp"), *folder.glob("shards/.*.tmp")]:
            leftover.unlink()
    unused = locked and not (folder / "samples.npz").exists() and not any(folder.glob("shards/*.npy"))
    if unused or not path.exists():
        write_json(path, settings)
        return settings
    before = read_json(path, REMEDY)
    differing = [name for name in settings if before.get(name) != settings[name]]
    if differing:
        change = "; ".join(f"{name}: {before.get(name)} there, {settings[name]} now" for name in differing)
        raise ValueError(f"--sample-dir {folder} holds images of another run ({change}); choose or empty a folder")
    return before
