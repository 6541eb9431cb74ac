"""Finds the CUDA toolkit to compile with: its real home, not just something called nvcc on PATH.

`nvcc` may be a wrapper script or a link far from the toolkit's headers and libraries, and the
toolkit may be the one from PyPI, which has no libcudart.so for the linker. Standard library only,
and no imports from the package: setup.py loads this file by its path.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

INSTALL_HINT = (
    "`pip install 'batchnorm_cuda[nvcc]'` fetches the compiler for CUDA 13 from PyPI; else install "
    "NVIDIA's toolkit and set CUDA_HOME to it"
)
USUAL_PLACE = Path("/usr/local")  # where NVIDIA's installers put cuda and cuda-<version>


class ToolkitError(RuntimeError):
    """No usable CUDA toolkit; the message says what was looked at and what mends it."""


@dataclass(frozen=True)
class Toolkit:
    home: Path
    version: str  # of nvcc, "13.0"
    include_dir: Path
    cudart: Path  # libcudart.so, or libcudart.so.<major> where only that is installed

    @property
    def nvcc(self) -> Path:
        return self.home / "bin" / "nvcc"

    @property
    def major(self) -> str:
        return self.version.split(".")[0]

    @property
    def extra_include_dirs(self) -> list[Path]:
        """What cpp_extension does not add itself; /usr/include, above all, must not be repeated."""
        return [] if self.include_dir == self.home / "include" else [self.include_dir]

    @property
    def lacks_linker_name(self) -> bool:
        """True if `-lcudart` finds nothing here unless a libcudart.so is put beside it."""
        return self.cudart.name != "libcudart.so"

    def linker_dir(self, scratch: Path) -> Path:
        """The folder for `-L`: the library's own, or `scratch` with the missing link made there."""
        if not self.lacks_linker_name:
            return self.cudart.parent
        scratch.mkdir(parents=True, exist_ok=True)
        link = scratch / "libcudart.so"
        link.unlink(missing_ok=True)
        link.symlink_to(self.cudart)
        return scratch

    def gpu_codes(self) -> list[str]:
        """Compute capabilities nvcc can generate code for: ["7.5", "8.0", ...]."""
        codes = re.findall(r"sm_(\d+)(\d)\b", _run(self.nvcc, "--list-gpu-code"))
        return [f"{major}.{minor}" for major, minor in codes]


def resolve_toolkit(torch_cuda: str | None) -> Toolkit:
    """The first complete toolkit whose major version is that of the CUDA torch was built with.

    CUDA_HOME (or CUDA_PATH), if set, is the only candidate: what was asked for is used or refused.
    `torch_cuda=None` takes any version.
    """
    refused, mismatched = [], []
    for origin, home in _candidates():
        found = inspect(home)
        if isinstance(found, str):
            refused.append(f"{origin}: {home} {found}")
        elif torch_cuda and found.major != torch_cuda.split(".")[0]:
            mismatched.append(f"{found.home} is CUDA {found.version}")
        else:
            return found
    if mismatched:
        raise ToolkitError(
            f"PyTorch was built with CUDA {torch_cuda}, but the CUDA toolkit at "
            f"{', '.join(dict.fromkeys(mismatched))}: the major versions must be the same. "
            f"Install a CUDA {str(torch_cuda).split('.')[0]} toolkit and set CUDA_HOME to it"
        )
    looked = "; ".join(dict.fromkeys(refused)) or "no nvcc on PATH, from PyPI or in /usr/local/cuda"
    raise ToolkitError(f"no CUDA toolkit found ({looked}): {INSTALL_HINT}")


def inspect(home: Path) -> Toolkit | str:
    """The toolkit at `home`, or what it lacks."""
    nvcc = home / "bin" / "nvcc"
    if not os.access(nvcc, os.X_OK):
        return "has no bin/nvcc"
    include = _first(home, ("include", "targets/*/include"), "cuda_runtime.h")
    if include is None:
        return "has no include/cuda_runtime.h"
    folders = ("lib64", "lib", "targets/*/lib", "lib/*-linux-gnu")
    cudart = _first(home, folders, "libcudart.so") or _first(home, folders, "libcudart.so.[0-9]*")
    if cudart is None:
        return "has no libcudart.so"
    release = re.search(r"release (\d+\.\d+)", _run(nvcc, "--version"))
    if release is None:
        return "has a bin/nvcc that does not run"
    return Toolkit(home, release.group(1), include.parent, cudart)


def compiler_version() -> str:
    """Name and version of the C++ compiler that torch's builder will call."""
    compiler = os.environ.get("CXX", "c++")
    printed = _run(compiler, "--version").splitlines()
    program, *arguments = compiler.split() or [""]
    if not printed and arguments and shutil.which(program):
        raise ToolkitError(
            f"CXX={compiler!r} is a program with arguments, where one program is expected. For "
            "ccache, unset CXX and set `PATH=/usr/lib/ccache:$PATH`, where g++ is a link to it; "
            f'else name a script in CXX that runs `exec {compiler} "$@"`'
        )
    if not printed:
        raise ToolkitError(
            f"no C++ compiler: {compiler!r} does not run; install one (`apt-get install g++` or "
            "`dnf install gcc-c++`) or name it in CXX"
        )
    return f"{compiler} {printed[0]}"


def _candidates() -> Iterator[tuple[str, Path]]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            home = Path(os.environ[variable])
            for candidate in (home, *_homes_of(home / "bin" / "nvcc")):
                yield variable, candidate
            return
    on_path = shutil.which("nvcc")
    if on_path:
        for home in _homes_of(Path(on_path)):
            yield "nvcc on PATH", home
    for entry in sys.path:
        for nvcc in sorted(Path(entry or ".").glob("nvidia/cu*/bin/nvcc"), reverse=True):
            yield "PyPI", nvcc.parent.parent
    for pattern in ("cuda", "cuda-*"):
        for home in sorted(USUAL_PLACE.glob(pattern), reverse=True):
            yield str(USUAL_PLACE), home


def _homes_of(nvcc: Path) -> list[Path]:
    """Where the toolkit of an `nvcc` may be: as it says itself, then by links, then by place."""
    if not nvcc.exists():
        return []
    top = re.search(r"^#\$ TOP=(.+)$", _run(nvcc, "--dryrun", "-x", "cu", os.devnull), re.MULTILINE)
    said = [Path(top.group(1).strip()).resolve()] if top else []
    return [*said, nvcc.resolve().parent.parent, nvcc.parent.parent]


def main() -> None:
    """Print the toolkit that a build would take, for a torch built with the CUDA version given."""
    try:
        found = resolve_toolkit(sys.argv[1] if len(sys.argv) > 1 else None)
    except ToolkitError as error:
        sys.exit(str(error))
    print(f"CUDA {found.version} at {found.home}")


def _first(home: Path, folders: tuple[str, ...], name: str) -> Path | None:
    found = (path for folder in folders for path in sorted(home.glob(f"{folder}/{name}")))
    return next(found, None)


def _run(*command: str | Path) -> str:
    """What a command prints on either stream; empty if it cannot be run."""
    try:
        done = subprocess.run(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="surrogateescape",  # as in the names of files
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


if __name__ == "__main__":
    main()
