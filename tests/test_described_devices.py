"""The plans of large devices, run: an H100's for layers of networks, and every count's largest.

The suite's device has four SMs and so gets few splits, small teams and few rounds. Here the host
model is the device that batchnorm_cuda/devices.py describes, and problems are cut in size but not
in geometry: as many blocks share a channel as on that device, and each does little. On a GPU those
problems run whose device it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import harness
import pytest
import torch
from cases import Case, channels_last, fill, fill_gradient, fill_parameters
from conftest import HAS_GPU, KERNELS
from described import (
    BACKWARD,
    DOUBLE_BACKWARD,
    FORWARD,
    Problem,
    Sizes,
    counts,
    dtype_name,
    largest,
    layout_of,
    make_plan,
    options_of,
)
from fused_problem import Fused
from sync_cases import EPS, MOMENTUM, SyncCase
from test_double_backward import fill_grad_grads
from test_sync import assert_parts_match

from batchnorm_cuda import batch_norm, devices, ops, sync_ops
from bench.traffic_model import scaled_device

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


# Operation, layer, what of it is run, and why the H100 does it in that way.
LAYERS = [
    (DOUBLE_BACKWARD, IMAGES, HALF, Case((1, 3, 66, 128), "two passes of 176 splits")),
    (DOUBLE_BACKWARD, rows(ODD_WIDE), HALF, Case((2112, 12), "528 splits of two rows")),
    (FORWARD, rows(ODD_WIDE), HALF, Case((2112, 12), "a merge of 1056 rows")),
    (BACKWARD, rows(ODD_WIDE), HALF, Case((2112, 12), "the same of sums")),
    (BACKWARD, RESNET[1], HALF, Case((128, 2, 28, 28), "a block that holds all it can")),
    (FORWARD, RESNET[3], HALF, Case((32, 16, 7, 7), "a block, eight channels to a row")),
    (BACKWARD, RESNET[3], HALF, Case((32, 16, 7, 7), "the same")),
    (FORWARD, RESNET[0], FLOAT, Case((256, 2, 56, 56), "a cluster of eight, nearly full")),
    (BACKWARD, RESNET[0], HALF, Case((256, 2, 56, 56), "the same of two tensors")),
    (FORWARD, rows(RESNET[2]), HALF, Case((196 * 128, 64), "a cluster along C")),
    (BACKWARD, WIDE_BATCH, HALF, Case((128, 16, 7, 7), "a cluster along a row")),
    (FORWARD, FEW_ODD, HALF, Case((64, 10, 7, 7), "a cluster along a masked row")),
    (FORWARD, ODD, HALF, Case((256, 2, 55, 55), "a cluster of four, odd runs")),
    (BACKWARD, ODD, HALF, Case((256, 2, 55, 55), "a cluster of eight, odd runs")),
    (FORWARD, IMAGES, HALF, Case((1, 2, 224, 224), "88 blocks a team")),
    (BACKWARD, IMAGES, HALF, Case((1, 2, 224, 224), "the same of sums")),
    (BACKWARD, rows(RESNET[2]), HALF, Case((6272, 64), "16 blocks a team, all read all slots")),
    (FORWARD, rows(RESNET[0]), HALF, Case((132 * 32, 32), "132 blocks, two levels")),
    (FORWARD, rows(IMAGES), HALF, Case((264 * 16, 3), "264 blocks, two levels, three channels")),
]
# The same with a residual and a ReLU, forward and backward.
FUSED_LAYERS = [
    (IMAGES, Case((1, 2, 224, 224), "88 blocks a team")),
    (rows(RESNET[3]), Case((32, 64, 7, 7), "a cluster along C", channels_last)),
    (rows(ODD_WIDE), Case((2112, 12), "two passes of 528 splits")),
]


def plan_like(
    extension: ModuleType, layer: Sizes, problem: Problem, **facts: object
) -> dict[str, Any]:
    """The options that make the problem's plan what the layer's is."""
    dtype = dtype_name(problem.dtype)
    whole = make_plan(extension, problem.op, layer, dtype, problem.properties(), **facts)
    options = options_of(whole)
    cut = replace(problem, options=options | facts).plan(extension)
    assert layout_of(cut) == layout_of(whole)
    return options


@pytest.mark.parametrize(
    "op, layer, dtype, case",
    LAYERS,
    ids=[f"{op.removesuffix('_training')}-{case.id}" for op, *_, case in LAYERS],
)
def test_layers_on_an_h100(
    extension: ModuleType,
    use_device: UseDevice,
    plan_options: Callable,
    op: str,
    layer: Sizes,
    dtype: torch.dtype,
    case: Case,
) -> None:
    problem = Problem("h100", op, case, dtype)
    use_device(problem.properties())
    plan_options(plan_like(extension, layer, problem))
    check(problem)


@pytest.mark.parametrize("layer, case", FUSED_LAYERS, ids=[case.id for _, case in FUSED_LAYERS])
def test_fused_layers_on_an_h100(
    extension: ModuleType, use_device: UseDevice, plan_options: Callable, layer: Sizes, case: Case
) -> None:
    forward = Problem("h100", FORWARD, case, HALF)
    use_device(forward.properties())
    backward = replace(forward, op=BACKWARD)
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
    gathered = torch.stack([sync_ops.sync_statistics(x) for x, _ in parts])
    results, sums, saved = [], [], []
    for x, dy in parts:
        weight, bias, mean, var = (t.to(KERNELS.device) for t in case.parameters())
        output, *statistics = sync_ops.sync_forward(
            x, weight, bias, mean, var, None, gathered, MOMENTUM, EPS
        )
        own, *of_parameters = sync_ops.sync_backward_reduce(
            dy, x, weight, bias, *statistics[:2], True, True
        )
        names = ("output", "running_mean", "running_var", "grad_weight", "grad_bias")
        results.append(dict(zip(names, (output, mean, var, *of_parameters), strict=True)))
        sums.append(own)
        saved.append((weight, *statistics))
    total = sync_ops.sync_sum(torch.stack(sums))
    for (x, dy), result, (weight, mean, invstd, count) in zip(parts, results, saved, strict=True):
        arguments = (dy, x, weight, mean, invstd, total, count)
        result["grad_input"] = sync_ops.sync_backward_elementwise(*arguments)
    assert_parts_match(case, parts, results)


# ------------------------------------------------------------------------ each count's largest


def two_passes(splits: int) -> dict[str, Any]:
    return {"strategy": "two_pass", "splits": splits}


def team(size: int, scope: str = "auto") -> dict[str, Any]:
    return {"strategy": "team", "scope": scope, "team_size": size}


LARGEST = [
    # Splits and rows of partial results.
    Problem("rtx5090", FORWARD, Case((5440, 7), "rows of a merge"), HALF, two_passes(680)),
    Problem("rtx5090", BACKWARD, Case((5440, 31), "170 rows a thread"), HALF, two_passes(680)),
    Problem("rtx5090", FORWARD, Case((1360, 64), "splits along C"), HALF, two_passes(680)),
    Problem("rtx5090", BACKWARD, Case((10880, 3), "splits along rows"), HALF, two_passes(680)),
    Problem("rtx5090", FORWARD, Case((1, 1, 680, 4), "splits along S"), FLOAT, two_passes(680)),
    Problem("h100", BACKWARD, Case((3, 3), "eight samples to a row group"), HALF, two_passes(1)),
    Problem("h100", BACKWARD, Case((1024, 3, 125), "runs of one split"), HALF, two_passes(1)),
    Problem("h100", FORWARD, Case((1024, 2, 125), "runs of one block"), HALF, team(1)),
    # Blocks of a team.
    Problem("h100", BACKWARD, Case((2, 2, 8, 160), "a cluster along S"), FLOAT, team(8)),
    Problem("h100", FORWARD, Case((64, 32), "a cluster along C"), FLOAT, team(8)),
    Problem("h100", FORWARD, Case((3136, 3), "a cluster, 16 samples to a row"), HALF, team(8)),
    Problem("rtx5090", BACKWARD, Case((1, 1, 340, 1024), "along S"), FLOAT, team(340, "grid")),
    Problem("rtx5090", BACKWARD, Case((2720, 3), "along a row"), FLOAT, team(340, "grid")),
    Problem("rtx5090", BACKWARD, Case((340, 16), "along C, two levels"), FLOAT, team(340, "grid")),
    Problem("rtx5090", BACKWARD, Case((2720, 12), "along a row"), FLOAT, team(340, "grid")),
    Problem("t4", BACKWARD, Case((80, 8), "along C, one level"), FLOAT, team(80, "grid")),
    # Slots, and the channels in them.
    Problem("rtx5090", FORWARD, Case((340, 544), "slots and totals"), FLOAT, team(20, "grid")),
    Problem("t4", BACKWARD, Case((8, 1000), "slices of 250"), HALF, team(4, "grid")),
    Problem("t4", FORWARD, Case((16, 1000), "slices of a slab"), HALF, team(8, "grid")),
    Problem("t4", BACKWARD, Case((49, 1000), "slots of a slab"), HALF, team(7, "grid")),
    Problem("t4", BACKWARD, Case((8, 257, 2), "129 channels to a row"), FLOAT, team(4, "grid")),
    Problem("t4", FORWARD, Case((8, 7, 7, 7), "eight places where samples begin"), HALF),
    Problem("t4", FORWARD, Case((1, 301, 7), "256 channels to a block"), FLOAT),
    # Rounds.
    Problem("t4", BACKWARD, Case((1, 342, 8, 256), "grid"), FLOAT, team(2, "grid"), sms=1),
    Problem("h100", BACKWARD, Case((1, 63, 8, 1024), "cluster"), FLOAT, team(8), sms=4),
    Problem("t4", BACKWARD, Case((1, 52, 128, 98), "block"), FLOAT, team(1), sms=1),
]


# Windows that a thread holds, in registers and in shared memory, of one tensor or of two: of a full
# block of each pattern and depth, on one SM, so that pipelined blocks have two rounds.
for op, of in ((FORWARD, 1), (BACKWARD, 2)):
    LARGEST += [
        Problem(device, op, case, dtype, team(1), sms=1)
        for device, dtype, case in [
            ("h100", HALF, Case((2, 2, 5632 // of, 8), "44 windows")),
            ("h100", HALF, Case((2, 2, 13056 // of, 8), "102 windows")),
            ("h100", HALF, Case((2, 2, 15360 // of, 8), "more than a block holds")),
            ("b200", FLOAT, Case((35 // of * 32, 64), "35 windows")),
            ("b200", FLOAT, Case((100 // of * 32, 64), "100 windows")),
            ("b200", FLOAT, Case((220 // of * 32, 64), "more than a block holds")),
            ("b200", FLOAT, Case((62 // of, 25, 14, 14), "31 rows")),
        ]
    ]


@pytest.fixture(scope="module")
def found(extension: ModuleType) -> dict[str, tuple[int, str]]:
    return largest(extension)


def test_no_plan_counts_further(extension: ModuleType, found: dict) -> None:
    """What is run is the largest that a scan of problems and devices finds of each count."""
    run: dict[str, int] = {}
    for problem in LARGEST:
        for count, value in counts(problem.plan(extension)).items():
            run[count] = max(value, run.get(count, 0))
    beyond = {
        count: f"{value} in {where}; run are {run.get(count, 0)}"
        for count, (value, where) in found.items()
        if value > run.get(count, 0)
    }
    assert not beyond


@pytest.mark.parametrize("problem", LARGEST, ids=lambda problem: problem.id)
def test_largest(
    extension: ModuleType,
    use_device: UseDevice,
    plan_options: Callable,
    found: dict,
    problem: Problem,
) -> None:
    planned = counts(problem.plan(extension))
    assert any(value >= found[count][0] for count, value in planned.items()), (
        f"no count is the largest any more: {planned}"
    )
    use_device(problem.properties())
    plan_options(problem.options)
    check(problem)
