"""Runs the interpreter tests (`interpreted_*.py`) in a process where Triton interprets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent


def test_in_the_interpreter():
    triton = pytest.importorskip("triton")
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip(f"the interpreter of triton {triton.__version__} fails with NumPy {np.__version__}")
    files = sorted(str(path) for path in HERE.glob("interpreted_*.py"))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--no-header", *files]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=HERE.parents[1], capture_output=True, text=True
    )
    assert len(files) > 3
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
