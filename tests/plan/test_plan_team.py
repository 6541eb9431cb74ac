"""Properties of the team plan, on random devices and on described ones.

Every element is held by exactly one thread of one team, no limit of the device is exceeded, and
where a channel group fits the device at all, some team moves each activation once. Whether it is
chosen is a matter of cost (test_candidates.py): what can be held is asked of the candidates.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_walk import DTYPE_BYTES, WINDOW_BYTES, elements_of, team_parts

from batchnorm_cuda import devices

THREADS = 256
RESERVED_BYTES = 1024  # of shared memory, per block, by the system
# Windows of all tensors that a thread holds in registers, and its registers (csrc/geometry.h).
MAX_REGISTER_WINDOWS, REGISTERS = 16, 128
OPS = ("forward_training", "backward_training", "backward_eval")
NAMES = sorted(devices.DEVICES)

MakePlan = Callable[..., dict[str, Any]]
# Teams that hold their whole channel groups, among all that the planner looks at.
Holding = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def make_plan(extension: ModuleType) -> MakePlan:
    def plan(op, sizes, dtype, device, **options):
        if op.startswith("backward"):
            options.setdefault("grad_output_shift", 0)
        return extension.make_plan(op, *sizes, dtype, device, options)

    return plan


@pytest.fixture(scope="module")
def holding(extension: ModuleType, make_plan: MakePlan) -> Holding:
    """By options that force them."""

    def teams(op, sizes, dtype, device):
        shifts = {"grad_output_shift": 0} if op.startswith("backward") else {}
        found = extension.plan_candidates(op, *sizes, dtype, device, shifts)
        teams = [each["options"] for each in found if each["options"]["strategy"] == "team"]
        return [
            options
            for options in teams
            if make_plan(op, sizes, dtype, device, **options)["team"]["streamed_bytes"] == 0
        ]

    return teams


def described(name: str) -> dict[str, Any]:
    return devices.planner_properties(devices.DEVICES[name])


def members(team: dict[str, Any], pattern: str) -> int:
    """Threads of a block among which the units of its part are dealt."""
    t = team["traversal"]
    return t["threads_x"] if pattern == "along_s" else t["threads_y"] // starts(t)


def starts(t: dict[str, Any]) -> int:
    """Places in a window where samples begin that a masked row keeps apart."""
    return t["row_repeat"] if t["pattern"] == "along_row" and not t["exact"] else 1


def check_limits(plan: dict[str, Any], dtype: str, device: dict[str, Any], op: str) -> None:
    team, pattern = plan["team"], plan["team"]["pattern"]
    t = team["traversal"]
    threads = t["threads_x"] * t["threads_y"]
    # Where columns are no power of two, a block is as many whole rows of them as its threads cover.
    row = t["threads_x"] * starts(t)
    assert threads == THREADS or (pattern != "along_s" and THREADS - row < threads)
    assert threads <= THREADS
    assert team["tensors"] == (1 if op == "forward_training" else 2)
    windows = team["register_windows"] * team["tensors"]
    assert windows <= MAX_REGISTER_WINDOWS
    # A window is four registers; a thread needs some 40 beside what it holds.
    assert 4 * windows <= REGISTERS - 40
    assert team["blocks_per_sm"] * REGISTERS * THREADS <= 64 * 1024
    assert team["shared_windows"] >= 0

    resident = team["blocks_per_sm"] * device["sm_count"]
    assert team["size"] * team["teams"] == team["grid"] == t["grid"]
    assert team["rounds"] == math.ceil(t["channel_blocks"] / team["teams"])
    assert t["tasks"] == t["channel_blocks"] * team["size"]
    if team["scope"] == "block":
        assert team["size"] == 1 and team["grid"] <= device["max_grid"]
    else:
        assert team["size"] > 1
        # Blocks wait for each other: they must all be resident.
        assert team["grid"] <= resident
    if team["scope"] == "cluster":
        assert team["size"] <= device["max_cluster"]
    if team["scope"] == "grid":
        assert device["cooperative"]

    assert team["shared_bytes"] <= device["shared_bytes_per_block_optin"]
    per_sm = team["blocks_per_sm"]
    assert per_sm * (team["shared_bytes"] + RESERVED_BYTES) <= device["shared_bytes_per_sm"]
    assert per_sm * THREADS <= device["max_threads_per_sm"]
    windows = team["shared_windows"] * team["tensors"] * THREADS * WINDOW_BYTES
    assert windows <= team["shared_bytes"]

    assert plan["launches"] == 1
    assert plan["reread_bytes"] == team["streamed_bytes"]
    extra = plan["predicted_bytes"] - plan["compulsory_bytes"]
    assert max(0, plan["reread_bytes"] - device["l2_bytes"] * team["rounds"]) <= extra
    assert extra <= plan["reread_bytes"]
    check_workspace(plan, pattern, dtype, op)


def check_workspace(plan: dict[str, Any], pattern: str, dtype: str, op: str) -> None:
    """Two slots a block, with all fields of every channel of the group, and words to order them."""
    team, t = plan["team"], plan["team"]["traversal"]
    assert plan["workspace_bytes"] == team["exchange_bytes"]
    if team["scope"] != "grid":
        assert team["exchange_bytes"] == team["sync_words"] == 0
        return
    channels = {
        "along_s": t["threads_y"],
        "along_c": t["threads_x"] * plan["vec"],
        "along_row": t["segments"],
    }[pattern]
    fields = 4 if op == "forward_training" else 2
    value_bytes = 8 if dtype == "float64" else 4
    totals = team["teams"] if team["two_level"] else 0
    slots = (team["grid"] + totals) * 2
    assert team["exchange_bytes"] >= slots * channels * fields * value_bytes
    assert team["sync_words"] >= 2 + team["grid"]  # epoch, finished blocks, a flag a block


def check_streamed(plan: dict[str, Any], numel: int, runs: int, dtype: str) -> None:
    """What is streamed is at least what exceeds all threads' room, and nothing where all fits."""
    team, pattern = plan["team"], plan["team"]["pattern"]
    room = team["register_windows"] + team["shared_windows"]
    part = team["traversal"]["per_split"]
    assert (team["streamed_bytes"] > 0) == (part > room * members(team, pattern))
    t = team["traversal"]
    windows = t["channel_blocks"] * team["size"] * THREADS * room
    edges = 2 * (plan["vec"] - 1) * runs if pattern == "along_s" and not t["exact"] else 0
    held = windows * WINDOW_BYTES * team["tensors"]
    assert team["streamed_bytes"] >= (numel - edges) * DTYPE_BYTES[dtype] * team["tensors"] - held


