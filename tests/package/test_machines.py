"""The build cache on machines that people have: what fails there is mended, or named in words."""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_toolkit import write_program
from toy import VALUE, fork, toy_recipe, wait_for

import batchnorm_cuda
from batchnorm_cuda._build import ahead_of_time, builder, extension, recipes, trust
from batchnorm_cuda._build.compile import BuildError, Recipe, touch

DAY = 24 * 3600


class Compiler:
    """Stands for the compilers, and counts what they were asked for."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.builds = 0

    def replace(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Recipe, "compile", lambda *arguments: self(*arguments))

    def __call__(self, recipe: Recipe, work: Path, objects: Path, jobs: int) -> None:
        self.builds += 1
        for source in recipe.sources:
            stored = objects / recipe.object_name(source)
            if not touch(stored):
                self.compiled.append(source.name)
                stored.write_text("object")
        (work / f"{recipe.name}.so").write_text("module")


@pytest.fixture
def compiler(toy: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    stand_in = Compiler()
    stand_in.replace(monkeypatch)
    return stand_in


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"  # as the toy's fixture sets it


def refuse(number: int) -> Callable:
    def refusing(*arguments, **options):
        raise OSError(number, os.strerror(number))

    return refusing


def test_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HOME", "XDG_CACHE_HOME", "BATCHNORM_CUDA_CACHE_DIR"):
        monkeypatch.delenv(variable, raising=False)

    def unknown(user: int):
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(BuildError, match="no home folder; set HOME, or set BATCHNORM_CUDA_CACHE"):
        builder.cache_dir()
    assert batchnorm_cuda.build_info()["cache_dir"] is None


@pytest.mark.parametrize("record", ['{"torch": "2.1', ""])
def test_record_of_half_an_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: str
) -> None:
    (tmp_path / "_aot.json").write_text(record)
    monkeypatch.setattr(extension, "_AOT_RECORD", tmp_path / "_aot.json")
    assert batchnorm_cuda.build_info()["ahead_of_time"] is None


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_system_without_locks(
    toy: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", refuse(number))
    with pytest.raises(BuildError, match=r"has no locks; set BATCHNORM_CUDA_CACHE_DIR .* local"):
        builder.build(toy_recipe(toy))


@pytest.mark.parametrize("step", ["mkdtemp", "compile", "rename"])
@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, r"free room .*TMPDIR.* or set BATCHNORM_CUDA_CACHE_DIR"),
        (errno.EDQUOT, r"free room .*TMPDIR.* or set BATCHNORM_CUDA_CACHE_DIR"),
        (errno.EROFS, r"set BATCHNORM_CUDA_CACHE_DIR to a folder that can be written"),
    ],
)
def test_disk_that_is_full_or_read_only(
    toy: Path, compiler: Compiler, cache: Path, monkeypatch, step: str, number: int, said: str
) -> None:
    recipe = toy_recipe(toy)
    with monkeypatch.context() as faulty:
        owner = {"mkdtemp": builder.tempfile, "rename": os}.get(step, Recipe)
        faulty.setattr(owner, step, refuse(number))
        with pytest.raises(BuildError, match=f"cannot use the build cache {cache} .*{said}"):
            builder.build(recipe)
    assert not list(cache.glob("*.tmp-*"))
    assert builder.build(recipe).exists()


def test_compiler_that_meets_a_full_disk(
    toy: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_on_a_full_disk(*_) -> None:
        raise BuildError("cc1plus: fatal error: error writing to a.s: No space left on device")

    monkeypatch.setattr(Recipe, "compile", compile_on_a_full_disk)
    with pytest.raises(BuildError, match=r"error writing to a\.s.*\n.*is full: free room .*TMPDIR"):
        builder.build(toy_recipe(toy))


def test_cache_of_two_file_systems(
    toy: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "rename", refuse(errno.EXDEV))
    with pytest.raises(BuildError, match="must lie on one file system; set BATCHNORM_CUDA_CACHE"):
        builder.build(toy_recipe(toy))


SHARED_MEMORY = Path("/dev/shm")  # often a file system of its own
HAS_SHARED_MEMORY = SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK)


@pytest.mark.skipif(not HAS_SHARED_MEMORY, reason="no /dev/shm")
def test_objects_on_another_file_system(toy: Path, cache: Path, compiler: Compiler) -> None:
    """Said before anything is compiled: a move there could be cut in half."""
    trust.make_private(cache)
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as elsewhere:
        (cache / "objects").symlink_to(elsewhere)
        if os.stat(elsewhere).st_dev == cache.stat().st_dev:
            pytest.skip("/dev/shm is no other file system")
        with pytest.raises(BuildError, match=r"objects'\): a cache must lie on one file system"):
            builder.build(toy_recipe(toy))
    assert compiler.builds == 0


def test_another_file_system_for_scratch_and_a_clock_that_was_set_back(
    toy: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, compiled
) -> None:
    """Also: a umask that hides nothing, and a package that must not be written."""
    if HAS_SHARED_MEMORY:
        monkeypatch.setenv("TMPDIR", str(SHARED_MEMORY))
    future = time.time() + 1000 * DAY
    for path, when in zip(sorted(toy.iterdir()), (future, 0, future), strict=True):
        os.utime(path, (when, when))
    package = Path(batchnorm_cuda.__file__).parent
    before = {path: path.stat().st_mtime_ns for path in package.rglob("*")}
    umask = os.umask(0)
    try:
        module = builder.build(toy_recipe(toy))
    finally:
        os.umask(umask)
    assert compiled() == ["toy.cpp", "toy_value.cpp"]
    after = {path: path.stat().st_mtime_ns for path in package.rglob("*")}
    assert {path for path, when in after.items() if before.get(path) != when} == set()
    for path in (cache, cache / "objects", module.parent, module, *cache.glob("objects/*")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_installation_ahead_of_time(
    toy: Path, tmp_path: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are for all users, other than the cache's; nonsense ends without a traceback."""
    recipe = toy_recipe(toy)
    recipe.key["cuda"] = "13.0"
    monkeypatch.setattr(recipes, "all_cuda_recipes", lambda **_: [recipe])
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(SystemExit, match="BATCHNORM_CUDA_AOT=1: MAX_JOBS='many'"):
        ahead_of_time.build_into(tmp_path / "site", "_C.so", ["8.0"])
    monkeypatch.delenv("MAX_JOBS")
    built = builder.build(recipe)
    built.chmod(0o700)
    ahead_of_time.build_into(tmp_path / "site", "_C.so", ["8.0"])
    umask = os.umask(0o022)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "site" / "_C.so").stat().st_mode) == 0o666 & ~umask


