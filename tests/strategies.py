"""Every way to run the kernels: forced, and checked with the plan at each call."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import harness
import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from batchnorm_cuda._explain.explain import explain_forced
from batchnorm_cuda._ops import operators as ops

# Options of the plan by name. Three blocks, so that ranks are unequal; two are the least cluster.
TEAM = {"strategy": "team"}
FORCED: dict[str, dict[str, Any]] = {
    "two_pass": {"strategy": "two_pass"},
    "block": {"strategy": "team", "scope": "block", "team_size": 1},
    "grid": {**TEAM, "scope": "grid", "team_size": 3},
    "cluster": {**TEAM, "scope": "cluster", "team_size": 2},
}
TEAMS = [name for name in FORCED if name != "two_pass"]


def walk_of(layout: str, name: str) -> dict[str, str]:
    """Forces the walk that a layout is named after, where the planner may prefer another and a
    team of several blocks has room.
    """
    several = FORCED[name].get("team_size", 0) > 1
    return {"pattern": "along_row"} if "along a row" in layout and several else {}


def planned(x: Tensor, op: str, name: str, **walk: str) -> str:
    """What the plan makes of a forced strategy: its name, or that of what runs instead."""
    plan = explain_forced(x, FORCED[name] | walk, op=op)
    if plan.team is None:
        return "two_pass"
    if plan.team.size != FORCED[name]["team_size"]:
        return f"team of {plan.team.size}"
    return plan.team.scope


def expected(name: str, extension: ModuleType) -> str:
    """A device without clusters has to say so and run two passes."""
    has_clusters = extension.device_info()["max_cluster"] >= FORCED["cluster"]["team_size"]
    return name if has_clusters or name != "cluster" else "two_pass"


def launched(extension: ModuleType, step: Callable[[], object]) -> list[str]:
    """Names of the kernels that `step` launches, in order."""
    if not torch.cuda.is_available():
        extension._host_model.start_traffic()
        step()
        return extension._host_model.stop_traffic()["launches"]
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        step()
        torch.cuda.synchronize()
    ran = [e for e in record.events() if e.device_type == DeviceType.CUDA]
    copies = ("Memcpy", "Memset")
    return [
        e.name
        for e in sorted(ran, key=lambda e: e.time_range.start)
        if not e.name.startswith(copies)
    ]


def force(
    name: str,
    extension: ModuleType,
    plan_options: Callable[[dict], None],
    monkeypatch: pytest.MonkeyPatch,
    **walk: str,
) -> None:
    """Forces a strategy, and a walk if given, for the rest of the test; a training call that runs
    another strategy fails.
    """
    plan_options(FORCED[name] | walk)

    def check(x: Tensor, op: str) -> None:
        got = planned(x, op, name, **walk)
        assert got == expected(name, extension), f"{op} of {tuple(x.shape)} runs as {got}"

    def forward(x: Tensor, *rest: object) -> None:
        training = rest[5]
        if training:
            check(x, "forward")

    def backward(dy: Tensor, x: Tensor, *rest: object) -> None:
        check(x, "backward")

    harness.watch(monkeypatch, ops.forward, forward)
    harness.watch(monkeypatch, ops.backward, backward)
