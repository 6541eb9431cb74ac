"""A plugin of pytest: a row for every test as it ends, so that a suite cut short has told its part.

pytest -p bench.visit.test_log --test-log=FILE.csv
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

COLUMNS = ("outcome", "seconds", "test", "why")
BAD = ("failed", "error")
_WHY = 300


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--test-log", type=Path, help="a CSV file of outcomes")


def pytest_configure(config: Any) -> None:
    path = config.getoption("--test-log")
    if path is not None and not hasattr(config, "workerinput"):  # workers report to one process
        config.pluginmanager.register(_Rows(path))


class _Rows:
    def __init__(self, path: Path) -> None:
        self._file = path.open("w", newline="", buffering=1)
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(COLUMNS)

    def pytest_runtest_logreport(self, report: Any) -> None:
        bad = report.outcome == "failed"
        if report.when != "call" and report.outcome == "passed":
            return
        outcome = "error" if bad and report.when != "call" else report.outcome
        why = _last_line(report) if report.outcome != "passed" else ""
        self._writer.writerow([outcome, f"{report.duration:.2f}", report.nodeid, why])
        if bad:  # at once: the summary may never come
            print(f"\n{outcome.upper()} {report.nodeid}: {why}", file=sys.stderr, flush=True)


def _last_line(report: Any) -> str:
    if isinstance(report.longrepr, tuple):  # a skip: where, and why
        return str(report.longrepr[2])[:_WHY]
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr)
    return " ".join(text.split())[:_WHY]