def set_age(path: Path, days: float) -> None:
    when = time.time() - days * DAY
    os.utime(path, (when, when))


def build_value(toy: Path, value: int, days: float = 0) -> Path:
    """A build with other sources than the one before, last used some days ago."""
    (toy / "toy_value.cpp").write_text(VALUE.replace("42", str(value)))
    module = builder.build(toy_recipe(toy))
    set_age(module, days)
    return module


def test_pruning_takes_what_is_old_alone(toy: Path, cache: Path, compiler: Compiler) -> None:
    old = build_value(toy, 1, days=31)
    used = build_value(toy, 2, days=29)
    ahead = build_value(toy, 3, days=-400)  # before the clock was set back
    set_age(shutil.copy(used, used.parent / "another.so"), 31)  # of the same build
    for path in (stale := cache / "objects" / "old.o", failed := cache / "old.log"):
        path.touch()
        set_age(path, 31)
    build_value(toy, 4)
    assert not any(path.exists() for path in (old, old.parent, stale, failed))
    assert used.exists() and ahead.exists()
    assert abs(ahead.stat().st_mtime - time.time()) < DAY  # so that it will be old one day
    assert not list(cache.glob("*.tmp-*"))


def test_clock_that_jumps_during_a_build(
    toy: Path, cache: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine starts in 1970 and learns the time: what is built, here and beside, stays."""

    def compile_in_1970(recipe: Recipe, work: Path, *rest) -> None:
        compiler(recipe, work, *rest)
        set_age(work / "toy.so", 20000)

    monkeypatch.setattr(Recipe, "compile", compile_in_1970)
    beside = cache / "other.tmp-1" / "other.so"
    trust.make_private(beside.parent)
    beside.touch()
    set_age(beside, 20000)
    with builder.lock(cache / "other.lock", "no words"):
        assert builder.build(toy_recipe(toy)).exists()
        assert beside.exists()


def test_two_versions_of_torch_take_turns(toy: Path, cache: Path, compiler: Compiler) -> None:
    """Neither evicts the other, whatever is built in between; each is compiled once."""

    def build(version: str) -> Path:
        recipe = toy_recipe(toy)
        return builder.build(Recipe("toy", "a toy", recipe.sources, {"torch": version}, 1 << 20))

    modules = {version: build(version) for version in ("2.11.0", "2.14.1")}
    for value in range(3):
        for module in modules.values():
            set_age(module, 31)
        assert {version: build(version) for version in modules} == modules  # used, hence kept
        build_value(toy, value)
        assert {version: build(version) for version in modules} == modules
    assert len(set(modules.values())) == 2
    assert compiler.builds == 2 + 3


def kill_oneself(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_before(function: Callable) -> Callable:
    return kill_oneself


def die_after(function: Callable) -> Callable:
    def die(*arguments, **options) -> None:
        function(*arguments, **options)
        kill_oneself()

    return die


def die_before_clearing(function: Callable) -> Callable:
    def die(path: Path, **options) -> None:
        if "pruned" in path.name:
            kill_oneself()
        function(path, **options)

    return die


MOMENTS = {
    "before the folder of the build": (builder.tempfile, "mkdtemp", die_before),
    "after it": (builder.tempfile, "mkdtemp", die_after),
    "after compiling": (Recipe, "compile", die_after),
    "before the folder gets its name": (Path, "rename", die_before),
    "after that": (Path, "rename", die_after),
    "before pruning": (builder, "_prune", die_before),
    "while an old object is dropped": (Path, "unlink", die_after),
    "while an old build is dropped": (shutil, "rmtree", die_before_clearing),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment(toy: Path, cache: Path, compiler: Compiler, moment: str) -> None:
    """The next build works, and clears away what the killed one left."""
    build_value(toy, 1, days=31)
    (cache / "objects" / "old.o").touch()
    set_age(cache / "objects" / "old.o", 31)
    (toy / "toy_value.cpp").write_text(VALUE)
    owner, name, die = MOMENTS[moment]

    def be_killed() -> None:
        setattr(owner, name, die(getattr(owner, name)))
        builder.build(toy_recipe(toy))

    child = fork(be_killed)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert builder.build(toy_recipe(toy)).read_text() == "module"
    build_value(toy, 2)
    assert not list(cache.glob("*.tmp-*"))


def test_folder_that_lost_its_module_is_built_anew(toy: Path, compiler: Compiler) -> None:
    module = builder.build(toy_recipe(toy))
    module.unlink()
    assert builder.build(toy_recipe(toy)) == module and module.exists()


@pytest.mark.parametrize("victims", ["compiling process", "both processes"])
def test_killed_for_want_of_memory(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victims: str
) -> None:
    """What the kernel kills first is the child that runs torch's loader."""
    pid_file = tmp_path / "pid"
    hang = f'#!/bin/sh\ncase "$*" in *" -c "*) echo $$ > {pid_file}; exec sleep 600 ;; esac\n'
    monkeypatch.setenv("CXX", str(write_program(tmp_path / "c++", hang + 'exec c++ "$@"\n')))
    said, say = os.pipe()

    def build() -> None:
        with pytest.raises(BuildError):
            builder.build(toy_recipe(toy))
        os.write(say, b"BuildError")

    child = fork(build)
    os.close(say)
    wait_for(lambda: pid_file.exists() and pid_file.read_text().strip())
    compiler = int(pid_file.read_text())
    children = Path(f"/proc/{child}/task/{child}/children").read_text().split()
    for process in [*([child] if victims == "both processes" else []), *map(int, children)]:
        os.kill(process, signal.SIGKILL)
    os.waitpid(child, 0)
    if victims == "both processes":
        os.kill(compiler, signal.SIGTERM)  # nobody is left to do it
    else:
        assert os.read(said, 100) == b"BuildError"
        wait_for(lambda: not Path(f"/proc/{compiler}").exists())
    Compiler().replace(monkeypatch)
    assert builder.build(toy_recipe(toy)).exists()


def test_object_of_somebody_else_is_not_linked(
    toy: Path, cache: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_value(toy, 1)
    planted = cache / "objects" / "planted.o"
    planted.touch()
    planted.chmod(0o666)
    with pytest.raises(BuildError, match=f"others can write to {planted}"):
        build_value(toy, 2)


def test_module_of_somebody_else_is_not_loaded(toy: Path, cache: Path, compiler: Compiler) -> None:
    module = build_value(toy, 1)
    module.parent.chmod(0o777)
    with pytest.raises(BuildError, match=f"{module} is not used, .*chmod go-w {module.parent}"):
        builder.build(toy_recipe(toy))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
@pytest.mark.parametrize("opened", [False, True])
def test_cache_of_root_for_another_user(
    toy: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch, opened: bool
) -> None:
    """Refused in words as it is made; used where root opens it for reading."""
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is for this user alone
        os.chmod(folder, 0o755)
        monkeypatch.setenv("BATCHNORM_CUDA_CACHE_DIR", f"{folder}/cache")
        recipe = toy_recipe(toy)
        module = builder.build(recipe)
        if opened:
            subprocess.run(["chmod", "-R", "a+rX", f"{folder}/cache"], check=True)
        said = said_to_another_user(recipe)
    if opened:
        assert said == str(module)
    else:
        assert "Permission denied" in said and "set BATCHNORM_CUDA_CACHE_DIR" in said


def said_to_another_user(recipe: Recipe) -> str:
    """The path of a build, or the error."""
    said, say = os.pipe()

    def build() -> None:
        os.setgroups([])
        os.setgid(61234)
        os.setuid(61234)
        try:
            os.write(say, str(builder.build(recipe)).encode())
        except BuildError as error:
            os.write(say, str(error).encode())

    os.waitpid(fork(build), 0)
    os.close(say)
    return os.read(said, 10000).decode()