device_shapes = st.fixed_dictionaries(
    {
        "sm_count": st.integers(1, 200),
        "max_threads_per_sm": st.sampled_from([1024, 1536, 2048]),
        "shared_bytes_per_sm": st.one_of(
            st.sampled_from([64 << 10, 100 << 10, 164 << 10, 228 << 10]),
            st.integers(8 << 10, 256 << 10),
        ),
        "shared_bytes_per_block_optin": st.integers(4 << 10, 227 << 10),
        "max_grid": st.sampled_from([3, 65535, 2**31 - 1]),
        "l2_bytes": st.sampled_from([0, 4 << 20, 50 << 20]),
        "cooperative": st.booleans(),
        "max_cluster": st.sampled_from([0, 4, 8]),
    }
)
any_device = st.one_of(device_shapes, st.sampled_from(NAMES).map(described))
team_options = st.fixed_dictionaries(
    {
        "strategy": st.just("team"),
        "scope": st.sampled_from(["auto", "block", "cluster", "grid"]),
        "team_size": st.sampled_from([0, 0, 1, 2, 3, 5, 8, 9, 40]),
    }
)
small_sizes = st.tuples(
    st.integers(1, 9),
    st.one_of(st.integers(1, 40), st.sampled_from([64, 96, 136])),
    st.one_of(st.just(1), st.integers(2, 70), st.sampled_from([196, 784, 3136])),
)


