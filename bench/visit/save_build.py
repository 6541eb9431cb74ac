"""The build cache as a file, for a later visit's `--build FILE`: no second compilation.

    python -m bench.visit.save_build --out FOLDER   writes build.tar.gz, or build.tar.gz.0 and .1

The objects go along where they fit: after a change of one file the others are not compiled again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from batchnorm_cuda._build.builder import cache_dir
from batchnorm_cuda._build.compile import BuildError, Recipe
from batchnorm_cuda._build.recipes import AnyRecipe, all_cuda_recipes, emulated_recipe
from batchnorm_cuda._build.toolkit import ToolkitError

from .folder import MOST_BYTES
from .parts import NOTHING_TO_RUN_ON

NAME = "build.tar.gz"
_MOST_PIECES = 2  # other files are to come back, too


def contents(cache: Path, recipes: Sequence[AnyRecipe], objects: bool) -> list[Path]:
    """The modules and what their folders record, and if wanted the objects they are made of."""
    files: list[Path] = []
    for recipe in recipes:
        files += sorted(path for path in (cache / recipe.folder).glob("*") if path.suffix != ".o")
        if objects:
            files += objects_of(recipe, cache)
            files += objects_of(recipe.kernels, cache) if isinstance(recipe, Recipe) else []
    return [path for path in files if path.is_file() and not path.is_symlink()]


def objects_of(recipe: AnyRecipe | None, cache: Path) -> list[Path]:
    sources = recipe.sources if recipe else []
    return [cache / "objects" / recipe.object_name(path) for path in sources]


def find_recipes(cache: Path) -> list[AnyRecipe]:
    """Of what is built: for the GPU, else for the host."""
    for make in (all_cuda_recipes, lambda: [emulated_recipe()]):
        with contextlib.suppress(ToolkitError, BuildError):  # no nvcc, no torch for it
            recipes = make()
            if all((cache / recipe.folder).is_dir() for recipe in recipes):
                return recipes
    return []


def pack(cache: Path, out: Path, files: Sequence[Path], most: int = MOST_BYTES - 1) -> list[Path]:
    """One archive, cut into files of `most` bytes; none if there would be too many of them."""
    with tempfile.TemporaryDirectory() as folder:  # none is there by half, also after a kill
        whole = Path(folder) / NAME
        with tarfile.open(whole, "w:gz", compresslevel=6) as archive:
            for file in files:
                archive.add(file, file.relative_to(cache))
        data = whole.read_bytes()
        pieces = [data[at : at + most] for at in range(0, len(data), most)]
        if len(pieces) > _MOST_PIECES:
            return []
        ends = [""] if len(pieces) == 1 else [f".{n}" for n in range(len(pieces))]
        written = []
        for end, piece in zip(ends, pieces, strict=True):
            (Path(folder) / f"piece{end}").write_bytes(piece)
            written.append(Path(shutil.move(Path(folder) / f"piece{end}", out / f"{NAME}{end}")))
        return written


def unpack(pieces: Sequence[Path], cache: Path) -> None:
    """ValueError for what is no whole archive, or names a file elsewhere."""
    data = b"".join(path.read_bytes() for path in sorted(pieces))
    cache.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            archive.extractall(cache, filter="data")
    except (EOFError, tarfile.TarError, zlib.error) as error:
        names = ", ".join(str(path) for path in pieces)
        raise ValueError(f"expected --build to be all of {NAME}, got {names}: {error}") from None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.visit.save_build", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    cache, out = cache_dir(), parser.parse_args().out
    recipes = find_recipes(cache)
    if not recipes:
        print(f"nothing is built in {cache}")
        return NOTHING_TO_RUN_ON
    for objects in (True, False):
        files = contents(cache, recipes, objects)
        written = pack(cache, out, files)
        if written:
            kind = "with" if objects else "without"
            size = sum(path.stat().st_size for path in written) / 1e6
            names = ", ".join(path.name for path in written)
            print(
                f"{recipes[0].folder}: {len(files)} files, {kind} objects, {size:.1f} MB in {names}"
            )
            return 0
    print(f"{recipes[0].folder} is too large to be kept, even compressed")
    return NOTHING_TO_RUN_ON


if __name__ == "__main__":
    sys.exit(main())
