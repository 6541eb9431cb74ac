"""Neither an import nor a build looks for another machine, not even to go on when there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy import WORKER

# In every Python below, that of the build too: notes names that are looked up and connections that
# are made. Sockets between processes of one machine are no network.
WATCH = """
import sys

LOOKS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.connect")

def watch(event, arguments):
    within_machine = event == "socket.connect" and isinstance(arguments[1], (str, bytes))
    if event in LOOKS and not within_machine:
        with open({log!r}, "a") as log:
            log.write(f"{{event}} {{arguments}}\\n")

sys.addaudithook(watch)
"""

LOOK = """
import contextlib, socket
for look in (
    lambda: socket.getaddrinfo("localhost", 80),
    lambda: socket.socket().connect(("127.0.0.1", 9)),
    lambda: socket.socket(socket.AF_UNIX).connect("/nowhere"),
):
    with contextlib.suppress(OSError):
        look()
"""


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where what is looked for on the network is written down."""
    log = tmp_path / "network"
    folder = tmp_path / "watch"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(WATCH.format(log=str(log)))
    paths = [str(folder), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    return log


def run(script: str, *arguments: Path) -> str:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_a_look_is_seen(watched: Path) -> None:
    run(LOOK)
    seen = [line.split()[0] for line in watched.read_text().splitlines()]
    assert seen == ["socket.getaddrinfo", "socket.connect"]


def test_import_and_build(watched: Path, toy: Path) -> None:
    assert run(f"import batchnorm_cuda\n{WORKER}", toy) == "42"
    assert not watched.exists(), watched.read_text()