@settings(max_examples=200, deadline=None)
@given(
    sizes=small_sizes,
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    op=st.sampled_from(OPS),
    device=any_device,
    options=team_options,
    shift=st.sampled_from([0, 0, 0, 1, 3]),
)
def test_every_element_is_held_once(make_plan, sizes, dtype, op, device, options, shift):
    n, c, s = sizes
    vec = WINDOW_BYTES // DTYPE_BYTES[dtype]
    plan = make_plan(op, sizes, dtype, device, **options, output_shift=shift % vec)
    if plan["strategy"] != "team":
        assert plan["reason"]
        return
    check_limits(plan, dtype, device, op)
    check_streamed(plan, n * c * s, n * c, dtype)
    team, pattern = plan["team"], plan["team"]["pattern"]
    if options["team_size"]:
        assert team["size"] == options["team_size"]
    if options["scope"] != "auto" and team["size"] > 1:
        assert team["scope"] == options["scope"]
    visits = np.zeros(n * c * s, dtype=np.int64)
    parts = list(team_parts(team))
    assert len(parts) == team["traversal"]["tasks"]
    for part in parts:
        elements = elements_of(pattern, plan["vec"], team["traversal"], c, s, n * c * s, part)
        assert elements.size > 0, "a rank without work"
        np.add.at(visits, elements, 1)
    assert (visits == 1).all()


