"""Refuses to load or link what somebody else may have written.

A path is trusted if everything it leads through, folders, symbolic links and the file itself,
belongs to this user or to root, and if nobody else can write there. It is walked from the root
down, so that each step is looked at where only trusted users can still exchange it: what has been
checked is what will be loaded, whenever that is.

Standard library only, and no imports from the package. `pwd` and `grp` are imported where they are
needed, because Windows has neither and imports this file with the package.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path

_MOST_LINKS = 40  # as the kernel follows
_ELSEWHERE = "set BATCHNORM_CUDA_CACHE_DIR to a folder of your own"


class UntrustedError(RuntimeError):
    """Others can write what would be loaded; the message names the part, and what mends it."""


def require_trusted(path: Path) -> None:
    """UntrustedError if others own or can write any part of `path`; OSError if it is not there."""
    _require_parts(path, path)


def require_trusted_folder(folder: Path) -> None:
    """The same of a folder and of all that is directly in it."""
    require_trusted(folder)
    for entry in os.scandir(folder):
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:  # another process has just pruned or renamed it
            continue
        if stat.S_ISLNK(status.st_mode):
            require_trusted(Path(entry.path))
        else:
            _require_own(Path(entry.path), Path(entry.path), status)


def make_private(folder: Path) -> None:
    """Create what is missing of a folder for this user alone, where all above it is trusted."""
    missing = []
    above = folder
    while not above.exists():
        missing.append(above)
        above = above.parent
    _require_parts(above, folder)
    for part in reversed(missing):
        part.mkdir(mode=0o700, exist_ok=True)  # another process may be as far
    require_trusted(folder)


def _require_parts(path: Path, wanted: Path) -> None:
    for part, status in _parts(path):
        _require_own(wanted, part, status)


def _parts(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """All that the kernel looks at to find `path`, from the root down, links and their targets."""
    at = Path("/")
    pending = list(path.absolute().parts[:0:-1])
    links = 0
    yield at, at.lstat()
    while pending:
        name = pending.pop()
        at = at.parent if name == ".." else at / name  # `at` itself leads through no link
        status = at.lstat()
        yield at, status
        if stat.S_ISLNK(status.st_mode):
            links += 1
            if links > _MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
            target = Path(os.readlink(at))
            pending += reversed([part for part in target.parts if part != target.root])
            at = Path("/") if target.is_absolute() else at.parent


def _require_own(path: Path, part: Path, status: os.stat_result) -> None:
    if not _is_own(status):
        me = f"{_user_name(os.geteuid())} or " if os.geteuid() else ""
        raise UntrustedError(
            f"{path} is not used, because {part} belongs to {_user_name(status.st_uid)}, not to "
            f"{me}root: run as its owner (in a container, `docker run --user {status.st_uid}`), or "
            f"{_ELSEWHERE}"
        )
    # In a folder with the sticky bit, others can add entries but exchange only their own.
    sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
    if stat.S_ISLNK(status.st_mode) or sticky or not _others_can_write(status):
        return
    cure = f"chmod go-w {shlex.quote(str(part))}"
    if stat.S_ISREG(status.st_mode):
        cure = f"rm {shlex.quote(str(part))}"  # whatever others have written there would stay
    raise UntrustedError(
        f"{path} is not used, because others can write to {part} (mode "
        f"{stat.S_IMODE(status.st_mode):04o}, group {_group_name(status.st_gid)}): `{cure}`, or "
        f"{_ELSEWHERE}"
    )


def _is_own(status: os.stat_result) -> bool:
    if status.st_uid in (0, os.geteuid()):
        return True
    # Where a user namespace leaves root out, as in Apptainer, the system's folders are nobody's.
    return not stat.S_ISREG(status.st_mode) and status.st_uid == _unmapped_owner()


def _unmapped_owner() -> int | None:
    """The user as whom this namespace shows those that it leaves out; None if it has all."""
    try:
        if Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]:
            return None
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError):
        return None


def _others_can_write(status: os.stat_result) -> bool:
    """By the mode, in which the group's bits are also the most that an access list can allow."""
    if status.st_mode & stat.S_IWOTH:
        return True
    return bool(status.st_mode & stat.S_IWGRP) and not _is_private(status.st_gid)


def _is_private(group: int) -> bool:
    """Whether a group has this user alone: their own group, of their name, with nobody listed.

    So it is where every user has a group, which then goes with a umask of 002 (Ubuntu, Fedora).
    """
    import grp
    import pwd

    try:
        user, found = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    listed = set(found.gr_mem) - {user.pw_name}
    return user.pw_gid == group and found.gr_name == user.pw_name and not listed


def _user_name(user: int) -> str:
    import pwd

    try:
        return f"{pwd.getpwuid(user).pw_name} (user {user})"
    except KeyError:
        return f"user {user}"


def _group_name(group: int) -> str:
    import grp

    try:
        return grp.getgrgid(group).gr_name
    except KeyError:
        return str(group)
