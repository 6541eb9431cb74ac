"""Problems under described devices: their plans, what these count, and the largest of a scan.

A count is a number that the plan chooses and that a kernel loops over, indexes by or holds that
many of. Where the same number drives another loop (by access pattern, scope) it is a count
of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from cases import Case

from batchnorm_cuda import devices
from bench.models.traffic_model import scaled_device

FORWARD, BACKWARD = "forward_training", "backward_training"
DOUBLE_BACKWARD = "double_backward_training"

# N, C and S of the scan, those of networks among them, up to as many elements.
SIZES = (
    (1, 8, 1024),
    (1, 3, 7, 12, 64, 257, 1000, 2048),
    (1, 2, 49, 1225, 12544, 2**17),
)
MAX_NUMEL = 2**28
# Of these windows and channels of a slab differ; bfloat16 is like float16.
DTYPES = ("float16", "float32")

Sizes = tuple[int, int, int]
Plan = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """What to run on a described device, with the choices of the plan that are forced."""

    device: str
    op: str
    dtype: torch.dtype
    case: Case
    options: dict[str, Any] = field(default_factory=dict)
    sms: int | None = None  # what the device is cut to

    def properties(self) -> dict[str, Any]:
        return devices.planner_properties(scaled_device(self.device, self.sms))

    def plan(self, extension: ModuleType) -> Plan:
        return make_plan(
            extension,
            self.op,
            self.case.geometry,
            dtype_name(self.dtype),
            self.properties(),
            **self.options,
        )


def forced(choice: str) -> dict[str, Any]:
    """Options of the plan: "two_pass 680", its splits, or "grid 88 along_c 8", its slab."""
    words = choice.split()
    if words[0] == "two_pass":
        options = {"strategy": "two_pass"}
        return options | ({"splits": int(words[1])} if len(words) > 1 else {})
    scope, size, pattern = words[:3]
    options = {"strategy": "team", "scope": scope, "team_size": int(size), "pattern": pattern}
    return options | ({"slab": int(words[3])} if len(words) > 3 else {})


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def aligned(op: str) -> dict[str, int]:
    """That all tensors are, to the planner."""
    shifts = {} if op == FORWARD else {"grad_output_shift": 0}
    return shifts | ({"grad_grad_input_shift": 0} if op == DOUBLE_BACKWARD else {})


def make_plan(
    extension: ModuleType,
    op: str,
    sizes: Sizes,
    dtype: str,
    device: dict[str, Any],
    **options: object,
) -> Plan:
    return extension.make_plan(op, *sizes, dtype, device, aligned(op) | options)


def candidates(
    extension: ModuleType,
    op: str,
    sizes: Sizes,
    dtype: str,
    device: dict[str, Any],
    **facts: object,
) -> list[dict[str, Any]]:
    """Options that force each of the plans that may be chosen."""
    plans = extension.plan_candidates(op, *sizes, dtype, device, aligned(op) | facts)
    return [plan["options"] for plan in plans]


def counts(plan: Plan) -> dict[str, int]:
    return dict(_counts_of_team(plan) if "team" in plan else _counts_of_stages(plan))


def _counts_of_team(plan: Plan) -> Iterator[tuple[str, int]]:
    team, t = plan["team"], plan["team"]["traversal"]
    scope, pattern = team["scope"], team["pattern"]
    held = team["register_windows"] + team["shared_windows"]
    yield f"rounds, {scope}", team["rounds"]
    yield f"windows, {pattern}, of {team['tensors']}", held
    if pattern == "along_s":
        yield "channels of a block", t["threads_y"]
    if pattern == "along_row":
        form = "exact" if t["exact"] else "masked"
        yield f"row_repeat, team, {form}", t["row_repeat"]
        yield f"segments, {form}", t["segments"]
    if scope == "cluster":
        yield f"ranks of a cluster, {pattern}", team["size"]
    if scope == "grid":
        channels = {
            "along_s": t["threads_y"],
            "along_c": t["threads_x"] * plan["vec"],
            "along_row": t["segments"],
        }[pattern]
        levels = "two levels" if team["two_level"] else "one level"
        yield f"ranks, {levels}, {pattern}", team["size"]
        yield f"channels of a slot, {levels}, {pattern}", channels
        yield "slots and totals", 2 * (team["grid"] + team["two_level"] * team["teams"])
        if team["two_level"]:
            yield f"channels of a slice, {pattern}", math.ceil(channels / team["size"])


def _counts_of_stages(plan: Plan) -> Iterator[tuple[str, int]]:
    for stage in ("reduce", "elementwise"):
        t = plan[stage]
        yield f"splits, {stage}, {t['pattern']}", t["splits"]
        most = t["per_split"] + 1  # units of a stretch
        yield f"channel blocks of a stretch, {stage}", min(most // t["work"], t["channel_blocks"])
        if t["pattern"] == "along_s":
            runs = math.ceil(min(most, t["work"]) / max(t["row_windows"], 1))
            yield f"edge runs, {stage}", 0 if t["exact"] else runs
        else:
            yield f"row_repeat, {stage}, {t['pattern']}", t["row_repeat"]
    merge = plan["merge"]
    yield "rows of a merge", merge["rows"]
    yield "rows of a thread of a merge", math.ceil(merge["rows"] / merge["threads_y"])


def scanned() -> Iterator[tuple[Sizes, str, str]]:
    """Sizes in both layouts, dtype and operation."""
    for n, c, s in itertools.product(*SIZES):
        if n * c * s <= MAX_NUMEL:
            layouts = dict.fromkeys([(n, c, s), (n * s, c, 1)])
            yield from itertools.product(layouts, DTYPES, (FORWARD, BACKWARD))


def largest(extension: ModuleType) -> dict[str, tuple[int, str]]:
    """Each count at its largest on any described device, and the plan that has it.

    Of all plans that may be chosen, so that it does not hang on what the planner takes for cheap.
    """
    found: dict[str, tuple[int, str]] = {}
    for name, (sizes, dtype, op) in itertools.product(devices.DEVICES, scanned()):
        device = devices.planner_properties(devices.DEVICES[name])
        for options in candidates(extension, op, sizes, dtype, device):
            plan = make_plan(extension, op, sizes, dtype, device, **options)
            for count, value in counts(plan).items():
                if count not in found or value > found[count][0]:
                    found[count] = value, f"{name}, {op} of {sizes}, {dtype}, {options}"
    return found


def layout_of(plan: Plan) -> dict[str, Any]:
    """What of a plan stays when a problem is cut in size but not in geometry."""
    walk = ("pattern", "exact", "threads_x", "threads_y", "row_repeat", "segments")
    if "team" in plan:
        team = plan["team"]
        kept = ("scope", "size", "two_level", "register_windows")
        return {key: team[key] for key in kept} | {key: team["traversal"][key] for key in walk}
    stages = {stage: plan[stage] for stage in ("reduce", "elementwise")}
    kept = {stage: {key: t[key] for key in walk} for stage, t in stages.items()}
    kept["reduce"]["splits"] = plan["reduce"]["splits"]
    return kept | {"merge": {key: plan["merge"][key] for key in ("rows", "threads_x", "threads_y")}}
