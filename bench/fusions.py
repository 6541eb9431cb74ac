"""Batch norm with ReLU, and with a residual and ReLU, in one pass against one after the other.

    python -m bench.fusions --out FOLDER [--seconds S]

Times ours, cuDNN's batch norm followed by torch's addition and ReLU, the same under torch.compile,
and a copy of as many bytes. Writes FOLDER/fusions.csv, a row at a time; torch.compile comes last,
because it takes seconds a case. Without a GPU our results are compared on a small cut of every case
and nothing is timed.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from .cases.behind import Behind, FusedCase
from .cases.case import BenchCase
from .cases.shapes import Shape
from .options import part_parser
from .timing.fused import Run, Timed, fused, inputs, make_call, measure_runs, problem, separate
from .timing.machine import Machine, gpu
from .timing.providers import COPY, Tensors

_BEHIND = {"relu": Behind(False, "relu"), "add_relu": Behind(True, "relu")}
KINDS = tuple(_BEHIND)
PROVIDERS = ("ours", "cudnn", COPY)
_SHAPES = ((32, 256, 56, 56), (32, 1024, 14, 14))
_DTYPE = "fp16"
_SECONDS = 0.1  # of timing a case


@dataclass(frozen=True)
class Row:
    device: str
    shape: str
    layout: str
    dtype: str
    fusion: str
    op: str
    provider: str
    status: str
    ms: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    samples: int | None = None
    copy_percent: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Case:
    bench: BenchCase
    kind: str

    @property
    def fused(self) -> FusedCase:
        return FusedCase(self.bench, _BEHIND[self.kind])

    def row(self, device: str, provider: str, status: str, **values: object) -> Row:
        case = self.bench
        key = (device, case.shape.text, case.layout, case.dtype, self.kind, case.op, provider)
        return Row(*key, status, **values)


def cases(most_elements: int | None = None) -> list[Case]:
    """`most_elements`: cut for a machine without a GPU, in the batch and the width."""
    sizes = [(2, n_c[1] // 16, 7, 7) if most_elements else n_c for n_c in _SHAPES]
    return [
        Case(BenchCase(Shape("fusion", each), layout, _DTYPE, op), kind)
        for op in ("both", "forward")
        for each in sizes
        for layout in ("nhwc", "nchw")
        for kind in KINDS
    ]


def ours(kind: str) -> Run:
    return fused(_BEHIND[kind])


def one_by_one(kind: str) -> Run:
    return separate(_BEHIND[kind])


def make_run(provider: str, kind: str) -> Run:
    if provider == "ours":
        return ours(kind)
    if provider == "cudnn":
        return one_by_one(kind)
    torch._dynamo.reset()
    compiled = torch.compile(_flat(kind), dynamic=False, fullgraph=True)
    return lambda t, residual: compiled(*vars(t).values(), residual)


def _flat(kind: str) -> Callable[..., Tensor]:
    """Of tensors alone, for torch.compile."""
    run = one_by_one(kind)
    return lambda *tensors: run(Tensors(*tensors[:-1]), tensors[-1])


def measured_rows(case: Case, providers: tuple[str, ...], machine: Machine) -> Iterator[Row]:
    found = measure_runs(
        case.fused, providers, lambda name: make_run(name, case.kind), machine, _SECONDS
    )
    copy = found.get(COPY)
    for name in providers:
        timed = found[name]
        if isinstance(timed, str):
            yield case.row(machine.name, name, "failed", note=timed)
            continue
        s = timed.spread
        values = {"ms": s.median, "ms_p20": s.low, "ms_p80": s.high, "samples": s.samples}
        if isinstance(copy, Timed):
            values["copy_percent"] = 100 * copy.spread.median / s.median
        yield case.row(machine.name, name, "ok", **values)
    machine.release()


def append(path: Path, row: Row) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        if new:
            writer.writeheader()
        values = asdict(row).items()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values})


def compare_on_host() -> int:
    wrong = []
    for case in cases(most_elements=1):
        t, residual = inputs(case.fused, "cpu")
        found = problem(case.fused, ours(case.kind), t, residual)
        make_call(case.fused, ours(case.kind), t, residual)()
        wrong += [f"{case.bench.title} {case.kind}: {found}"] if found else []
    print(
        "\n".join([*wrong, f"{len(wrong)} of {len(cases())} cases wrong; without a GPU no times"])
    )
    return 1 if wrong else 0


def main() -> int:
    options = part_parser("bench.fusions", __doc__, seconds=60.0).parse_args()
    deadline = time.monotonic() + options.seconds
    if not torch.cuda.is_available():
        return compare_on_host()
    machine, done, failed = gpu(), 0, 0
    for providers in (PROVIDERS, ("compile",)):
        for case in cases():
            if time.monotonic() > deadline:
                break
            for row in measured_rows(case, providers, machine):
                append(options.out / "fusions.csv", row)
                failed += row.provider == "ours" and row.status != "ok"
            done += 1
    print(f"{done} of {2 * len(cases())} cases timed; ours failed in {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
