"""The benchmark's short set in every layout and dtype, the most telling first, until time is up.

    python -m bench.visit.timings --out FOLDER [--seconds S] [--compile]

Writes FOLDER/bench.csv, in the benchmark's own columns, and bench.json with the environment: what
`python -m bench report` takes. torch.compile takes seconds a case, and may fail: with --compile its
rows are added for a few cases. A process of its own works through the cases; where one hangs or
takes it along, the next goes on behind that case. Without a GPU the rows are the models'.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import environment, model
from ..cases.case import DTYPE_NAMES, BenchCase, cases
from ..cases.shapes import SETS
from ..gpu.worker import listen, say
from ..models.byte_model import OPS
from ..options import part_parser
from ..rows.results import FAILED, INACCURATE, ResultsError, Row, append_row, read_csv, write_json
from ..timing.machine import Machine, gpu
from ..timing.measure import CheckCache, rows
from ..timing.providers import COPY

PROVIDERS = ("ours", "cudnn", "native", COPY)
LAYOUTS = ("nchw", "nhwc")
_COMPILED = ("32x256x56x56", "32x1024x14x14")
_SECONDS = 0.05  # of timing a case
_CHECKED = 2**21  # elements of a case that are compared; the smoke test looks at more
_PEER_TOLERANCE = 100.0  # a peer's time is worth having; its error is in the row
_RESTARTS = 5
_PATIENCE = 60.0  # seconds without a word: the case hangs
_CONTEXT_LOST = 3
_DEVICE = "h100"  # of the models


def work(compiled: bool) -> list[BenchCase]:
    """Sorted by dtype first: half of the time gives all of one."""
    shapes = [shape for shape in SETS["short"] if not compiled or shape.text in _COMPILED]
    dtypes = DTYPE_NAMES[:1] if compiled else DTYPE_NAMES
    return [case for dtype in dtypes for case in cases(shapes, LAYOUTS, [dtype], OPS)]


def case_rows(
    case: BenchCase, machine: Machine | None, compiled: bool, cache: CheckCache
) -> Iterator[Row]:
    names = ["compile", COPY] if compiled else list(PROVIDERS)
    if machine is None:
        known = [name for name in names if name not in model.NO_MODEL]
        return model.rows(case, known, model.ModelSettings(_DEVICE, 0))
    found = rows(
        case, names, machine, seconds=_SECONDS, peer_tolerance=_PEER_TOLERANCE, cache=cache
    )
    # The copy's row is that of the process which timed the others.
    return (row for row in found if not (compiled and row.provider == COPY))


Tell = Callable[[dict[str, Any]], None]


def work_through(
    out: Path, compiled: bool, first: int, machine: Machine | None, tell: Tell
) -> bool:
    """In the worker: False where the CUDA context was lost."""
    cache, todo = CheckCache(_CHECKED), work(compiled)
    for number, case in enumerate(todo[first:], first):
        tell({"start": number, "title": case.title})
        failed, wrong = False, []
        for row in case_rows(case, machine, compiled, cache):
            append_row(out / "bench.csv", row)
            failed |= row.status == FAILED
            if row.provider == "ours" and row.status in (FAILED, INACCURATE):
                wrong.append(f"{case.title}: {row.status}, {row.note}")
        tell({"done": number + 1, "wrong": wrong})
        if failed and machine is not None and _context_is_lost():
            return False
    tell({"end": True})
    return True


def _context_is_lost() -> bool:
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@dataclass
class Progress:
    """What the workers have said."""

    of: int
    done: int = 0
    title: str | None = None  # of the case that is begun and not done
    wrong: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    ended: bool = False

    def take(self, message: dict[str, Any]) -> None:
        self.about |= message.get("about", {})
        self.ended |= "end" in message
        if "start" in message:
            self.done, self.title = message["start"], message["title"]
        if "done" in message:
            self.done, self.title = message["done"], None
            self.add_wrong(message["wrong"])
            if self.done % 20 == 0:
                print(f"{self.done} of {self.of} cases", flush=True)

    def add_wrong(self, lines: Sequence[str]) -> None:
        for line in lines:
            print(line, flush=True)
        self.wrong += lines


def follow(
    progress: Progress, command: Sequence[str], deadline: float, patience: float = _PATIENCE
) -> None:
    """One worker after the other, until all cases are done or the time is over."""
    for _ in range(_RESTARTS + 1):
        before = progress.done
        line = [*command, f"--first={progress.done}"]
        why = listen(line, progress.take, deadline=deadline, patience=patience)
        if progress.ended or time.monotonic() >= deadline:
            return
        if progress.title is not None:
            progress.add_wrong([f"{progress.title}: {why}"])
            progress.done, progress.title = progress.done + 1, None
        elif progress.done == before:  # it does not even begin
            progress.add_wrong([why])
            return


def run(out: Path, compiled: bool, seconds: float) -> int:
    progress = Progress(len(work(compiled)))
    command = [sys.executable, "-m", "bench.visit.timings", "--worker", f"--out={out}"]
    follow(progress, command + ["--compile"] * compiled, time.monotonic() + seconds)
    path = out / "bench.csv"
    if path.exists() and not compiled:
        complete = {"complete": progress.done == progress.of}
        try:
            write_json(path.with_suffix(".json"), progress.about | complete, read_csv(path))
        except ResultsError as error:  # the worker was killed within a row
            print(error)
    kind = "" if torch.cuda.is_available() else " of the models, nothing timed"
    print(f"{progress.done} of {progress.of} cases{kind}; {len(progress.wrong)} went wrong")
    return 1 if progress.wrong else 0


def main() -> int:
    parser = part_parser("bench.visit.timings", __doc__, seconds=120.0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.worker:
        return run(options.out, options.compile, options.seconds)
    machine = gpu() if torch.cuda.is_available() else None
    say({"about": environment.collect(None if machine else _DEVICE)})
    if not work_through(options.out, options.compile, options.first, machine, say):
        os._exit(_CONTEXT_LOST)  # destructors would only fail again
    return 0


if __name__ == "__main__":
    sys.exit(main())
