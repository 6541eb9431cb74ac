"""Compiles an extension just in time, once per configuration, into a cache shared by processes.

One `flock` per configuration serialises the builders: the kernel drops it when its holder dies, so
a killed build blocks nobody. Each build runs in a fresh folder and is renamed into place when it
has been compiled, linked and imported; a folder with its final name is therefore always complete.
The compiling itself is torch.utils.cpp_extension's, in a child process, because it reads CUDA_HOME
when it is imported and TORCH_CUDA_ARCH_LIST and MAX_JOBS from the environment, none of which is
ours to change in a running program.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from . import _jobs, _sources

_CHILD = """
import json, sys
with open(sys.argv[1]) as file:
    spec = json.load(file)
sys.path[:] = spec["sys_path"]
from torch.utils.cpp_extension import load
load(**spec["load"])
"""


class BuildError(RuntimeError):
    """The extension could not be compiled; the message says why and what mends it."""


@dataclass(frozen=True)
class Recipe:
    """What to compile and everything that the result depends on."""

    name: str  # the module's name, PyInit_<name>
    label: str  # for the progress line
    sources: list[Path]  # .cpp, and .cu for nvcc
    key: dict[str, str]  # every ingredient whose change makes the old binary wrong
    job_bytes: int
    compiled_as_cpp: list[Path] = field(default_factory=list)  # .cu files, through wrappers
    include_dirs: list[Path] = field(default_factory=list)
    cflags: list[str] = field(default_factory=list)
    cuda_cflags: list[str] = field(default_factory=list)
    ldflags: list[str] = field(default_factory=list)
    links: dict[str, Path] = field(default_factory=dict)  # symlinks to place in the link folder
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The cache folder's name: other sources, versions or flags give another."""
        return f"{self.name.strip('_')}-{_digest(self.key, self._flags())}"

    @property
    def all_sources(self) -> list[Path]:
        return [*self.sources, *self.compiled_as_cpp]

    @property
    def with_cuda(self) -> bool:
        return any(path.suffix == ".cu" for path in self.sources)

    def object_name(self, source: Path) -> str:
        """The cache name of one compiled file: as `folder`, but for the files that it includes."""
        settings = {name: value for name, value in self.key.items() if name != "sources"}
        content = _sources.closure_hash(source, self.include_dirs)
        return f"{source.stem}-{_digest(self.name, settings, self._flags(), content)}.o"

    def _flags(self) -> list[object]:
        return [self.cflags, self.cuda_cflags, self.ldflags, self.environment]


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def cache_dir() -> Path:
    """BATCHNORM_CUDA_CACHE_DIR, or batchnorm_cuda under the user's cache folder."""
    explicit = os.environ.get("BATCHNORM_CUDA_CACHE_DIR")
    if explicit:
        return Path(explicit).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().resolve() / "batchnorm_cuda"


@contextlib.contextmanager
def lock(path: Path, say_waiting: str) -> Iterator[None]:
    """Hold `path` exclusively. The lock lives in the kernel, not in the file's existence."""
    import fcntl

    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(say_waiting)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def say(text: str) -> None:
    """One line of progress. On stderr, so that a program's own output stays clean."""
    print(f"batchnorm_cuda: {text}", file=sys.stderr, flush=True)


def build(recipe: Recipe) -> Path:
    """Path of the compiled module, from the cache or freshly built."""
    root = cache_dir()
    final = root / recipe.folder
    module = final / f"{recipe.name}.so"
    if module.exists():
        return module
    try:
        root.mkdir(parents=True, exist_ok=True)
        with lock(root / f"{recipe.folder}.lock", f"waiting for another process: {recipe.label}"):
            if not module.exists():
                _build_into(recipe, root, final)
    except OSError as error:
        raise BuildError(
            f"cannot write the build cache {root} ({error}): "
            "set BATCHNORM_CUDA_CACHE_DIR to a folder that can be written"
        ) from error
    return module


