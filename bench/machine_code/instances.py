"""Which kernel instances a compiled extension holds, and what a profiler calls them."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..toolkit import ToolkitError, find_tool, resolve
from .kernels import demangle, shorten

_KERNEL = re.compile(r"^\w+_kernel(<|$)")
_SECONDS = 120


def short_names(names: Iterable[str]) -> set[str]:
    """Of our kernels among `names`, mangled or not, as both sides are compared."""
    names = list(names)
    mangled = [name for name in names if name.startswith("_Z")]
    plain = [name for name in names if not name.startswith("_Z")]
    if mangled:
        plain += demangle(mangled).values()
    return {short for short in map(shorten, plain) if _KERNEL.match(short)}


def compiled(libraries: Sequence[str | Path]) -> tuple[set[str], str]:
    """Names of the kernels in the libraries, and the tool that listed them.

    Device code is what counts, which cuobjdump reads. Without it, and for the host model, the
    symbols of the host's side are read: every kernel has one there.
    """
    with contextlib.suppress(ToolkitError):
        tool = find_cuobjdump()
        found = short_names(
            name
            for library in libraries
            for name in device_functions(_output([tool, "-res-usage", library]))
        )
        if found:
            return found, "cuobjdump"
    tool = shutil.which("nm")
    if tool is None:
        return set(), "neither cuobjdump nor nm is here"
    return short_names(host_symbols(_output([tool, *libraries]))), "nm"


def per_architecture(library: Path) -> dict[str, set[str]]:
    """Short names of our kernels by architecture ("9.0"), as cuobjdump reads the machine code.

    Raises ToolkitError where there is no cuobjdump.
    """
    tool = find_cuobjdump()
    found: dict[str, set[str]] = {}
    for part in _output([tool, "-res-usage", library]).split("Fatbin elf code:")[1:]:
        arch = re.search(r"^arch = sm_(\d+)(\d)", part, flags=re.MULTILINE)
        if arch is not None:
            names = short_names(device_functions(part))
            found.setdefault(".".join(arch.groups()), set()).update(names)
    return found


def device_functions(text: str) -> list[str]:
    """Mangled names out of `cuobjdump -res-usage`: "Function NAME:", a line each."""
    return re.findall(r"^\s*Function\s+([^\s:]+):", text, flags=re.MULTILINE)


def host_symbols(text: str) -> list[str]:
    """Mangled names of functions out of `nm`, without the stubs that launch them."""
    found = re.findall(r"^[0-9a-f]+ [tTwW] (_Z\S*_kernel\S*)$", text, flags=re.MULTILINE)
    return [name for name in found if "__device_stub__" not in name]


def find_cuobjdump() -> Path:
    """Of whatever toolkit is here, or from elsewhere. Raises ToolkitError."""
    home = None
    with contextlib.suppress(ToolkitError):
        home = resolve().home
    return find_tool("cuobjdump", home)


def _output(command: list[str | Path]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
