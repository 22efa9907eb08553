"""What scripts do before they import torch."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_windows_is_told_what_to_use():
    code = "import os, utils.early; os.name = 'nt'; utils.early.end_when_told()"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "WSL2" in result.stderr


def test_it_imports_nothing_slow():
    code = "import sys, utils.early; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
