"""The benchmark's short set in every layout and dtype, the most telling first, until time is up.

    python -m bench.visit.timings --out FOLDER [--seconds S] [--compile]

Writes FOLDER/bench.csv, in the benchmark's own columns, and bench.json with the environment: what
`python -m bench report` takes. torch.compile takes seconds a case, and may fail: with --compile its
rows are added for a few cases, in a process of their own. Without a GPU the rows are the models'.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from .. import environment, model
from ..byte_model import OPS
from ..case import DTYPE_NAMES, BenchCase, cases
from ..machine import Machine, gpu
from ..measure import CheckCache, rows
from ..options import positive
from ..providers import COPY
from ..results import FAILED, INACCURATE, Row, append_row, write_json
from ..shapes import SETS

PROVIDERS = ("ours", "cudnn", "native", COPY)
LAYOUTS = ("nchw", "nhwc")
_COMPILED = ("32x256x56x56", "32x1024x14x14")
_SECONDS = 0.1  # of timing a case
_CHECKED = 2**21  # elements of a case that are compared; the smoke test looks at more
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
    found = rows(case, names, machine, seconds=_SECONDS, peer_tolerance=1.0, cache=cache)
    # The copy's row is that of the process which timed the others.
    return (row for row in found if not (compiled and row.provider == COPY))


def run(out: Path, compiled: bool, deadline: float, machine: Machine | None) -> int:
    path, cache, found = out / "bench.csv", CheckCache(_CHECKED), list[Row]()
    todo = work(compiled)
    done = 0
    for case in todo:
        if time.monotonic() > deadline:
            break
        for row in case_rows(case, machine, compiled, cache):
            append_row(path, row)
            found.append(row)
        done += 1
        if done % 20 == 0:
            print(f"{done} of {len(todo)} cases: {case.title}")
    if not compiled:
        about = environment.collect(None if machine else _DEVICE)
        write_json(path.with_suffix(".json"), about | {"complete": done == len(todo)}, found)
    return _conclude(found, done, len(todo), machine)


def _conclude(found: Iterable[Row], done: int, of: int, machine: Machine | None) -> int:
    ours = [row for row in found if row.provider == "ours"]
    wrong = [row for row in ours if row.status in (FAILED, INACCURATE)]
    for row in wrong:
        print(f"{' '.join(row.case)}: {row.status}, {row.note}")
    kind = "" if machine else " of the models, nothing timed"
    print(f"{done} of {of} cases{kind}; ours failed in {len(wrong)}")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.visit.timings", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=positive, default=120.0)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    machine = gpu() if torch.cuda.is_available() else None
    return run(options.out, options.compile, deadline, machine)


if __name__ == "__main__":
    sys.exit(main())
