"""The folder of a run that may be stopped and continued: one run has it at a time, and one set of settings."""

import errno
import json
import re
import zlib
from contextlib import ExitStack
from pathlib import Path

from utils.files import lock, read_json, remove_leftovers, write_json
from utils.sampling.shards import SHARD_PATTERN, has_shards

REMEDY = "choose or empty a folder"
DAMAGED = f"it does not say which run this is; {REMEDY}"
RESULTS = "samples.json", "samples.npz", "contact_sheet.png"
LEFTOVERS = "|".join(map(re.escape, ("run.json", *RESULTS)))


def open_run(folder: Path, settings: dict, stack: ExitStack) -> dict:
    """Make the folder this run's, or see that it is, and lock it until `stack` closes.

    What a killed run left half-written is removed, and a run that made no image gives way. Returns the content of the
    folder's run.json. ValueError: see `claim`; or where the folder cannot be written to, or something is in the way.
    """
    flag = f"--sample-dir {folder}"
    try:
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        locked = lock(folder, stack, "--sample-dir")
        if locked:
            remove_leftovers(folder, LEFTOVERS)
            remove_leftovers(folder / "shards", SHARD_PATTERN)
    except OSError as error:
        raise _unless_full(error, f"{flag}: cannot be written to ({error}); choose another folder") from None
    for name in ("run.json", *RESULTS):
        if (folder / name).exists() and not (folder / name).is_file():
            raise ValueError(f"{flag}: {name} in it is no file, but a result goes there; {REMEDY}")
    has_images = (folder / "samples.npz").exists() or has_shards(folder / "shards")
    if locked and not has_images and is_ours(folder / "run.json"):
        write_json(folder / "run.json", settings)
    return claim(folder, settings, "--sample-dir", has_images or any((folder / name).exists() for name in RESULTS))


def claim_pngs(folder: Path, settings: dict) -> None:
    """Make the folder of PNGs, or see that its images are this run's. ValueError: see `claim` and `open_run`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        text = f"--save-images {folder}: cannot be written to ({error}); choose another folder"
        raise _unless_full(error, text) from None
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
        try:
            write_json(path, settings)
        except OSError as error:
            text = f"{flag} {folder}: cannot be written to ({error}); choose another folder"
            raise _unless_full(error, text) from None
        return settings
    before = read_json(path, DAMAGED)
    if not is_ours(path):
        raise ValueError(f"{flag} {folder}: its run.json is another program's; {REMEDY}")
    differing = [name for name in settings if before.get(name) != settings[name]]
    if differing:
        change = "; ".join(f"{name}: {before.get(name)} there, {settings[name]} now" for name in differing)
        raise ValueError(f"{flag} {folder} holds images of another run ({change}); {REMEDY}")
    return before


def is_ours(path: Path) -> bool:
    """Whether a run.json is one of ours: settings by flag. ValueError where it is damaged."""
    return path.exists() and any(name.startswith("--") for name in read_json(path, DAMAGED))


def _unless_full(error: OSError, text: str) -> Exception:
    """ValueError of the flag; a full disk is the machine's fault, and stays what it is."""
    return error if error.errno in (errno.ENOSPC, errno.EDQUOT) else ValueError(text)


def note(folder: Path, values: dict) -> None:
    """Add values to the folder's run.json."""
    write_json(folder / "run.json", {**read_json(folder / "run.json", DAMAGED), **values})


def key_of(settings: dict) -> int:
    """The number that ties shards to their run."""
    return zlib.crc32(json.dumps(settings, sort_keys=True).encode())
