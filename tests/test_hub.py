"""Addresses of the hub, with the hub's own library and a cache made here: nothing is downloaded."""

import sys

import pytest
import torch

from utils import checkpoint_file, hub

constants = pytest.importorskip("huggingface_hub.constants")
COMMIT = "0" * 39 + "1"


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A function that puts a checkpoint where the hub's library looks while it is offline; gives the file."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(owner="guolinke", repo="SphereAR", name="vae.pt"):
        folder = tmp_path / f"models--{owner}--{repo}"
        file = folder / "snapshots" / COMMIT / name
        file.parent.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(COMMIT)
        (folder / "blobs").mkdir()
        checkpoint_file.write({"model": {"a": torch.ones(3)}}, folder / "blobs" / "abc")
        file.symlink_to(folder / "blobs" / "abc")
        return file

    return put


def test_an_address_is_a_file_of_the_cache(cached):
    file = cached()
    assert str(hub.local("hf://guolinke/SphereAR/vae.pt")) == str(file)
    assert str(hub.local(f"hf://guolinke/SphereAR@{COMMIT}/vae.pt")) == str(file)
    assert hub.local("vae.pt") == "vae.pt" and hub.local(file) is file


def test_checkpoints_are_examined_and_loaded_by_their_address(cached):
    cached()
    examined = checkpoint_file.examine("hf://guolinke/SphereAR/vae.pt")
    assert examined.path == "hf://guolinke/SphereAR/vae.pt"  # another node has a cache of its own
    assert checkpoint_file.load_examined(examined, lambda checkpoint: checkpoint["model"]["a"]).sum() == 3


@pytest.mark.parametrize(
    "address, message",
    [
        (
            "hf://guolinke/SphereAR/missing.pt",
            "not in the cache .*, and the hub is out of reach; go online",
        ),
        ("hf://guolinke/SphereAR@v2/vae.pt", "not in the cache"),
        ("hf://vae.pt", "the hub's files are named hf://OWNER/REPO/FILE"),
        ("hf://guolinke/SphereAR", "the hub's files are named hf://OWNER/REPO/FILE"),
        ("hf://gu..olinke/SphereAR/vae.pt", "the hub does not give it"),
    ],
)
def test_what_is_not_there_is_one_line(cached, address, message):
    cached()
    with pytest.raises(ValueError, match=f"{address}: {message}") as caught:
        checkpoint_file.read(address)
    assert "\n" not in str(caught.value)


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="needs the package huggingface_hub; run pip install huggingface_hub"):
        hub.local("hf://guolinke/SphereAR/vae.pt")
