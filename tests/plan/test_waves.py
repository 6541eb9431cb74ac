"""Whether every SM has work all the time: stage kernels over the benchmark's shapes, as planned."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from plan_walk import DTYPE_BYTES, stretches

from batchnorm_cuda import devices
from bench.cases.shapes import README_SHAPES, SETS

LARGE = 8 << 20  # bytes of a tensor
STAGE_THREADS, WARP_SIZE, WARPS = 256, 32, 16
OPS = ("forward_training", "forward_eval", "backward_training", "backward_eval")
OPS += ("double_backward_training", "double_backward_eval")
SHAPES = {shape.sizes for shapes in (*SETS.values(), README_SHAPES) for shape in shapes}


def geometries() -> Iterator[tuple[int, int, int]]:
    """[N, C, S] of every shape in both layouts."""
    for n, c, *spatial in sorted(SHAPES):
        s = math.prod(spatial)
        yield from dict.fromkeys([(n, c, s), (n * s, c, 1)])


def shifts(op: str) -> dict[str, int]:
    facts = {} if op.startswith("forward") else {"grad_output_shift": 0}
    return facts | ({"grad_grad_input_shift": 0} if op.startswith("double") else {})


def large_stages(
    extension: ModuleType, device: dict[str, Any], **facts: Any
) -> Iterator[tuple[Any, dict[str, Any], int]]:
    """The traversals of large problems, and how many blocks of their kernels an SM holds."""
    for sizes in geometries():
        for dtype in ("float16", "float32"):
            if math.prod(sizes) * DTYPE_BYTES[dtype] < LARGE:
                continue
            for op in OPS:
                options = {"strategy": "two_pass", **shifts(op), **facts}
                plan = extension.make_plan(op, *sizes, dtype, device, options)
                for stage in ("reduce", "elementwise"):
                    if stage in plan:
                        t = plan[stage]
                        light = "reduce" not in plan and not op.startswith("double")
                        blocks = 3 if light and t["exact"] else 2
                        yield (sizes, dtype, op, stage), t, blocks


@pytest.mark.parametrize("facts", [{}, {"input_shift": 1}, {"fused": True}], ids=str)
@pytest.mark.parametrize("name", devices.DEVICES)
def test_the_busiest_sm_of_a_stage(extension: ModuleType, name: str, facts: dict) -> None:
    """Within 5 % of the mean, in one whole wave of blocks, 16 warps an SM or more."""
    device = devices.planner_properties(devices.DEVICES[name])
    seen = 0
    for problem, t, blocks in large_stages(extension, device, **facts):
        seen += 1
        assert t["grid"] == blocks * device["sm_count"], problem
        units = t["channel_blocks"] * t["work"]
        longest = t["per_split"] + (t["spare"] > 0)
        assert longest <= 1.05 * units / t["grid"], problem
        warps = math.ceil(t["threads_x"] * t["threads_y"] / WARP_SIZE)
        assert warps * blocks >= WARPS - 1, problem  # rows of an odd width leave some threads out
    assert seen > 1000


def test_a_stretch_is_what_the_blocks_share(extension: ModuleType) -> None:
    """What the test above takes from the traversal is what the blocks get."""
    device = devices.planner_properties(devices.DEVICES["h100"])
    for facts in ({}, {"input_shift": 1}):
        for sizes in ((64, 96, 3136), (61, 131, 899), (200704, 144, 1), (8191, 1027, 1)):
            options = {"strategy": "two_pass", **facts}
            plan = extension.make_plan("forward_training", *sizes, "float16", device, options)
            for t in (plan["reduce"], plan["elementwise"]):
                units = [sum(end - first for _, first, end in parts) for parts in stretches(t)]
                assert len(units) == t["grid"] and min(units) == t["per_split"]
                assert max(units) == t["per_split"] + (t["spare"] > 0)
                assert sum(units) == t["channel_blocks"] * t["work"]
