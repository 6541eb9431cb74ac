"""Compiles the kernels with nvcc: a shared object for each table, which knows nothing of torch.

So one build serves every version of torch on the same CUDA, and the objects serve whoever links
kernels. ninja runs the compilers, as for torch's builder, from a file that is written here.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from . import _archs, _jobs, _sources
from ._compile import BuildError, digest, failure, run_child, touch
from ._toolkit import Toolkit, compiler_version
from ._version import __version__

_FLAG_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")  # which nvcc itself reads


@dataclass(frozen=True)
class KernelRecipe:
    """The kernels of one table (csrc/kernel_table.h) and everything that the result depends on."""

    table: str
    label: str  # for the progress line
    sources: list[Path]
    key: dict[str, str]
    job_bytes: int
    compiler: list[str]  # nvcc and its flags
    linker: list[str]
    libraries: list[Path]

    @classmethod
    def of(cls, table: str, toolkit: Toolkit, archs: list[str]) -> KernelRecipe:
        """The one recipe of a table: whoever asks for the same architectures shares the objects."""
        listed = ";".join(archs)
        host_compiler = os.environ.get("CC")  # as for torch's builder
        flags = [
            *_sources.NVCC_FLAGS,
            # A quarter of the binary; the flag came with CUDA 12.8.
            *(["--compress-mode=size"] if int(toolkit.major) >= 13 else []),
            *(["-ccbin", host_compiler] if host_compiler else []),
            *(f"-isystem={path}" for path in toolkit.extra_include_dirs),
            *_archs.gencode(archs),
        ]
        return cls(
            table=table,
            label=f'the kernels "{table}" for {listed} (CUDA {toolkit.version})',
            sources=_sources.kernel_sources(table),
            key={
                "version": __version__,
                "cuda": toolkit.version,
                "archs": listed,
                "compiler": compiler_version(),
                "flags": " ".join(os.environ.get(name, "") for name in _FLAG_VARIABLES),
            },
            job_bytes=_jobs.CUDA_JOB_BYTES,
            compiler=[str(toolkit.nvcc), *flags],
            linker=[os.environ.get("CXX", "c++"), "-shared"],
            libraries=[toolkit.cudart],
        )

    @property
    def name(self) -> str:
        return f"kernels_{self.table}"

    @property
    def all_sources(self) -> list[Path]:
        return self.sources

    @property
    def folder(self) -> str:
        """The cache folder's name: other sources, versions or flags give another."""
        names = [self.object_name(source) for source in self.sources]
        return f"{self.name}-{digest(self.key, self.linker, names)}"

    def object_name(self, source: Path) -> str:
        content = _sources.closure_hash([source], [], lines=False)
        # Where the compiler lies makes no difference.
        return f"{source.stem}-{digest(self.key, self.compiler[1:], content)}.o"

    def compile(self, work: Path, objects: Path, jobs: int) -> None:
        """Leave `<name>.so` in `work`, or raise BuildError with the compiler's own words."""
        compile_objects([self], work, objects, jobs)
        module = f"{self.name}.so"
        linked = [objects / self.object_name(source) for source in self.sources]
        command = [*self.linker, "-o", module, *map(str, (*linked, *self.libraries))]
        if run_child({"command": command}, work, {}) != 0:
            raise failure(self.label, work, work.parent / f"{self.folder}.log")


def compile_objects(recipes: list[KernelRecipe], work: Path, objects: Path, jobs: int) -> None:
    """Leave the objects of all recipes in `objects`, where each may be already."""
    objects.mkdir(exist_ok=True)
    edges = {}
    for recipe in recipes:
        for source in recipe.sources:
            target = objects / recipe.object_name(source)
            if not touch(target):
                edges[target] = [*recipe.compiler, "-c", str(source), "-o", target.name]
    if not edges:
        return
    _refuse_double_quotes(edges)
    (work / "build.ninja").write_text(ninja_file(edges))
    if run_child({"command": ["ninja", "-j", str(jobs)]}, work, {}) != 0:
        raise failure(recipes[0].label, work, work.parent / f"{recipes[0].folder}.log")


def _refuse_double_quotes(edges: dict[Path, list[str]]) -> None:
    for word in (word for command in edges.values() for word in command):
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
