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
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import batchnorm_cuda

from .cases.case import BenchCase
from .cases.shapes import Shape
from .options import part_parser
from .timing.clock import Call, measure, rotation
from .timing.machine import Machine, gpu
from .timing.measure import captured
from .timing.providers import EPS, MOMENTUM, Tensors
from .timing.steps import copy_of, make_tensors

KINDS = ("relu", "add_relu")
PROVIDERS = ("ours", "cudnn", "copy")
_SHAPES = ((32, 256, 56, 56), (32, 1024, 14, 14))
_DTYPE = "fp16"
_SECONDS = 0.1  # of timing a case
_TOLERANCE = 2e-2  # of outputs of about 1 in fp16, whose own error is 1e-3

Run = Callable[[Tensors, Tensor], Tensor]


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
    def moved_bytes(self) -> int:
        """At least: x and the output, for the backward x and two gradients; the residual or its
        gradient once in each. Our mask of a sixteenth is not counted.
        """
        passes = {"forward": 2, "both": 5}[self.bench.op]
        added = {"forward": 1, "both": 2}[self.bench.op] if self.kind == "add_relu" else 0
        return (passes + added) * self.bench.nbytes

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
    def run(t: Tensors, residual: Tensor) -> Tensor:
        arguments = (t.x, t.running_mean, t.running_var, t.weight, t.bias, True, MOMENTUM, EPS)
        added = residual if kind == "add_relu" else None
        return batchnorm_cuda.batch_norm(*arguments, residual=added, activation="relu")

    return run


def one_by_one(kind: str) -> Run:
    def run(t: Tensors, residual: Tensor) -> Tensor:
        y = F.batch_norm(t.x, t.running_mean, t.running_var, t.weight, t.bias, True, MOMENTUM, EPS)
        return torch.relu(y + residual if kind == "add_relu" else y)

    return run


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


def make_call(case: Case, run: Run, t: Tensors, residual: Tensor) -> Call:
    if case.bench.op == "forward":

        def forward() -> dict[str, Tensor]:
            with torch.no_grad():
                return {"output": run(t, residual)}

        return forward
    leaves = [each.detach().requires_grad_() for each in (t.x, t.weight, t.bias)]
    own = replace(t, x=leaves[0], weight=leaves[1], bias=leaves[2])
    added = residual.detach().requires_grad_()
    wanted = [*leaves, added] if case.kind == "add_relu" else leaves

    def both() -> dict[str, Tensor]:
        output = run(own, added)
        grads = torch.autograd.grad(output, wanted, own.dy)
        return {"output": output.detach()} | {f"grad {n}": g for n, g in enumerate(grads)}

    return both


def problem(case: Case, run: Run, t: Tensors, residual: Tensor) -> str | None:
    """The output against float64; what the gradients are, the tests of the fused kernels say."""
    with torch.no_grad():
        got = run(copy_of(t), residual).double()
        exact = Tensors(*(each.double() for each in vars(copy_of(t)).values()))
        wanted = one_by_one(case.kind)(exact, residual.double())
    off = ((got - wanted).abs() / (1 + wanted.abs())).max().item()
    return None if off <= _TOLERANCE else f"an output is off by {off:.3g} of itself and one"


def inputs(case: Case, device: str) -> tuple[Tensors, Tensor]:
    t = make_tensors(case.bench, device, seed=0)
    return t, torch.randn_like(t.x)


def measured_rows(case: Case, providers: tuple[str, ...], machine: Machine) -> Iterator[Row]:
    with machine.scope():
        t, residual = inputs(case, machine.device)
        count, fill = rotation(3 * case.bench.nbytes, machine.l2_bytes)
        sets = [(t, residual)]
        sets += [(copy_of(t), residual.clone()) for _ in range(count - 1)]
        calls, failed = {}, {}
        for name in providers:
            try:
                calls[name] = _calls(case, name, sets, machine)
            except RuntimeError as reason:
                failed[name] = " ".join(str(reason).split())[:200]
        spreads = measure(calls, machine.clock(fill), _SECONDS)
    for name in providers:
        if name in failed:
            yield case.row(machine.name, name, "failed", note=failed[name])
            continue
        s = spreads[name]
        values = {"ms": s.median, "ms_p20": s.low, "ms_p80": s.high, "samples": s.samples}
        if "copy" in spreads:
            values["copy_percent"] = 100 * spreads["copy"].median / s.median
        yield case.row(machine.name, name, "ok", **values)
    machine.release()


def _calls(
    case: Case, name: str, sets: list[tuple[Tensors, Tensor]], machine: Machine
) -> list[Call]:
    if name == "copy":
        source = torch.zeros(case.moved_bytes // 2, dtype=torch.uint8, device=machine.device)
        target = torch.empty_like(source)
        return captured([lambda: {"copy": target.copy_(source)}], machine)[0]
    run = make_run(name, case.kind)
    wrong = problem(case, run, *sets[0]) if name == "ours" else None
    if wrong is not None:
        raise RuntimeError(wrong)
    return captured([make_call(case, run, *each) for each in sets], machine)[0]


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
        t, residual = inputs(case, "cpu")
        found = problem(case, ours(case.kind), t, residual)
        make_call(case, ours(case.kind), t, residual)()
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
