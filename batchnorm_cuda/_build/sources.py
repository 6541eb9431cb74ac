"""The files that make up the compiled extensions: the one list that setup.py and the JIT read.

Standard library only, and no imports from the package: setup.py loads this file by its path, on
machines that have no torch.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]

# Relative to csrc/. The emulated extension compiles the same bindings, operators, plan and kernels,
# and its own stand-in for device_context.cpp (streams, guards and device properties).
HOST_SOURCES = (
    "device_query.cpp",
    "kernel_loading.cpp",
    "launch.cpp",
    "plan/named_values.cpp",
    "plan/plan.cpp",
    "plan/plan_bytes.cpp",
    "plan/plan_cache.cpp",
    "plan/plan_candidates.cpp",
    "plan/plan_costs.cpp",
    "plan/plan_dict.cpp",
    "plan/plan_rows.cpp",
    "plan/plan_team.cpp",
    "plan/plan_team_layout.cpp",
    "torch/backward.cpp",
    "torch/bindings.cpp",
    "torch/checks.cpp",
    "torch/double_backward.cpp",
    "torch/forward.cpp",
    "torch/recorded.cpp",
    "torch/ranks.cpp",
    "torch/refusals.cpp",
    "torch/tensors.cpp",
)
DEVICE_CONTEXT = "torch/device_context.cpp"
_KERNEL_PARTS = ("team_forward", "stages", "team_backward")
# The kernels, by table (csrc/kernel_table.h): what all dtypes share, and each dtype. Relative to
# csrc/kernels/.
KERNEL_TABLES = {
    "common": ("common.cu",),
    **{
        dtype: tuple(f"{part}_{dtype}.cu" for part in _KERNEL_PARTS)
        for dtype in ("half", "bfloat16", "float", "double")
    },
}
KERNEL_SOURCES = tuple(name for names in KERNEL_TABLES.values() for name in names)

# Hidden symbols: `_C` and `_C_emulated` define the same functions and may share a process.
CXX_FLAGS = ("-O2", "-fvisibility=hidden")
NVCC_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden")

EMULATED_FLAGS = ("-march=native", "-DBATCHNORM_CUDA_HOST_MODEL")

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


def cuda_host_sources() -> list[Path]:
    """What `batchnorm_cuda._C` is compiled from: it loads the kernels when they are needed."""
    return [csrc_dir() / name for name in (*HOST_SOURCES, DEVICE_CONTEXT)]


def cuda_sources() -> list[Path]:
    """All of csrc/, which may as well be linked into one module."""
    return [*cuda_host_sources(), *kernel_sources()]


def emulated_cpp_sources() -> list[Path]:
    """The C++ files of `_C_emulated`; KERNEL_SOURCES, compiled as C++, come on top."""
    simt = simt_dir()
    host = [csrc_dir() / name for name in HOST_SOURCES]
    return [*host, *sorted((simt / "torch").glob("*.cpp")), *sorted(simt.glob("*.cpp"))]


def kernel_sources(table: str | None = None) -> list[Path]:
    """The `.cu` files, or those of one table alone: they include no torch header."""
    names = KERNEL_TABLES[table] if table else KERNEL_SOURCES
    return [csrc_dir() / "kernels" / name for name in names]


def emulated_include_dirs() -> list[Path]:
    """tests/simt/include goes first: its <cuda_runtime.h> must win over a real one."""
    return [simt_dir() / "include", csrc_dir()]


# Blanks and comments, and what may look like one inside: literals, raw or not. A quote between two
# digits separates them.
_BLANKS = re.compile(
    rb"""
    (?P<kept> R"(?P<mark>[^()\s\\]{0,16})\(.*?\)(?P=mark)" | "(?:\\.|[^"\\\n])*"
      | (?<![0-9a-fA-F])'(?:\\.|[^'\\\n])*' )
    | (?: [ \t]+ | //[^\n]* | /\*.*?\*/ )+
    """,
    re.VERBOSE | re.DOTALL,
)


def compiled_text(text: bytes, *, lines: bool) -> bytes:
    """What a compiler makes something of: `text` without comments, and with one blank for many.

    With `lines` every line keeps its number, because the compiled file may name it.
    """

    def shortened(match: re.Match[bytes]) -> bytes:
        kept = match.group("kept")
        return kept if kept is not None else b" " + b"\n" * (match.group().count(b"\n") * lines)

    stripped = [line.strip(b" ") for line in _BLANKS.sub(shortened, text).split(b"\n")]
    return b"\n".join(line for line in stripped if line or lines).rstrip(b"\n")


def content_hash(*, emulated: bool) -> str:
    """Hash of every file a build can read, headers included, so that no edit goes unnoticed."""
    roots = [csrc_dir()]
    if emulated:
        roots += [simt_dir() / "include", simt_dir() / "torch"]
    files = {path for root in roots for path in root.rglob("*") if path.suffix in _SOURCE_SUFFIXES}
    if emulated:
        files |= set(simt_dir().glob("*.cpp")) | set(simt_dir().glob("*.h"))
    return _hash({path: path.read_bytes() for path in files}, lines=emulated)


def closure_hash(sources: list[Path], include_dirs: list[Path], *, lines: bool) -> str:
    """Hash of the sources and of all our headers that they reach through quoted includes.

    Takes too many (those inside #if 0 as well), which is the safe side for reusing objects.
    """
    seen: dict[Path, bytes] = {}
    pending = [source.resolve() for source in sources]
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
    return _hash(seen, lines=lines)


def _hash(texts: dict[Path, bytes], *, lines: bool) -> str:
    digest = hashlib.sha256()
    for path in sorted(texts):
        text = compiled_text(texts[path], lines=lines)
        digest.update(path.name.encode() + b"\0" + text + b"\0")
    return digest.hexdigest()


def path_maps() -> list[str]:
    """Flags by which a compiled file says csrc/plan/plan.cpp or simt/engine.h of itself.

    The same file of two checkouts then compiles to the same object, and either may use it.
    """
    return [f"-ffile-prefix-map={folder.parent}/=" for folder in (csrc_dir(), simt_dir())]
