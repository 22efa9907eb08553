"""The folder of a run: locked, cleaned of what a killed run left half-written, and never another run's."""

import errno
from contextlib import ExitStack

import numpy as np
import pytest

from utils.sampling import run_folder
from utils.sampling.run_folder import claim, claim_pngs, key_of, note, open_run
from utils.sampling.shards import write_shard


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    leftovers = [tmp_path / ".samples.npz.12-34.tmp", tmp_path / "shards" / ".00000000-00000002.npy.12-34.tmp"]
    (tmp_path / "shards").mkdir()
    for path in leftovers:
        path.write_bytes(b"half")
    with ExitStack() as stack, ExitStack() as other:
        open_run(tmp_path, {}, stack)
        assert not any(path.exists() for path in leftovers)
        leftovers[0].write_bytes(b"being written")
        with pytest.raises(ValueError, match="in use"):
            open_run(tmp_path, {}, other)
        assert leftovers[0].exists()


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff"])
def test_a_damaged_run_json_is_named(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    (tmp_path / "samples.npz").touch()
    with ExitStack() as stack, pytest.raises(ValueError, match="is damaged"):
        open_run(tmp_path, {}, stack)


def opened(folder, settings):
    with ExitStack() as stack:
        return open_run(folder, settings, stack)


def test_only_our_own_leftovers_are_removed(tmp_path):
    others = [tmp_path / ".notes.txt.12-34.tmp", tmp_path / ".x.tmp", tmp_path / "shards" / ".00001.tar.12-34.tmp"]
    (tmp_path / "shards").mkdir()
    for path in others:
        path.touch()
    opened(tmp_path, {})
    assert all(path.exists() for path in others)


@pytest.mark.parametrize("what", ["shard", "npz"])
def test_images_that_no_run_json_speaks_of_are_not_adopted(tmp_path, what):
    (tmp_path / "shards").mkdir()
    if what == "shard":
        write_shard(tmp_path / "shards", 0, np.zeros((1, 8, 8, 3), np.uint8), key_of({"--a": 1}))
    else:
        (tmp_path / "samples.npz").touch()
    with pytest.raises(ValueError, match=f"^--sample-dir {tmp_path} holds images, and no run.json that says which"):
        opened(tmp_path, {"--a": 1})
    assert not (tmp_path / "run.json").exists()


def test_a_folder_of_shards_that_are_not_ours_is_used_and_left_alone(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "00000.tar").touch()
    (tmp_path / "shards" / "notes.npy").touch()
    assert opened(tmp_path, {"--a": 1}) == {"--a": 1}
    assert opened(tmp_path, {"--a": 2}) == {"--a": 2}  # no image was made
    assert len(list((tmp_path / "shards").iterdir())) == 2


def test_a_claimed_folder_is_one_runs(tmp_path):
    assert claim(tmp_path, {"--a": 1}, "--save-images", False) == {"--a": 1}
    note(tmp_path, {"extra": [2]})
    assert claim(tmp_path, {"--a": 1}, "--save-images", True) == {"--a": 1, "extra": [2]}
    with pytest.raises(ValueError, match=r"^--save-images .* holds images of another run \(--a: 1 there, 2 now\)"):
        claim(tmp_path, {"--a": 2}, "--save-images", True)


def test_the_key_is_the_settings():
    assert key_of({"a": 1, "b": [2, None]}) == key_of({"b": [2, None], "a": 1}) != key_of({"a": 1, "b": [3, None]})


@pytest.mark.parametrize("name", ["samples.json", "contact_sheet.png", "run.json"])
@pytest.mark.parametrize("content", [b'{"config": 1}', b"mine"])
def test_foreign_files_of_our_results_names_are_left_alone(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"another program's|no run\.json that says|is damaged"):
        opened(tmp_path, {"--a": 1, "config": 1})
    assert (tmp_path / name).read_bytes() == content
    if name == "run.json":
        with pytest.raises(ValueError, match=r"--save-images .* another program's|is damaged"):
            claim_pngs(tmp_path, {"--a": 1, "config": 1})
        assert (tmp_path / name).read_bytes() == content


def test_a_run_of_ours_without_images_gives_way_with_all_that_it_left(tmp_path):
    opened(tmp_path, {"--a": 1})
    (tmp_path / "samples.json").write_text("{}")
    assert opened(tmp_path, {"--a": 2}) == {"--a": 2}


@pytest.mark.parametrize("name", ["shards", "contact_sheet.png", "samples.json", "samples.npz", "run.json"])
def test_what_is_in_the_way_is_named_with_the_flag(tmp_path, name):
    if name == "shards":
        (tmp_path / name).touch()
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=rf"^--sample-dir {tmp_path}: .*{name}"):
        opened(tmp_path, {"--a": 1})


def test_what_cannot_be_written_is_named_with_the_flag(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^--sample-dir .*: cannot be written to \(.*\); choose another folder"):
        opened(tmp_path / "file" / "run", {"--a": 1})
    for target in (tmp_path / "file", tmp_path / "file" / "png"):
        with pytest.raises(ValueError, match=r"^--save-images .*: cannot be written to"):
            claim_pngs(target, {"--a": 1})


def test_a_full_disk_is_no_fault_of_the_flag(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder, "lock", full)
    with pytest.raises(OSError, match="No space left"):
        opened(tmp_path, {"--a": 1})
