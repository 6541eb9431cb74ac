"""Installs an ahead-of-time wheel where nothing can be compiled, and looks at what it holds.

    python -m tools.wheel_check dist/batchnorm_cuda-...whl

The fresh environment borrows torch from this interpreter. There, PATH leads to nothing, CUDA_HOME
to no toolkit, and the network is cut off where `unshare` may do so: a kernel that had to be
compiled there would be an error.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch

from bench.loading import ROOT
from bench.machine_code import instances
from bench.toolkit import ToolkitError
from bench.visit.rehearse import without_network

# The first tensor of each dtype loads its kernels; without a GPU they are loaded by hand.
_LOAD = """
import ctypes, json
import batchnorm_cuda
from batchnorm_cuda._build import extension, sources
extension.load_cuda()
for table in sources.KERNEL_TABLES:
    library = ctypes.CDLL(extension._kernels_ahead_of_time(table))
    getattr(library, f"batchnorm_cuda_kernels_{table}")
print(json.dumps(batchnorm_cuda.build_info()))
"""


class CheckError(RuntimeError):
    """The wheel does not do what its name says."""


def environment(place: Path) -> dict[str, str]:
    """Variables with which nothing is found but what was installed."""
    nowhere = str(place / "nowhere")
    said = {"PATH": nowhere, "CUDA_HOME": nowhere, "CXX": f"{nowhere}/c++", "HOME": str(place)}
    # No configuration of pip's, which may hold back versions or name another place for them.
    said["PIP_CONFIG_FILE"] = os.devnull
    return said | {"BATCHNORM_CUDA_CACHE_DIR": str(place / "cache"), "CUDA_VISIBLE_DEVICES": ""}


def install(wheel: Path, place: Path) -> Path:
    """The interpreter of a new environment with the wheel, whose requirements pip found met."""
    shutil.rmtree(place, ignore_errors=True)
    _run([sys.executable, "-m", "venv", "--without-pip", place / "venv"])
    python = place / "venv" / "bin" / "python"
    folder = sysconfig.get_path("purelib", vars={"base": str(place / "venv")})
    borrowed = Path(folder) / "borrowed.pth"
    borrowed.write_text("".join(f"{path}\n" for path in sys.path if path.endswith("-packages")))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index"]
    # Elsewhere than in the checkout, whose package would be found first.
    _run([*pip, "--disable-pip-version-check", wheel], cwd=place, env=environment(place))
    return python


def load(python: Path, place: Path) -> dict[str, Any]:
    """`build_info()` after the import, in the environment that can compile nothing."""
    command = [*without_network(), str(python), "-c", _LOAD]
    command[0] = shutil.which(command[0]) or command[0]
    info = json.loads(_run(command, cwd=place, env=environment(place)).splitlines()[-1])
    for loaded in info["loaded"].values():
        if loaded["origin"] != "ahead of time" or not Path(loaded["path"]).is_relative_to(place):
            raise CheckError(f"expected the wheel's own binary, got {loaded}")
    if info["torch"] != torch.__version__:
        raise CheckError(f"expected torch {torch.__version__}, got {info['torch']}")
    if (place / "cache").exists():
        raise CheckError(f"expected no build, found {place / 'cache'}")
    return info


def holdings(package: Path, archs: list[str]) -> list[str]:
    """A line for each library with kernels: each has them all, for every architecture."""
    lines, wanted = [], {arch.removesuffix("+PTX") for arch in archs}
    for library in sorted(package.glob("*.so")):
        found = instances.per_architecture(library)
        if not found:
            continue
        if set(found) != wanted:
            raise CheckError(
                f"{library.name}: expected code for {sorted(wanted)}, got {list(found)}"
            )
        lacking = set().union(*found.values()) - set.intersection(*found.values())
        if lacking:
            raise CheckError(f"{library.name}: not for every architecture: {sorted(lacking)}")
        count, size = len(found[min(found)]), library.stat().st_size / 1e6
        lines.append(f"{library.name}: {count} kernels for {' '.join(archs)}, {size:.1f} MB")
    if not lines:
        raise CheckError(f"{package}: no library in it holds a kernel")
    return lines


def check(wheel: Path, place: Path) -> list[str]:
    """What was found, line by line; raises CheckError."""
    info = load(install(wheel, place), place)
    loaded = info["loaded"]["cuda"]
    try:
        lines = holdings(Path(loaded["path"]).parent, loaded["archs"])
    except ToolkitError as error:
        raise CheckError(str(error)) from error
    return [f"installed and loaded with torch {info['torch']}, CUDA {loaded['cuda']}", *lines]


def _run(command: list[Any], **options: Any) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, text=True, capture_output=True, **options)
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip())[-2000:]
        raise CheckError(f"{' '.join(words)[:200]} ended with {done.returncode}:\n{said}")
    return done.stdout


def main() -> int:
    try:
        (path,) = sys.argv[1:]
        print("\n".join(check(Path(path).resolve(), ROOT / "build" / "wheel" / "fresh")))
    except CheckError as error:
        print(f"python -m tools.wheel_check: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
