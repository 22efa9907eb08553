"""The folder of a run that may be stopped and continued: one run has it at a time, and one set of settings."""

import json
import re
import zlib
from contextlib import ExitStack
from pathlib import Path

from utils.files import lock, read_json, remove_leftovers, write_json
from utils.sampling.shards import SHARD_PATTERN, has_shards

REMEDY = "choose or empty a folder"
DAMAGED = f"it does not say which run this is; {REMEDY}"
RESULTS = r"(samples|run)\.json|samples\.npz|contact_sheet\.png"


def open_run(folder: Path, settings: dict, stack: ExitStack) -> dict:
    """Make the folder this run's, or see that it is, and lock it until `stack` closes.

    What a killed run left half-written is removed, and a run that made no image gives way. Returns the content of the
    folder's run.json. ValueError: see `claim`.
    """
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    locked = lock(folder, stack, "--sample-dir")
    if locked:
        remove_leftovers(folder, RESULTS)
        remove_leftovers(folder / "shards", SHARD_PATTERN)
    has_images = (folder / "samples.npz").exists() or has_shards(folder / "shards")
    if locked and not has_images:
        (folder / "run.json").unlink(missing_ok=True)
    return claim(folder, settings, "--sample-dir", has_images)


def claim_pngs(folder: Path, settings: dict) -> None:
    """Make the folder of PNGs, or see that its images are this run's. ValueError: see `claim`."""
    folder.mkdir(parents=True, exist_ok=True)
    claim(folder, settings, "--save-images", any(re.fullmatch(r"\d{6,}\.png", path.name) for path in folder.iterdir()))


def claim(folder: Path, settings: dict, flag: str, has_images: bool) -> dict:
    """Write the settings to the folder's run.json, or see that they are there already; its content.

    ValueError says which settings differ from those of the run in it, that the file is damaged, or that nothing says
    which run made the images in the folder.
    """
    path = folder / "run.json"
    if not path.exists():
        if has_images:
            raise ValueError(f"{flag} {folder} holds images, and no run.json that says which run made them; {REMEDY}")
        write_json(path, settings)
        return settings
    before = read_json(path, DAMAGED)
    differing = [name for name in settings if before.get(name) != settings[name]]
    if differing:
        change = "; ".join(f"{name}: {before.get(name)} there, {settings[name]} now" for name in differing)
        raise ValueError(f"{flag} {folder} holds images of another run ({change}); {REMEDY}")
    return before


def note(folder: Path, values: dict) -> None:
    """Add values to the folder's run.json."""
    write_json(folder / "run.json", {**read_json(folder / "run.json", DAMAGED), **values})


def key_of(settings: dict) -> int:
    """The number that ties shards to their run."""
    return zlib.crc32(json.dumps(settings, sort_keys=True).encode())
