"""The issue budget of bench/machine_code: its arithmetic on made-up loops, and the real kernels."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from bench_cases import kernel

sys.path.append(str(Path(__file__).resolve().parents[2]))  # bench/ is not installed

from bench.machine_code.budget import budgets, slots_per_window
from bench.machine_code.budget_table import (
    budget_markdown,
    budget_table,
    devices_of,
    over_budget,
    short_name,
)
from bench.machine_code.kernels import Kernel, MainLoop
from bench.machine_code.listing import Instruction, Resources
from bench.sass import kernels_for
from bench.toolkit import ToolkitError, devices, find_tool, resolve

# 10 SMs at 1 GHz share 1280 GB/s: 128 bytes a cycle and SM, 4 cycles and 16 slots for 512.
DEVICE = {
    "compute_major": 8,
    "compute_minor": 0,
    "sm_count": 10,
    "boost_mhz": 1000,
    "bandwidth_gb_s": 1280,
}
KNOWN = {"made up": DEVICE, "other": {**DEVICE, "compute_major": 9}}


def loop(
    kinds: dict[str, int], loads: int, stores: int, *, nested: int = 0, **shared: int
) -> MainLoop:
    accesses = [{128: count} if count else {} for count in (loads, stores)]
    return MainLoop(0, sum(kinds.values()), *accesses, nested, kinds, **shared)


STAGE = kernel(
    resources=Resources(64, 0, 0),
    loads={128: 4},
    main_loop=loop({"float": 48, "memory": 8, "integer": 16}, 4, 4),
)


def team(operation: str, held: int, kinds: dict[str, int], loops: list[MainLoop]) -> Kernel:
    name = f"team_kernel<AlongS<float, int>, {operation}, {held}, Identity<float>>"
    whole = loop(kinds, held, held, nested=len(loops))
    most = max([whole, *loops], key=lambda each: each.windows)
    return replace(STAGE, name=name, main_loop=most, loops=(whole, *loops))


def test_slots_at_full_bandwidth() -> None:
    assert slots_per_window(DEVICE) == 16
    assert slots_per_window({**DEVICE, "bandwidth_gb_s": 640}) == 32
    assert slots_per_window({**DEVICE, "sm_count": 20}) == 32
    # 3350 GB/s over 132 SMs at 1.98 GHz: 12.8 bytes a cycle, 512 bytes in 39.9 cycles.
    assert slots_per_window(devices.DEVICES["h100"]) == pytest.approx(159.8, abs=0.1)


def test_a_stage_kernel_is_its_main_loop() -> None:
    (budget,) = budgets([STAGE])
    assert (budget.part, budget.instructions) == ("loop", 9)  # 72 over 4 loads and 4 stores
    assert budget.per_window == {"float": 6, "memory": 1, "integer": 2}
    assert budget.per_element == 9 / 8
    assert budget.share(DEVICE) == 9 / 16


def test_parts_of_a_team_kernel() -> None:
    loops = [
        loop({"memory": 12, "integer": 24}, 12, 0, copied=12),  # 3 a window
        loop({"float": 40, "memory": 4}, 0, 0, shared_loads=4),  # 11
        loop({"float": 6, "memory": 2}, 0, 1, shared_loads=1),  # 8
        loop({"float": 30, "memory": 2}, 2, 0),  # streamed in: 16
        loop({"float": 90, "memory": 2, "control": 30}, 1, 0),  # the same, left over from unrolling
        loop({"float": 18, "memory": 2}, 1, 1),  # streamed out: 20
        loop({"float": 5}, 0, 0),  # of a reduction
    ]
    forward = {b.part: b for b in budgets([team("TeamForward", 4, {"float": 400}, loops)])}
    # Windows moved: 4 in and 4 out; one in, one out; two in, one out.
    assert {part: b.instructions for part, b in forward.items()} == pytest.approx(
        {"round": 400 / 8, "shared": (3 + 11 + 8) / 2, "streamed": (16 + 20) / 3}
    )
    assert forward["shared"].per_window["float"] == (10 + 6) / 2
    # Two tensors in for one out: half an output for each window held.
    backward = {b.part: b for b in budgets([team("TeamBackward", 4, {"float": 400}, loops)])}
    assert {part: b.instructions for part, b in backward.items()} == pytest.approx(
        {"round": 400 / 6, "shared": (3 + 11 + 8) / 1.5, "streamed": (16 + 20) / 2.5}
    )
    alone = budgets([team("TeamForward", 4, {"float": 400}, loops[:3])])
    assert [b.part for b in alone] == ["round", "shared"]


def test_what_is_held_to_the_share() -> None:
    slow = replace(STAGE, main_loop=loop({"float": 80}, 4, 4))  # 10 of 16 slots: 62.5 %
    (line,) = over_budget(budgets([slow]), KNOWN)
    assert line == f"{slow.name} for 8.0, loop: 10.0 instructions per 16 B, 62% of made up's " + (
        "issue slots"
    )
    assert over_budget(budgets([STAGE]), KNOWN) == []  # 56 %
    assert over_budget(budgets([replace(slow, arch="7.5")]), KNOWN) == []  # no such device
    edges = replace(
        slow, name=slow.name.replace("AlongS<__half, int>", "AlongC<__half, long, false>")
    )
    assert len(over_budget(budgets([edges]), KNOWN)) == 1
    for name in (
        slow.name.replace("__half", "double"),
        "merge_kernel<Welford<float>>",
    ):
        assert over_budget(budgets([replace(slow, name=name)]), KNOWN) == []
    round_only = team("TeamForward", 4, {"float": 10000}, [])
    assert over_budget(budgets([round_only]), KNOWN) == []


def test_tables() -> None:
    slow = replace(STAGE, main_loop=loop({"float": 80}, 4, 4))
    found = budgets([STAGE, slow])
    assert "made up 56%" in budget_table(found, KNOWN)
    header, _, limits, row = budget_markdown(found, KNOWN).splitlines()
    assert header.endswith("| made up |") and limits.endswith("| 16 |")
    assert row == "| transform input, along S | loop | half | 1.1-1.2 | **62%** |"
    for cursor, along in (
        ("AlongRow<float, int, true>", "a row"),
        ("AlongRow<float, long, false>", "a row, with edges"),
        ("AlongRuns<float, long, true>", "S"),
        ("AlongRuns<float, int, false>", "S, with edges"),
        ("AlongSamples<float, int>", "samples"),
    ):
        name = f"team_kernel<{cursor}, TeamForward, 4, Identity<float>>"
        assert short_name(name) == f"team forward, along {along}"


@pytest.mark.parametrize(
    ("opcode", "kind", "window"),
    [
        ("HADD2.F32", "convert", None),
        ("HFMA2.MMA", "float", None),
        ("DADD", "float", None),
        ("F2FP.PACK_AB", "convert", None),
        ("IMAD.U32", "integer", None),
        ("LDG.E.128.CONSTANT", "memory", None),
        ("LDS.128", "memory", "load"),
        ("STS.128", "memory", "store"),
        ("LDS", "memory", None),
        ("BRA", "control", None),
    ],
)
def test_kinds_of_instructions(opcode: str, kind: str, window: str | None) -> None:
    instruction = Instruction(0, opcode, False)
    assert (instruction.kind, instruction.shared_window) == (kind, window)


@pytest.mark.nvcc
@pytest.mark.parametrize("arch", ["7.5", "8.0", "8.9", "9.0", "10.0", "12.0"])
def test_memory_and_not_issue_bounds_every_loop(arch: str) -> None:
    try:
        kit = resolve()
        find_tool("nvdisasm", kit.home)
    except ToolkitError as error:
        pytest.skip(str(error))
    if arch not in kit.gpu_codes():
        pytest.skip(f"nvcc {kit.version} cannot generate {arch}")
    assert devices_of(arch, devices.DEVICES)
    found = budgets(kernels_for([arch], kit))
    held_to_it = {budget.kernel.template for budget in found if budget.held_to_share}
    assert held_to_it == {
        "backward_elementwise_kernel",
        "backward_reduce_kernel",
        "collect_statistics_kernel",
        "double_backward_elementwise_kernel",
        "double_backward_reduce_kernel",
        "team_kernel",
        "transform_input_kernel",
    }
    assert {b.part for b in found} == {"loop", "round", "shared", "streamed"}
    assert over_budget(found, devices.DEVICES) == []
