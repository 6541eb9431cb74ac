"""What a visit says at the end: its verdicts and the figures that matter most, cut to fit."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import figures
from .runner import Verdict, conclusion
from .test_log import BAD

MOST_LINES, MOST_CHARACTERS = 60, 8000
_WIDTH = 132
_VERDICT_WIDTH = 230
_MOST_FAILURES = 10

Row = Mapping[str, str]


def read(path: Path) -> list[Row]:
    """The whole rows of a CSV file: the last may have been cut short."""
    if not path.exists():
        return []
    with path.open(newline="", errors="replace") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if None not in row.values() and None not in row]


def text(record: Mapping[str, Any], verdicts: Sequence[Verdict], out: Path, scratch: Path) -> str:
    """Sections in the order of their worth; what no longer fits is left out at the end."""
    bench = out / "bench.csv"
    sections = [
        _head(record),
        [_cut(str(verdict), _VERDICT_WIDTH) for verdict in verdicts],
        _section(_failures, scratch / "tests.csv"),
        _section(_failed_cases, out / "smoke.csv"),
        _section(partial(_plain, "step", 11), out / "training.csv"),
        _section(figures.summary, bench),
        *(_section(figures.regret, path) for path in sorted(out.glob("*tune.csv"))),
        _section(partial(_plain, "fusions", 12), out / "fusions.csv"),
        _section(partial(_plain, "exchange", 12), out / "exchange.csv"),
        _section(partial(_plain, "counters", 14), out / "counters.csv"),
        _section(figures.worst, bench),
        _section(figures.cases, bench),
    ]
    return fit([line for section in sections for line in section], conclusion(verdicts))


def _section(describe: Callable[[Sequence[Row]], list[str]], path: Path) -> list[str]:
    """Whatever is in a file, the other sections stand."""
    try:
        rows = read(path)
        return [_cut(line) for line in describe(rows)] if rows else []
    except (ArithmeticError, KeyError, TypeError, ValueError, csv.Error, OSError) as error:
        return [f"== {path.name} is not as expected: {type(error).__name__}: {error}"[:_WIDTH]]


def fit(lines: Iterable[str], last: str) -> str:
    """Within lines and characters; the last line always stands."""
    last = _cut(last, _VERDICT_WIDTH)
    kept: list[str] = []
    room = MOST_CHARACTERS - len(last)
    for line in lines:
        room -= len(line) + 1
        if room < 0 or len(kept) == MOST_LINES - 1:
            break
        kept.append(line)
    return "\n".join([*kept, last])


def _cut(line: str, width: int = _WIDTH) -> str:
    line = " ".join(line.splitlines()).rstrip()
    return line if len(line) <= width else line[: width - 3] + "..."


def _head(record: Mapping[str, Any]) -> list[str]:
    found = record.get("environment", {})
    names = ("device", "driver", "torch", "cuda", "clock_sm_mhz", "clock_sm_most_mhz")
    said = ", ".join(f"{name} {found[name]}" for name in names if name in found)
    return [_cut(f"== visit {record['plan']}, commit {record['commit']}; {said}")]


def _failures(rows: Sequence[Row]) -> list[str]:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["outcome"]] = counts.get(row["outcome"], 0) + 1
    bad = [row for row in rows if row["outcome"] in BAD]
    lines = ["== tests: " + ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items()))]
    return lines + [f"{row['test']}: {row['why']}" for row in bad[:_MOST_FAILURES]]


def _failed_cases(rows: Sequence[Row]) -> list[str]:
    """Of the smoke test."""
    bad = [row for row in rows if row["kind"] == "case" and row["status"] == "FAIL"]
    idle = [row["case"] for row in rows if row["kind"] == "instance" and row["ran"] == "0"]
    lines = [f"{row['case']}: {row['note']}" for row in bad[:_MOST_FAILURES]]
    lines += [f"{len(idle)} instances did not run, such as {', '.join(idle[:3])}"] if idle else []
    return [f"== smoke: {len(bad)} failed", *lines] if lines else []


def _plain(title: str, most: int, rows: Sequence[Row]) -> list[str]:
    """Rows of any columns: what is the same in all of them is left out."""
    names = [name for name in rows[0] if len(rows) == 1 or len({row[name] for row in rows}) > 1]
    table = [names, *([_short(row[name]) for name in names] for row in rows[:most])]
    widths = [max(len(line[at]) for line in table) for at in range(len(names))]
    lines = ["  ".join(map(str.ljust, line, widths)) for line in table]
    more = f", {most} of {len(rows)} rows" if len(rows) > most else ""
    return [f"== {title}{more}", *lines]


def _short(value: str) -> str:
    """A number of four digits; other words as they are, but not long ones."""
    try:
        number = float(value)
    except ValueError:
        return value[:24]
    return value if value.lstrip("-").isdigit() or not math.isfinite(number) else f"{number:.4g}"
