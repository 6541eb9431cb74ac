"""The build cache in one file, for a later visit's `--build FILE`: no second compilation.

    python -m bench.visit.save_build --out FOLDER      writes FOLDER/build.tar.gz

The objects go along where they fit: after a change of one file the others are not compiled again.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from batchnorm_cuda import _build

from .folder import MOST_BYTES

NAME = "build.tar.gz"


def contents(cache: Path, objects: bool) -> list[Path]:
    """The modules and what their folders record, and if wanted the objects of which they are."""
    modules = [path.parent for path in sorted(cache.glob("*/*.so")) if not path.is_symlink()]
    files = [path for folder in dict.fromkeys(modules) for path in sorted(folder.iterdir())]
    files = [path for path in files if path.suffix != ".o"]
    return files + (sorted(cache.glob("objects/*.o")) if objects else [])


def pack(cache: Path, target: Path, files: Sequence[Path], most: int) -> bool:
    """Whether it fits; what does not is not left behind."""
    with tarfile.open(target, "w:gz", compresslevel=6) as archive:
        for file in files:
            archive.add(file, file.relative_to(cache))
    if target.stat().st_size < most:
        return True
    target.unlink()
    return False


def unpack(archive: Path, cache: Path) -> int:
    """How many files were unpacked. A file that is no archive, or names others, is an error."""
    cache.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as file:
        file.extractall(cache, filter="data")
        return len(file.getnames())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.visit.save_build", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    cache, target = _build.cache_dir(), parser.parse_args().out / NAME
    if not contents(cache, objects=False):
        print(f"nothing is built in {cache}")
        return 2
    for objects in (True, False):
        files = contents(cache, objects)
        if pack(cache, target, files, MOST_BYTES):
            kind = "with" if objects else "without"
            print(f"{len(files)} files, {kind} objects: {target.stat().st_size / 1e6:.1f} MB")
            return 0
    print(f"the build takes {MOST_BYTES >> 20} MiB and more, compressed: not kept")
    return 1


if __name__ == "__main__":
    sys.exit(main())
