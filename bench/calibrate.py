"""`python -m bench calibrate FILE.csv`: fits the constants of the cost model to a tune file.

The formula is C++'s (csrc/plan/plan_costs.cpp), asked for the cost of every measured plan under
other constants. Times are taken as cost times one unit, the time of a move, and the constants that
make the logarithms agree best are found by damped least squares; one that no measured plan depends
on stays. Per problem it prints the regret, the time of the chosen plan over that of the best one
measured, before and after. A chosen plan that was not measured stands for the measured one that
differs least, and is marked by ~.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from batchnorm_cuda._build.extension import load_cuda, load_emulated

from .rows import records
from .tuning.candidates import Candidate, identity, list_plans
from .tuning.rows import COPY, MEASURED, OK, OPTIONS, RETIRED, TuneRow

Costs = dict[str, float]
Forced = tuple[Any, ...]

_STEPS = 40
# What a constant can be: an SM moves no less than its share, and reads alone are no more than three
# times as fast as the moves of a copy.
_BOUNDS = {"sm_rate": (1.0, 16.0), "reduce": (0.33, 16.0)}
_BOUND = (0.001, 1000.0)
_MOVE_BYTES = 8192  # csrc/plan/plan_costs.h


@dataclass
class Problem:
    """The plans of one problem that were measured, and their times."""

    title: str
    op: str
    dtype: str
    sizes: tuple[int, int, int]
    ms: dict[Forced, float]
    retired_ms: float = math.inf  # the least of kernels that are no longer there

    @property
    def best(self) -> Forced:
        return min(self.ms, key=lambda plan: self.ms[plan])

    @property
    def best_ms(self) -> float:
        return min(self.ms[self.best], self.retired_ms)


@dataclass(frozen=True)
class Data:
    kind: str
    name: str
    commit: str
    device: dict[str, Any]  # as the planner sees it
    problems: list[Problem]


def load(path: Path) -> Data:
    """Raises RecordsError where the file, or the one beside it, is not one of ours."""
    rows = records.read(path, TuneRow)
    beside = path.with_suffix(".json")
    try:
        facts = json.loads(beside.read_text())
        device = facts["planner_device"]
    except (OSError, ValueError, KeyError) as error:
        raise records.RecordsError(f"{beside}: expected the planner's device, {error!r}") from None
    found: dict[tuple[Any, ...], Problem] = {}
    for row in rows:
        title = f"{row.set} {row.shape} {row.layout} {row.dtype} {row.op}"
        new = Problem(title, row.op, row.dtype, (row.n, row.c, row.s), {})
        problem = found.setdefault(row.problem, new)
        if row.ms is None or row.strategy == COPY:
            continue
        if row.status == OK:
            problem.ms.setdefault(row.forced, row.ms)
        elif row.status == RETIRED:
            problem.retired_ms = min(problem.retired_ms, row.ms)
    problems = [problem for problem in found.values() if problem.ms]
    if not problems:
        raise records.RecordsError(f"{path}: no plan has a time")
    commit = str(facts.get("commit", "unknown"))
    return Data(rows[0].kind, rows[0].device, commit, device, problems)


@dataclass(frozen=True)
class Prediction:
    """Of one problem: costs of the measured plans, in their order, and the plan that is chosen."""

    costs: list[float]
    chosen: Forced
    exact: bool = True  # else the chosen plan was not measured, and this one is the nearest


def predict(extension: ModuleType, data: Data, problem: Problem, costs: Costs) -> Prediction:
    what = (extension, problem.op, problem.dtype, problem.sizes, data.device, costs)
    plans = list_plans(*what)
    known = {identity(plan): plan["cost"] for plan in plans}
    for forced in problem.ms:
        if forced not in known:  # one that the planner no longer looks at
            known[forced] = _cost_of(list_plans(*what, _options(forced)), problem, forced)
    chosen = next(identity(plan) for plan in plans if plan["chosen"])
    costs_of_measured = [known[plan] for plan in problem.ms]
    return Prediction(costs_of_measured, nearest(chosen, problem.ms), chosen in problem.ms)


def _options(forced: Forced) -> dict[str, Any]:
    pairs = zip(OPTIONS.items(), forced, strict=True)
    return {name: value for (name, none), value in pairs if value != none}


def _cost_of(plans: list[Candidate], problem: Problem, forced: Forced) -> float:
    if len(plans) != 1 or identity(plans[0])[:-1] != forced[:-1]:  # splits may be clamped
        raise records.RecordsError(f"{problem.title}: the planner has no plan {forced}")
    return plans[0]["cost"]


def nearest(plan: Forced, measured: Mapping[Forced, float]) -> Forced:
    """`plan`, or where it was left out the measured one that differs least: in size, at best."""
    counts = [list(OPTIONS).index(name) for name in ("team_size", "splits")]

    def distance(other: Forced) -> tuple[int, float]:
        pairs = list(zip(plan, other, strict=True))
        differ = sum(a != b for i, (a, b) in enumerate(pairs) if i not in counts)
        return differ, sum(abs(math.log((pairs[i][0] + 1) / (pairs[i][1] + 1))) for i in counts)

    return min(measured, key=distance)


def regrets(data: Data, predictions: Sequence[Prediction]) -> list[float]:
    pairs = zip(data.problems, predictions, strict=True)
    return [problem.ms[p.chosen] / problem.best_ms for problem, p in pairs]


def predict_all(extension: ModuleType, data: Data, costs: Costs) -> list[Prediction]:
    return [predict(extension, data, problem, costs) for problem in data.problems]


@dataclass(frozen=True)
class Fit:
    costs: Costs
    unit_ms: float  # of a move
    error: float  # root mean square of the logarithm of time over prediction


class _Fitter:
    """Damped least squares (Levenberg 1944) over the logarithms of constants and unit."""

    def __init__(self, extension: ModuleType, data: Data, names: Sequence[str]) -> None:
        self.extension, self.data, self.names = extension, data, names
        times = [ms for problem in data.problems for ms in problem.ms.values()]
        best = [problem.ms[problem.best] for problem in data.problems for _ in problem.ms]
        self.times = np.log(np.array(times))
        # A plan far from the best decides nothing.
        self.weights = np.array(best) / np.array(times)
        bounds = [_BOUNDS.get(name, _BOUND) for name in self.names]
        self.low, self.high = np.log(np.array(bounds)).T

    def residuals(self, logs: np.ndarray) -> tuple[np.ndarray, float]:
        """Weighted, for the unit that suits the constants best; and that unit."""
        predictions = predict_all(self.extension, self.data, self.costs(logs))
        costs = np.log(np.array([cost for each in predictions for cost in each.costs]))
        off = self.times - costs
        unit = float(np.average(off, weights=self.weights**2))
        return self.weights * (off - unit), unit

    def costs(self, logs: np.ndarray) -> Costs:
        return dict(zip(self.names, np.exp(logs).tolist(), strict=True))

    def jacobian(self, logs: np.ndarray, at: np.ndarray) -> np.ndarray:
        columns = []
        for i in range(len(logs)):
            step = 0.02 if logs[i] + 0.02 <= self.high[i] else -0.02
            moved = logs.copy()
            moved[i] += step
            columns.append((self.residuals(moved)[0] - at) / step)
        return np.stack(columns, axis=1)

    def run(self, start: Costs) -> Fit:
        logs = np.clip(np.log(np.array(list(start.values()))), self.low, self.high)
        at, unit = self.residuals(logs)
        damping = 0.01
        slopes = self.jacobian(logs, at)
        for _ in range(_STEPS):
            scale = np.maximum((slopes**2).sum(axis=0), 1e-6)
            left = np.concatenate([slopes, np.diag(np.sqrt(damping * scale))])
            right = np.concatenate([-at, np.zeros(len(logs))])
            move = np.linalg.lstsq(left, right, rcond=None)[0]
            moved = np.clip(logs + np.clip(move, -1, 1), self.low, self.high)
            there, unit_there = self.residuals(moved)
            gain = float((at**2).sum() - (there**2).sum())
            if gain <= 0:
                damping *= 4
                if damping > 1e6:
                    break
                continue
            done = gain < 1e-6 * float((at**2).sum())
            logs, at, unit, damping = moved, there, unit_there, damping / 4
            if done:
                break
            slopes = self.jacobian(logs, at)
        error = math.sqrt(float((at**2).sum() / (self.weights**2).sum()))
        return Fit(self.costs(logs), math.exp(unit), error)


def fit(extension: ModuleType, data: Data, start: Costs) -> Fit:
    return _Fitter(extension, data, list(start)).run(start)


def _name(plan: Forced) -> str:
    options = dict(zip(OPTIONS, plan, strict=True))
    if options["strategy"] != "team":
        return f"two passes/{options['splits']}"
    slab = f"/{options['slab']}" if options["slab"] else ""
    return f"{options['scope']} {options['team_size']}{slab}"


def _print_problems(data: Data, before: Sequence[Prediction], after: Sequence[Prediction]) -> None:
    columns = {"before": before, "after": after}
    found = {name: regrets(data, each) for name, each in columns.items()}
    print("".join(f"{name:>7}" for name in found) + f"  {'best':23}{'chosen after':23}problem")
    for i, (problem, p) in enumerate(zip(data.problems, after, strict=True)):
        chosen = _name(p.chosen) if p.exact else f"~{_name(p.chosen)}"
        values = "".join(f"{each[i]:7.3f}" for each in found.values())
        print(f"{values}  {_name(problem.best):23}{chosen:23}{problem.title}")
    for name, values in found.items():
        median, largest = statistics.median(values), max(values)
        print(f"regret, {name}: median {median:.3f}, largest {largest:.3f}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="of `python -m bench tune`")
    options = parser.parse_args(arguments)
    load_extension = load_cuda if torch.cuda.is_available() else load_emulated
    try:
        data = load(options.file)
        extension = load_extension()
        _report(extension, data, options.file)
    except records.RecordsError as error:
        print(f"python -m bench calibrate: {error}", file=sys.stderr)
        return 2
    return 0


def _report(extension: ModuleType, data: Data, path: Path) -> None:
    if data.kind != MEASURED:
        print(f"{data.kind}: no time below is a GPU's")
    start = extension.cost_model()
    fitted = fit(extension, data, start)
    before = predict_all(extension, data, start)
    _print_problems(data, before, predict_all(extension, data, fitted.costs))
    rate = _MOVE_BYTES * data.device["sm_count"] / fitted.unit_ms * 1e-6
    print(f"a move takes {fitted.unit_ms * 1000:.4f} us: {rate:.0f} GB/s of the whole device")
    print(f"times are off the prediction by {100 * fitted.error:.1f}% (root mean square)")
    print(f"for csrc/plan/plan_costs.h, {data.kind} ({data.name}, {path.name}, {data.commit}):")
    for name, value in fitted.costs.items():
        print(f"  {name:28} {value:8.3g}   {start[name]:g} before")
