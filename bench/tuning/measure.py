"""Forces each plan of a problem, checks what it computes, and times them all in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..cases.case import BenchCase
from ..timing.clock import CACHES, Call, Clock, interleave, rotation, rounds_for
from ..timing.machine import Machine
from ..timing.providers import EPS, MOMENTUM, Tensors
from ..timing.samples import spread
from ..timing.steps import copy_of, make_copy, make_tensors
from .candidates import Candidate
from .rows import FAILED, INACCURATE, OK, UNSUPPORTED

# Activations of a set, and as many again that a graph keeps.
_TENSORS_PER_SET = 4
_WARM_UP = 3
# A plan so many times slower than the fastest keeps the few samples that told.
_SLOW = 3.0
_REFUSED = "the device refused to launch a team, and other kernels took its place"
_COPY = -1  # among the plans' indices
# Two plans sum in different orders: a result near a tie rounds to either side, and sums that cancel
# differ by more than their own roundoff.
_TOLERANCE = {"fp16": 4e-3, "bf16": 3e-2, "fp32": 2e-4}


@dataclass(frozen=True)
class Limits:
    seconds: float  # of timing for each plan
    rounds: tuple[int, int]  # the fewest and the most


@dataclass
class Outcomes:
    """What the rows of the plans, and of the copy, will say."""

    plans: list[dict[str, Any]] = field(default_factory=list)
    copy: dict[str, Any] = field(default_factory=dict)


def measure_plans(
    case: BenchCase,
    plans: Sequence[Candidate],
    extension: ModuleType,
    machine: Machine,
    limits: Limits,
) -> Outcomes:
    outcomes = Outcomes([{} for _ in plans])
    with machine.scope():
        try:
            _measure(case, plans, extension, machine, limits, outcomes)
        except (RuntimeError, MemoryError) as reason:  # CUDA's out of memory is the former
            for each in (*outcomes.plans, outcomes.copy):
                if "ms" not in each and each.get("status", OK) == OK:
                    each.update(_failure(reason))
        finally:
            extension.set_plan_options({})
    machine.release()
    return outcomes


def _measure(
    case: BenchCase,
    plans: Sequence[Candidate],
    extension: ModuleType,
    machine: Machine,
    limits: Limits,
    outcomes: Outcomes,
) -> None:
    count, fill = rotation(2 * case.nbytes, machine.l2_bytes)
    affordable = machine.memory_bytes // (_TENSORS_PER_SET * case.nbytes * 2)
    first = make_tensors(case, machine.device, seed=0)
    sets = [first] + [copy_of(first) for _ in range(max(1, min(count, affordable)) - 1)]
    extension.set_plan_options({})
    steps = [_step(case, extension, t) for t in sets]
    expected = [each.clone() for each in steps[0]()]
    calls: dict[int, list[Call]] = {}
    device = extension.device_info()
    for i, plan in enumerate(plans):
        forced = [_forced(extension, plan["options"], step) for step in steps]
        try:
            got = forced[0]()
            if extension.device_info() != device:  # less what it refused by now
                outcomes.plans[i] = {"status": UNSUPPORTED, "note": _REFUSED}
                continue
            outcomes.plans[i] = _check(case, got, expected)
            if outcomes.plans[i]["status"] == OK:
                calls[i], outcomes.plans[i]["method"] = _captured(forced, machine)
        except (RuntimeError, ValueError) as reason:
            outcomes.plans[i] = _failure(reason)
    large = case.compulsory_bytes >= CACHES * machine.l2_bytes
    copies: list[Call] = [make_copy(case, machine.device) for _ in sets[: 1 if large else None]]
    outcomes.copy = {"status": OK}
    calls[_COPY], outcomes.copy["method"] = _captured(copies, machine)
    always = {i for i, plan in enumerate(plans) if plan["chosen"]} | {_COPY}
    for i, times in _times(calls, always, machine.clock(fill), limits).items():
        (outcomes.copy if i == _COPY else outcomes.plans[i]).update(times)


def _step(case: BenchCase, extension: ModuleType, t: Tensors) -> Callable[[], list[Tensor]]:
    """The pass by the extension itself, without Python between it and the kernels."""
    running = (t.running_mean, t.running_var, None)

    def forward() -> list[Tensor]:
        return list(extension.forward(t.x, t.weight, t.bias, *running, True, MOMENTUM, EPS))

    if case.op == "forward":
        return forward
    mean, invstd = forward()[1:]

    def backward() -> list[Tensor]:
        saved = (t.weight, t.bias, mean, invstd)
        return list(extension.backward(t.dy, t.x, *saved, True, True, True, True))

    return backward


def _forced(
    extension: ModuleType, options: dict[str, Any], step: Callable[[], list[Tensor]]
) -> Callable[[], list[Tensor]]:
    def call() -> list[Tensor]:
        extension.set_plan_options(options)
        return step()

    return call


def _check(case: BenchCase, got: list[Tensor], want: list[Tensor]) -> dict[str, Any]:
    """The first entries of an outcome: do the results agree with those of the chosen plan?"""
    worst = max(_distance(a, b) for a, b in zip(got, want, strict=True))
    limit = _TOLERANCE[case.dtype]
    if worst <= limit:
        return {"status": OK}
    return {"status": INACCURATE, "note": f"off by {worst:.3g}, expected at most {limit}"}


def _distance(got: Tensor, want: Tensor) -> float:
    """The largest difference over the larger of 1 and the largest value; infinite for a NaN."""
    got, want = got.float(), want.float()
    off = (got - want).abs().amax() / want.abs().amax().clamp_min(1)
    return float("inf") if torch.isnan(off) else off.item()


def _captured(calls: list[Call], machine: Machine) -> tuple[list[Call], str]:
    """As graphs where every one can be captured; all keep their results until the last is there, so
    that none is written where the one before left its own in the cache.
    """
    if machine.capture is None:
        return calls, "host" if machine.device == "cpu" else "events"
    for call in calls:  # each must have run once: that loads kernels
        call()
    try:
        graphs = [machine.capture(call) for call in calls]
    except RuntimeError:
        return calls, "events"
    replays = [replay for replay, _ in graphs]
    for replay in replays:  # the first replay uploads the graph
        replay()
    return replays, "graph"


def _times(
    calls: dict[int, list[Call]], always: set[int], clock: Clock, limits: Limits
) -> dict[int, dict[str, Any]]:
    """By the plan's index. The slow ones but `always` keep the samples that told."""
    named = {str(i): each for i, each in calls.items()}
    # The first calls load kernels.
    samples = {int(i): times[1:] for i, times in interleave(named, clock, _WARM_UP).items()}
    trial = {i: min(times) for i, times in samples.items()}
    slow = _SLOW * min(ms for i, ms in trial.items() if i != _COPY or len(calls) == 1)
    fast = [i for i, ms in trial.items() if i in always or ms <= slow]
    round_ms = sum(trial[i] for i in fast)
    rounds = rounds_for(limits.seconds * len(fast), round_ms, limits.rounds)
    timed = interleave({str(i): calls[i] for i in fast}, clock, rounds)
    samples |= {int(i): times for i, times in timed.items()}
    found = {}
    for i, times in samples.items():
        s = spread(times)
        found[i] = {"ms": s.median, "ms_p20": s.low, "ms_p80": s.high, "samples": s.samples}
    return found


def _failure(reason: BaseException) -> dict[str, Any]:
    lines = str(reason).strip().splitlines()
    text = f"{type(reason).__name__}: {lines[0] if lines else 'no message'}"
    return {"status": FAILED, "note": text[:200]}
