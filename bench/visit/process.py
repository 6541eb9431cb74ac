"""A command that ends in time, with everything that it started.

Its processes are told by a mark in their environment, because a group does not hold them: ninja
gives every compiler a group of its own.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..loading import ROOT

_MARK = "BATCHNORM_CUDA_PART"
_LOOK_SECONDS = 0.1  # between two looks at a process that says nothing
_DYING_SECONDS = 5.0  # a process inside the driver does not die at once; do not wait for it long
_QUIET_SECONDS = 0.2
_KEPT_BYTES = 64 << 10  # of the output, for the line of the verdict
_CANNOT_RUN = 127  # the shell's own exit status for it

Sink = Callable[[bytes], None]


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int | None  # None: stopped for want of time; negative: by that signal
    output: str  # its end


def run_command(
    command: Sequence[str],
    seconds: float,
    *,
    emulate: bool = False,
    variables: Mapping[str, str] | None = None,
    sink: Sink | None = None,
) -> Done:
    """Output goes to `sink` as it comes."""
    mark = uuid.uuid4().hex
    environment = {**os.environ, **(variables or {}), _MARK: mark, "PYTHONUNBUFFERED": "1"}
    environment.setdefault("PYTHONFAULTHANDLER", "1")  # a crash says where
    environment.pop("BATCHNORM_CUDA_EMULATE", None)
    if emulate:
        environment["BATCHNORM_CUDA_EMULATE"] = "1"
    deadline = time.monotonic() + max(1.0, seconds)
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:  # there is no such program
        return Done(_CANNOT_RUN, str(error))
    assert process.stdout is not None  # asked for above
    output = _Output(process.stdout.fileno(), sink)
    try:
        with _guarded(mark):
            ended = _follow(process, output, deadline)
    finally:
        end_all(mark)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_DYING_SECONDS)
        output.drain()
        process.stdout.close()
    return Done(process.returncode if ended else None, output.text)


def end_all(mark: str) -> None:
    """All processes with the mark, until none is left to start more.

    One that is just becoming another program shows no environment: none must be seen for a while.
    """
    began = seen = time.monotonic()
    while time.monotonic() < min(seen + _QUIET_SECONDS, began + _DYING_SECONDS):
        for pid in _with_mark(mark):
            seen = time.monotonic()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _with_mark(mark: str) -> list[int]:
    wanted = f"{_MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


@contextlib.contextmanager
def _guarded(mark: str) -> Iterator[None]:
    """Ends all with the mark also when the visit itself is killed and can end nothing: a process
    waits for that, on a pipe whose other end only the visit holds.
    """
    command = [sys.executable, "-m", __name__, mark]
    guard = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        guard.kill()
        guard.communicate()


class _Output:
    """What comes through a pipe: handed on at once, its end kept."""

    def __init__(self, descriptor: int, sink: Sink | None) -> None:
        self._descriptor = descriptor
        self._sink = sink
        self._kept = b""
        self.closed = False
        os.set_blocking(descriptor, False)

    def take(self, seconds: float) -> bool:
        """Waits for output up to so long; whether some came."""
        if self.closed or not select.select([self._descriptor], [], [], seconds)[0]:
            return False
        data = os.read(self._descriptor, 1 << 16)
        self.closed = not data
        self._kept = (self._kept + data)[-_KEPT_BYTES:]
        if data and self._sink is not None:
            self._sink(data)
        return bool(data)

    def drain(self) -> None:
        while self.take(0):
            pass

    @property
    def text(self) -> str:
        return self._kept.decode(errors="replace")


def _follow(process: subprocess.Popen, output: _Output, deadline: float) -> bool:
    """Until the process has ended, whatever it left in the background, or its time is over."""
    while process.poll() is None:
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        if output.closed:
            time.sleep(min(left, _LOOK_SECONDS))
        else:
            output.take(min(left, _LOOK_SECONDS))
    return True


if __name__ == "__main__":
    sys.stdin.read()
    end_all(sys.argv[1])
