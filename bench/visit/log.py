"""visit.log: all that the parts say, written through at once."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

_MOST_BYTES = 12 << 20
_PART_BYTES = 2 << 20  # one part that says too much must not silence the others
_LEFT_OUT = b"\n[the rest of this part is left out]\n"


class Log:
    """Never larger than it may be, whatever the parts say."""

    def __init__(self, path: Path, most: int = _MOST_BYTES, part: int = _PART_BYTES) -> None:
        self._file = path.open("ab", buffering=0)
        self._left, self._part = most, part
        self._part_left = part

    def begin(self, title: str) -> None:
        """The next part, with a share of its own."""
        now = datetime.now(timezone.utc).strftime("%H:%M:%S")
        self._part_left = min(self._part, self._left)
        self.write(f"\n== {title} ({now} UTC)\n".encode())

    def write(self, data: bytes) -> None:
        room = self._part_left - len(_LEFT_OUT)
        if room < 0:
            return
        if len(data) > room:
            data, self._part_left = data[:room] + _LEFT_OUT, 0
        else:
            self._part_left -= len(data)
        self._left -= len(data)
        self._file.write(data)
