"""Compiles the extension, or takes it from the cache, and imports it.

    python -m bench.visit.build cuda|emulated

Says what the compilers took, file by file. With no flags of its own: what is measured is what users
get, and nvcc makes other machine code with --split-compile.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from batchnorm_cuda._build import builder, extension

KINDS = ("cuda", "emulated")


def compile_seconds(log: Path) -> dict[str, float]:
    """Of every object, by its name, from ninja's log."""
    lines = log.read_text().splitlines() if log.exists() else []
    rows = [line.split("\t") for line in lines if line.count("\t") >= 4]
    return {Path(row[3]).name: (int(row[1]) - int(row[0])) / 1000 for row in rows}


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in KINDS:
        print(f"expected one of {', '.join(KINDS)}, got {' '.join(arguments) or 'nothing'}")
        return 3
    started = time.monotonic()
    if arguments[0] == "cuda":
        module = extension.load_cuda()
        extension.build_kernels()
    else:
        module = extension.load_emulated()
    took = time.monotonic() - started
    folders = (Path(str(module.__file__)).parent, builder.cache_dir() / builder.KERNELS)
    seconds = compile_seconds(folders[0] / ".ninja_log") | compile_seconds(
        folders[1] / ".ninja_log"
    )
    for name, value in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"{value:7.1f} s  {name}")
    for name, value in extension.build_info()["loaded"][arguments[0]].items():
        print(f"{name}: {value}")
    compiled = f", {len(seconds)} files in {sum(seconds.values()):.0f} s of compilers"
    longest = f", the longest {max(seconds.values()):.0f} s" if seconds else ""
    print(f"{arguments[0]}: loaded after {took:.0f} s{compiled if seconds else ''}{longest}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
