"""Every kernel family once, on small problems, against float64: the first thing to run on a GPU.

    python3 -m bench.smoke --out DIR [--seconds 120]

A process per dtype runs its cases (bench/gpu/smoke_cases.py): what crashes, hangs or loses the CUDA
context is a row that names its case, and the next process goes on behind it. DIR/smoke.csv has a
row for each case and for each kernel instance that is compiled, whether it ran; instances that did
not are listed in DIR/smoke-instances.txt.

The last line says what came out. Exit status 0: all passed; 1: a result was wrong, or cases did not
run; 2: nothing to run on. With BATCHNORM_CUDA_EMULATE=1 and no GPU a cut of the cases runs on the
host model, which says nothing about a GPU.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .gpu import smoke_cases
from .gpu.smoke_worker import FAIL, NOT_RUN, PASS, UNREACHED
from .gpu.worker import listen
from .machine_code import instances
from .options import part_parser
from .rows.flushed import FlushedCsv

COLUMNS = (
    *("kind", "case", "status", "error", "note", "ran", "dtype", "op", "pattern", "shape"),
    *("layout", "form", "scope", "size", "keeps", "rounds", "index_bits", "seconds"),
)
RESTARTS = 4  # of a group, before what is left of it is given up
SECONDS_PER_CASE = 60  # without a word: it hangs


@dataclass
class Group:
    """What is known of one process's cases so far."""

    name: str
    command: list[str]
    cases: int = 0
    done: int = 0
    current: dict[str, Any] | None = None  # started and not answered
    ran: set[str] = field(default_factory=set)
    libraries: Sequence[str] = ()
    device: str = ""
    worst: float = 0.0
    statuses: Counter = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    ended: bool = False

    def take(self, message: dict[str, Any], table: FlushedCsv) -> None:
        if "cases" in message:
            self.cases, self.libraries = message["cases"], message["libraries"]
            self.device = message["device"]
        if "start" in message:
            self.done, self.current = message["start"], message["case"]
        if "row" in message:
            self.done, self.current = self.done + 1, None
            self.record(message["row"], table)
        self.ran |= set(message.get("ran", ()))
        self.ended |= "end" in message

    def record(self, row: dict[str, Any], table: FlushedCsv) -> None:
        self.statuses[row["status"]] += 1
        if row["status"] == FAIL:
            self.failed.append(f"{row['case']}: {row.get('note', '')}")
        elif row.get("error"):
            self.worst = max(self.worst, float(row["error"]))
        table.write({"kind": "case"} | row)


def follow(group: Group, deadline: float, table: FlushedCsv) -> None:
    """Runs the group to its end, starting again behind a case that took the process along."""
    for _ in range(RESTARTS + 1):
        command = [*group.command, "--first", str(group.done)]
        take = partial(group.take, table=table)
        why = listen(command, take, deadline=deadline, patience=SECONDS_PER_CASE)
        if group.ended:
            return
        late = time.monotonic() >= deadline
        if group.current is not None and not late:
            group.record(group.current | {"status": FAIL, "note": why}, table)
            group.done, group.current = group.done + 1, None
        elif group.cases == 0 or late:  # it never began, or there is no time for another
            break
    left = group.cases - group.done
    what = {"case": f"{group.name}: {left or 'all'} cases", "dtype": group.name}
    group.record(what | {"status": FAIL if not group.cases else NOT_RUN, "note": why}, table)
    group.statuses[NOT_RUN] += max(0, left - 1)


def coverage(groups: list[Group], out: Path, table: FlushedCsv) -> str:
    """Rows and list of the instances, and their summary."""
    libraries = next((group.libraries for group in groups if group.libraries), ())
    if not libraries:
        return "no kernel instance known"
    ran = instances.short_names(name for group in groups for name in group.ran)
    found, tool = instances.compiled(libraries)
    if not found:
        return f"{len(ran)} kernel instances ran of an unknown number ({tool})"
    table.write_all(
        [{"kind": "instance", "case": name, "ran": int(name in ran)} for name in sorted(found)]
    )
    idle = sorted(found - ran)
    (out / "smoke-instances.txt").write_text("".join(f"{name}\n" for name in idle))
    return f"{len(found & ran)} of {len(found)} kernel instances ran (listed by {tool})"


def run(groups: list[Group], out: Path, seconds: float) -> int:
    """Follows all groups at once; prints failures and the summary."""
    table = FlushedCsv(out / "smoke.csv", COLUMNS)
    deadline = time.monotonic() + seconds
    began = time.monotonic()
    with ThreadPoolExecutor(len(groups)) as pool:
        list(pool.map(lambda group: follow(group, deadline, table), groups))
    total = sum((group.statuses for group in groups), Counter())
    for line in [line for group in groups for line in group.failed][:20]:
        print(f"{FAIL} {line}"[:300])
    covered = coverage(groups, out, table)
    passed = not total[FAIL] and not total[NOT_RUN] and total[PASS] > 0
    device = next((group.device for group in groups if group.device), "no device")
    print(
        f"smoke: {PASS if passed else FAIL} on {device}: {total[PASS]} cases passed, "
        f"{total[FAIL]} failed, {total[NOT_RUN]} not run, {total[UNREACHED]} unreachable; worst "
        f"error {max(group.worst for group in groups):.2f} of its tolerance; {covered}; "
        f"{time.monotonic() - began:.0f} s"
    )
    return 0 if passed else 1


def main(arguments: list[str] | None = None) -> int:
    parser = part_parser("bench.smoke", __doc__, seconds=120.0)
    parser.add_argument("--all", action="store_true", help="all cases on the host model, too")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and os.environ.get("BATCHNORM_CUDA_EMULATE") != "1":
        print("smoke: nothing to run on: no GPU, and BATCHNORM_CUDA_EMULATE=1 is not set")
        return 2
    more = ["--all"] if options.all else []
    worker = [sys.executable, "-m", "bench.gpu.smoke_worker"]
    groups = [Group(dtype, [*worker, dtype, *more]) for dtype in smoke_cases.DTYPES]
    return run(groups, options.out, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
