"""Files of the Hugging Face hub by their address, hf://OWNER/REPO/FILE, in the hub's own cache ($HF_HOME)."""

import re
from pathlib import Path

ADDRESS = re.compile(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)")  # @REVISION after the repository, as elsewhere


def is_address(path: str | Path) -> bool:
    return str(path).startswith("hf://")


def local(path: str | Path) -> str | Path:
    """Where the file of an address lies on this machine, downloaded if need be; any other path is itself.

    With $HF_HUB_OFFLINE=1 only what is in the cache is used. ValueError says what is missing, in one line.
    """
    if not is_address(path):
        return path
    parts = ADDRESS.fullmatch(str(path))
    if parts is None:
        raise ValueError(f"{path}: the hub's files are named hf://OWNER/REPO/FILE")
    try:
        from huggingface_hub import constants, errors, hf_hub_download
        from huggingface_hub.utils import logging
    except ImportError:
        raise ValueError(f"{path}: needs the package huggingface_hub; run pip install huggingface_hub") from None
    logging.set_verbosity_error()  # each of its retries would be told
    repo, revision, file = parts.groups()
    try:
        return hf_hub_download(repo, file, revision=revision)
    except errors.LocalEntryNotFoundError:
        reason = f"not in the cache ({constants.HF_HUB_CACHE}), and the hub is out of reach"
        remedy = "go online (and unset HF_HUB_OFFLINE where it is set), or give a file"
        raise ValueError(f"{path}: {reason}; {remedy}") from None
    except Exception as error:  # the hub's, the network library's, the disk's
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path}: the hub does not give it ({reason}); check the address") from None
