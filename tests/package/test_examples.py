"""The examples run at toy size, learn, and find no difference between torch's layers and ours.

On the GPU where there is one. Elsewhere on the emulated kernels where that takes seconds, and else
on the composite of torch operators.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ATEN, KERNELS, Backend
from forked import Forks, Program

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "common.py")
LAUNCHER = ("-m", "torch.distributed.run", "--nproc-per-node=2")


def command(script: str, *arguments: str) -> tuple[str, ...]:
    return str(EXAMPLES / script), *arguments


def check(done: subprocess.CompletedProcess[str], backend: Backend, verdict: str) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"batchnorm_cuda backend: {backend.name}" in done.stdout
    assert re.search(f"^OK: {verdict}", done.stdout, re.MULTILINE), done.stdout


def on(backend: Backend) -> str:
    return f"--device={'cpu' if backend is ATEN else backend.name}"


HEAVY = KERNELS if KERNELS.device == "cuda" else ATEN
# One GPU is not two: where there are GPUs, the ranks share the CPU without emulation.
OF_RANKS = ATEN if KERNELS.device == "cuda" else KERNELS


def test_gradient_penalty(forks: Forks) -> None:
    device = "cuda" if KERNELS.device == "cuda" else "cpu"  # the latter means emulated there
    done = forks.run(*command("gradient_penalty.py", "--steps=3", f"--device={device}"))
    check(done, KERNELS, "3 steps within 1e-04 of torch.nn's")


def test_train_resnet(forks: Forks) -> None:
    """Under autocast, and through AOTAutograd: inductor, which the tutorial takes, takes longer."""
    done = forks.run(*command("train_resnet.py", "--toy", "--compile=aot_eager", on(HEAVY)))
    check(done, HEAVY, "accuracy")


def test_train_ddp(forks: Forks) -> None:
    done = forks.run(*LAUNCHER, *command("train_ddp.py", "--toy", on(OF_RANKS)))
    check(done, OF_RANKS, "2 ranks train as one process does")


def test_train_ddp_sees_unshared_statistics(forks: Forks) -> None:
    """The ranks as forks, which torchrun's are not."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    program = command("train_ddp.py", "--toy", "--unshared", "--device=cpu")
    ranks = [
        Program(program, meeting | {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    first, second = forks.run_together(ranks)
    assert (first.returncode, second.returncode) == (1, 1), first.stderr + second.stderr
    assert "FAILED: the losses part by" in first.stdout


def test_segment_3d(forks: Forks) -> None:
    check(forks.run(*command("segment_3d.py", "--toy", on(HEAVY))), HEAVY, "Dice rose from")


@pytest.mark.parametrize("script", ["train_resnet.py", "segment_3d.py"])
def test_gradients_by_the_kernels(forks: Forks, script: str) -> None:
    done = forks.run(*command(script, "--toy", "--check", on(KERNELS)))
    check(done, KERNELS, "gradients of one step")


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
