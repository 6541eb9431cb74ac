"""DRAM bytes as a GPU counts them, of 12 large problems, against what the plan predicts.

    python3 -m bench.counters --out DIR [--seconds 180]

Nsight Compute's `ncu` reads the counters. DIR/counters.csv has a row for each problem
(bench/gpu/counters_problems.py): the plan, the fewest bytes possible, the bytes predicted, and
those read and written, with the factor between them. What is still in the L2 cache when a kernel
ends is not written yet: up to `l2_bytes` may be missing from the bytes written. Times are under
ncu, of one launch: they are no benchmark.

The last line says what came out. Exit status 0: every problem was counted; 1: some were not; 2:
there is no GPU or no ncu. A factor far from 1 is a finding, not a failure.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from .gpu import ncu
from .gpu.counters_problems import MARKER, PROBLEMS
from .gpu.worker import listen
from .machine_code.kernels import shorten
from .options import part_parser
from .rows.flushed import FlushedCsv

COLUMNS = (
    *("kind", "device", "shape", "layout", "dtype", "op", "form", "strategy", "pattern", "scope"),
    *("size", "status", "compulsory_bytes", "predicted_bytes", "read_bytes"),
    *("written_bytes", "counted_over_predicted", "us", "launches", "kernels", "l2_bytes", "note"),
)
KERNELS = (
    *("team_kernel", "collect_statistics_kernel", "merge_kernel", "transform_input_kernel"),
    *("backward_reduce_kernel", "backward_elementwise_kernel", MARKER),
)
NAMED = ("strategy", "dtype", "layout", "op", "form", "shape")  # of a problem in the summary
PER_RUN = 6  # ncu answers when its program ends: rows of the first run are safe from the second
COUNTED, FAILED = "counted", "FAILED"


def grouped(launches: list[ncu.Launch]) -> list[list[ncu.Launch]]:
    """The launches of each problem: those behind a marker."""
    groups: list[list[ncu.Launch]] = []
    for launch in launches:
        if shorten(launch.name).startswith(MARKER):
            groups.append([])
        elif groups:
            groups[-1].append(launch)
    return groups


def counted(problem: dict[str, Any], launches: list[ncu.Launch]) -> dict[str, Any]:
    """The row of a problem with the launches that were found for it."""
    row = problem | {"kernels": " ".join(shorten(each.name).split("<")[0] for each in launches)}
    if len(launches) != problem["launches"]:
        note = f"ncu saw {len(launches)} launches of {problem['launches']}"
        return row | {"status": FAILED, "note": note}
    read, written = (
        sum(getattr(each, name) for each in launches) for name in ("read_bytes", "written_bytes")
    )
    row |= {"status": COUNTED, "read_bytes": round(read), "written_bytes": round(written)}
    row["counted_over_predicted"] = f"{(read + written) / problem['predicted_bytes']:.4f}"
    return row | {"us": f"{sum(each.ns for each in launches) / 1e3:.2f}"}


def count(tool: Path, first: int, deadline: float) -> list[dict[str, Any]]:
    """Rows of PER_RUN problems from the first on."""
    problems: list[dict[str, Any]] = []
    known: dict[str, Any] = {"kind": "measured"}

    def take(message: dict[str, Any]) -> None:
        if "problem" in message:
            problems.append(message["problem"])
        else:
            known.update(message)

    program = [sys.executable, "-m", "bench.gpu.counters_problems", str(first), str(PER_RUN)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        ended = listen(ncu.command(tool, log, KERNELS, program), take, deadline=deadline)
        text = log.read_text(errors="replace") if log.exists() else ""
    return rows_of(problems, text, known, ended)


def rows_of(
    problems: list[dict[str, Any]], text: str, known: dict[str, Any], ended: str
) -> list[dict[str, Any]]:
    """A row for each problem that was begun, from ncu's answer."""
    try:
        groups = grouped(ncu.parse(text))
        why = f"ncu said nothing of it: {ended}; {ncu.said(text)}"
    except ValueError as error:
        groups, why = [], str(error)
    rows = []
    for i, problem in enumerate(problems):
        found = groups[i] if i < len(groups) else None
        failed = problem | {"status": FAILED, "note": why}
        rows.append(known | (failed if found is None else counted(problem, found)))
    return rows or [known | {"status": FAILED, "note": why}]


def summary(rows: list[dict[str, Any]]) -> str:
    counts = [row for row in rows if row["status"] == COUNTED]
    device = next((r["device"] for r in rows if r.get("device")), "no device")
    verdict = "PASS" if len(counts) == len(PROBLEMS) else "FAIL"
    text = f"counters: {verdict} on {device}: {len(counts)} of {len(PROBLEMS)} problems counted"
    if counts:
        factors = [float(row["counted_over_predicted"]) for row in counts]
        far = max(counts, key=lambda row: abs(float(row["counted_over_predicted"]) - 1))
        text += f"; DRAM bytes {min(factors):.3f} to {max(factors):.3f} of the prediction, "
        text += "farthest " + " ".join(str(far[c]) for c in NAMED if far.get(c))
    failed = next((r["note"] for r in rows if r["status"] == FAILED), "")
    return f"{text}; {failed}" if failed else text


def main(arguments: list[str] | None = None) -> int:
    options = part_parser("bench.counters", __doc__, seconds=180.0).parse_args(arguments)
    tool = ncu.find_ncu()
    if not torch.cuda.is_available() or tool is None:
        lacking = "no GPU" if not torch.cuda.is_available() else "no ncu (Nsight Compute)"
        print(f"counters: nothing to count with: {lacking}")
        return 2
    table = FlushedCsv(options.out / "counters.csv", COLUMNS)
    deadline = time.monotonic() + options.seconds
    rows: list[dict[str, Any]] = []
    for first in range(0, len(PROBLEMS), PER_RUN):
        found = count(tool, first, deadline)
        table.write_all(found)
        rows += found
    print(summary(rows))
    return 0 if sum(row["status"] == COUNTED for row in rows) == len(PROBLEMS) else 1


if __name__ == "__main__":
    sys.exit(main())
