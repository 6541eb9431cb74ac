"""Compares two runs: what became slower or faster by more than their spreads explain.

    python -m bench compare A.csv B.csv [--provider ours] [--all]

A is before, B after. Two medians differ where the ranges from the 20th to the 80th percentile do
not overlap and the medians are more than 1 % apart, which clocks alone can do. For runs of the
models, which have no spread, bytes are compared. Exit status 1 if something regressed, is gone, or
is no longer correct; 2 for files that cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .rows.results import MODEL, OK, ResultsError, Row, read_csv

LEAST_CHANGE = 0.01

SLOWER, FASTER = "SLOWER", "faster"
MORE, LESS = "MORE", "less"  # bytes, of models: that says nothing of time
TIE, GONE, BROKEN, NEW = "tie", "GONE", "BROKEN", "new"
REGRESSIONS = (SLOWER, MORE, GONE, BROKEN)


@dataclass(frozen=True)
class Change:
    verdict: str
    provider: str
    case: tuple[str, ...]
    before: Row | None
    after: Row | None

    def __str__(self) -> str:
        figures = ""
        if self.before is not None and self.after is not None:
            one, other = _figure(self.before), _figure(self.after)
            if one and other:
                figures = f"{_text(self.before)} -> {_text(self.after)}, x {other / one:.3f}"
            elif self.verdict == BROKEN:
                figures = f"{self.after.status}: {self.after.note}"
        return f"{self.verdict:<7} {self.provider:<13} {' '.join(self.case)}  {figures}".rstrip()


def compare(before: Sequence[Row], after: Sequence[Row]) -> list[Change]:
    """A change for each provider and case of either run, in the order of the first."""
    old = {(row.provider, row.case): row for row in before}
    new = {(row.provider, row.case): row for row in after}
    changes = []
    for key in dict.fromkeys([*old, *new]):
        one, other = old.get(key), new.get(key)
        changes.append(Change(_verdict(one, other), *key, one, other))
    return changes


def _verdict(before: Row | None, after: Row | None) -> str:
    if before is None:
        return NEW
    if after is None:
        return GONE
    one, other = _figure(before), _figure(after)
    if one is not None and other is None:
        return GONE if after.status == OK else BROKEN
    if one is None or other is None:
        return NEW if other is not None else TIE
    if abs(other / one - 1) <= LEAST_CHANGE or _overlap(before, after):
        return TIE
    worse, better = (MORE, LESS) if before.kind == MODEL else (SLOWER, FASTER)
    return worse if other > one else better


def _figure(row: Row) -> float | None:
    """What is compared: less is better."""
    return row.model_bytes if row.kind == MODEL else row.ms


def _text(row: Row) -> str:
    if row.kind == MODEL:
        return f"{row.model_bytes:,} bytes (model)"
    return f"{row.ms:.4f} ms ({row.ms_p20:.4f}-{row.ms_p80:.4f})"


def _overlap(one: Row, other: Row) -> bool:
    if one.kind == MODEL:
        return False
    return one.ms_p20 <= other.ms_p80 and other.ms_p20 <= one.ms_p80


def check_comparable(before: Sequence[Row], after: Sequence[Row]) -> None:
    """Raises ResultsError: times of two GPUs, or times and bytes, are no comparison."""
    for what in ("kind", "device"):
        ones, others = ({getattr(row, what) for row in rows} for rows in (before, after))
        if ones != others:
            raise ResultsError(
                f"the runs differ in {what}: {', '.join(sorted(ones)) or 'nothing'} "
                f"against {', '.join(sorted(others)) or 'nothing'}"
            )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--provider", help="only this one")
    parser.add_argument("--all", action="store_true", help="ties as well")
    options = parser.parse_args(arguments)
    try:
        before, after = read_csv(options.before), read_csv(options.after)
        check_comparable(before, after)
    except ResultsError as error:
        print(f"python -m bench compare: {error}", file=sys.stderr)
        return 2
    changes = compare(before, after)
    if options.provider:
        changes = [change for change in changes if change.provider == options.provider]
    for change in changes:
        if options.all or change.verdict != TIE:
            print(change)
    worse = sum(change.verdict in REGRESSIONS for change in changes)
    print(f"{len(changes)} compared, {worse} regressed")
    return 1 if worse else 0