def _build_into(recipe: Recipe, root: Path, final: Path) -> None:
    for stale in root.glob(f"{recipe.folder}.tmp-*"):  # ours alone: we hold the lock
        shutil.rmtree(stale, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f"{recipe.folder}.tmp-", dir=root))
    jobs = _jobs.compile_jobs(recipe.job_bytes)
    say(f"compiling {recipe.label} in {final} with {jobs} job(s); this takes minutes, once")
    start = time.monotonic()
    try:
        _compile(recipe, work, jobs)
        (work / "build.json").write_text(json.dumps(recipe.key, indent=2))
        work.rename(final)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(f"compiled {recipe.label} in {time.monotonic() - start:.0f} s")


def _compile(recipe: Recipe, work: Path, jobs: int) -> None:
    objects = cache_dir() / "objects"
    objects.mkdir(exist_ok=True)
    stored = {path: objects / recipe.object_name(path) for path in recipe.all_sources}
    reused = [path for path in recipe.all_sources if stored[path].exists()]
    if len(reused) == len(stored):  # cpp_extension links nothing without a source: the cheapest
        reused.remove(min(reused, key=lambda path: stored[path].stat().st_size))
    for name, target in recipe.links.items():
        (work / name).symlink_to(target)
    load = {
        "name": recipe.name,
        "sources": [
            str(_wrap(path, work) if path in recipe.compiled_as_cpp else path)
            for path in recipe.all_sources
            if path not in reused
        ],
        "extra_include_paths": [str(path) for path in recipe.include_dirs],
        "extra_cflags": recipe.cflags,
        "extra_cuda_cflags": recipe.cuda_cflags,
        "extra_ldflags": [*(str(stored[path]) for path in reused), f"-L{work}", *recipe.ldflags],
        "with_cuda": recipe.with_cuda,
        "build_directory": str(work),
    }
    spec = work / "spec.json"
    spec.write_text(json.dumps({"sys_path": sys.path, "load": load}))
    environment = {**os.environ, **recipe.environment, "MAX_JOBS": str(jobs)}
    environment["PATH"] = os.pathsep.join([*_ninja_dirs(), environment.get("PATH", os.defpath)])
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, str(spec)],
        cwd=work,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    _store_objects(stored, work)
    if child.returncode != 0 or not (work / f"{recipe.name}.so").exists():
        log = cache_dir() / f"{recipe.folder}.log"
        log.write_text(child.stdout)
        raise BuildError(
            f"compiling {recipe.label} failed (full log: {log}):\n{failure_excerpt(child.stdout)}"
        )


def _store_objects(stored: dict[Path, Path], work: Path) -> None:
    """Keep what was compiled, also after a failure: mending one file must not cost the others.

    Only outputs in ninja's log are complete; a killed compiler may leave half an object behind.
    """
    log = work / ".ninja_log"
    lines = log.read_text().splitlines() if log.exists() else []
    finished = {line.split("\t")[3] for line in lines if line.count("\t") >= 4}
    for path, target in stored.items():
        for name in (f"{path.stem}.o", f"{path.stem}_cu.o", f"{path.stem}.cuda.o"):
            if name in finished and (work / name).exists():
                (work / name).replace(target)


def _wrap(source: Path, work: Path) -> Path:
    """A C++ file that includes a `.cu`: cpp_extension would give the `.cu` itself to nvcc."""
    wrapper = work / f"{source.stem}_cu.cpp"
    wrapper.write_text(f'#include "{source}"\n')
    return wrapper


def failure_excerpt(log: str, lines: int = 12) -> str:
    """The compiler's own words: the first errors, or the end of the log if none is marked."""
    split = log.splitlines()
    marked = [line for line in split if "error:" in line or "cannot find" in line]
    marked += [line for line in split if "Killed" in line]
    return "\n".join("  " + line[:300] for line in (marked[:lines] or split[-lines:]))


def _ninja_dirs() -> list[str]:
    """Where the ninja package keeps its program: a venv's bin need not be on PATH."""
    if importlib.util.find_spec("ninja") is None:
        return []
    import ninja

    return [ninja.BIN_DIR]
