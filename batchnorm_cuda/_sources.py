"""The files that make up the compiled extensions: the one list that setup.py and the JIT read.

Standard library only, and no imports from the package: setup.py loads this file by its path, on
machines that have no torch.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent

# Relative to csrc/. The emulated extension compiles the same bindings, operators, plan and kernels,
# and its own stand-in for device_context.cpp (streams, guards and device properties).
HOST_SOURCES = (
    "backward.cpp",
    "bindings.cpp",
    "checks.cpp",
    "device_query.cpp",
    "double_backward.cpp",
    "forward.cpp",
    "plan.cpp",
    "plan_bytes.cpp",
    "plan_cache.cpp",
    "plan_candidates.cpp",
    "plan_costs.cpp",
    "plan_dict.cpp",
    "plan_rows.cpp",
    "plan_team.cpp",
    "plan_team_layout.cpp",
    "sync_batch_norm.cpp",
    "tensors.cpp",
)
DEVICE_CONTEXT = "device_context.cpp"
KERNEL_SOURCES = (
    "backward_elementwise.cu",
    "backward_reduce.cu",
    "double_backward_elementwise.cu",
    "double_backward_reduce.cu",
    "merge.cu",
    "merge_ranks.cu",
    "normalize.cu",
    "statistics.cu",
    "team_backward_bfloat16.cu",
    "team_backward_double.cu",
    "team_backward_float.cu",
    "team_backward_half.cu",
    "team_forward_bfloat16.cu",
    "team_forward_double.cu",
    "team_forward_float.cu",
    "team_forward_half.cu",
)

# Hidden symbols: `_C` and `_C_emulated` define the same functions and may share a process.
CXX_FLAGS = ("-O2", "-fvisibility=hidden")
NVCC_FLAGS = ("-O3", "-lineinfo", "-Xcompiler", "-fvisibility=hidden")

_SOURCE_SUFFIXES = {".cpp", ".cu", ".cuh", ".h"}


def in_checkout() -> bool:
    """True in a source tree or an editable install, where csrc/ lies beside the package."""
    return not (_PACKAGE / "csrc").is_dir()


def csrc_dir() -> Path:
    """csrc/ of the checkout, or its copy inside the installed package."""
    return _PACKAGE.parent / "csrc" if in_checkout() else _PACKAGE / "csrc"


def simt_dir() -> Path:
    """The host build of the CUDA model: tests/simt/ of the checkout, or the installed copy."""
    return _PACKAGE.parent / "tests" / "simt" if in_checkout() else _PACKAGE / "simt"


def cuda_sources() -> list[Path]:
    """Everything `batchnorm_cuda._C` is compiled from."""
    return [csrc_dir() / name for name in (*HOST_SOURCES, DEVICE_CONTEXT, *KERNEL_SOURCES)]


def emulated_cpp_sources() -> list[Path]:
    """The C++ files of `_C_emulated`; KERNEL_SOURCES, compiled as C++, come on top."""
    simt = simt_dir()
    host = [csrc_dir() / name for name in HOST_SOURCES]
    return [*host, *sorted((simt / "torch").glob("*.cpp")), *sorted(simt.glob("*.cpp"))]


def kernel_sources() -> list[Path]:
    """The `.cu` files alone: they include no torch header."""
    return [csrc_dir() / name for name in KERNEL_SOURCES]


def emulated_include_dirs() -> list[Path]:
    """tests/simt/include goes first: its <cuda_runtime.h> must win over a real one."""
    return [simt_dir() / "include", csrc_dir()]


def content_hash(*, emulated: bool) -> str:
    """Hash of every file a build can read, headers included, so that no edit goes unnoticed."""
    roots = [csrc_dir()]
    if emulated:
        roots += [simt_dir() / "include", simt_dir() / "torch"]
    files = {path for root in roots for path in root.rglob("*") if path.suffix in _SOURCE_SUFFIXES}
    if emulated:
        files |= set(simt_dir().glob("*.cpp")) | set(simt_dir().glob("*.h"))
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def closure_hash(source: Path, include_dirs: list[Path]) -> str:
    """Hash of one source and of all our headers that it reaches through quoted includes.

    Takes too many (those inside #if 0 as well), which is the safe side for reusing objects.
    """
    seen: dict[Path, bytes] = {}
    pending = [source.resolve()]
    while pending:
        path = pending.pop()
        if path in seen:
            continue
        seen[path] = path.read_bytes()
        for name in re.findall(rb'^\s*#\s*include\s*[<"]([^">]+)[">]', seen[path], re.MULTILINE):
            for folder in (path.parent, *include_dirs):
                candidate = folder / name.decode()
                if candidate.is_file():
                    pending.append(candidate.resolve())
                    break
    digest = hashlib.sha256()
    for path in sorted(seen):
        digest.update(path.name.encode() + b"\0" + seen[path] + b"\0")
    return digest.hexdigest()


def path_maps() -> list[str]:
    """Flags by which a compiled file says csrc/plan.cpp or simt/engine.h of itself.

    The same file of two checkouts then compiles to the same object, and either may use it.
    """
    return [f"-ffile-prefix-map={folder.parent}/=" for folder in (csrc_dir(), simt_dir())]
