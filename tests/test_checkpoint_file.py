"""Checkpoint files: read without executing anything in them, or copying what is not used; damage is never silent."""

import os
import pickle
import random
import subprocess
import sys
import zipfile

import pytest
import torch

from tests.helpers.states import is_whole, state
from utils import checkpoint_file
from utils.checkpoint_file import examine, load_examined, read
from utils.files import sha256


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


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b" \n<!DOCTYPE html>\n<html><body>404</body></html>", "is a web page"),
        (b"<html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3\n", "is a Git-LFS pointer"),
        (b"some text\n", "not a readable checkpoint: no file of torch.save"),
        (pickle.dumps({"model": {}}, protocol=4), "not a readable checkpoint: no file of torch.save"),
        (bytes(range(128, 256)) * 9, "not a readable checkpoint: no file of torch.save"),
        (b"PK\x03\x04" + bytes(200), "not a readable checkpoint: damaged or cut short"),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_what_is_no_checkpoint_is_named_in_one_line(tmp_path, content, message, verify, recwarn):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read(path, verify=verify)
    said = str(caught.value)
    assert said.startswith(f"{path}: ") and "\n" not in said and "weights_only" not in said and not recwarn.list
    assert message in said or (content.startswith(b"PK") and "not a readable checkpoint" in said)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path, tmp_path / "pipe.pt"):
        with pytest.raises(ValueError, match=f"{path}: is no file"):
            read(path)
    with pytest.raises(ValueError, match=r"missing\.pt: no such checkpoint"):
        examine(tmp_path / "missing.pt")


def test_a_file_with_code_in_it_is_refused_without_torchs_advice(tmp_path):
    class Code:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    torch.save({"model": {"a": Code()}}, tmp_path / "model.pt")
    with pytest.raises(ValueError) as caught:
        read(tmp_path / "model.pt")
    assert "holds posix.system, which is not run" in str(caught.value) and "weights_only" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_what_was_examined_is_what_is_loaded(tmp_path):
    first, second, link = tmp_path / "1.pt", tmp_path / "2.pt", tmp_path / "last.pt"
    for number, path in enumerate((first, second)):
        checkpoint_file.write({"model": {"a": torch.tensor(number)}}, path)
    link.symlink_to(first)
    file = examine(link)
    assert file.sha256 == sha256(first) and file.path == str(first)
    link.unlink()
    link.symlink_to(second)  # moves on
    value = load_examined(file, lambda checkpoint: checkpoint["model"]["a"])
    assert value == 0

    copy = tmp_path / "copy.pt"
    copy.write_bytes(first.read_bytes())
    load_examined(file._replace(path=str(copy)), lambda _: None)  # a node's own copy
    os.replace(second, first)
    with pytest.raises(ValueError, match=r"1\.pt: is being written, or is another file here than on process 0"):
        load_examined(file, lambda _: None)


def test_examining_finds_a_flipped_bit(tmp_path):
    path = tmp_path / "model.pt"
    checkpoint_file.write({"model": {"a": torch.zeros(1000)}}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    read(path)  # no byte is looked at
    with pytest.raises(ValueError, match=r"checksum of .* does not match"):
        examine(path)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads its memory there")
def test_what_is_read_is_not_copied(tmp_path):
    """80 MB of another tensor cost nothing, though they are in the file."""
    checkpoint_file.write({"model": {"a": torch.ones(5)}, "optimizer": torch.ones(20_000_000)}, tmp_path / "file.pt")
    code = (
        "import sys\nfrom utils.checkpoint_file import read\n"
        "def resident(): return next(int(line.split()[1]) for line in open('/proc/self/status') if 'VmRSS' in line)\n"
        "before = resident()\ncheckpoint = read(sys.argv[1])\n"
        "assert checkpoint['model']['a'].sum() == 5\nprint(resident() - before)\n"
    )
    grown = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "file.pt"], text=True, capture_output=True, check=True
    )
    assert int(grown.stdout) < 20_000  # kB


def test_a_compressed_file_is_refused_before_it_inflates(tmp_path):
    checkpoint_file.write(state(1), tmp_path / "stored.pt")
    with zipfile.ZipFile(tmp_path / "stored.pt") as stored, zipfile.ZipFile(tmp_path / "small.pt", "w") as deflated:
        for member in stored.infolist():
            deflated.writestr(member.filename, stored.read(member), zipfile.ZIP_DEFLATED)
    for verify in (True, False):
        with pytest.raises(ValueError, match=r"small\.pt: not a readable checkpoint: .*compressed, which torch.save"):
            read(tmp_path / "small.pt", verify=verify)


def test_tensors_that_claim_more_than_the_file_has_are_refused(tmp_path):
    def deep(value):
        for _ in range(100):
            value = [value]
        return value

    one, shared = torch.ones(()), torch.ones(30_000)
    for number, value in enumerate((one.expand(10**6, 10**6), deep(one.expand(10**12)), [shared[:] for _ in range(9)])):
        checkpoint_file.write({**state(1), "optimizer": value}, tmp_path / f"{number}.pt")
        with pytest.raises(ValueError, match=rf"{number}\.pt: its tensors claim [\d.e+-]+ GB, the file has"):
            read(tmp_path / f"{number}.pt")
    looped = [shared]
    looped.append(looped)
    checkpoint_file.write({**state(1), "ema": {"a": shared}, "optimizer": looped}, tmp_path / "good.pt")
    assert read(tmp_path / "good.pt")["step"] == 1
