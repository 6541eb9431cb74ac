"""Compiles the kernels, which know nothing of torch: one build serves every version of it.

By nvcc into a shared object for each table, or by the C++ compiler into objects for the host model;
who links kernels shares the objects. ninja runs the compilers, as for torch's builder, from a file
that is written here. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from .._version import __version__
from . import sources
from .archs import gencode
from .compile import BuildError, digest, failure, run_child, touch
from .jobs import CUDA_JOB_BYTES, HOST_JOB_BYTES
from .toolkit import Toolkit, compiler_version

_FLAG_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")  # which nvcc itself reads


@dataclass(frozen=True)
class KernelRecipe:
    """The kernels of one table (csrc/kernel_table.h) and everything that the result depends on."""

    table: str
    label: str  # for the progress line
    sources: list[Path]
    key: dict[str, str]
    job_bytes: int
    compiler: list[str]  # with its flags
    linker: list[str] = field(default_factory=list)
    libraries: list[Path] = field(default_factory=list)
    include_dirs: list[Path] = field(default_factory=list)  # beside the sources' own
    lines: bool = False  # the objects name files and lines

    @classmethod
    def of(cls, table: str, toolkit: Toolkit, archs: list[str]) -> KernelRecipe:
        """The one recipe of a table: whoever asks for the same architectures shares the objects."""
        listed = ";".join(archs)
        host_compiler = os.environ.get("CC")  # as for torch's builder
        flags = [
            *sources.NVCC_FLAGS,
            # A quarter of the binary; the flag came with CUDA 12.8.
            *(["--compress-mode=size"] if int(toolkit.major) >= 13 else []),
            *(["-ccbin", host_compiler] if host_compiler else []),
            *(f"-isystem={path}" for path in toolkit.extra_include_dirs),
            *gencode(archs),
        ]
        return cls(
            table=table,
            label=f'the kernels "{table}" for {listed} (CUDA {toolkit.version})',
            sources=sources.kernel_sources(table),
            key={
                "version": __version__,
                "cuda": toolkit.version,
                "archs": listed,
                "compiler": compiler_version(),
                "flags": " ".join(os.environ.get(name, "") for name in _FLAG_VARIABLES),
            },
            job_bytes=CUDA_JOB_BYTES,
            compiler=[str(toolkit.nvcc), *flags],
            linker=[os.environ.get("CXX", "c++"), "-shared"],
            libraries=[toolkit.cudart],
        )

    @classmethod
    def emulated(cls) -> KernelRecipe:
        """All kernels for the host model: objects, which are linked into what uses them."""
        flags = ["-std=c++17", *sources.CXX_FLAGS, "-fPIC", *sources.EMULATED_FLAGS, "-x", "c++"]
        return cls(
            table="emulated",
            label="the kernels for the host model",
            sources=sources.kernel_sources(),
            key={"version": __version__, "compiler": compiler_version(), "cpu": cpu_hash()},
            job_bytes=HOST_JOB_BYTES,
            compiler=[os.environ.get("CXX", "c++"), *flags],
            include_dirs=sources.emulated_include_dirs(),
            lines=True,
        )

    @property
    def name(self) -> str:
        return f"kernels_{self.table}"

    @property
    def folder(self) -> str:
        """The cache folder's name: other sources, versions or flags give another."""
        names = [self.object_name(source) for source in self.sources]
        return f"{self.name}-{digest(self.key, self.linker, names)}"

    def object_name(self, source: Path) -> str:
        content = sources.closure_hash([source], self.include_dirs, lines=self.lines)
        # Where the compiler lies makes no difference.
        return f"{source.stem}-{digest(self.key, self.compiler[1:], content)}.o"

    def compile(self, work: Path, objects: Path, jobs: int) -> None:
        """Leave `<name>.so` in `work`, or raise BuildError with the compiler's own words."""
        linked = self.compile_objects(work, objects, jobs)
        module = f"{self.name}.so"
        command = [*self.linker, "-o", module, *map(str, (*linked, *self.libraries))]
        if run_child({"command": command}, work, {}) != 0:
            raise failure(self.label, work, work.parent / f"{self.folder}.log")

    def compile_objects(self, work: Path, objects: Path, jobs: int) -> list[Path]:
        """The compiled objects, in the order of the sources."""
        compile_objects([self], work, objects, jobs)
        return [objects / self.object_name(source) for source in self.sources]

    def command(self, source: Path, target: str) -> list[str]:
        # Paths are no part of the object's name: what they lead to is.
        places = [f"-I{folder}" for folder in self.include_dirs]
        places += sources.path_maps() if self.lines else []
        return [*self.compiler, *places, "-c", str(source), "-o", target]


def compile_objects(recipes: list[KernelRecipe], work: Path, objects: Path, jobs: int) -> None:
    """Leave the objects of all recipes in `objects`, where each may be already."""
    objects.mkdir(exist_ok=True)
    edges = {}
    for recipe in recipes:
        for source in recipe.sources:
            target = objects / recipe.object_name(source)
            if not touch(target):
                edges[target] = recipe.command(source, target.name)
    if not edges:
        return
    _refuse_double_quotes(edges)
    (work / "build.ninja").write_text(ninja_file(edges))
    if run_child({"command": ["ninja", "-j", str(jobs)]}, work, {}) != 0:
        raise failure(recipes[0].label, work, work.parent / f"{recipes[0].folder}.log")


def _refuse_double_quotes(edges: dict[Path, list[str]]) -> None:
    by_nvcc = [command for command in edges.values() if Path(command[0]).name == "nvcc"]
    for word in (word for command in by_nvcc for word in command):
        if '"' in word:
            raise BuildError(
                f"nvcc takes no double quote in the name of a file or folder: {word}; give the "
                "folder another name, or name it through a symbolic link without one"
            )


def ninja_file(edges: dict[Path, list[str]]) -> str:
    """A command for each target, which is complete when it appears: whatever is killed when."""
    lines = ["ninja_required_version = 1.3", "rule run", "  command = $command"]
    for target, command in edges.items():
        moved = shlex.join(["mv", "-f", target.name, str(target)])
        escaped = str(target).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
        lines += [
            f"build {escaped}: run",
            f"  command = {shlex.join(command)} && {moved}".replace("$", "$$"),
        ]
    return "\n".join(lines) + "\n"


def cpu_hash() -> str:
    """-march=native makes a binary for this kind of CPU; a shared cache may serve several."""
    text = Path("/proc/cpuinfo").read_text()
    lines = {line for line in text.splitlines() if line.startswith(("flags", "Features", "model"))}
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]
