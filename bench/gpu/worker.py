"""A worker process that answers in lines, and the one who reads them while they come.

A worker that hangs or crashes must not take along what it has found so far, nor the other workers:
so it says everything at once, and the reader kills it at its limit.
"""

from __future__ import annotations

import json
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

_MARK = "@"  # of answers, among whatever else a process prints


def say(message: dict[str, Any]) -> None:
    """An answer of this process, on a line of its own whatever a warning left behind."""
    print("\n" + _MARK + json.dumps(message), flush=True)


def listen(
    command: Sequence[str],
    take: Callable[[dict[str, Any]], None],
    *,
    deadline: float,
    patience: float = float("inf"),
) -> str:
    """Runs the command, gives every answer to `take`, and says in words how it ended.

    Killed at the deadline (of time.monotonic), and after `patience` seconds without a line.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    said = ""  # the last line that was no answer: of a traceback, the error
    while True:
        wait = max(0.0, min(patience, deadline - time.monotonic()))
        try:
            line = lines.get(timeout=wait)
        except queue.Empty:
            process.kill()
            process.wait()
            return f"killed: no answer in {wait:.0f} s"
        if line is None:
            return f"ended with status {process.wait()}{': ' if said else ''}{said[:200]}"
        if line.startswith(_MARK):
            take(json.loads(line.removeprefix(_MARK)))
        else:
            said = line.strip() or said
