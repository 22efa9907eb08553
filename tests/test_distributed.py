"""Processes: their device, and what is said where a GPU cannot be used. (Agreement: test_train_distributed.py.)"""

import pytest
import torch

from utils import distributed


@pytest.fixture
def unusable(monkeypatch):
    """A machine with a GPU whose driver is older than torch's CUDA."""

    def old_driver():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update")

    monkeypatch.setattr(distributed, "_has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", old_driver)


def test_an_unusable_gpu_is_told_loudly(unusable, capsys):
    assert distributed.init().type == "cpu"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("WARNING: running on the CPU; this machine has an NVIDIA GPU, but torch ")
    assert "driver on your system is too old (found version 11040)" in line and "CUDA_VISIBLE_DEVICES=-1" in line


def test_several_processes_do_not_share_a_cpu_instead(unusable, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"cannot use it: The NVIDIA driver .* set CUDA_VISIBLE_DEVICES=-1") as error:
        distributed.init()
    assert distributed.is_shared(error.value)


@pytest.mark.parametrize(("devices", "told"), [("-1", False), ("", False), ("0", True)])
def test_who_hides_the_gpu_means_the_cpu(monkeypatch, tmp_path, devices, told):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(distributed, "DEVICES", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    assert distributed._has_nvidia_gpu() is told


def test_a_torch_without_cuda_means_the_cpu(unusable, monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("WORLD_SIZE", "1")
    distributed._tell_of_unused_gpu()
    assert capsys.readouterr().err == ""


def test_without_a_gpu_nothing_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(distributed, "DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    distributed.init()
    assert capsys.readouterr().err == ""
