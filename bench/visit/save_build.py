"""The build cache in one file, for a later visit's `--build FILE`: no second compilation.

    python -m bench.visit.save_build --out FOLDER      writes FOLDER/build.tar.gz

The objects go along where they fit: after a change of one file the others are not compiled again.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from batchnorm_cuda import _build, _recipes
from batchnorm_cuda._compile import BuildError, Recipe
from batchnorm_cuda._toolkit import ToolkitError

from .folder import MOST_BYTES
from .parts import NOTHING_TO_RUN_ON

NAME = "build.tar.gz"


def contents(cache: Path, recipe: Recipe, objects: bool) -> list[Path]:
    """The module and what its folder records, and if wanted the objects of which it is made."""
    files = sorted(path for path in (cache / recipe.folder).glob("*") if path.suffix != ".o")
    if objects:
        files += [cache / "objects" / recipe.object_name(path) for path in recipe.all_sources]
    return [path for path in files if path.is_file() and not path.is_symlink()]


def find_recipe(cache: Path) -> Recipe | None:
    """Of what is built: for the GPU, else for the host."""
    for make in (_recipes.cuda_recipe, _recipes.emulated_recipe):
        with contextlib.suppress(ToolkitError, BuildError):  # no nvcc, no torch for it
            recipe = make()
            if (cache / recipe.folder).is_dir():
                return recipe
    return None


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
    recipe = find_recipe(cache)
    if recipe is None:
        print(f"nothing is built in {cache}")
        return NOTHING_TO_RUN_ON
    for objects in (True, False):
        files = contents(cache, recipe, objects)
        if pack(cache, target, files, MOST_BYTES):
            kind = "with" if objects else "without"
            size = target.stat().st_size / 1e6
            print(f"{recipe.folder}: {len(files)} files, {kind} objects, {size:.1f} MB")
            return 0
    print(f"{recipe.folder} takes {MOST_BYTES >> 20} MiB and more, compressed: not kept")
    return NOTHING_TO_RUN_ON


if __name__ == "__main__":
    sys.exit(main())
