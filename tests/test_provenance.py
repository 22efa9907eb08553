"""Provenance: plain values that JSON and a checkpoint take as they are."""

import torch

from utils import checkpoint_file
from utils.provenance import cpu_name, provenance, versions


def test_a_checkpoint_and_json_take_it(tmp_path):
    found = provenance(torch.device("cpu"))
    checkpoint_file.write({"model": {}, "provenance": found}, tmp_path / "a.pt")
    assert checkpoint_file.read(tmp_path / "a.pt")["provenance"] == found
    assert all(type(value) is str for value in found["versions"].values())


def test_it_names_what_numbers_depend_on():
    found = versions("no-such-package")
    assert found["torch"] == torch.__version__ and "no-such-package" not in found
    assert provenance(torch.device("cpu"))["device"] == cpu_name() != ""
