"""`python -m bench build-time`: what compiling the extension costs, file by file, from nothing.

Builds it all in an empty cache, with a program around each compiler that notes CPU seconds (of the
compiler and all that it starts) and peak memory (of the largest of these). Prints a table as
docs/build-time.md has it: the files, the sums, the sizes of the binaries, and when a first training
step could come on more cores, by a schedule of the files' seconds. Needs no GPU.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .loading import ROOT
from .toolkit import Toolkit, resolve, sources

# Runs the compiler of its first argument, and appends a line to the log.
_NOTE = """#!{python}
import json, os, sys, time
start = time.monotonic()
pid = os.posix_spawn({real!r}, [{real!r}, *sys.argv[1:]], os.environ)
_, status, used = os.wait4(pid, 0)
names = [word for word in sys.argv[1:] if word.endswith((".cpp", ".cu"))]
if "-c" in sys.argv and names:
    record = {{"file": os.path.basename(names[-1]), "cpu": used.ru_utime + used.ru_stime,
              "wall": time.monotonic() - start, "mb": used.ru_maxrss / 1024}}
    with open({log!r}, "a") as file:
        file.write(json.dumps(record) + "\\n")
sys.exit(os.waitstatus_to_exitcode(status))
"""
# Prints the seconds of each step of a first use; imports of torch are the first.
_STEPS = """
import json, sys, time
start = time.monotonic()
from batchnorm_cuda._build import extension
steps = {"import": time.monotonic() - start}
def step(name, call, *arguments):
    start = time.monotonic()
    result = call(*arguments)
    steps[name] = time.monotonic() - start
    return result
paths = {"_C": step("_C", extension.load_cuda).__file__}
for table in sys.argv[1:]:
    paths[table] = step(table, extension._kernels_just_in_time, table)
print(json.dumps({"steps": steps, "paths": paths}))
"""


@dataclass(frozen=True)
class Compiled:
    """What one file took, in seconds and MB."""

    file: str
    cpu: float
    wall: float
    mb: float

    @property
    def part(self) -> str:
        """What the file is linked into: `_C`, or the kernels of a table."""
        tables = (name for name, files in sources.KERNEL_TABLES.items() if self.file in files)
        return next(tables, "_C")


@dataclass(frozen=True)
class Build:
    machine: str
    arch: str
    jobs: int
    files: list[Compiled]
    steps: dict[str, float]  # seconds, by part; and "import"
    sizes: dict[str, int]  # bytes, by part

    def of(self, part: str) -> list[Compiled]:
        return [each for each in self.files if each.part == part]

    def seconds(self, part: str, cores: int) -> float:
        """What a part would take on so many cores: beside the compilers as here, where it was
        measured, and the compilers by a schedule of their CPU seconds."""
        files = self.of(part)
        beside = self.steps[part] - makespan([each.wall for each in files], self.jobs)
        return max(0.0, beside) + makespan([each.cpu for each in files], cores)


def makespan(seconds: Sequence[float], workers: int) -> float:
    """When the last is done if each worker takes the next of the list: as ninja does it."""
    free = [0.0] * workers
    for each in seconds:
        heapq.heapreplace(free, free[0] + each)
    return max(free)


def measure(arch: str, jobs: int, kit: Toolkit) -> Build:
    """Compile everything for one architecture ("9.0")."""
    with tempfile.TemporaryDirectory(prefix="build-time-") as name:
        folder = Path(name)
        log = folder / "log"
        home = _with_notes(kit.home, folder / "toolkit", log)
        compiler = shutil.which(os.environ.get("CXX", "c++")) or "c++"
        environment = {
            **os.environ,
            "BATCHNORM_CUDA_CACHE_DIR": str(folder / "cache"),
            "CUDA_HOME": str(home),
            "CXX": str(_note(folder / "bin" / Path(compiler).name, Path(compiler), log)),
            "MAX_JOBS": str(jobs),
            "TORCH_CUDA_ARCH_LIST": arch,
        }
        done = subprocess.run(
            [sys.executable, "-c", _STEPS, *sources.KERNEL_TABLES],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        said = json.loads(done.stdout)
        sizes = {part: Path(path).stat().st_size for part, path in said["paths"].items()}
        files = [Compiled(**json.loads(line)) for line in log.read_text().splitlines()]
        return Build(_machine(), arch, jobs, files, said["steps"], sizes)


def _with_notes(home: Path, copy: Path, log: Path) -> Path:
    """The toolkit by links, but for nvcc."""
    (copy / "bin").mkdir(parents=True)
    for path in home.iterdir():
        if path.name != "bin":
            (copy / path.name).symlink_to(path)
    _note(copy / "bin" / "nvcc", home / "bin" / "nvcc", log)
    return copy


def _note(program: Path, real: Path, log: Path) -> Path:
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(_NOTE.format(python=sys.executable, real=str(real), log=str(log)))
    program.chmod(0o755)
    return program


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "a CPU")
    return f"{os.cpu_count()} cores of {model}, {platform.system()}"


def markdown(build: Build, dtype: str, cores: int) -> str:
    """The tables of docs/build-time.md."""
    files = sorted(build.files, key=lambda each: -each.cpu)
    lines = [
        f"For {build.arch}, {build.jobs} compilers at a time on {build.machine}.",
        "",
        "| file | linked into | CPU seconds | peak MB |",
        "|---|---|---|---|",
        *(f"| `{x.file}` | {_linked(x.part)} | {x.cpu:.1f} | {x.mb:.0f} |" for x in files),
        "",
        "| binary | files | CPU seconds | longest | MB |",
        "|---|---|---|---|---|",
    ]
    for part, size in build.sizes.items():
        cpu = [each.cpu for each in build.of(part)]
        sums = f"{len(cpu)} | {sum(cpu):.1f} | {max(cpu):.1f} | {size / 1e6:.2f}"
        lines.append(f"| {_linked(part)} | {sums} |")
    every = [each.cpu for each in files]
    size = sum(build.sizes.values())
    sums = f"{len(every)} | {sum(every):.1f} | {max(every):.1f} | {size / 1e6:.2f}"
    lines.append(f"| all | {sums} |")
    needed = ("_C", "common", dtype)
    parts = {part: build.seconds(part, cores) for part in needed}
    cpu = sum(each.cpu for part in needed for each in build.of(part))
    lines += [
        "",
        f"A first training step in {dtype} on {cores} cores, from nothing, by this schedule: "
        f"{build.steps['import']:.0f} s until torch is imported, "
        + ", ".join(f"{seconds:.0f} s {_linked(part)}" for part, seconds in parts.items())
        + f": {build.steps['import'] + sum(parts.values()):.0f} s, {cpu:.0f} CPU seconds of "
        "compilers.",
    ]
    return "\n".join(lines)


def _linked(part: str) -> str:
    return "`_C`" if part == "_C" else f"`kernels_{part}`"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench build-time", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", default="9.0", help="what to compile for (default: 9.0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    dtypes = [name for name in sources.KERNEL_TABLES if name != "common"]
    parser.add_argument("--dtype", choices=dtypes, default="bfloat16", help="of the first step")
    parser.add_argument("--cores", type=int, default=8, help="to make the schedule for")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    build = measure(options.arch, options.jobs, resolve())
    print(markdown(build, options.dtype, options.cores))
    return 0
