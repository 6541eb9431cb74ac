"""CUDA toolkits made of empty files and an nvcc that only talks, to test how they are found."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

_NVCC = """#!/bin/sh
case "$*" in
  --version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
  --list-gpu-code) printf 'sm_75\\nsm_80\\nsm_90\\nsm_100\\n' ;;
  *--dryrun*) echo '#$ _SPACE_= '; printf '#$ TOP=%s/bin/..\\n' {home} ;;
esac
"""


def make_toolkit(
    home: Path, version: str = "13.0", *, libcudart: str = "lib64/libcudart.so"
) -> Path:
    """A tree that passes for a complete toolkit."""
    for name in ("include/cuda_runtime.h", libcudart):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch()
    nvcc = _NVCC.format(version=version, home=shlex.quote(str(home)))
    write_program(home / "bin" / "nvcc", nvcc)
    return home


def make_linkable_toolkit(home: Path) -> Path:
    """One whose libcudart.so the linker takes."""
    cudart = make_toolkit(home) / "lib64" / "libcudart.so"
    command = ["c++", "-shared", "-x", "c++", "/dev/null", "-o", str(cudart)]
    subprocess.run(command, check=True)
    return home


def make_wrapper(path: Path, home: Path) -> Path:
    """A script that runs the nvcc of another tree, as distributions and containers have them."""
    return write_program(path, f'#!/bin/sh\nexec {shlex.quote(str(home))}/bin/nvcc "$@"\n')


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path
