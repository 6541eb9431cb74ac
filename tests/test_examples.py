"""The examples run, and find no difference between torch's layers and ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import KERNELS

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_gradient_penalty() -> None:
    device = "cuda" if KERNELS.device == "cuda" else "cpu"
    command = [sys.executable, EXAMPLES / "gradient_penalty.py", "--steps=3", f"--device={device}"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"batchnorm_cuda backend: {KERNELS.name}" in run.stdout
    assert "OK: 3 steps within 1e-04 of torch.nn's" in run.stdout
