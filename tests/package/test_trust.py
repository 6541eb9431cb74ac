"""What is loaded from a cache was written by this user or root, where nobody else can write."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from toy import fork

from batchnorm_cuda._build import trust
from batchnorm_cuda._build.trust import UntrustedError, make_private, require_trusted

STRANGER = 61234  # of no meaning anywhere


@pytest.fixture
def module(tmp_path: Path) -> Path:
    """tmp_path/cache/toy/toy.so, private."""
    path = tmp_path / "cache" / "toy" / "toy.so"
    path.parent.mkdir(parents=True)
    path.touch()
    for part in (path, path.parent, path.parent.parent):
        part.chmod(0o700)
    return path


@pytest.fixture
def disguise(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets a path appear to be of another owner or group, without being root."""
    real, changes = Path.lstat, {}

    def lstat(path: Path) -> os.stat_result:
        fields = list(real(path))
        for index, value in changes.get(path, {}).items():
            fields[index] = value
        return os.stat_result(fields)

    def disguise(path: Path, user: int | None = None, group: int | None = None) -> None:
        wanted = {stat.ST_UID: user, stat.ST_GID: group}
        changes[path] = {field: value for field, value in wanted.items() if value is not None}

    monkeypatch.setattr(Path, "lstat", lstat)
    return disguise


def test_private_path_is_trusted(module: Path) -> None:
    require_trusted(module)


@pytest.mark.parametrize("up", [0, 1, 2])
@pytest.mark.parametrize("bit", [stat.S_IWGRP, stat.S_IWOTH])
def test_part_that_others_can_write_is_named_with_the_command(
    module: Path, up: int, bit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "_is_private", lambda group: False)
    part = [module, *module.parents][up]
    part.chmod(0o700 | bit)
    cure = "rm" if up == 0 else "chmod go-w"
    with pytest.raises(UntrustedError, match=f"others can write to {part} .*`{cure} {part}`"):
        require_trusted(module)


@pytest.mark.parametrize("up", [0, 1, 2, 3])
def test_part_of_another_user_is_named(module: Path, up: int, disguise) -> None:
    part = [module, *module.parents][up]
    disguise(part, user=STRANGER)
    with pytest.raises(UntrustedError, match=rf"{part} belongs to user {STRANGER}.*CACHE_DIR"):
        require_trusted(module)


def test_root_is_trusted(module: Path, disguise) -> None:
    disguise(module, user=0)
    require_trusted(module)


def test_sticky_folder_may_be_written_by_all(module: Path) -> None:
    module.parent.parent.chmod(0o1777)
    require_trusted(module)


@pytest.mark.parametrize("absolute", [True, False])
def test_links_are_followed_one_by_one(
    module: Path, tmp_path: Path, absolute: bool, disguise
) -> None:
    """Neither the link itself nor what it leads through may be another's."""
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    (open_folder / "inner").symlink_to(module.parent if absolute else "../cache/toy")
    link = tmp_path / "link"
    link.symlink_to(open_folder / "inner" if absolute else "open/../open/inner")
    require_trusted(link / "toy.so")
    open_folder.chmod(0o777)
    with pytest.raises(UntrustedError, match=f"write to {open_folder} "):
        require_trusted(link / "toy.so")
    open_folder.chmod(0o700)
    disguise(link, user=STRANGER)
    with pytest.raises(UntrustedError, match=f"{link} belongs to"):
        require_trusted(link / "toy.so")


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("other")
    (tmp_path / "other").symlink_to("one")
    with pytest.raises(OSError, match="symbolic links"):
        require_trusted(tmp_path / "one")


@pytest.mark.parametrize(
    ("name", "group", "members", "trusted"),
    [
        ("ann", 500, [], True),  # a group for each user, with a umask of 002
        ("ann", 500, ["ann"], True),
        ("ann", 500, ["bob"], False),
        ("staff", 500, [], False),
        ("ann", 501, [], False),
    ],
)
def test_group_of_one_user_may_write(
    module: Path,
    monkeypatch: pytest.MonkeyPatch,
    disguise,
    name: str,
    group: int,
    members: list[str],
    trusted: bool,
) -> None:
    module.parent.chmod(0o770)
    disguise(module.parent, group=group)
    user = SimpleNamespace(pw_name="ann", pw_gid=500)
    monkeypatch.setattr(pwd, "getpwuid", lambda _: user)
    monkeypatch.setattr(grp, "getgrgid", lambda _: SimpleNamespace(gr_name=name, gr_mem=members))
    with contextlib.nullcontext() if trusted else pytest.raises(UntrustedError, match=name):
        require_trusted(module)


