"""The kernels that read each activation once, with every way to share a channel group forced."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import harness
import pytest
import torch
from cases import Case, channels_last, fill, fill_gradient, fill_parameters
from conftest import Backend
from torch import Tensor

from batchnorm_cuda import batch_norm

CASES = [
    Case((8, 3, 20, 20), "channels shared by several blocks, whole windows"),
    Case((9, 5, 21, 23), "odd runs: heads and tails in every run"),
    Case((2, 40, 5, 3), "many short channels: a block serves several"),
    Case((6, 24, 15, 15), "a slab of channels over many rows", channels_last),
    Case((300, 64), "rows of channels"),
]
# (scope, blocks of a team); block scope is a team of one.
TEAMS = [("block", 1), ("grid", 2), ("grid", 3), ("grid", 5), ("cluster", 2), ("cluster", 4)]

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
every_team = pytest.mark.parametrize("scope, size", TEAMS, ids=lambda value: str(value))


def compute(case: Case, kernels: Backend, dtype: torch.dtype) -> tuple[dict, dict]:
    """Results of a training step and what the reference says to them."""
    torch.manual_seed(3)
    x = fill(case, dtype, kernels.device)
    dy = fill_gradient(x, dtype)
    parameters = fill_parameters(case.channels, dtype, kernels.device)
    forward = harness.reference_forward(x, parameters, True)
    backward = harness.reference_backward(dy, x, parameters, True)
    gradients = harness.backward(batch_norm, x, parameters, dy, True)
    results = harness.forward(kernels, x, parameters, True)
    harness.assert_matches(results, forward, x)
    harness.assert_matches(gradients, backward, x)
    return results, gradients


@every_case
@every_team
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_every_team(
    kernels: Backend,
    plan_options: Callable,
    case: Case,
    scope: str,
    size: int,
    dtype: torch.dtype,
) -> None:
    plan_options({"strategy": "team", "scope": scope, "team_size": size})
    compute(case, kernels, dtype)


@every_team
@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=lambda case: case.id)
@pytest.mark.parametrize("op", ["forward_training", "backward_training"])
def test_the_plan_obeys(extension: ModuleType, scope: str, size: int, case: Case, op: str) -> None:
    """The tests here are empty unless forced teams are what runs."""
    options = {"strategy": "team", "scope": scope, "team_size": size}
    options["grad_output_shift"] = 0
    device = extension.device_info()
    plan = extension.make_plan(op, *case.geometry, "float32", device, options)
    team = plan["team"]
    assert (team["scope"], team["size"]) == (scope, size)
    assert plan["launches"] == 1


LARGE = Case((16, 5, 64, 96), "more channels than teams: one team has a last round of its own")
HALF = Case((8, 5, 64, 96), "the same")
# What fills registers and shared memory, in all dtypes, and for teams of several blocks in several
# rounds.
FULL = [
    ("forward_training", torch.float16, LARGE, "block"),
    ("forward_training", torch.bfloat16, LARGE, "block"),
    ("forward_training", torch.float32, HALF, "block"),
    ("forward_training", torch.float64, Case((4, 5, 64, 96), "the same"), "block"),
    ("backward_training", torch.float16, HALF, "block"),
    ("backward_training", torch.float16, LARGE, "cluster"),
    ("backward_training", torch.bfloat16, LARGE, "grid"),
    ("backward_training", torch.float32, HALF, "grid"),
    ("backward_training", torch.float32, HALF, "cluster"),
    ("backward_training", torch.float64, Case((2, 5, 64, 96), "the same"), "block"),
]
# Runs of odd sizes, whose ends are held or read twice beside their whole windows; the last has more
# heads of runs than a block has threads.
ODD = [Case((n, 5, 63, 97), "odd runs") for n in (16, 8, 4, 2)]
MANY = [Case((n, 5, 5, 51), "many odd runs") for n in (400, 260)]
FULL += [
    ("forward_training", torch.float16, ODD[0], "block"),
    ("forward_training", torch.float16, MANY[0], "block"),
    ("forward_training", torch.float32, ODD[1], "block"),
    ("forward_training", torch.float64, ODD[2], "block"),
    ("backward_training", torch.float16, ODD[1], "block"),
    ("backward_training", torch.float16, MANY[1], "block"),
    ("backward_training", torch.bfloat16, ODD[0], "grid"),
    ("backward_training", torch.float32, ODD[1], "cluster"),
    ("backward_training", torch.float64, ODD[3], "block"),
]
for op, rows in (("forward_training", 3000), ("backward_training", 1500)):
    for dtype, channels in ((torch.float16, 168), (torch.bfloat16, 168), (torch.float32, 84)):
        FULL.append(
            (op, dtype, Case((rows, channels), "slabs of which the last is narrow"), "block")
        )
        for scope in ("cluster", "grid"):
            FULL.append(
                (op, dtype, Case((3200, channels), "and which teams have unequally"), scope)
            )
    FULL.append((op, torch.float64, Case((rows + 100, 42), "the same"), "block"))
    FULL.append((op, torch.float64, Case((3100, 42), "the same"), "grid"))


@pytest.mark.parametrize("op, dtype, case, scope", FULL, ids=lambda v: getattr(v, "id", str(v)))
def test_full_blocks(
    kernels: Backend,
    extension: ModuleType,
    plan_options: Callable,
    op: str,
    dtype: torch.dtype,
    case: Case,
    scope: str,
) -> None:
    size = {"block": 1, "grid": 3, "cluster": 4}[scope]
    options = {"strategy": "team", "scope": scope, "team_size": size, "slab": 8}
    device = extension.device_info()
    name = str(dtype).removeprefix("torch.")
    known = options | {"grad_output_shift": 0}
    team = extension.make_plan(op, *case.geometry, name, device, known)["team"]
    if not torch.cuda.is_available():  # the sizes are for the model's SMs
        assert team["scope"] == scope and team["shared_windows"] > 0
        assert team["rounds"] > 1 or scope == "block"
    plan_options(options)
    compute(case, kernels, dtype)


@pytest.mark.parametrize(
    "case",
    [
        Case((3, 1, 200, 200), "a channel of three times what a block holds"),
        Case((3, 1, 201, 199), "the same with masks"),
        Case((150, 8, 16, 16), "a slab of three times what a block holds", channels_last),
    ],
    ids=lambda case: case.id,
)
def test_what_does_not_fit_is_read_again(
    kernels: Backend, extension: ModuleType, plan_options: Callable, case: Case
) -> None:
    options = {"strategy": "team", "team_size": 1}
    device = extension.device_info()
    plan = extension.make_plan("forward_training", *case.geometry, "float32", device, options)
    assert plan["team"]["streamed_bytes"] > 0
    assert plan["reread_bytes"] == plan["team"]["streamed_bytes"]
    plan_options(options)
    compute(case, kernels, torch.float32)


def test_workspace_serves_launches_of_any_size(kernels: Backend, plan_options: Callable) -> None:
    """The flags of one launch must not satisfy the next, whatever the teams of either."""
    expected: dict[str, Tensor] = {}
    for size in (2, 5, 3, 2, 7, 2, 5):
        plan_options({"strategy": "team", "scope": "grid", "team_size": size})
        results, _ = compute(CASES[0], kernels, torch.float32)
        key = str(size)
        assert torch.equal(results["output"], expected.setdefault(key, results["output"]))


@pytest.mark.parametrize("scope, size", [("grid", 3), ("cluster", 4)])
@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=lambda case: case.id)
def test_order_of_blocks(
    kernels: Backend,
    plan_options: Callable,
    monkeypatch: pytest.MonkeyPatch,
    case: Case,
    scope: str,
    size: int,
) -> None:
    """Every block merges the ranks in one order, whichever publishes first."""
    plan_options({"strategy": "team", "scope": scope, "team_size": size})
    runs = []
    for seed in ("1", "2", "99"):
        monkeypatch.setenv("BATCHNORM_CUDA_EMULATE_SEED", seed)
        results, gradients = compute(case, kernels, torch.float32)
        runs.append(results | gradients)
    for run in runs[1:]:
        for name, value in run.items():
            assert torch.equal(value, runs[0][name]), name


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=lambda case: case.id)
def test_eval_backward_reads_once(kernels: Backend, plan_options: Callable, case: Case) -> None:
    """Constant statistics, all three gradients: one launch of a team as well."""
    plan_options({"strategy": "team", "team_size": 2})
    x = fill(case, torch.float32, kernels.device)
    dy = fill_gradient(x, torch.float32)
    parameters = fill_parameters(case.channels, torch.float32, kernels.device)
    gradients = harness.backward(batch_norm, x, parameters, dy, False)
    harness.assert_matches(gradients, harness.reference_backward(dy, x, parameters, False), x)
