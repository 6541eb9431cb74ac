"""The cache of compiled extensions: each configuration is compiled once, by one process.

One `flock` per configuration serialises the builders: the kernel drops it when its holder dies, so
a killed build blocks nobody. Each build runs in a fresh folder and is renamed into place when it
has been compiled, linked and imported; a folder with its final name is therefore always complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from . import _jobs
from ._compile import BuildError, Recipe, touch
from ._nvcc import KernelRecipe, compile_objects

KERNELS = "kernels"  # where compilers of all tables work
_KEEP_SECONDS = 30 * 24 * 3600


def cache_dir() -> Path:
    """BATCHNORM_CUDA_CACHE_DIR, or batchnorm_cuda under the user's cache folder."""
    explicit = os.environ.get("BATCHNORM_CUDA_CACHE_DIR")
    if explicit:
        return Path(explicit).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().resolve() / "batchnorm_cuda"


@contextlib.contextmanager
def lock(path: Path, say_waiting: str) -> Iterator[None]:
    """Hold `path` exclusively. The lock lives in the kernel, not in the file's existence."""
    import fcntl

    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(say_waiting)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def say(text: str) -> None:
    """One line of progress. On stderr, so that a program's own output stays clean."""
    print(f"batchnorm_cuda: {text}", file=sys.stderr, flush=True)


def build(recipe: Recipe | KernelRecipe) -> Path:
    """Path of the shared object, from the cache or freshly built."""
    final = cache_dir() / recipe.folder
    module = final / f"{recipe.name}.so"
    if touch(module):
        return module
    with lock(_lock_file(final), f"waiting for another process: {recipe.label}"):
        if not module.exists():
            _build_into(recipe, final)
            _prune(final.parent)
    return module


def build_kernels(recipes: list[KernelRecipe]) -> list[Path]:
    """As `build` for each, but all compilers run side by side; what ninja says is in KERNELS."""
    root = cache_dir()
    missing = [each for each in recipes if not (root / each.folder / f"{each.name}.so").exists()]
    if missing:
        build_objects(missing)
    return [build(recipe) for recipe in recipes]


def build_objects(recipes: list[KernelRecipe]) -> dict[Path, Path]:
    """The compiled objects of all kernels, by source."""
    root = cache_dir()
    objects = {
        source: root / "objects" / recipe.object_name(source)
        for recipe in recipes
        for source in recipe.sources
    }
    if all([touch(path) for path in objects.values()]):
        return objects
    with lock(_lock_file(root / KERNELS), "waiting for another process: all kernels"):
        (root / KERNELS).mkdir(exist_ok=True)
        jobs = _jobs.compile_jobs(recipes[0].job_bytes)
        say(f"compiling kernels for {recipes[0].key['archs']} with {jobs} job(s)")
        compile_objects(recipes, root / KERNELS, root / "objects", jobs)
    return objects


def _lock_file(final: Path) -> Path:
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        path = final.with_name(f"{final.name}.lock")
        path.touch()
    except OSError as error:
        raise BuildError(
            f"cannot write to the build cache {final.parent} ({error}): "
            "set BATCHNORM_CUDA_CACHE_DIR to a folder that can be written"
        ) from error
    return path


def _prune(root: Path) -> None:
    """Drop objects and builds that nothing has used for long; a loaded module stays mapped."""
    oldest = time.time() - _KEEP_SECONDS
    for path in (*root.glob("objects/*.o"), *root.glob("*/*.so")):
        with contextlib.suppress(OSError):  # another process may be pruning, too
            if path.stat().st_mtime < oldest:
                path.unlink() if path.suffix == ".o" else shutil.rmtree(path.parent)


def _build_into(recipe: Recipe | KernelRecipe, final: Path) -> None:
    root = final.parent
    for stale in root.glob(f"{recipe.folder}.tmp-*"):  # ours alone: we hold the lock
        shutil.rmtree(stale, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f"{recipe.folder}.tmp-", dir=root))
    jobs = _jobs.compile_jobs(recipe.job_bytes)
    say(f"compiling {recipe.label} in {final} with {jobs} job(s); this takes minutes, once")
    start = time.monotonic()
    try:
        recipe.compile(work, root / "objects", jobs)
        (work / "build.json").write_text(json.dumps(recipe.key, indent=2))
        work.rename(final)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(f"compiled {recipe.label} in {time.monotonic() - start:.0f} s")
