"""Files that are complete and on the disk, or not there."""

import errno

import pytest

from utils.files import atomic_file


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"), atomic_file(path) as file:
        file.write(b"half")
        raise OSError("disk full")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_a_failed_write_says_why_and_where(tmp_path):
    with (
        pytest.raises(OSError, match=r"No space left on device \(\d+ MB free\): '.*file'"),
        atomic_file(tmp_path / "file"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError, match="absent/file'"), atomic_file(tmp_path / "absent" / "file"):
        pass
    with pytest.raises(OSError, match="other"), atomic_file(tmp_path / "file"):
        raise OSError(errno.EIO, "Input/output error", "other")  # the fault of a file that was read
