"""Times a batch norm with what stands behind it: as operators of their own, or in one.

Outputs are compared with float64; what the gradients are, the tests of the fused kernels say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import batchnorm_cuda
from batchnorm_cuda._fusion.activations import BY_NAME
from batchnorm_cuda._ops.activations import parse

from ..cases.behind import Behind, FusedCase
from ..models import byte_model
from ..rows.fused import FusedRow
from ..rows.results import FAILED
from .clock import Call, measure, rotation
from .machine import Machine
from .measure import captured
from .providers import COPY, EPS, MOMENTUM, Tensors, select_backend
from .samples import Spread
from .steps import copy_of, make_tensors

TORCH, SEPARATE, FUSED = "torch", "ours", "ours:fused"
PROVIDERS = (TORCH, SEPARATE, FUSED)

# Of outputs of about 1, each by itself and one. Three operators round three times.
_TOLERANCES = {"fp16": 2e-2, "bf16": 4e-2, "fp32": 1e-4}

Run = Callable[[Tensors, Tensor], Tensor]  # of the inputs and a residual


def fused(behind: Behind) -> Run:
    def run(t: Tensors, residual: Tensor) -> Tensor:
        arguments = (t.x, t.running_mean, t.running_var, t.weight, t.bias, True, MOMENTUM, EPS)
        added = residual if behind.add else None
        return batchnorm_cuda.batch_norm(*arguments, residual=added, activation=behind.activation)

    return run


def separate(behind: Behind, batch_norm: Callable[..., Tensor] = F.batch_norm) -> Run:
    """In place behind the batch norm, as networks that save memory are written."""
    _, name, parameter = parse(behind.activation)
    activation = None if behind.activation is None else BY_NAME[name].made(parameter)

    def run(t: Tensors, residual: Tensor) -> Tensor:
        y = batch_norm(t.x, t.running_mean, t.running_var, t.weight, t.bias, True, MOMENTUM, EPS)
        if behind.add:
            y += residual
        return y if activation is None else activation(y)

    return run


def make_run(provider: str, behind: Behind) -> Run:
    if provider == FUSED:
        return fused(behind)
    ours = provider == SEPARATE
    return separate(behind, batchnorm_cuda.batch_norm if ours else F.batch_norm)


def make_call(case: FusedCase, run: Run, t: Tensors, residual: Tensor) -> Call:
    if case.bench.op == "forward":

        def forward() -> dict[str, Tensor]:
            with torch.no_grad():
                return {"output": run(t, residual)}

        return forward
    leaves = [each.detach().requires_grad_() for each in (t.x, t.weight, t.bias)]
    own = replace(t, x=leaves[0], weight=leaves[1], bias=leaves[2])
    added = residual.detach().requires_grad_()
    wanted = [*leaves, added] if case.behind.add else leaves

    def both() -> dict[str, Tensor]:
        output = run(own, added)
        grads = torch.autograd.grad(output, wanted, own.dy)
        return {"output": output.detach()} | {f"grad {n}": g for n, g in enumerate(grads)}

    return both


def problem(case: FusedCase, run: Run, t: Tensors, residual: Tensor) -> str | None:
    """What is wrong with the output."""
    with torch.no_grad():
        got = run(copy_of(t), residual).double()
        exact = Tensors(*(each.double() for each in vars(copy_of(t)).values()))
        wanted = separate(case.behind)(exact, residual.double())
    off = ((got - wanted).abs() / (1 + wanted.abs())).max().item()
    if off <= _TOLERANCES[case.bench.dtype]:
        return None
    return f"an output is off by {off:.3g} of itself and one"


def inputs(case: FusedCase, device: str) -> tuple[Tensors, Tensor]:
    t = make_tensors(case.bench, device, seed=0)
    return t, torch.randn_like(t.x)


@dataclass(frozen=True)
class Timed:
    spread: Spread
    method: str  # graph or events


def measure_runs(
    case: FusedCase,
    names: Iterable[str],
    make: Callable[[str], Run],
    machine: Machine,
    seconds: float,
) -> dict[str, Timed | str]:
    """By name, in turns: what each took, or why it was not timed. COPY is the floor."""
    found: dict[str, Timed | str] = {}
    calls: dict[str, list[Call]] = {}
    methods: dict[str, str] = {}
    with machine.scope():
        first = inputs(case, machine.device)
        count, fill = rotation(3 * case.bench.nbytes, machine.l2_bytes)
        sets = [first, *((copy_of(first[0]), first[1].clone()) for _ in range(count - 1))]
        for name in names:
            try:
                calls[name], methods[name] = _calls(case, name, make, sets, machine)
            except RuntimeError as reason:
                found[name] = " ".join(str(reason).split())[:200]
        spreads = measure(calls, machine.clock(fill), seconds)
        found |= {name: Timed(spread, methods[name]) for name, spread in spreads.items()}
        calls.clear()
    return found


def _calls(
    case: FusedCase,
    name: str,
    make: Callable[[str], Run],
    sets: list[tuple[Tensors, Tensor]],
    machine: Machine,
) -> tuple[list[Call], str]:
    if name == COPY:
        source = torch.zeros(case.compulsory_bytes // 2, dtype=torch.uint8, device=machine.device)
        target = torch.empty_like(source)
        calls: list[Call] = [lambda: {"copy": target.copy_(source)}]
    else:
        run = make(name)
        wrong = problem(case, run, *sets[0])
        if wrong is not None:
            raise RuntimeError(wrong)
        calls = [make_call(case, run, *each) for each in sets]
    calls, method, _ = captured(calls, machine)
    return calls, method


def rows(case: FusedCase, machine: Machine, seconds: float) -> Iterator[FusedRow]:
    """A row for each of PROVIDERS, also for one that fails."""
    try:
        found = measure_runs(
            case, PROVIDERS, lambda name: make_run(name, case.behind), machine, seconds
        )
        backends = _backends(case, machine)
    except (RuntimeError, MemoryError) as reason:  # CUDA's out of memory is the former
        found = dict.fromkeys(PROVIDERS, f"{type(reason).__name__}: {reason}"[:200])
        backends = {}
    machine.release()
    for name in PROVIDERS:
        timed = found[name]
        if isinstance(timed, str):
            yield case.row(name, machine.name, status=FAILED, note=timed)
            continue
        s = timed.spread
        values = {"ms": s.median, "ms_p20": s.low, "ms_p80": s.high, "samples": s.samples}
        if s.median > 0:
            values["gb_s"] = byte_model.gb_per_s(case.compulsory_bytes, s.median)
        named = {"backend": backends[name], "method": timed.method}
        yield case.row(name, machine.name, **values, **named)


def _backends(case: FusedCase, machine: Machine) -> dict[str, str]:
    t, _ = inputs(case, machine.device)
    ours = str(batchnorm_cuda.backend_for(t.x))
    return {TORCH: f"torch: {select_backend(t)}", SEPARATE: ours, FUSED: ours}
