"""Every way to run the kernels: forced, and checked with the plan at each call."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from batchnorm_cuda import explain, ops

# Options of the plan by name. Three blocks, so that ranks are unequal; two are the least cluster.
FORCED = {
    "two_pass": {"strategy": "two_pass"},
    "block": {"strategy": "team", "scope": "block", "team_size": 1},
    "grid": {"strategy": "team", "scope": "grid", "team_size": 3},
    "cluster": {"strategy": "team", "scope": "cluster", "team_size": 2},
}
TEAMS = [name for name in FORCED if name != "two_pass"]


def planned(x: Tensor, op: str, name: str) -> str:
    """What the plan makes of a forced strategy: its name, or that of what runs instead."""
    plan = explain(x, op=op, **FORCED[name])
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
) -> None:
    """Forces a strategy for the rest of the test; a training call that runs another one fails."""
    plan_options(FORCED[name])

    def check(x: Tensor, op: str) -> None:
        got = planned(x, op, name)
        assert got == expected(name, extension), f"{op} of {tuple(x.shape)} runs as {got}"

    def forward(x: Tensor, *rest: object) -> tuple[Tensor, ...]:
        training = rest[5]
        if training:
            check(x, "forward")
        return run_forward(x, *rest)

    def backward(dy: Tensor, x: Tensor, *rest: object) -> tuple[Tensor | None, ...]:
        check(x, "backward")
        return run_backward(dy, x, *rest)

    run_forward, run_backward = ops.forward, ops.backward
    monkeypatch.setattr(ops, "forward", forward)
    monkeypatch.setattr(ops, "backward", backward)
