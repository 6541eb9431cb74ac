"""The plans of large devices, run: an H100's for layers of networks, and every count's largest.

The suite's device has four SMs and so gets few splits, small teams and few rounds. Here the host
model is the device that batchnorm_cuda/devices.py describes, and problems are cut in size but not
in geometry: as many blocks share a channel as on that device, and each does little. On a GPU those
problems run whose device it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import harness
import pytest
import torch
from cases import Case, fill, fill_gradient, fill_parameters
from conftest import HAS_GPU, KERNELS
from described import (
    BACKWARD,
    DOUBLE_BACKWARD,
    FORWARD,
    Problem,
    Sizes,
    candidates,
    counts,
    dtype_name,
    forced,
    largest,
    layout_of,
    make_plan,
)
from fused_problem import Fused
from sync_cases import EPS, MOMENTUM, SyncCase
from test_double_backward import fill_grad_grads
from test_sync import assert_parts_match

from batchnorm_cuda import batch_norm, devices
from batchnorm_cuda._ops import operators as ops
from bench.models.traffic_model import scaled_device

HALF, FLOAT = torch.float16, torch.float32
UseDevice = Callable[[dict[str, Any]], None]


@pytest.fixture
def use_device(extension: ModuleType) -> Iterator[UseDevice]:
    """Describes the modelled device for the length of a test."""

    def use(properties: dict[str, Any]) -> None:
        if HAS_GPU:
            own = extension.device_info()
            same = all(own[key] == properties[key] for key in ("compute_major", "compute_minor"))
            if not same or own["sm_count"] < properties["sm_count"]:
                pytest.skip(f"needs the host model, or the device itself: {properties['name']}")
            return
        # With these registers an SM holds two team blocks: a larger grid than planned is refused.
        extension._host_model.set_device({**properties, "registers_per_thread": 128})

    yield use
    if not HAS_GPU:
        extension._host_model.set_device({})


def check(problem: Problem) -> None:
    """Runs its operation and compares with the reference."""
    torch.manual_seed(3)
    x = fill(problem.case, problem.dtype, KERNELS.device)
    dy = fill_gradient(x, problem.dtype)
    p = fill_parameters(problem.case.channels, FLOAT, KERNELS.device)
    forward = harness.reference_forward(x, p, True)
    if problem.op == FORWARD:
        harness.assert_matches(harness.forward(KERNELS, x, p, True), forward, x)
    elif problem.op == BACKWARD:
        saved = [t.to(x.device, FLOAT) for t in (forward.save_mean, forward.save_invstd)]
        gradients = ops.backward(dy, x, p.weight, p.bias, *saved, True, True, True, True)
        names = ("grad_input", "grad_weight", "grad_bias")
        expected = harness.reference_backward(dy, x, p, True)
        harness.assert_matches(dict(zip(names, gradients, strict=True)), expected, x)
    else:
        grad_grads = fill_grad_grads(x, p)
        results = harness.double_backward(batch_norm, x, p, dy, grad_grads, True)
        expected = harness.reference_double_backward(grad_grads, dy, x, p, True)
        harness.assert_matches(results, expected, x)


# ------------------------------------------------------------------- an H100's plans for layers

# [N, C, S] of layers of networks.
IMAGES = (32, 3, 224 * 224)
RESNET = [(256, 64, 56 * 56), (128, 512, 28 * 28), (128, 1024, 14 * 14), (32, 2048, 7 * 7)]
WIDE_BATCH = (128, 512, 7 * 7)
ODD, ODD_WIDE, FEW_ODD = (256, 64, 55 * 55), (64, 12, 147 * 147), (64, 10, 7 * 7)


def rows(sizes: Sizes) -> Sizes:
    """Channels last."""
    n, c, s = sizes
    return n * s, c, 1


# Operation, layer, what of it is run (few of its channels or samples), and how an H100 may do it.
LAYERS = [
    (DOUBLE_BACKWARD, IMAGES, HALF, Case((1, 3, 66, 128), "few channels"), "two_pass"),
    (DOUBLE_BACKWARD, rows(ODD_WIDE), HALF, Case((2112, 12), "many rows"), "two_pass"),
    (FORWARD, rows(ODD_WIDE), HALF, Case((2112, 12), "many rows"), "two_pass"),
    (BACKWARD, rows(ODD_WIDE), HALF, Case((2112, 12), "many rows"), "two_pass"),
    (BACKWARD, RESNET[1], HALF, Case((128, 2, 28, 28), "full"), "block 1 along_s"),
    (FORWARD, RESNET[2], HALF, Case((128, 2, 14, 14), "odd runs"), "block 1 along_s"),
    (FORWARD, RESNET[3], HALF, Case((32, 16, 7, 7), "short runs"), "block 1 along_row"),
    (BACKWARD, RESNET[3], HALF, Case((32, 16, 7, 7), "short runs"), "block 1 along_row"),
    (FORWARD, RESNET[0], FLOAT, Case((256, 2, 56, 56), "full"), "cluster 8 along_s"),
    (BACKWARD, RESNET[0], HALF, Case((256, 2, 56, 56), "full"), "cluster 8 along_s"),
    (BACKWARD, ODD, HALF, Case((256, 2, 55, 55), "odd runs"), "cluster 8 along_s"),
    (FORWARD, rows(RESNET[2]), HALF, Case((25088, 64), "full"), "cluster 8 along_c 8"),
    (BACKWARD, rows(WIDE_BATCH), HALF, Case((6272, 32), "two reads"), "cluster 8 along_c 4"),
    (BACKWARD, WIDE_BATCH, HALF, Case((128, 16, 7, 7), "runs"), "cluster 4 along_row"),
    (FORWARD, FEW_ODD, HALF, Case((64, 10, 7, 7), "masked"), "cluster 8 along_row"),
    (BACKWARD, ODD, HALF, Case((256, 2, 55, 55), "two reads"), "grid 20 along_s"),
    (FORWARD, IMAGES, HALF, Case((1, 2, 224, 224), "one level"), "grid 88 along_s"),
    (BACKWARD, IMAGES, HALF, Case((1, 2, 224, 224), "one level"), "grid 88 along_s"),
    (BACKWARD, rows(RESNET[2]), HALF, Case((6272, 64), "one level"), "grid 16 along_c 8"),
    (FORWARD, rows(RESNET[0]), HALF, Case((4224, 32), "two levels"), "grid 132 along_c 4"),
    (FORWARD, rows(IMAGES), HALF, Case((4224, 3), "two levels"), "grid 264 along_row"),
]
# The same with a residual and a ReLU, forward and backward.
FUSED_LAYERS = [
    (IMAGES, Case((1, 2, 224, 224), "one level"), "grid 88 along_s"),
    (rows(RESNET[3]), Case((1568, 64), "a slab"), "cluster 8 along_c 8"),
    (rows(ODD_WIDE), Case((2112, 12), "many rows"), "two_pass"),
]


def plan_like(
    extension: ModuleType, layer: Sizes, problem: Problem, **facts: object
) -> dict[str, Any]:
    """The options that make the problem's plan what the layer's may be."""
    given = (extension, problem.op, layer, dtype_name(problem.dtype), problem.properties())
    options = problem.options
    assert any(options.items() <= may_be.items() for may_be in candidates(*given, **facts))
    whole = make_plan(*given, **options, **facts)
    if "reduce" in whole:
        options = options | {"splits": whole["reduce"]["splits"]}
    cut = replace(problem, options=options | facts).plan(extension)
    assert layout_of(cut) == layout_of(whole)
    return options


@pytest.mark.parametrize(
    "op, layer, dtype, case, choice",
    LAYERS,
    ids=[f"{op}-{choice}-{case.id}" for op, _, _, case, choice in LAYERS],
)
def test_layers_on_an_h100(
    extension: ModuleType,
    use_device: UseDevice,
    plan_options: Callable,
    op: str,
    layer: Sizes,
    dtype: torch.dtype,
    case: Case,
    choice: str,
) -> None:
    problem = Problem("h100", op, dtype, case, forced(choice))
    use_device(problem.properties())
    plan_options(plan_like(extension, layer, problem))
    check(problem)


@pytest.mark.parametrize(
    "layer, case, choice", FUSED_LAYERS, ids=[choice for *_, choice in FUSED_LAYERS]
)
def test_fused_layers_on_an_h100(
    extension: ModuleType,
    use_device: UseDevice,
    plan_options: Callable,
    layer: Sizes,
    case: Case,
    choice: str,
) -> None:
    forward, backward = (
        Problem("h100", op, HALF, case, forced(choice)) for op in (FORWARD, BACKWARD)
    )
    use_device(forward.properties())
    options = plan_like(extension, layer, forward, fused=True, mask=True, residual_shift=0)
    assert options == plan_like(extension, layer, backward, fused=True, mask=True, outputs=2)
    plan_options(options)
    Fused(extension, case, HALF).check()


def test_ranks_on_an_h100(use_device: UseDevice, plan_options: Callable) -> None:
    """The parts of synchronised batch norm for 72 ranks, two of which have work for 176 splits."""
    small, large = (1, 3, 2, 3), (1, 3, 66, 64)
    case = SyncCase("72 ranks", (large, *[small] * 70, large))
    use_device(devices.planner_properties(scaled_device("h100")))
    plan_options({"splits": 176})
    parts = [tuple(t.to(KERNELS.device) for t in part) for part in case.parts()]
    gathered = torch.stack([ops.sync_statistics(x) for x, _ in parts])
    results, sums, saved = [], [], []
    for x, dy in parts:
        weight, bias, mean, var = (t.to(KERNELS.device) for t in case.parameters())
        output, *statistics = ops.sync_forward(
            x, weight, bias, mean, var, None, gathered, MOMENTUM, EPS
        )
        own, *of_parameters = ops.sync_backward_reduce(
            dy, x, weight, bias, *statistics[:2], True, True
        )
        names = ("output", "running_mean", "running_var", "grad_weight", "grad_bias")
        results.append(dict(zip(names, (output, mean, var, *of_parameters), strict=True)))
        sums.append(own)
        saved.append((weight, *statistics))
    total = ops.sync_sum(torch.stack(sums))
    for (x, dy), result, (weight, mean, invstd, count) in zip(parts, results, saved, strict=True):
        arguments = (dy, x, weight, mean, invstd, total, count)
        result["grad_input"] = ops.sync_backward_elementwise(*arguments)
    assert_parts_match(case, parts, results)


# ------------------------------------------------------------------------ each count's largest

# Device, SMs that it is cut to, operation, what is run, and how. Each has a count at its largest.
ALL = None
CHOICES = [
    # Splits, rows that are merged, runs of which a part has the edges, and parts of a stretch.
    ("rtx5090", ALL, FORWARD, HALF, (5440, 7), "two_pass 680"),
    ("rtx5090", ALL, BACKWARD, HALF, (1360, 64), "two_pass 680"),
    ("rtx5090", ALL, BACKWARD, HALF, (10880, 3), "two_pass 680"),
    ("rtx5090", ALL, FORWARD, FLOAT, (1, 1, 680, 4), "two_pass 680"),
    ("h100", ALL, BACKWARD, HALF, (3, 3), "two_pass 1"),
    ("h100", ALL, BACKWARD, HALF, (1024, 3, 125), "two_pass 1"),
    ("t4", 1, FORWARD, HALF, (1, 52, 8192), "two_pass"),
    ("t4", ALL, FORWARD, FLOAT, (1, 1000, 2), "two_pass"),
    # Blocks of a team.
    ("h100", ALL, BACKWARD, FLOAT, (2, 2, 8, 160), "cluster 8 along_s"),
    ("h100", ALL, FORWARD, FLOAT, (64, 32), "cluster 8 along_c 8"),
    ("h100", ALL, FORWARD, HALF, (3136, 3), "cluster 8 along_row"),
    ("rtx5090", ALL, BACKWARD, FLOAT, (1, 1, 340, 1024), "grid 340 along_s"),
    ("rtx5090", ALL, BACKWARD, FLOAT, (2720, 3), "grid 340 along_row"),
    ("rtx5090", ALL, BACKWARD, FLOAT, (340, 16), "grid 340 along_c 8"),
    ("rtx5090", ALL, BACKWARD, FLOAT, (2720, 12), "grid 340 along_row"),
    ("t4", ALL, BACKWARD, FLOAT, (80, 8), "grid 80 along_c 16"),
    # Slots, totals, and the channels in them and in a slice of them.
    ("rtx5090", ALL, FORWARD, HALF, (49, 2048), "grid 13 along_c 8"),
    ("a100", ALL, FORWARD, HALF, (8, 1000), "grid 2 along_row"),
    ("t4", ALL, FORWARD, HALF, (49, 1000), "grid 5 along_c 16"),
    ("t4", ALL, BACKWARD, HALF, (49, 1000), "grid 2 along_c 16"),
    ("t4", ALL, BACKWARD, FLOAT, (8, 257, 2), "grid 2 along_row"),
    # Channels and runs of a block, and places in a window where its samples begin.
    ("t4", ALL, FORWARD, FLOAT, (1, 301, 7), "block 1 along_s"),
    ("t4", ALL, FORWARD, HALF, (8, 7, 49), "block 1 along_row"),
    # Rounds.
    ("t4", 1, BACKWARD, FLOAT, (1, 2048, 8, 256), "grid 2 along_s"),
    ("h100", 4, BACKWARD, FLOAT, (1, 128, 8, 1024), "cluster 8 along_s"),
    # Windows that a thread holds, of one tensor and of two, in registers and in shared memory.
    ("h100", 1, FORWARD, HALF, (2, 2, 5632, 8), "block 1 along_s"),
    ("h100", 1, BACKWARD, HALF, (2, 2, 2816, 8), "block 1 along_s"),
    ("h100", 1, FORWARD, HALF, (2, 2, 13056, 8), "block 1 along_s"),
    ("h100", 1, BACKWARD, HALF, (2, 2, 6528, 8), "block 1 along_s"),
    ("h100", 1, FORWARD, HALF, (2, 2, 15360, 8), "block 1 along_s"),
    ("h100", 1, BACKWARD, HALF, (2, 2, 7680, 8), "block 1 along_s"),
    ("h100", 1, FORWARD, FLOAT, (2240, 32), "block 1 along_c 4"),
    ("h100", 1, BACKWARD, FLOAT, (1152, 32), "block 1 along_c 4"),
    ("h100", 1, FORWARD, FLOAT, (6400, 32), "block 1 along_c 4"),
    ("h100", 1, BACKWARD, FLOAT, (3200, 32), "block 1 along_c 4"),
    ("h100", 1, FORWARD, FLOAT, (7040, 32), "block 1 along_c 4"),
    ("h100", 1, BACKWARD, FLOAT, (3520, 32), "block 1 along_c 4"),
    ("h100", 1, FORWARD, FLOAT, (1024, 3, 49), "block 1 along_row"),
    ("h100", 1, BACKWARD, FLOAT, (12544, 3), "block 1 along_row"),
]
LARGEST = [
    Problem(device, op, dtype, Case(shape, ""), forced(choice), sms)
    for device, sms, op, dtype, shape, choice in CHOICES
]


def test_no_plan_counts_further(extension: ModuleType) -> None:
    """What is run is the largest that a scan of problems and devices finds of each count."""
    planned = [counts(problem.plan(extension)) for problem in LARGEST]
    run: dict[str, int] = {}
    for count, value in itertools.chain.from_iterable(plan.items() for plan in planned):
        run[count] = max(value, run.get(count, 0))
    beyond = {
        count: f"{value} in {where}; run are {run.get(count, 0)}"
        for count, (value, where) in largest(extension).items()
        if value > run.get(count, 0)
    }
    assert not beyond
    idle = [
        choice
        for choice, plan in zip(CHOICES, planned, strict=True)
        if not any(value == run[count] > 1 for count, value in plan.items())
    ]
    assert not idle


@pytest.mark.parametrize(
    "problem",
    LARGEST,
    ids=[f"{device}-{op}-{choice}-{shape}" for device, _, op, _, shape, choice in CHOICES],
)
def test_largest(
    extension: ModuleType, use_device: UseDevice, plan_options: Callable, problem: Problem
) -> None:
    use_device(problem.properties())
    plan_options(problem.options)
    check(problem)


@pytest.mark.parametrize("op", [FORWARD, BACKWARD])
def test_stretches_and_channel_blocks_of_all_kinds(
    extension: ModuleType, use_device: UseDevice, plan_options: Callable, op: str
) -> None:
    """40 stretches of 33 channel blocks: two, or three, have a part of one, and stretch 17 begins
    with channel block 14 only because the start of a stretch is rounded down.
    """
    case = Case((39, 33 * 256), "rows of channels")
    problem = Problem("t4", op, HALF, case, {"strategy": "two_pass"}, 20)
    t = problem.plan(extension)["reduce"]
    assert (t["grid"], t["channel_blocks"], t["work"]) == (40, 33, 39)
    assert 17 * 33 * 39 // 40 == 14 * 39 and 17 * 33 * 39 % 40 > 0
    assert t["splits"] == 3
    use_device(problem.properties())
    plan_options(problem.options)
    check(problem)
