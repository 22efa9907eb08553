"""Checkpoint files: read without executing anything in them, or copying what is not used; damage is never silent."""

import random
import subprocess
import sys

import pytest
import torch

from tests.helpers.states import is_whole, state
from utils import checkpoint_file
from utils.checkpoint_file import read


def test_flipped_bytes_are_never_silently_wrong(tmp_path):
    path, good = tmp_path / "good.pt", state(3)
    checkpoint_file.write(good, path)
    content, draws, refused = path.read_bytes(), random.Random(0), 0
    offsets = [*draws.sample(range(len(content)), 150), *range(len(content) - 60, len(content))]
    for offset in offsets:
        damaged = bytearray(content)
        damaged[offset] ^= draws.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            saved = read(path, verify=True)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
        else:  # padding between members, time stamps: nothing that is read
            assert is_whole(saved) and saved["step"] == 3 and torch.equal(saved["model"]["b"], good["model"]["b"])
            assert saved["args"] == good["args"] and saved["config"] == good["config"]
    assert refused > len(offsets) / 2


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2\n"


class Stranger:
    pass


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "an HTML page, as a failed download leaves"),
        (LFS, "a Git LFS pointer, not the file itself"),
        (b"just a text file\n", "damaged, or not torch's"),
        (bytes(range(128, 256)) * 9, "damaged"),
        (Stranger(), "holds .*Stranger, which is not run"),
        (None, "Is a directory"),
    ],
    ids=["empty", "html", "lfs", "text", "bytes", "object", "folder"],
)
@pytest.mark.parametrize("verify", [False, True])
def test_what_is_no_checkpoint_is_named_in_one_line_without_torchs_advice(tmp_path, content, reason, verify):
    path = tmp_path / "file.pt"
    if content is None:
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save({"model": {}, "more": content}, path)
    with pytest.raises(ValueError, match=reason) as error:
        read(path, verify=verify)
    text = str(error.value)
    assert text.startswith(str(path)) and text.isprintable()
    assert "weights_only" not in text and "trust" not in text


def test_what_is_read_is_not_copied(tmp_path):
    """80 MB of another tensor cost nothing, though they are in the file."""
    checkpoint_file.write({"model": {"a": torch.ones(5)}, "optimizer": torch.ones(20_000_000)}, tmp_path / "file.pt")
    code = (
        "import resource, sys\nfrom utils.checkpoint_file import read\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert read(sys.argv[1])['model']['a'].sum() == 5\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    grown = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "file.pt"], text=True, capture_output=True, check=True
    )
    assert int(grown.stdout) < 20_000  # kB
