"""From a plan, as the extension gives it (csrc/plan/plan_dict.cpp), to the launches it comes to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .explanation import Kernel, TeamSummary

# The kernels of the stages, by operation; those of the backward if it is not here.
_REDUCE = {"forward": "collect_statistics_kernel"}
_ELEMENTWISE = {"forward": "transform_input_kernel", "eval": "transform_input_kernel"}

WINDOW_BYTES = 16
_WARP_SIZE = 32
# csrc/geometry.h: kUnroll windows a thread of a stage kernel loads before it uses the first, and
# the blocks of it that its registers let an SM hold at least; more of an exact elementwise kernel.
_STAGE_LOADS = 4
_STAGE_BLOCKS_PER_SM, _ELEMENTWISE_BLOCKS_PER_SM = 2, 3
# Those of the double backward: windows of dy, x and the gradient of dx at one position, or at two
# where a thread has one channel (csrc/double_backward_*.cuh).
_DOUBLE_BACKWARD_LOADS, _DOUBLE_BACKWARD_LOADS_ALONG_S = 3, 6
# Copies from global to shared memory that no register waits for came with 8.0.
_FIRST_WITH_ASYNC_COPIES = (8, 0)


def capability(properties: Mapping[str, Any]) -> tuple[int, int]:
    return properties["compute_major"], properties["compute_minor"]


def kernels_of(plan: Mapping[str, Any], op: str, properties: Mapping[str, Any]) -> list[Kernel]:
    """The launches in order; `op` as `explain` takes it, `properties` of the device."""
    if "team" in plan:
        return [_team_kernel(plan, properties)]
    if op.endswith("double_backward"):
        return _double_backward_kernels(plan, properties)
    kernels = []
    if "reduce" in plan:
        kernels = [
            _stage(plan["reduce"], _REDUCE.get(op, "backward_reduce_kernel"), properties),
            _merge(plan["merge"]),
        ]
    if "elementwise" in plan:
        name = _ELEMENTWISE.get(op, "backward_elementwise_kernel")
        exact = plan["elementwise"]["exact"]
        blocks = _ELEMENTWISE_BLOCKS_PER_SM if exact else _STAGE_BLOCKS_PER_SM
        kernels.append(_stage(plan["elementwise"], name, properties, blocks))
    return kernels


def _merge(geometry: Mapping[str, Any]) -> Kernel:
    block = (geometry["threads_x"], geometry["threads_y"])
    return Kernel("merge_kernel", geometry["grid"], block, geometry["shared_bytes"])


def _double_backward_kernels(
    plan: Mapping[str, Any], properties: Mapping[str, Any]
) -> list[Kernel]:
    kernels = []
    for stage in ("reduce", "elementwise"):
        if stage not in plan:
            continue
        kernel = _stage(plan[stage], f"double_backward_{stage}_kernel", properties)
        along_s = plan[stage]["pattern"] == "along_s"
        loads = _DOUBLE_BACKWARD_LOADS_ALONG_S if along_s else _DOUBLE_BACKWARD_LOADS
        in_flight = kernel.in_flight_bytes // _STAGE_LOADS * loads
        kernels.append(replace(kernel, in_flight_bytes=in_flight))
        if stage == "reduce":
            kernels.append(_merge(plan["merge"]))
    return kernels


def _stage(
    traversal: Mapping[str, Any],
    name: str,
    properties: Mapping[str, Any],
    blocks_per_sm: int = _STAGE_BLOCKS_PER_SM,
) -> Kernel:
    block = (traversal["threads_x"], traversal["threads_y"])
    blocks = min(blocks_per_sm, math.ceil(traversal["grid"] / properties["sm_count"]))
    return Kernel(
        name=name,
        grid=traversal["grid"],
        block=block,
        shared_bytes=traversal["shared_bytes"],
        index_bits=traversal["index_bits"],
        in_flight_bytes=WINDOW_BYTES * _STAGE_LOADS * math.prod(block) * blocks,
    )


def _team_kernel(plan: Mapping[str, Any], properties: Mapping[str, Any]) -> Kernel:
    team = plan["team"]
    traversal = team["traversal"]
    places = team["blocks_per_sm"] * properties["sm_count"]
    # Teams of several blocks stay and take the next group; single blocks leave for the next one.
    at_a_time = places if team["scope"] == "block" else team["grid"]
    waves = math.ceil(traversal["tasks"] / at_a_time)
    busy_at_last = traversal["tasks"] - (waves - 1) * at_a_time
    block = (traversal["threads_x"], traversal["threads_y"])
    blocks = min(team["blocks_per_sm"], math.ceil(team["grid"] / properties["sm_count"]))
    loads = min(team["register_windows"], _windows_per_thread(plan))
    if capability(properties) >= _FIRST_WITH_ASYNC_COPIES:
        loads = min(loads + team["shared_windows"], _windows_per_thread(plan))
    return Kernel(
        name="team_kernel",
        grid=team["grid"],
        block=block,
        shared_bytes=team["shared_bytes"],
        index_bits=traversal["index_bits"],
        blocks_per_sm=team["blocks_per_sm"],
        waves=waves,
        tail_idle=1 - busy_at_last / places,
        in_flight_bytes=WINDOW_BYTES * loads * team["tensors"] * math.prod(block) * blocks,
    )


def pattern_of(plan: Mapping[str, Any]) -> str:
    """A team may walk another way than the stage kernels."""
    return plan.get("team", plan)["pattern"]


def _members(plan: Mapping[str, Any]) -> int:
    """Threads of a block that share a channel (along S) or a column of windows (along C)."""
    traversal = plan["team"]["traversal"]
    if pattern_of(plan) == "along_s":
        return traversal["threads_x"]
    # Masked rows: samples that start at different places in a window have threads of their own.
    starts = traversal["row_repeat"] if not traversal["exact"] else 1
    return traversal["threads_y"] // starts


def _windows_per_thread(plan: Mapping[str, Any]) -> int:
    return math.ceil(plan["team"]["traversal"]["per_split"] / _members(plan))


def team_of(plan: Mapping[str, Any]) -> TeamSummary | None:
    """None where two passes run."""
    if "team" not in plan:
        return None
    team = plan["team"]
    part = team["traversal"]["per_split"]  # windows of a block, shared by its members
    in_registers = min(part, _members(plan) * team["register_windows"])
    in_shared = min(part - in_registers, _members(plan) * team["shared_windows"])
    return TeamSummary(
        scope=team["scope"],
        size=team["size"],
        teams=team["teams"],
        groups=team["traversal"]["channel_blocks"],
        rounds=team["rounds"],
        register_share=in_registers / part,
        shared_share=in_shared / part,
        two_level=team["two_level"],
        in_warp=(
            team["scope"] == "block"
            and team["pattern"] == "along_s"
            and team["traversal"]["threads_x"] <= _WARP_SIZE
        ),
    )