@settings(max_examples=200, deadline=None)
@given(
    sizes=small_sizes,
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    device=any_device,
)
def test_channels_of_a_row_are_whole(make_plan, sizes, dtype, device):
    """Along a row the block's columns are dealt to channels, each channel's all to the same one."""
    n, c, s = sizes
    if c == 1:  # the samples of a single channel are one run
        s *= n
    plan = make_plan("forward_training", sizes, dtype, device, strategy="team")
    if plan["strategy"] != "team" or plan["team"]["pattern"] != "along_row":
        return
    t = plan["team"]["traversal"]
    if not t["exact"]:  # whole by construction: tests/plan_walk.py
        assert t["threads_y"] % t["row_repeat"] == 0
        return
    columns = t["threads_x"] * plan["vec"]
    channel_of = np.full(columns, -1)
    for k, j, i in itertools.product(range(t["segments"]), range(t["row_repeat"]), range(s)):
        column = (j * t["segments"] + k) * s + i
        assert channel_of[column] == -1
        channel_of[column] = k
    assert (channel_of >= 0).all()
    row = np.arange(t["row_windows"] * plan["vec"])
    for first in range(0, row.size, columns):
        block = row[first : first + columns]
        channels = block // s % c
        # One channel k of the block is one channel of the tensor, and no other k is.
        pairs = set(zip(channel_of[: block.size].tolist(), channels.tolist(), strict=True))
        assert len(pairs) == len({k for k, _ in pairs}) == len({channel for _, channel in pairs})
        for k, channel in pairs:
            whole = (row // s % c == channel).sum()
            assert (channel_of[: block.size] == k).sum() == whole


@settings(max_examples=300, deadline=None)
@given(
    n=st.integers(1, 2**18),
    c=st.integers(1, 2**16),
    s=st.one_of(st.just(1), st.integers(2, 2**16)),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    op=st.sampled_from(OPS),
    device=any_device,
    options=team_options,
)
def test_limits_hold_at_any_size(make_plan, n, c, s, dtype, op, device, options):
    plan = make_plan(op, (n, c, s), dtype, device, **options)
    if plan["strategy"] == "team":
        check_limits(plan, dtype, device, op)
        check_streamed(plan, n * c * s, n * c, dtype)
        t = plan["team"]["traversal"]
        assert n * c * s < 2**31 or t["index_bits"] == 64


@pytest.mark.parametrize("shifted", ["input_shift", "output_shift", "grad_output_shift"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("shape", [(4096, 64, 1), (32, 64, 3136), (32, 64, 1225), (256, 512, 49)])
def test_misaligned_tensor_gets_no_team(make_plan, shifted, dtype, shape):
    options = {"strategy": "team", shifted: 1}
    plan = make_plan("backward_training", shape, dtype, described("h100"), **options)
    assert plan["strategy"] == "two_pass"
    assert "misaligned" in plan["reason"]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("s", [1225, 75 * 75, 147 * 147, 149 * 149])
def test_odd_runs_are_held_like_others(holding, make_plan, s, dtype):
    """Inception's sizes: but for the runs' ends they are whole windows, held as any others.

    The least team that holds a channel is the same. Which is chosen is not: walks with edges have
    costs of their own.
    """
    least = []
    for run in (s, s // 8 * 8):
        problem = ("backward_training", (32, 64, run), dtype, described("h100"))
        forced = [o for o in holding(*problem) if o["pattern"] == "along_s"]
        teams = [make_plan(*problem, **options)["team"] for options in forced]
        assert all(team["streamed_bytes"] == 0 for team in teams)
        assert all(team["traversal"]["exact"] == (run % 8 == 0) for team in teams)
        least.append(min(team["size"] for team in teams))
    assert least[0] == least[1]


# --------------------------------------------------------------------- bytes on real networks

# (C, side) of the inputs of ResNet-50's batch norms.
RESNET50 = [
    (64, 112),
    (64, 56),
    (256, 56),
    (128, 56),
    (128, 28),
    (512, 28),
    (256, 28),
    (256, 14),
    (1024, 14),
    (512, 14),
    (512, 7),
    (2048, 7),
]
# MobileNetV2's expanded and depthwise widths.
MOBILENET = [(32, 112), (96, 112), (96, 56), (144, 56), (144, 28), (192, 28)]
MOBILENET += [(192, 14), (384, 14), (576, 14), (576, 7), (960, 7), (1280, 7)]
# (N, C, side) of a 3-D U-Net with patches of 128^3.
UNET3D = [(2, 32, 128), (2, 64, 64), (2, 128, 32), (2, 256, 16), (2, 320, 8), (4, 320, 4)]
FEATURES = [
    (n, c) for n in (64, 256, 1024, 4096, 16384, 65536) for c in (64, 256, 1000, 1024, 4096)
]


def both_layouts(n: int, c: int, s: int) -> list[tuple[int, int, int]]:
    return [(n, c, s), (n * s, c, 1)]


WORKLOADS = {
    f"{network}-{n}": [sizes for c, side in layers for sizes in both_layouts(n, c, side**2)]
    for network, layers in (("resnet50", RESNET50), ("mobilenet", MOBILENET))
    for n in (32, 256)
}
WORKLOADS["unet3d"] = [sizes for n, c, side in UNET3D for sizes in both_layouts(n, c, side**3)]
WORKLOADS["features"] = [(n, c, 1) for n, c in FEATURES]


def on_chip_bytes(device: dict[str, Any], dtype: str, tensors: int, along_s: bool) -> int:
    """What teams must be able to hold on chip: of registers what 512 threads of an SM keep (csrc/
    geometry.h, team_windows); of shared memory whole windows of a block's threads, beside what is
    reserved and 4 KB that a block works with.
    """
    if not along_s:
        windows = 6 if tensors == 1 and DTYPE_BYTES[dtype] == 2 else 8
    else:
        windows = 16 if dtype != "float64" else 10 if tensors == 1 else 12
    window_bytes = THREADS * WINDOW_BYTES
    room = device["shared_bytes_per_sm"] // 2 - RESERVED_BYTES - 4096
    room = room // (window_bytes * tensors) * window_bytes * tensors
    return 2 * device["sm_count"] * (windows * window_bytes + room)


def fits_on_chip(sizes: tuple[int, int, int], dtype: str, op: str, device: dict[str, Any]) -> bool:
    """Does a channel, or a slab of 64 bytes of channels, fit the whole device?"""
    n, c, s = sizes
    tensors = 1 if op == "forward_training" else 2
    width = DTYPE_BYTES[dtype] if s > 1 else min(c * DTYPE_BYTES[dtype], 64)
    return n * s * width * tensors <= on_chip_bytes(device, dtype, tensors, s > 1)


every_device = pytest.mark.parametrize("name", NAMES)
every_workload = pytest.mark.parametrize("workload", WORKLOADS)


def problems(workload: str) -> Iterator[tuple]:
    return itertools.product(
        WORKLOADS[workload], ("float16", "float32"), ("forward_training", "backward_training")
    )


@every_device
@every_workload
def test_what_fits_can_be_read_once(holding, workload, name):
    device = described(name)
    short = []
    for sizes, dtype, op in problems(workload):
        if fits_on_chip(sizes, dtype, op, device) and not holding(op, sizes, dtype, device):
            short.append((sizes, dtype, op))
    assert not short


@every_device
@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@pytest.mark.parametrize("op", ["forward_training", "backward_training"])
@pytest.mark.parametrize("along", ["along_s", "along_c"])
def test_the_chip_can_hold_data(holding, make_plan, along, op, dtype, name):
    """One channel, or channels that fill a sector and cannot be parted, held as a whole."""
    device = described(name)
    tensors = 1 if op == "forward_training" else 2
    window = WINDOW_BYTES // DTYPE_BYTES[dtype]
    windows = on_chip_bytes(device, dtype, tensors, along == "along_s") // (WINDOW_BYTES * tensors)
    sizes = (1, 1, windows * window) if along == "along_s" else (windows // 2, 2 * window, 1)
    forced = holding(op, sizes, dtype, device)
    assert forced, "no team holds so much"
    for options in forced:
        plan = make_plan(op, sizes, dtype, device, **options)
        assert plan["strategy"] == "team", plan["reason"]
        assert plan["team"]["streamed_bytes"] == plan["reread_bytes"] == 0
        assert plan["predicted_bytes"] <= 1.02 * plan["compulsory_bytes"]


@every_device
def test_samples_of_a_single_channel_are_one_run(make_plan, name):
    """343 floats are no whole windows, 256 times as many are."""
    apart, together = (
        make_plan("backward_training", sizes, "float32", described(name))
        for sizes in ((256, 1, 343), (1, 1, 256 * 343))
    )
    assert apart == together
    assert apart["team"]["traversal"]["exact"] and apart["predicted_bytes"] == 256 * 343 * 4 * 3


def large_teams(make_plan: MakePlan, workload: str, device: dict[str, Any]) -> Iterator[tuple]:
    """The teams for tensors of 8 MB and more."""
    for sizes, dtype, op in problems(workload):
        plan = make_plan(op, sizes, dtype, device)
        large = math.prod(sizes) * DTYPE_BYTES[dtype] >= 8 << 20
        if large and plan["strategy"] == "team":
            yield sizes, dtype, op, plan


def waves_of(plan: dict[str, Any], sms: int) -> tuple[list[int], float, float]:
    """Blocks of each wave, the time of the busiest SM over an even share, and the places that idle:
    of resident blocks, over all waves, which are rounds of teams, or blocks in sequence.

    A wave of fewer blocks is shorter too: an SM can move a third more than its share of the
    bandwidth.
    """
    team = plan["team"]
    tasks, places = team["traversal"]["tasks"], team["blocks_per_sm"] * sms
    at_a_time = min(tasks, places) if team["scope"] == "block" else team["grid"]
    waves = math.ceil(tasks / at_a_time)
    blocks = [min(at_a_time, tasks - wave * at_a_time) for wave in range(waves)]
    time = sum(max(n / sms, math.ceil(n / sms) / 1.3) for n in blocks) / (tasks / sms)
    return blocks, time, 1 - tasks / (waves * places)


@every_device
@every_workload
def test_sms_are_busy_and_idle_places_explained(
    extension, make_plan: MakePlan, workload: str, name: str
) -> None:
    """The busiest SM takes at most 1.05 of an even share, if all that is even does not cost more:
    its rounds are more, or wait, or it reads twice.
    """
    device = described(name)
    sms, wrong = device["sm_count"], []
    for sizes, dtype, op, plan in large_teams(make_plan, workload, device):
        blocks, time, idle = waves_of(plan, sms)
        stated = re.search(r"; (\d+)% of the places for blocks idle", plan["reason"])
        explained = abs(int(stated[1]) - 100 * idle) <= 1 if stated else idle <= 0.1
        busy = time <= 1.05 or even_ones_cost_more(extension, make_plan, op, sizes, dtype, device)
        warps = plan["team"]["blocks_per_sm"] * THREADS // 32
        # Of tensors that have 256 KiB for every SM.
        wide = (
            math.prod(sizes) * DTYPE_BYTES[dtype] < sms * (256 << 10) or max(blocks) >= 0.75 * sms
        )
        if not (busy and explained and wide) or warps < 16:
            choice = (plan["team"]["scope"], plan["team"]["size"], plan["team"]["rounds"])
            wrong.append((sizes, dtype, op, round(time, 3), round(idle, 3), choice))
    assert not wrong


def even_ones_cost_more(extension, make_plan, op, sizes, dtype, device) -> bool:
    """Whether all teams within 1.05 of an even share, and two passes, cost more than the choice."""
    shifts = {"grad_output_shift": 0} if op.startswith("backward") else {}
    found = extension.plan_candidates(op, *sizes, dtype, device, shifts)
    (chosen,) = (each["cost"] for each in found if each["chosen"])
    even = [
        each["cost"]
        for each in found
        if each["options"]["strategy"] == "two_pass"
        or waves_of(make_plan(op, sizes, dtype, device, **each["options"]), device["sm_count"])[1]
        <= 1.05
    ]
    return min(even) > chosen
