"""Lists of GPU architectures as torch writes them ("8.0;9.0+PTX"): defaults, parsing, coverage.

Standard library only, and no imports from the package: setup.py loads this file by its path.
"""

from __future__ import annotations

import re
from collections.abc import Collection

# One per generation that PyTorch's own CUDA 13 wheels carry, so that an ahead-of-time build on a
# machine without a GPU runs natively on all of them; what nvcc cannot generate is left out.
DEFAULT = ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0")

# The names that torch takes, old ones too: whether nvcc still knows them is for nvcc to say.
_NAMED = {
    "Kepler": ("3.5",),
    "Kepler+Tesla": ("3.7",),
    "Maxwell": ("5.0", "5.2"),
    "Maxwell+Tegra": ("5.3",),
    "Pascal": ("6.0", "6.1"),
    "Volta": ("7.0",),
    "Volta+Tegra": ("7.2",),
    "Turing": ("7.5",),
    "Ampere": ("8.0", "8.6"),
    "Ampere+Tegra": ("8.7",),
    "Ada": ("8.9",),
    "Hopper": ("9.0",),
    "Blackwell": ("10.0", "10.3", "12.0", "12.1"),
    "Blackwell+Tegra": ("11.0",),
    "Rubin": ("10.7",),
}


def parse(text: str, codes: Collection[str] = ()) -> list[str]:
    """TORCH_CUDA_ARCH_LIST as a list: "8.0", "9.0a", "9.0+PTX"; ValueError names a bad entry.

    Of a name's several architectures those are left out that are not among `codes`, since a name
    means more to a newer torch than to an older nvcc.
    """
    archs: list[str] = []
    for entry in re.split(r"[;,\s]+", text.strip()):
        name = entry.removesuffix("+PTX")
        named = _NAMED.get(name, (name,))
        if not re.fullmatch(r"\d+\.\d[af]?", named[0]):
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST={text!r}: {entry!r} is no architecture; "
                'expected entries such as "8.0", "9.0+PTX" or "Hopper", separated by ";"'
            )
        expanded = [arch for arch in named if arch in codes] or list(named)
        archs += [*expanded[:-1], expanded[-1] + entry[len(name) :]]
    return list(dict.fromkeys(archs))


def capability(arch: str) -> tuple[int, int]:
    """(9, 0) of "9.0", "9.0a" and "9.0+PTX"."""
    major, minor = arch.split("+")[0].rstrip("af").split(".")
    return int(major), int(minor)


def with_newest_ptx(archs: list[str]) -> list[str]:
    """The list in order, with PTX for the newest entry, from which later GPUs' drivers compile."""
    ordered = sorted(archs, key=capability)
    if not ordered[-1].endswith("+PTX"):
        ordered[-1] += "+PTX"
    return ordered


def select(explicit: str | None, visible: list[tuple[int, int]], codes: list[str]) -> list[str]:
    """What to compile for: the explicit list, else the GPUs present, else DEFAULT.

    `codes` is what nvcc can generate. A GPU that it does not know gets the next older one's code
    and PTX; one older than all of them gets nothing, and is named when it is used.
    """
    if explicit:
        return with_newest_ptx(parse(explicit, codes))
    known = sorted({capability(code) for code in codes})
    present = {max(code for code in known if code <= gpu) for gpu in visible if gpu >= known[0]}
    wanted = present or {capability(arch) for arch in DEFAULT} & set(known) or {known[-1]}
    return with_newest_ptx([f"{major}.{minor}" for major, minor in sorted(wanted)])


def covers(archs: list[str], gpu: tuple[int, int]) -> bool:
    """Whether a GPU runs a build: binary code of its own major version, or any older PTX."""
    for arch in archs:
        built = capability(arch)
        specific = arch.split("+")[0][-1] in "af"  # "9.0a" runs on 9.0 only
        if arch.endswith("+PTX") and not specific and built <= gpu:
            return True
        if built == gpu or (not specific and built[0] == gpu[0] and built[1] <= gpu[1]):
            return True
    return False


def gencode(archs: list[str]) -> list[str]:
    """nvcc's flags for the list."""
    flags = []
    for arch in archs:
        number = arch.split("+")[0].replace(".", "")
        codes = [f"sm_{number}"] + ([f"compute_{number}"] if arch.endswith("+PTX") else [])
        flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    return flags
