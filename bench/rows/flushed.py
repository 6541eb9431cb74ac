"""A CSV file that is whole after every row: whoever is killed leaves what was known by then."""

from __future__ import annotations

import csv
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class FlushedCsv:
    """Rows of the given columns; a row may leave columns out. Threads may share one."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("w", newline="")
        self._writer = csv.DictWriter(self._file, columns, restval="", lineterminator="\n")
        self._lock = threading.Lock()
        self._writer.writeheader()
        self._file.flush()

    def write(self, row: Mapping[str, Any]) -> None:
        """ValueError for a column that is not the file's."""
        self.write_all([row])

    def write_all(self, rows: Sequence[Mapping[str, Any]]) -> None:
        with self._lock:
            self._writer.writerows(rows)
            self._file.flush()
