"""Shards: what is missing of a run, who makes it, and one .npz that numpy reads, in constant memory."""

import errno
import resource
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from utils.sampling.shards import (
    Writer,
    assemble,
    batches_of,
    check_npz,
    finished_shards,
    missing_ranges,
    read_image,
    remove_shards,
    verified_shards,
    wait_for_shards,
    write_shard,
)

SIZE = 8
IMAGES = np.random.RandomState(0).randint(0, 256, (10, SIZE, SIZE, 3), np.uint8)
LABELS = np.arange(10) % 3
KEY = 12345


@pytest.fixture
def shards(tmp_path):
    for start, stop in [(7, 10), (0, 3), (3, 7)]:
        write_shard(tmp_path, start, IMAGES[start:stop], KEY)
    return tmp_path


def test_images_come_out_in_index_order(shards):
    finished = finished_shards(shards, SIZE, 10)
    assert list(finished) == [(0, 3), (3, 7), (7, 10)]
    assemble(shards / "samples.npz", finished, LABELS, SIZE, KEY, print)
    with np.load(shards / "samples.npz", allow_pickle=False) as archive:
        assert archive.files == ["arr_0", "arr_1"]
        assert archive["arr_0"].dtype == np.uint8
        assert (archive["arr_0"] == IMAGES).all()
        assert (archive["arr_1"] == LABELS).all()
    assert (read_image(finished, 8) == IMAGES[8]).all()
    assert not list(shards.glob(".*"))


