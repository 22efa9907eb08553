"""The folder of a run: locked, cleaned of what a killed run left half-written, and never another run's."""

from contextlib import ExitStack

import numpy as np
import pytest

from utils.sampling.run_folder import claim, key_of, note, open_run
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
