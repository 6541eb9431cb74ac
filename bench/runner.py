"""Runs all cases. Rows go to the CSV file as they come, so that an interrupted run leaves them.

Two kinds of run differ in their cases, their rows and their pages: batch norm alone, and with
`--fuse` what stands behind it, too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import environment, model, report
from .cases.behind import FusedCase
from .cases.case import BenchCase, cases
from .cases.collect import collect, collect_behind
from .cases.shapes import SETS, Shape
from .rows.fused import FusedRow
from .rows.results import FAILED, INACCURATE, Row, append_row, write_json
from .timing import fused
from .timing.machine import Machine, gpu
from .timing.measure import CheckCache
from .timing.measure import rows as measured_rows
from .timing.providers import NAMES, missing

INTERRUPTED = 130  # the exit status of a process that SIGINT ended


def select_shapes(options: argparse.Namespace) -> list[Shape]:
    """Raises CollectError for a model that cannot be followed."""
    shapes = [shape for name in options.sets for shape in SETS[name]]
    shapes += [Shape("given", sizes) for sizes in options.shapes]
    if options.model:
        for layout in options.layouts:
            shapes += collect(options.model, options.input, layout)
    return shapes


def select_fused(options: argparse.Namespace) -> list[FusedCase]:
    """A model's training step. Raises CollectError for one that cannot be followed."""
    found: dict[FusedCase, None] = {}  # a shape without positions is the same in every layout
    for layout in options.layouts:
        for shape, behind in collect_behind(options.model, options.input, layout):
            for bench in cases([shape], options.layouts, options.dtypes, ["both"]):
                found[FusedCase(bench, behind)] = None
    return list(found)


def select_providers(options: argparse.Namespace) -> list[str]:
    """Those that were asked for, else all that can be had here, or that there is a model for."""
    if options.providers:
        return list(dict.fromkeys(options.providers))
    if not options.measure:
        return [name for name in NAMES if name not in model.NO_MODEL]
    return [name for name in NAMES if missing(name) is None]


def case_rows(
    case: BenchCase, names: Sequence[str], options: argparse.Namespace, state: State
) -> Iterator[Row]:
    if state.machine is None:
        settings = model.ModelSettings(options.device, options.count)
        return model.rows(case, list(names), settings)
    return measured_rows(
        case,
        names,
        state.machine,
        seconds=options.seconds,
        peer_tolerance=options.peer_tolerance,
        cache=state.cache,
    )


def fused_rows(
    case: FusedCase, options: argparse.Namespace, machine: Machine | None
) -> Iterator[FusedRow]:
    if machine is None:
        return model.fused_rows(case, model.ModelSettings(options.device))
    return fused.rows(case, machine, options.seconds)


class State:
    """What outlives a case: the GPU, none for a model, and the expected results."""

    def __init__(self, machine: Machine | None) -> None:
        self.machine = machine
        self.cache = CheckCache()


@dataclass(frozen=True)
class Work:
    """The cases of a command line, what gives the rows of one, and what writes the pages of all."""

    cases: Sequence[Any]
    rows: Callable[[Any], Iterator[Any]]
    write: Callable[[Path, dict[str, Any], Sequence[Any]], report.Written]
    suffix: str = ""  # of the files' names


def select_work(options: argparse.Namespace) -> Work:
    machine = gpu() if options.measure else None
    if options.fuse:
        rows_of = partial(fused_rows, options=options, machine=machine)
        return Work(select_fused(options), rows_of, report.write_fused, "-fused")
    todo = cases(select_shapes(options), options.layouts, options.dtypes, options.ops)
    names, state = select_providers(options), State(machine)
    return Work(todo, lambda case: case_rows(case, names, options, state), report.write)


def run(options: argparse.Namespace, stem: str | None = None) -> int:
    """All of a command line. Exit status 1 if one of ours failed or was inaccurate."""
    work = select_work(options)
    found = environment.collect(None if options.measure else options.device)
    if not options.measure:
        print("model: no figure below is measured; bytes are predicted or counted", file=sys.stderr)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = stem or environment.file_stem(found["device"] if options.measure else "model")
    path = options.out / f"{stem}{work.suffix}.csv"
    path.unlink(missing_ok=True)
    rows, interrupted = _collect_rows(work, path)
    found["command"] = "python -m bench " + " ".join(sys.argv[1:])
    found["complete"] = not interrupted
    return _finish(path, found, rows, interrupted, work)


def _collect_rows(work: Work, path: Path) -> tuple[list[Any], bool]:
    rows: list[Any] = []
    bar = tqdm(work.cases, unit="case", dynamic_ncols=True, disable=None)
    try:
        for case in bar:
            bar.set_description(case.title)
            for row in work.rows(case):
                append_row(path, row)
                rows.append(row)
    except KeyboardInterrupt:
        return rows, True
    finally:
        bar.close()
    return rows, False


def _finish(
    path: Path, found: dict[str, Any], rows: list[Any], interrupted: bool, work: Work
) -> int:
    write_json(path.with_suffix(".json"), found, rows)
    try:
        if rows:
            written = work.write(path, found, rows)
            print(written.markdown)
            print("\n".join(f"wrote {file}" for file in written.files), file=sys.stderr)
    except KeyboardInterrupt:  # `bench report` writes the pages from the rows
        interrupted = True
    if interrupted:
        left = f"{len(rows)} rows are in {path}" if rows else "before the first row"
        print(f"interrupted: {left}", file=sys.stderr)
        return INTERRUPTED
    wrong = [row for row in rows if row.provider.startswith("ours")]
    wrong = [row for row in wrong if row.status in (FAILED, INACCURATE)]
    for row in wrong:
        print(f"{row.provider} {' '.join(row.case)}: {row.status}, {row.note}", file=sys.stderr)
    return 1 if wrong else 0
