"""The folder of a run: locked, cleaned of what a killed run left half-written, and never another run's."""

from contextlib import ExitStack

import pytest

from utils.sampling.run_folder import open_run


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
