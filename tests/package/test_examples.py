"""The examples run at toy size, learn, and find no difference between torch's layers and ours.

On the GPU where there is one. Elsewhere on the emulated kernels where that takes seconds, and else
on the composite of torch operators.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ATEN, KERNELS, Backend

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "common.py")
LAUNCHER = ("-m", "torch.distributed.run", "--nproc-per-node=2")


def run(
    script: str, *arguments: str, launcher: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "BATCHNORM_CUDA_EMULATE"}
    # Layers this small only wait for each other's threads.
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, *launcher, str(EXAMPLES / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def check(done: subprocess.CompletedProcess[str], backend: Backend, verdict: str) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"batchnorm_cuda backend: {backend.name}" in done.stdout
    assert re.search(f"^OK: {verdict}", done.stdout, re.MULTILINE), done.stdout


def on(backend: Backend) -> str:
    return f"--device={'cpu' if backend is ATEN else backend.name}"


HEAVY = KERNELS if KERNELS.device == "cuda" else ATEN
# One GPU is not two: where there are GPUs, the ranks share the CPU without emulation.
OF_RANKS = ATEN if KERNELS.device == "cuda" else KERNELS


def test_gradient_penalty() -> None:
    device = "cuda" if KERNELS.device == "cuda" else "cpu"  # the latter means emulated there
    done = run("gradient_penalty.py", "--steps=3", f"--device={device}")
    check(done, KERNELS, "3 steps within 1e-04 of torch.nn's")


def test_train_resnet() -> None:
    """Under autocast, and through AOTAutograd: inductor, which the tutorial takes, takes longer."""
    check(run("train_resnet.py", "--toy", "--compile=aot_eager", on(HEAVY)), HEAVY, "accuracy")


def test_train_ddp() -> None:
    done = run("train_ddp.py", "--toy", on(OF_RANKS), launcher=LAUNCHER)
    check(done, OF_RANKS, "2 ranks train as one process does")


def test_train_ddp_sees_unshared_statistics() -> None:
    done = run("train_ddp.py", "--toy", "--unshared", "--device=cpu", launcher=LAUNCHER)
    assert done.returncode != 0
    assert "FAILED: the losses part by" in done.stdout


def test_segment_3d() -> None:
    check(run("segment_3d.py", "--toy", on(HEAVY)), HEAVY, "Dice rose from")


@pytest.mark.parametrize("script", ["train_resnet.py", "segment_3d.py"])
def test_gradients_by_the_kernels(script: str) -> None:
    check(run(script, "--toy", "--check", on(KERNELS)), KERNELS, "gradients of one step")


def test_help() -> None:
    """Of all, in one process."""
    ask = (
        "import os, runpy, sys\n"
        "sys.path.insert(0, os.path.dirname(sys.argv[1]))\n"
        "for script in sys.argv[1:]:\n"
        "    sys.argv = [script, '--help']\n"
        "    try:\n"
        "        runpy.run_path(script, run_name='__main__')\n"
        "    except SystemExit as end:\n"
        "        print(script, 'ended with', end.code)\n"
    )
    paths = [str(EXAMPLES / script) for script in SCRIPTS]
    done = subprocess.run([sys.executable, "-c", ask, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path in paths:
        assert f"{path} ended with 0" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_is_tested_and_documented(script: str) -> None:
    assert f'"{script}"' in Path(__file__).read_text() or script == "train_digits.py"  # make train
    for page in (ROOT / "README.md", ROOT / "docs" / "examples.md"):
        assert script in page.read_text()
