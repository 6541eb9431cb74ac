"""A training step of torchvision's ResNet-50 with torch.nn's batch norms, with ours, and fused.

    python3 -m bench.training_step --out DIR [--seconds 300]

Batch 128 of 224 x 224, autocast, forward, loss, backward, SGD with momentum: channels-last in bf16
and fp16, bf16 also as compiled by torch.compile, and NCHW in bf16 if there is time.
"fused" is `convert(model, fuse=True)`: ours with the adds and ReLUs behind them. DIR/training.csv
gets a row for each as soon as it is known: median and percentiles of the milliseconds of a step,
the part of it in kernels of batch norm, with whatever is fused to it, peak memory, and losses.
Variants start from the same weights and data; losses that differ by more than rounding explains
make a row INACCURATE.

The last line says what came out. Exit status 0: all that ran is right; 1: something failed or is
inaccurate; 2: nothing to run on. With BATCHNORM_CUDA_EMULATE=1 and no GPU a small ResNet takes one
step on the host model, without a time.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .gpu.worker import listen
from .options import part_parser
from .rows.flushed import FlushedCsv

COLUMNS = (
    *("kind", "device", "model", "batch", "layout", "dtype", "variant", "status"),
    *("ms", "p20", "p80", "samples", "bn_ms", "bn_share", "peak_mib"),
    *("loss_first", "loss", "note"),
)
OK, INACCURATE, FAILED, NOT_RUN = "ok", "INACCURATE", "FAILED", "NOT RUN"
# Relative, of the first step and of that behind some updates: bf16 keeps 8 bits, and what a step
# rounds off the next ones carry on.
TOLERANCES = (0.01, 0.05)


@dataclass(frozen=True)
class Job:
    """A process, by what it is worth."""

    dtype: str
    layout: str
    variants: tuple[str, ...]
    limit: float  # seconds it may take
    least: float  # that are worth a start


EAGER = ("torch", "ours", "fused")
JOBS = (
    Job("bf16", "nhwc", EAGER, 90, 25),
    Job("fp16", "nhwc", EAGER, 90, 25),
    Job("bf16", "nhwc", ("torch+compile",), 150, 45),
    Job("bf16", "nhwc", ("ours+compile",), 150, 45),
    Job("bf16", "nchw", EAGER, 90, 25),
)
HOST_JOBS = tuple(Job(dtype, "nhwc", EAGER, 300, 1) for dtype in ("bf16", "fp16"))


class Report:
    """Rows as they come, each against the losses of torch.nn's batch norms in the same dtype."""

    def __init__(self, table: FlushedCsv) -> None:
        self.table = table
        self.rows: list[dict[str, Any]] = []
        self.reference: dict[str, tuple[float, float]] = {}

    def add(self, row: dict[str, Any]) -> None:
        row = dict(row)
        if row["status"] == OK:
            losses = float(row["loss_first"]), float(row["loss"])
            of = self.reference.setdefault(row["dtype"], losses)
            close = [
                abs(loss - wanted) <= tolerance * abs(wanted)
                for loss, wanted, tolerance in zip(losses, of, TOLERANCES, strict=True)
            ]
            if not all(close):  # a NaN is close to nothing
                row["status"] = INACCURATE
                row["note"] = f"losses {losses}, of {of} expected; {row.get('note', '')}"
        self.rows.append(row)
        self.table.write(row)
        print(self.line(row), flush=True)

    def line(self, row: dict[str, Any]) -> str:
        name = f"{row['dtype']} {row['layout']} {row['variant']}"
        figures = [
            f"{row[c]} {unit}"
            for c, unit in (("ms", "ms"), ("bn_ms", "ms of batch norm"))
            if row.get(c)
        ]
        return f"{name}: {', '.join([row['status'], *figures, row.get('note', '')]).rstrip(', ')}"


def run_job(job: Job, command: list[str], deadline: float, report: Report) -> None:
    """All variants of the job get a row, whatever becomes of its process."""
    trained: dict[str, dict[str, Any]] = {}
    done: set[str] = set()

    def take(message: dict[str, Any]) -> None:
        if "trained" in message:
            trained[message["trained"]["variant"]] = message["trained"]
        else:
            done.add(message["row"]["variant"])
            report.add(message["row"])

    now = time.monotonic()
    if deadline - now < job.least:
        status, why = NOT_RUN, f"{max(0.0, deadline - now):.0f} s were left"
    else:
        status = FAILED
        why = listen(command, take, deadline=min(deadline, now + job.limit))
    for variant in job.variants:
        if variant not in done:
            known = {"dtype": job.dtype, "layout": job.layout, "variant": variant}
            report.add(known | trained.get(variant, {}) | {"status": status, "note": why})


def summary(rows: list[dict[str, Any]]) -> str:
    """Ours and fused against torch.nn's of the same dtype and layout, where both were timed."""
    timed = {(r["dtype"], r["layout"], r["variant"]): r for r in rows if r.get("ms")}
    parts = []
    for (dtype, layout, variant), row in timed.items():
        name, _, compiled = variant.partition("+")
        of = timed.get((dtype, layout, variant.replace(name, "torch")))
        if name != "torch" and of is not None:
            kind = (" fused" if name == "fused" else "") + (" compiled" if compiled else "")
            parts.append(f"{dtype} {layout}{kind} {row['ms']} ms, torch.nn {of['ms']} ms")
    counts = ", ".join(
        f"{sum(r['status'] == s for r in rows)} {s}" for s in (OK, INACCURATE, FAILED, NOT_RUN)
    )
    return "; ".join([counts, *parts])


def run(jobs: tuple[Job, ...], worker: list[str], out: Path, seconds: float) -> int:
    report = Report(FlushedCsv(out / "training.csv", COLUMNS))
    deadline = time.monotonic() + seconds
    for job in jobs:
        run_job(job, [*worker, job.dtype, job.layout, *job.variants], deadline, report)
    statuses = [row["status"] for row in report.rows]
    passed = OK in statuses and not {INACCURATE, FAILED} & set(statuses)
    device = next((r["device"] for r in report.rows if r.get("device")), "no device")
    verdict = "PASS" if passed else "FAIL"
    print(f"training step: {verdict} on {device}: {summary(report.rows)}")
    return 0 if passed else 1


def main(arguments: list[str] | None = None) -> int:
    options = part_parser("bench.training_step", __doc__, seconds=300.0).parse_args(arguments)
    gpu = torch.cuda.is_available()
    if importlib.util.find_spec("torchvision") is None:
        print("training step: nothing to run: torchvision is not installed")
        return 2
    if not gpu and os.environ.get("BATCHNORM_CUDA_EMULATE") != "1":
        print("training step: nothing to run on: no GPU, and BATCHNORM_CUDA_EMULATE=1 is not set")
        return 2
    worker = [sys.executable, "-m", "bench.gpu.training_step_worker"]
    return run(JOBS if gpu else HOST_JOBS, worker, options.out, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
