"""CUDA toolkits made of empty files and an nvcc that only talks, to test how they are found, and
one that compiles what is plain C++, to test how it is called.
"""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

_NVCC = """#!/bin/sh
case "$*" in
  --version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
  --list-gpu-code) printf 'sm_75\\nsm_80\\nsm_90\\nsm_100\\n' ;;
  *--dryrun*) echo '#$ _SPACE_= '; printf '#$ TOP=%s/bin/..\\n' {home} ;;
  *" -c "*) {compile} ;;
esac
"""
# As far as a file of plain C++ goes: what only nvcc understands is left out.
_COMPILE = """for word; do
    shift
    case "$word" in --expt-* | -gencode* | --compiler-options | -Xcompiler) ;;
      *) set -- "$@" "$word" ;;
    esac
  done
  exec c++ -x c++ "$@"
"""


def make_toolkit(
    home: Path, version: str = "13.0", *, libcudart: str = "lib64/libcudart.so"
) -> Path:
    """A tree that passes for a complete toolkit."""
    for name in ("include/cuda_runtime.h", libcudart):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch()
    nvcc = _NVCC.format(version=version, home=shlex.quote(str(home)), compile="exit 1")
    write_program(home / "bin" / "nvcc", nvcc)
    return home


def make_compiling_toolkit(home: Path) -> Path:
    """One with a library to link, and an nvcc that takes plain C++."""
    make_toolkit(home)
    cudart = home / "lib64" / "libcudart.so"
    command = ["c++", "-shared", "-x", "c++", "/dev/null", "-o", str(cudart)]
    subprocess.run(command, check=True)
    nvcc = _NVCC.format(version="13.0", home=shlex.quote(str(home)), compile=_COMPILE)
    write_program(home / "bin" / "nvcc", nvcc)
    return home


def make_wrapper(path: Path, home: Path) -> Path:
    """A script that runs the nvcc of another tree, as distributions and containers have them."""
    return write_program(path, f'#!/bin/sh\nexec {shlex.quote(str(home))}/bin/nvcc "$@"\n')


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path