def test_namespace_without_root(module: Path, disguise, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the system's folders are shown as nobody's; a file to load must be somebody's."""
    for part in list(module.parents)[2:]:
        disguise(part, user=STRANGER)
    with pytest.raises(UntrustedError, match="/ belongs to"):
        require_trusted(module)
    monkeypatch.setattr(trust, "_unmapped_owner", lambda: STRANGER)
    require_trusted(module)
    disguise(module, user=STRANGER)
    with pytest.raises(UntrustedError, match=r"toy\.so belongs to"):
        require_trusted(module)


def test_created_folders_are_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_private(tmp_path / "home" / ".cache" / "mine")
    finally:
        os.umask(before)
    made = [tmp_path / "home", tmp_path / "home" / ".cache", tmp_path / "home" / ".cache" / "mine"]
    assert [stat.S_IMODE(path.stat().st_mode) for path in made] == [0o700] * 3


def test_nothing_is_created_in_an_untrusted_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    mine = tmp_path / "mine"
    with pytest.raises(UntrustedError, match=f"{mine} is not used, .* write to {tmp_path} "):
        make_private(mine)
    assert not mine.exists()


def test_folder_is_trusted_with_its_contents(tmp_path: Path) -> None:
    (tmp_path / "good.o").touch()
    (tmp_path / "link.o").symlink_to("good.o")
    trust.require_trusted_folder(tmp_path)
    (tmp_path / "bad.o").touch()
    (tmp_path / "bad.o").chmod(0o666)
    with pytest.raises(UntrustedError, match=r"rm .*bad\.o"):
        trust.require_trusted_folder(tmp_path)


# Each makes one part of base/cache/toy.so open to others; the first nothing.
OPENINGS = {
    "nothing": lambda base: None,
    "sticky folder": lambda base: base.chmod(0o1777),
    "folder above": lambda base: base.chmod(0o777),
    "folder": lambda base: (base / "cache").chmod(0o777),
    "file": lambda base: (base / "cache" / "toy.so").chmod(0o666),
    "folder of another": lambda base: os.chown(base / "cache", STRANGER, STRANGER),
    "file of another": lambda base: os.chown(base / "cache" / "toy.so", STRANGER, STRANGER),
}


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user can reach, with cache/toy.so in it."""
    base = Path(tempfile.mkdtemp())
    (base / "cache").mkdir()
    (base / "cache" / "toy.so").write_text("ours")
    for part in (base, base / "cache", base / "cache" / "toy.so"):
        part.chmod(0o755)
    yield base
    shutil.rmtree(base)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
@pytest.mark.parametrize("opening", OPENINGS)
def test_what_is_trusted_cannot_be_exchanged_before_it_is_loaded(
    public: Path, opening: str
) -> None:
    """Another user tries, after the check; where they can, the check has refused."""
    OPENINGS[opening](public)
    module = public / "cache" / "toy.so"
    refused = False
    try:
        require_trusted(module)
    except UntrustedError:
        refused = True
    os.waitpid(fork(lambda: _exchange(module)), 0)
    assert refused == (module.read_text() != "ours")


def _exchange(module: Path) -> None:
    """All that another user can try, in a process of its own."""
    os.setgroups([])
    os.setgid(STRANGER)
    os.setuid(STRANGER)
    folder, base = module.parent, module.parent.parent
    with contextlib.suppress(OSError):
        module.write_text("theirs")
    with contextlib.suppress(OSError):
        module.unlink()
    with contextlib.suppress(OSError):
        folder.rename(base / "away")
        folder.mkdir()
    with contextlib.suppress(OSError):
        folder.mkdir()
    with contextlib.suppress(OSError):
        module.write_text("theirs")