def test_the_bytes_do_not_depend_on_how_the_shards_were_cut(shards, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write_shard(other, 0, IMAGES[:6], KEY)
    write_shard(other, 4, IMAGES[4:], KEY)  # overlaps
    for folder in (shards, other):
        assemble(folder / "samples.npz", finished_shards(folder, SIZE, 10), LABELS, SIZE, KEY, print)
    assert (shards / "samples.npz").read_bytes() == (other / "samples.npz").read_bytes()


def test_missing_ranges():
    assert missing_ranges([], 5) == [(0, 5)]
    assert missing_ranges([(2, 4), (7, 9)], 10) == [(0, 2), (4, 7), (9, 10)]
    assert missing_ranges([(0, 10)], 10) == []
    assert missing_ranges([(0, 6), (4, 10)], 10) == []


def test_batches_are_dealt_out_once():
    missing = [(0, 7), (9, 11)]
    shares = [batches_of(missing, 3, rank, 2) for rank in range(2)]
    assert shares == [[(0, 3), (6, 7)], [(3, 6), (9, 11)]]
    assert batches_of(missing, 16, 0, 1) == missing


def test_damaged_shards_are_not_counted(shards):
    short = shards / "00000003-00000007.npy"
    short.write_bytes(short.read_bytes()[:-1])
    (shards / "00000007-00000010.npy").write_bytes(b"")
    assert list(finished_shards(shards, SIZE, 10)) == [(0, 3)]
    assert finished_shards(shards, 2 * SIZE, 10) == {}
    with pytest.raises(ValueError, match="images 3 to 9"):
        assemble(shards / "samples.npz", finished_shards(shards, SIZE, 10), LABELS, SIZE, KEY, print)
    assert not (shards / "samples.npz").exists()


def test_a_shard_that_cannot_be_written_is_named(tmp_path):
    """The limit on file sizes stands in for a full disk: the write itself fails, after the file was opened."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            write_shard(tmp_path, 0, IMAGES, KEY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert f"File too large: '{tmp_path / '00000000-00000010.npy'}'" in str(caught.value)


def test_foreign_files_are_skipped(shards):
    for name in ("my-file.npy", "1-2.npy", "00000003-00000007-00000009.npy"):
        np.save(shards / name, IMAGES[:1])
    assert list(finished_shards(shards, SIZE, 10)) == [(0, 3), (3, 7), (7, 10)]


def test_shards_of_other_processes_are_waited_for(shards, tmp_path):
    late = tmp_path / "00000003-00000007.npy"
    late.rename(tmp_path / "late")
    timer = threading.Timer(0.7, lambda: (tmp_path / "late").rename(late))
    timer.start()
    assert list(wait_for_shards(shards, SIZE, 10, patience=60)) == [(0, 3), (3, 7), (7, 10)]
    timer.join()


def test_shards_that_do_not_come_are_not_waited_for_for_ever(shards):
    (shards / "00000003-00000007.npy").unlink()
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="image 3 and others do not come, for 0 minutes"):
        wait_for_shards(shards, SIZE, 10, patience=1.2)
    assert 1.2 < time.monotonic() - start < 10


def test_a_shard_beyond_the_last_image_is_no_image_of_this_run(shards):
    write_shard(shards, 10, IMAGES[:4], KEY)
    write_shard(shards, 8, IMAGES[:4], KEY)
    assert list(finished_shards(shards, SIZE, 10)) == [(0, 3), (3, 7), (7, 10)]
    found, rejected = verified_shards(shards, SIZE, 10, KEY)
    assert list(found) == [(0, 3), (3, 7), (7, 10)]
    assert [path.name for path in rejected] == ["00000008-00000012.npy.rejected", "00000010-00000014.npy.rejected"]


def flip_a_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("position", [140, -20, -1])  # first and last image, checksum
def test_changed_shards_are_set_aside(shards, position):
    changed = shards / "00000003-00000007.npy"
    flip_a_bit(changed, position)
    with pytest.raises(ValueError, match=r"00000003-00000007\.npy is damaged or of another run"):
        assemble(shards / "samples.npz", finished_shards(shards, SIZE, 10), LABELS, SIZE, KEY, print)
    assert not (shards / "samples.npz").exists()
    found, rejected = verified_shards(shards, SIZE, 10, KEY)
    assert list(found) == list(finished_shards(shards, SIZE, 10)) == [(0, 3), (7, 10)]
    assert rejected == [changed.with_name("00000003-00000007.npy.rejected")] and not changed.exists()


def test_shards_of_another_run_are_set_aside(shards):
    write_shard(shards, 3, IMAGES[3:7], KEY + 1)
    (shards / "00000000-00000003.npy").write_bytes(b"")
    found, rejected = verified_shards(shards, SIZE, 10, KEY)
    assert list(found) == [(7, 10)] and len(rejected) == 2


def test_only_shards_are_removed(shards):
    left = shards / ".00000003-00000007.npy.12-34.tmp"
    left.touch()
    mine = shards / "00000.tar", shards / ".x.tmp", shards / "my.npy"
    for path in mine:
        path.touch()
    remove_shards(shards)
    assert sorted(shards.iterdir()) == sorted(mine)
    for path in mine:
        path.unlink()
    remove_shards(shards)
    assert not shards.exists()
    remove_shards(shards)


def test_an_npz_that_the_run_did_not_write_is_refused(shards):
    path, written = shards / "samples.npz", {}
    assemble(path, finished_shards(shards, SIZE, 10), LABELS, SIZE, KEY, written.update)
    recorded = written["samples.npz"]
    check_npz(path, recorded)
    whole = path.read_bytes()

    def refused():
        with pytest.raises(ValueError, match=r"samples.npz is damaged, or this run did not make it"):
            check_npz(path, recorded)

    for damaged in (b"", whole[:-1], whole[: len(whole) // 2], b"<html>"):
        path.write_bytes(damaged)
        refused()
    path.write_bytes(whole)
    flip_a_bit(path, 300)
    refused()
    np.savez(path, arr_0=IMAGES, arr_1=LABELS + 1)
    refused()
    path.write_bytes(whole)
    check_npz(path, recorded)
    with pytest.raises(ValueError, match="this run did not make it"):
        check_npz(path, None)


def test_the_checksums_are_recorded_before_the_npz_appears(shards):
    path, seen = shards / "samples.npz", []
    assemble(path, finished_shards(shards, SIZE, 10), LABELS, SIZE, KEY, lambda _: seen.append(path.exists()))
    assert seen == [False] and path.exists()


PEAK = """
import re, sys
from pathlib import Path
import numpy as np
from utils.sampling.shards import assemble, finished_shards, write_shard
def peak():  # of this process alone: ru_maxrss would count the parent's too
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
folder, size, per_shard, count = Path(sys.argv[1]), 256, 64, 8
for shard in range(count):
    write_shard(folder, shard * per_shard, np.full((per_shard, size, size, 3), shard, np.uint8), 7)
before = peak()
total = count * per_shard
assemble(folder / "samples.npz", finished_shards(folder, size, total), np.zeros(total, int), size, 7, lambda _: None)
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_file(tmp_path):
    """100 MB of images, of which one shard's 12.6 MB were in memory before: assembling adds a copy buffer."""
    result = subprocess.run([sys.executable, "-c", PEAK, tmp_path], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 16_000  # kB


def test_a_batch_is_written_while_the_next_is_made(tmp_path):
    began, may_end, order = threading.Event(), threading.Event(), []

    def slow():
        began.set()
        assert may_end.wait(10)
        write_shard(tmp_path, 0, IMAGES[:5], KEY)
        order.append("first")

    with Writer() as writer:
        writer.call(slow)
        assert began.wait(10) and order == []  # this thread goes on meanwhile
        may_end.set()
        writer.call(lambda: order.append("second"))
        writer.call(write_shard, tmp_path, 5, IMAGES[5:], KEY)
    assert order == ["first", "second"]
    assert list(finished_shards(tmp_path, SIZE, 10)) == [(0, 5), (5, 10)]  # nothing is under way behind the block


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_an_error_of_a_write_is_raised_by_the_next_call_or_at_the_end():
    for calls_behind in (0, 1):
        with pytest.raises(OSError, match="No space left"), Writer() as writer:
            writer.call(full_disk)
            for _ in range(calls_behind):
                writer.call(pytest.fail, "called behind an error")


def test_a_block_that_ends_by_an_error_waits_and_says_what_was_not_written(tmp_path, capsys):
    for write, said in (
        (full_disk, "a batch was not written: [Errno 28] No space left on device\n"),
        (write_shard, ""),
    ):
        with pytest.raises(KeyboardInterrupt), Writer() as writer:
            writer.call(write, tmp_path, 0, IMAGES, KEY)
            raise KeyboardInterrupt
        assert capsys.readouterr().err == said
    assert list(finished_shards(tmp_path, SIZE, 10)) == [(0, 10)]


@pytest.mark.parametrize(
    "text", [b"(" * 9000, b"{'descr': '|u1', " + b"[" * 200, b"{'descr': '|u1'}"], ids=["round", "square", "short"]
)
def test_a_shard_with_a_hostile_header_is_set_aside(shards, text):
    path = shards / "00000003-00000007.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
    finished, rejected = verified_shards(shards, SIZE, 10, KEY)
    assert list(finished) == [(0, 3), (7, 10)] and [path.name for path in rejected] == [f"{path.name}.rejected"]


def test_a_shards_name_that_no_shard_has_is_set_aside(shards):
    write_shard(shards, 8, IMAGES[:2], KEY)
    (shards / "00000008-00000010.npy").rename(shards / "00000009-00000003.npy")
    (shards / "00000004-00000006.npy").mkdir()
    finished, rejected = verified_shards(shards, SIZE, 10, KEY)
    assert list(finished) == [(0, 3), (3, 7), (7, 10)] and len(rejected) == 2
