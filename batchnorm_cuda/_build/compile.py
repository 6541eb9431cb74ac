"""Compiles one extension into a folder of its own, reusing objects of earlier builds.

The compiling is torch.utils.cpp_extension's, in a child process, because it reads CUDA_HOME when it
is imported, and TORCH_CUDA_ARCH_LIST and MAX_JOBS from the environment, none of which is ours to
change in a running program. What is added: the child dies with its parent, and a file whose
contents, headers and flags are those of an earlier build is not compiled again.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from . import sources

if TYPE_CHECKING:
    from .kernels import KernelRecipe

# Dies with the process that started it, and takes ninja and the compilers along: its standard input
# is a pipe whose other end only that process holds, and it leads a process group of its own.
# SIGTERM, because ninja gives each compiler another group, and passes this signal on to them.
_CHILD = """
import json, os, shlex, signal, subprocess, sys, threading

def die_with_parent():
    os.read(0, 1)
    os.killpg(0, signal.SIGTERM)

threading.Thread(target=die_with_parent, daemon=True).start()
with open(sys.argv[1]) as file:
    spec = json.load(file)
if "command" in spec:
    sys.exit(subprocess.call(spec["command"], stdin=subprocess.DEVNULL))
sys.path[:] = spec["sys_path"]
from torch.utils import cpp_extension
cpp_extension.TORCH_LIB_PATH = shlex.quote(cpp_extension.TORCH_LIB_PATH)  # torch does not
cpp_extension.load(**spec["load"])
"""


class BuildError(RuntimeError):
    """The extension could not be compiled; the message says why and what mends it."""


@dataclass(frozen=True)
class Recipe:
    """What to compile and everything that the result depends on."""

    name: str  # the module's name, PyInit_<name>
    label: str  # for the progress line
    sources: list[Path]  # .cpp
    key: dict[str, str]  # every ingredient whose change makes the old binary wrong
    job_bytes: int
    kernels: KernelRecipe | None = None  # whose objects are linked, too
    include_dirs: list[Path] = field(default_factory=list)  # of our own headers
    cflags: list[str] = field(default_factory=list)
    ldflags: list[str] = field(default_factory=list)
    links: dict[str, Path] = field(default_factory=dict)  # symlinks to place in the link folder
    environment: dict[str, str] = field(default_factory=dict)
    with_cuda: bool = False

    @property
    def folder(self) -> str:
        """The cache folder's name: other sources, versions or flags give another."""
        return f"{self.name.strip('_')}-{digest(self.key, self._flags())}"

    def object_name(self, source: Path) -> str:
        """The cache name of one compiled file: as `folder`, but for the files that it includes."""
        settings = {name: value for name, value in self.key.items() if name != "sources"}
        content = sources.closure_hash([source], self.include_dirs, lines=True)
        return f"{source.stem}-{digest(self.name, settings, self._flags(), content)}.o"

    def compile(self, work: Path, objects: Path, jobs: int) -> None:
        """Leave `<name>.so` in `work`, or raise BuildError with the compiler's own words."""
        compile_extension(self, work, objects, jobs)

    def _flags(self) -> list[object]:
        return [self.cflags, self.ldflags]


def digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def compile_extension(recipe: Recipe, work: Path, objects: Path, jobs: int) -> None:
    objects.mkdir(exist_ok=True)
    stored = {path: objects / recipe.object_name(path) for path in recipe.sources}
    reused = [path for path in recipe.sources if touch(stored[path])]
    if len(reused) == len(stored):  # cpp_extension links nothing without a source: the cheapest
        reused.remove(min(reused, key=lambda path: stored[path].stat().st_size))
    kernels = recipe.kernels.compile_objects(work, objects, jobs) if recipe.kernels else []
    for name, target in recipe.links.items():
        (work / name).symlink_to(target)
    load = {
        "name": recipe.name,
        "sources": [str(path) for path in recipe.sources if path not in reused],
        "extra_include_paths": [str(path) for path in recipe.include_dirs],
        "extra_cflags": [*recipe.cflags, *map(quoted, sources.path_maps())],
        "extra_ldflags": [
            *(quoted(str(path)) for path in (*kernels, *(stored[source] for source in reused))),
            quoted(f"-L{work}"),
            *recipe.ldflags,
        ],
        "with_cuda": recipe.with_cuda,
        "build_directory": str(work),
    }
    try:
        status = run_child(
            {"sys_path": sys.path, "load": load},
            work,
            {**recipe.environment, **_links_to_tools(recipe, work), "MAX_JOBS": str(jobs)},
        )
    finally:
        _store_objects(stored, work)
    if status != 0 or not (work / f"{recipe.name}.so").exists():
        raise failure(recipe.label, work, work.parent / f"{recipe.folder}.log")


def failure(label: str, work: Path, log: Path) -> BuildError:
    """What to raise when the compilers have said their part into build.log; it is kept as `log`."""
    (work / "build.log").replace(log)
    return BuildError(
        f"compiling {label} failed (full log: {log}):\n"
        f"{failure_excerpt(log.read_text(errors='replace'))}"
    )


def quoted(word: str) -> str:
    """One word of a command in torch's build.ninja: its flags are the shell's to split, and a
    dollar is ninja's.
    """
    return shlex.quote(word).replace("$", "$$")


def run_child(spec: dict[str, object], work: Path, settings: dict[str, str]) -> int:
    """Run torch's builder with spec["load"], or spec["command"], in `work`; its exit status."""
    (work / "spec.json").write_text(json.dumps(spec))
    environment = {**os.environ, **settings}
    environment["PATH"] = os.pathsep.join([*_ninja_dirs(), environment.get("PATH", os.defpath)])
    read_end, write_end = os.pipe()
    try:
        with (work / "build.log").open("w") as log:
            child = subprocess.Popen(
                [sys.executable, "-c", _CHILD, "spec.json"],
                cwd=work,
                env=environment,
                stdin=read_end,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                umask=0o077,  # whatever the user's is: see trust.py
            )
        try:
            return child.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):  # all gone already, the usual case
                os.killpg(child.pid, signal.SIGTERM)
    finally:
        os.close(read_end)
        os.close(write_end)


def _links_to_tools(recipe: Recipe, work: Path) -> dict[str, str]:
    """Links in `work`, where ninja runs, to tools whose paths torch does not, or not always, quote.

    A compiler keeps its name, from which some tell the language.
    """
    links = {}
    for variable in ("CUDA_HOME", "CC", "CXX"):
        path = Path(recipe.environment.get(variable) or os.environ.get(variable, ""))
        if path.is_absolute() and quoted(str(path)) != str(path):
            (work / variable).symlink_to(path if path.is_dir() else path.parent)
            links[variable] = variable if path.is_dir() else f"{variable}/{path.name}"
    return links


def touch(path: Path) -> bool:
    """Whether the file exists; marks it as used, for the pruning of the cache."""
    with contextlib.suppress(OSError):  # a cache may be shared read-only
        os.utime(path)
    return path.exists()


def _store_objects(stored: dict[Path, Path], work: Path) -> None:
    """Keep what was compiled, also after a failure: mending one file must not cost the others.

    Only outputs in ninja's log are complete; a killed compiler may leave half an object behind.
    """
    log = work / ".ninja_log"
    lines = log.read_text().splitlines() if log.exists() else []
    finished = {line.split("\t")[3] for line in lines if line.count("\t") >= 4}
    for path, target in stored.items():
        name = f"{path.stem}.o"
        if name in finished and (work / name).exists():
            (work / name).replace(target)


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
