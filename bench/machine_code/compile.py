"""Compiles a `.cu` file for one architecture into the texts that listing.py reads, and keeps them.

    build/sass/<arch>/<stem>/{key,kernels.ptx,ptxas.txt,kernels.cubin,kernels.sass}

`key` is a hash of everything that the result depends on; a folder with the same key is reused.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..loading import ROOT
from ..toolkit import Toolkit, sources

BUILD_DIR = ROOT / "build" / "sass"
# Two compilers at once: each takes up to 3 GB on a file of many template instances.
MAX_JOBS = 2
# As the extension is compiled; torch adds the language standard and nothing that changes the code.
FLAGS = ("-std=c++17", *sources.NVCC_FLAGS)


class CompileError(RuntimeError):
    """nvcc or nvdisasm failed; the message holds what it said."""


@dataclass(frozen=True)
class Job:
    source: Path
    arch: str  # "8.0"

    @property
    def number(self) -> str:
        return self.arch.replace(".", "")


@dataclass(frozen=True)
class Texts:
    """What the tools said about one source and architecture."""

    ptx: str
    ptxas: str
    sass: str


def compile_all(jobs: list[Job], kit: Toolkit, nvdisasm: Path, build_dir: Path = BUILD_DIR):
    """Texts of every job, in order; at most MAX_JOBS compilers run at a time."""
    with ThreadPoolExecutor(MAX_JOBS) as pool:
        return list(pool.map(lambda job: compile_one(job, kit, nvdisasm, build_dir), jobs))


def compile_one(job: Job, kit: Toolkit, nvdisasm: Path, build_dir: Path = BUILD_DIR) -> Texts:
    folder = build_dir / f"sm_{job.number}" / job.source.stem
    folder.parent.mkdir(parents=True, exist_ok=True)
    key = _key(job, kit, nvdisasm)
    with (folder.parent / f"{job.source.stem}.lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed
        if not (folder / "key").exists() or (folder / "key").read_text() != key:
            print(f"compiling {job.source.name} for sm_{job.number}", file=sys.stderr, flush=True)
            _build(job, kit, nvdisasm, folder, key)
        names = ("kernels.ptx", "ptxas.txt", "kernels.sass")
        return Texts(*((folder / name).read_text() for name in names))


def _key(job: Job, kit: Toolkit, nvdisasm: Path) -> str:
    include_dirs = [sources.csrc_dir()]
    version = _run([nvdisasm, "--version"])
    parts = [job.arch, *FLAGS, kit.version, str(kit.nvcc), version]
    parts.append(sources.closure_hash(job.source, include_dirs))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _build(job: Job, kit: Toolkit, nvdisasm: Path, folder: Path, key: str) -> None:
    work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    try:
        ptx, cubin = work / "kernels.ptx", work / "kernels.cubin"
        nvcc = [kit.nvcc, *FLAGS]
        front = ["-ptx", f"-arch=compute_{job.number}", f"-I{sources.csrc_dir()}"]
        _run([*nvcc, *front, "-o", ptx, job.source])
        back = ["-cubin", f"-arch=sm_{job.number}", "--resource-usage"]
        (work / "ptxas.txt").write_text(_run([*nvcc, *back, "-o", cubin, ptx]))
        (work / "kernels.sass").write_text(_run([nvdisasm, "-c", cubin]))
        (work / "key").write_text(key)
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _run(command: list[str | Path]) -> str:
    """What the command printed on both streams."""
    done = subprocess.run(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        raise CompileError(f"{' '.join(str(part) for part in command)}\n{done.stdout}")
    return done.stdout
