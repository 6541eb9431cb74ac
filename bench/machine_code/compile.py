"""Takes the kernels' compiled objects apart into the texts that listing.py reads, and keeps them.

    build/sass/<object>/sm_<arch>/{kernels.ptx,resources.txt,kernels.sass}

The objects are those that the extension is linked from (batchnorm_cuda/_build/kernels.py), compiled
if they are not there yet. An object is named by everything that it depends on, and so are its
texts.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..loading import ROOT
from ..toolkit import Toolkit, archs, find_tool, kernel_objects

BUILD_DIR = ROOT / "build" / "sass"
MAX_JOBS = 2
_NAMES = ("kernels.ptx", "resources.txt", "kernels.sass")


class CompileError(RuntimeError):
    """A tool failed; the message holds what it said."""


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
    resources: str  # cuobjdump -res-usage
    sass: str


def architectures(wanted: list[str]) -> list[str]:
    """What to compile for: all of TORCH_CUDA_ARCH_LIST where that holds what is wanted, with the
    intermediate code that says what was asked for, so that one compilation serves several."""
    with_ptx = [f"{arch}+PTX" for arch in wanted]
    listed = archs.parse(os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(with_ptx))
    return archs.with_newest_ptx(listed if set(with_ptx) <= set(listed) else with_ptx)


def compile_all(wanted: list[str], kit: Toolkit, build_dir: Path = BUILD_DIR) -> dict[Job, Texts]:
    """Texts of every kernel source for every architecture."""
    objects = kernel_objects(kit, architectures(wanted))
    jobs = [Job(source, arch) for arch in wanted for source in objects]
    with ThreadPoolExecutor(MAX_JOBS) as pool:
        texts = pool.map(lambda job: texts_of(job, objects[job.source], kit, build_dir), jobs)
        return dict(zip(jobs, texts, strict=True))


def texts_of(job: Job, compiled: Path, kit: Toolkit, build_dir: Path = BUILD_DIR) -> Texts:
    """From the object that holds code and PTX for the architecture."""
    folder = build_dir / compiled.stem / f"sm_{job.number}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed
        if not folder.is_dir():
            _take_apart(job, compiled, kit, folder)
        return Texts(*((folder / name).read_text() for name in _NAMES))


def _take_apart(job: Job, compiled: Path, kit: Toolkit, folder: Path) -> None:
    cuobjdump, nvdisasm = (find_tool(name, kit.home) for name in ("cuobjdump", "nvdisasm"))
    work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    try:
        arch = ["-arch", f"sm_{job.number}"]
        _run([cuobjdump, *arch, "-xelf", "all", "-xptx", "all", compiled], work)
        (cubin,) = work.glob("*.cubin")
        (ptx,) = work.glob(f"*.sm_{job.number}.ptx")
        texts = (ptx.read_text(), _run([cuobjdump, "-res-usage", cubin], work))
        for name, text in zip(_NAMES, (*texts, _run([nvdisasm, "-c", cubin], work)), strict=True):
            (work / name).write_text(text)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _run(command: list[str | Path], folder: Path) -> str:
    """What the command printed on both streams."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        raise CompileError(f"{' '.join(str(part) for part in command)}\n{done.stdout}")
    return done.stdout
