"""Runs all cases. Rows go to the CSV file as they come, so that an interrupted run leaves them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import environment, model, report
from .cases.case import BenchCase, cases
from .cases.collect import collect
from .cases.shapes import SETS, Shape
from .rows.results import FAILED, INACCURATE, Row, append_row, write_json
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


class State:
    """What outlives a case: the GPU, none for a model, and the expected results."""

    def __init__(self, machine: Machine | None) -> None:
        self.machine = machine
        self.cache = CheckCache()


def run(options: argparse.Namespace, stem: str | None = None) -> int:
    """All of a command line. Exit status 1 if one of ours failed or was inaccurate."""
    shapes = select_shapes(options)
    work = cases(shapes, options.layouts, options.dtypes, options.ops)
    state = State(gpu() if options.measure else None)
    found = environment.collect(None if options.measure else options.device)
    if not options.measure:
        print("model: no figure below is measured; bytes are predicted or counted", file=sys.stderr)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = stem or environment.file_stem(found["device"] if options.measure else "model")
    path = options.out / f"{stem}.csv"
    path.unlink(missing_ok=True)
    rows, interrupted = _collect_rows(work, options, state, path)
    found["command"] = "python -m bench " + " ".join(sys.argv[1:])
    found["complete"] = not interrupted
    return _finish(path, found, rows, interrupted)


def _collect_rows(
    work: list[BenchCase], options: argparse.Namespace, state: State, path: Path
) -> tuple[list[Row], bool]:
    rows: list[Row] = []
    names = select_providers(options)
    bar = tqdm(work, unit="case", dynamic_ncols=True, disable=None)
    try:
        for case in bar:
            bar.set_description(case.title)
            for row in case_rows(case, names, options, state):
                append_row(path, row)
                rows.append(row)
    except KeyboardInterrupt:
        return rows, True
    finally:
        bar.close()
    return rows, False


def _finish(path: Path, found: dict[str, Any], rows: list[Row], interrupted: bool) -> int:
    write_json(path.with_suffix(".json"), found, rows)
    try:
        if rows:
            written = report.write(path, found, rows)
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
