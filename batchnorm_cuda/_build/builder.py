"""The cache of compiled extensions: each configuration is compiled once, by one process.

One `flock` per configuration serialises the builders: the kernel drops it when its holder dies, so
a killed build blocks nobody. Each build runs in a fresh folder and is renamed into place when it
has been compiled and linked; a folder with its final name and a module is therefore always
complete. Nothing is loaded or linked from folders that others can write (see trust.py).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from . import trust
from .compile import BuildError, Recipe, touch
from .jobs import compile_jobs
from .kernels import KernelRecipe, compile_objects

KERNELS = "kernels"  # where compilers of all tables work
_KEEP_SECONDS = 30 * 24 * 3600
_ELSEWHERE = "set BATCHNORM_CUDA_CACHE_DIR to a folder"
_DISK_FULL = f"free room there and in the temporary folder (TMPDIR), or {_ELSEWHERE} with room"
_NO_LOCKS = f"its file system has no locks; {_ELSEWHERE} on a local disk"
_CURES = {
    errno.ENOSPC: _DISK_FULL,
    errno.EDQUOT: _DISK_FULL,
    errno.ENOLCK: _NO_LOCKS,
    errno.EOPNOTSUPP: _NO_LOCKS,
    errno.ENOSYS: _NO_LOCKS,
    errno.EXDEV: f"a cache must lie on one file system; {_ELSEWHERE} that does",
}


def cache_dir() -> Path:
    """BATCHNORM_CUDA_CACHE_DIR, or batchnorm_cuda under the user's cache folder."""
    explicit = os.environ.get("BATCHNORM_CUDA_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    chosen = Path(explicit or f"{base}/batchnorm_cuda")
    try:
        expanded = chosen.expanduser()
    except RuntimeError as error:
        raise BuildError(
            f"the build cache {chosen} has no place: this user ({os.geteuid()}) has no home "
            f"folder; set HOME, or {_ELSEWHERE} that can be written"
        ) from error
    return Path(os.path.abspath(expanded))  # symbolic links stay: they are to be looked at


@contextlib.contextmanager
def lock(path: Path, say_waiting: str | None) -> Iterator[None]:
    """Hold `path` exclusively; without words to wait with, BlockingIOError if another holds it.

    The lock lives in the kernel, not in the file's existence.
    """
    import fcntl

    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if say_waiting is None:
                raise
            say(say_waiting)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def say(text: str) -> None:
    """One line of progress. On stderr, so that a program's own output stays clean."""
    print(f"batchnorm_cuda: {text}", file=sys.stderr, flush=True)


def build(recipe: Recipe | KernelRecipe) -> Path:
    """Path of the shared object, from the cache or freshly built, and safe to load."""
    root = cache_dir()
    final = root / recipe.folder
    module = _module_of(recipe, root)
    with _faults_named(root):
        if not touch(module):
            trust.make_private(root)
            with lock(_lock_of(final), f"waiting for another process: {recipe.label}"):
                if not module.exists():
                    _build_into(recipe, final)
                    _prune(root, final)
        trust.require_trusted(module)
    return module


def build_kernels(recipes: list[KernelRecipe]) -> list[Path]:
    """As `build` for each, but all compilers run side by side; what ninja says is in KERNELS."""
    root = cache_dir()
    with _faults_named(root):
        missing = [each for each in recipes if not _module_of(each, root).exists()]
    if missing:
        build_objects(missing)
    return [build(recipe) for recipe in recipes]


def build_objects(recipes: list[KernelRecipe]) -> dict[Path, Path]:
    """The compiled objects of all kernels, by source."""
    root = cache_dir()
    with _faults_named(root):
        folder = _objects_to_link(root)
        objects = {
            source: folder / recipe.object_name(source)
            for recipe in recipes
            for source in recipe.sources
        }
        if all([touch(path) for path in objects.values()]):
            return objects
        with lock(_lock_of(root / KERNELS), "waiting for another process: all kernels"):
            _set_aside(root / KERNELS)
            trust.make_private(root / KERNELS)
            jobs = compile_jobs(recipes[0].job_bytes)
            names = ", ".join(recipe.name for recipe in recipes)
            say(f"compiling {names} in {folder} with {jobs} job(s); this takes minutes, once")
            compile_objects(recipes, root / KERNELS, folder, jobs)
    return objects


def _set_aside(folder: Path) -> None:
    """Compilers whose parents were killed may still write into the folder of an earlier build."""
    if folder.exists():
        aside = folder.rename(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
        shutil.rmtree(aside, ignore_errors=True)


def _module_of(recipe: Recipe | KernelRecipe, root: Path) -> Path:
    return root / recipe.folder / f"{recipe.name}.so"


def _objects_to_link(root: Path) -> Path:
    """The folder of the cache's objects, which are all trusted."""
    objects = root / "objects"
    trust.make_private(objects)
    trust.require_trusted_folder(objects)
    if objects.stat().st_dev != root.stat().st_dev:  # to rename to it would copy: half, if killed
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(objects))
    return objects


@contextlib.contextmanager
def _faults_named(root: Path) -> Iterator[None]:
    """Says of what the machine refuses where that was, and what mends it."""
    try:
        yield
    except trust.UntrustedError as error:
        raise BuildError(str(error)) from error
    except OSError as error:
        cure = _CURES.get(error.errno, f"{_ELSEWHERE} that can be written")
        raise BuildError(f"cannot use the build cache {root} ({error}): {cure}") from error
    except BuildError as error:  # the compilers meet a full disk first
        if not any(os.strerror(full) in str(error) for full in (errno.ENOSPC, errno.EDQUOT)):
            raise
        raise BuildError(f"{error}\nThe disk of {root} is full: {_DISK_FULL}") from error


def _lock_of(final: Path) -> Path:
    return final.with_name(f"{final.name}.lock")


def _build_into(recipe: Recipe | KernelRecipe, final: Path) -> None:
    """Compile into a folder of its own, and rename it. The caller holds the lock."""
    root = final.parent
    objects = _objects_to_link(root)
    jobs = compile_jobs(recipe.job_bytes)
    for stale in root.glob(f"{recipe.folder}.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f"{recipe.folder}.tmp-", dir=root))
    say(f"compiling {recipe.label} in {final} with {jobs} job(s); this takes minutes, once")
    start = time.monotonic()
    try:
        recipe.compile(work, objects, jobs)
        (work / "build.json").write_text(json.dumps(recipe.key, indent=2))
        if final.exists():  # without its module, by a pruning or an rm that was killed
            shutil.rmtree(final)
        work.rename(final)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(f"compiled {recipe.label} in {time.monotonic() - start:.0f} s")


def _prune(root: Path, built: Path) -> None:
    """Drop what nothing has used for long, and what killed builds left; never what was just built.

    A loaded module stays mapped. Ages are differences within one clock, the file system's.
    """
    built.touch()
    now = built.stat().st_mtime
    builds = {path.parent for path in root.glob("*/*.so") if ".tmp-" not in path.parent.name}
    builds -= {built, root / "objects"}
    for entry in (*root.glob("objects/*"), *root.glob("*.log"), *builds):
        with contextlib.suppress(OSError):  # another process may be pruning, too
            _drop_if_unused(entry, now)
    for work in root.glob("*.tmp-*"):
        with contextlib.suppress(OSError), lock(root / f"{work.name.split('.tmp-')[0]}.lock", None):
            shutil.rmtree(work, ignore_errors=True)


def _drop_if_unused(entry: Path, now: float) -> None:
    """A file, or a build by the youngest of its modules."""
    files = [*entry.glob("*.so")] or [entry]
    used = max(file.stat().st_mtime for file in files)
    if used > now:  # from before the clock was set back: counts from now
        for file in files:
            os.utime(file, (now, now))
    elif now - used > _KEEP_SECONDS and entry.is_dir():
        # Renamed first: a folder of its final name holds all or nothing.
        entry.rename(entry.with_name(f"{entry.name}.tmp-pruned"))
    elif now - used > _KEEP_SECONDS:
        entry.unlink()
