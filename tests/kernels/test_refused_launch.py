"""Team kernels that a device refuses: the call goes on by other kernels, and says so once.

A GPU that is shared (MPS, MIG, green contexts) may refuse what its occupancy allows. The model of
CUDA refuses when it is told to.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import harness
import pytest
import torch
from cases import Case, channels_last, fill, fill_gradient, fill_parameters
from conftest import HAS_GPU, Backend
from forked import Forks, Program
from fused_problem import Fused
from strategies import FORCED, launched
from torch import nn

import batchnorm_cuda
from batchnorm_cuda import batch_norm

pytestmark = [
    pytest.mark.skipif(HAS_GPU, reason="a GPU refuses what it refuses"),
    pytest.mark.filterwarnings("ignore:batch_norm. the device refused"),
]

INVALID_VALUE, INVALID_CONFIGURATION = 1, 9
OUT_OF_RESOURCES, TOO_LARGE, NOT_SUPPORTED, CLUSTER_SIZE = 701, 720, 801, 912
# By scope: what refuse_launches takes it for, what the planner takes from the device, the errors.
KINDS = {"grid": "cooperative", "cluster": "cluster"}
ERRORS = [
    *(("grid", error) for error in (TOO_LARGE, OUT_OF_RESOURCES, NOT_SUPPORTED)),
    *(("cluster", error) for error in (CLUSTER_SIZE, INVALID_CONFIGURATION, OUT_OF_RESOURCES)),
]
CASES = [
    Case((8, 3, 20, 20), "whole windows along S"),
    Case((9, 5, 21, 23), "odd runs: a mask that is cleared first"),
    Case((6, 24, 15, 15), "along C", channels_last),
]

every_scope = pytest.mark.parametrize("scope", KINDS)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


class Refusing:
    """A device that refuses teams of some scopes, and counts how often it did."""

    def __init__(self, extension: ModuleType) -> None:
        self.model = extension._host_model
        self.errors: dict[str, int] = {}
        self.model.set_device({})  # one that nobody knows yet

    def refuse(self, scope: str, error: int) -> None:
        self.errors[KINDS[scope]] = error
        self.model.refuse_launches(**self.errors)

    def count(self) -> int:
        """Since the last call."""
        return self.model.refuse_launches(**self.errors)


@pytest.fixture
def refusing(extension: ModuleType) -> Iterator[Refusing]:
    device = Refusing(extension)
    yield device
    device.model.refuse_launches()
    device.model.set_device({})


@pytest.mark.parametrize("scope, error", ERRORS)
@every_case
def test_results(
    kernels: Backend,
    extension: ModuleType,
    plan_options: Callable,
    refusing: Refusing,
    scope: str,
    error: int,
    case: Case,
) -> None:
    plan_options(FORCED[scope])
    refusing.refuse(scope, error)
    x = fill(case, torch.float32, kernels.device)
    dy = fill_gradient(x, torch.float32)
    parameters = fill_parameters(case.channels, torch.float32, kernels.device)
    want = harness.reference_forward(x, parameters, True)
    gradients = harness.backward(batch_norm, x, parameters, dy, True)
    assert refusing.count() == 1
    harness.assert_matches(harness.forward(kernels, x, parameters, True), want, x)
    harness.assert_matches(gradients, harness.reference_backward(dy, x, parameters, True), x)
    assert refusing.count() == 0
    assert extension._host_model.last_error() == 0


@every_scope
@every_case
def test_refused_for_the_first_time_in_the_backward_pass(
    kernels: Backend, plan_options: Callable, refusing: Refusing, scope: str, case: Case
) -> None:
    x = fill(case, torch.float32, kernels.device).requires_grad_()
    dy = fill_gradient(x, torch.float32)
    parameters = fill_parameters(case.channels, torch.float32, kernels.device)
    want = harness.reference_backward(dy, x.detach(), parameters, True)
    output = harness.call(batch_norm, x, parameters, True)
    plan_options(FORCED[scope])
    refusing.refuse(scope, OUT_OF_RESOURCES)
    (grad_input,) = torch.autograd.grad(output, x, dy)
    assert refusing.count() == 1
    harness.assert_matches({"grad_input": grad_input}, want, x.detach())


@every_scope
@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_fused(
    extension: ModuleType,
    plan_options: Callable,
    refusing: Refusing,
    scope: str,
    case: Case,
    dtype: torch.dtype,
) -> None:
    """Output, mask, running statistics and gradients."""
    plan_options(FORCED[scope])
    refusing.refuse(scope, TOO_LARGE)
    Fused(extension, case, dtype).check()
    assert refusing.count() == 1


@every_scope
@pytest.mark.parametrize("momentum", [0.25, None])
def test_the_batch_counts_once(
    kernels: Backend,
    plan_options: Callable,
    refusing: Refusing,
    scope: str,
    momentum: float | None,
) -> None:
    plan_options(FORCED[scope])
    refusing.refuse(scope, TOO_LARGE)
    module = batchnorm_cuda.BatchNorm2d(3, momentum=momentum).to(kernels.device)
    expected = nn.BatchNorm2d(3, momentum=momentum)
    for _ in range(2):
        x = torch.randn(8, 3, 20, 20)
        module(x.to(kernels.device))
        expected(x)
        torch.testing.assert_close(dict(module.cpu().state_dict()), dict(expected.state_dict()))
    assert refusing.count() == 1


@every_scope
def test_the_device_is_planned_without(
    kernels: Backend,
    extension: ModuleType,
    plan_options: Callable,
    refusing: Refusing,
    scope: str,
) -> None:
    """Not the scope that it takes: what is refused is known of one device and one scope."""
    other = next(each for each in KINDS if each != scope)
    x = torch.randn(8, 3, 20, 20, device=kernels.device)
    refusing.refuse(scope, TOO_LARGE)
    for forced, count in ((scope, 1), (scope, 0), (other, 0)):
        plan_options(FORCED[forced])
        names = launched(extension, lambda: batch_norm(x, None, None, training=True))
        assert refusing.count() == count
        assert ["team_kernel" in name for name in names] == (
            [True] if forced == other else [False] * 3
        )
    device = extension.device_info()
    assert device["cooperative"] == (scope != "grid")
    assert (device["max_cluster"] > 0) == (scope != "cluster")
    refusing.model.set_device({})
    assert extension.device_info()["cooperative"] and extension.device_info()["max_cluster"] > 0


def test_the_first_call_takes_the_path_of_the_later_ones(
    kernels: Backend, extension: ModuleType, plan_options: Callable, refusing: Refusing
) -> None:
    """Results repeat to the bit: what a cluster does not do, a grid does from the first call on."""
    plan_options({"strategy": "team", "team_size": 4})
    x = torch.randn(8, 3, 64, 64, device=kernels.device)
    refusing.refuse("cluster", CLUSTER_SIZE)
    outputs = []

    def step() -> None:
        outputs.append(batch_norm(x, None, None, training=True))

    first, second = (launched(extension, step) for _ in range(2))
    assert refusing.count() == 1
    assert first == second and len(first) == 1 and "team_kernel" in first[0]
    assert torch.equal(*outputs)


def test_both_scopes_may_be_refused_in_one_call(
    kernels: Backend, extension: ModuleType, plan_options: Callable, refusing: Refusing
) -> None:
    plan_options({"strategy": "team", "team_size": 4})
    for scope in KINDS:
        refusing.refuse(scope, OUT_OF_RESOURCES)
    x = torch.randn(8, 3, 64, 64, device=kernels.device)
    y = batch_norm(x, None, None, training=True)
    assert refusing.count() == 2
    torch.testing.assert_close(y, nn.functional.batch_norm(x, None, None, training=True))


@every_scope
def test_other_errors_are_raised(
    kernels: Backend,
    plan_options: Callable,
    refusing: Refusing,
    scope: str,
) -> None:
    plan_options(FORCED[scope])
    refusing.refuse(scope, INVALID_VALUE)
    x = torch.randn(8, 3, 20, 20, device=kernels.device)
    with pytest.raises(RuntimeError, match="launching team_kernel failed: invalid argument"):
        batch_norm(x, None, None, training=True)


def test_threads(kernels: Backend, plan_options: Callable, refusing: Refusing) -> None:
    """Some plan by what another has just been refused."""
    plan_options(FORCED["grid"])
    refusing.refuse("grid", TOO_LARGE)
    x = torch.randn(8, 3, 20, 20, device=kernels.device)
    want = nn.functional.batch_norm(x, None, None, training=True)
    results = []

    def call() -> None:
        for _ in range(5):
            results.append(batch_norm(x, None, None, training=True))

    threads = [threading.Thread(target=call) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 30
    for result in results:
        torch.testing.assert_close(result, want)
    assert 1 <= refusing.count() <= len(threads)


# What a process says: each a process of its own, which says it once.
SCRIPT = """
import json, sys, warnings
import torch
from batchnorm_cuda import batch_norm
from batchnorm_cuda._build.extension import load_emulated

options, device, refusals = json.loads(sys.argv[1])
extension = load_emulated()
extension.set_plan_options(options)
extension._host_model.set_device(device)
extension._host_model.refuse_launches(**refusals)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(2):
        x = torch.randn(8, 3, 20, 20, requires_grad=True)
        y = batch_norm(x, None, None, training=True)
        y.backward(y.detach())
        info = extension.device_info()
        extension._host_model.set_device(device)  # another device, which refuses as well
    expected = torch.nn.functional.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(y, expected)
print(json.dumps([[str(each.message) for each in said], info["cooperative"], info["max_cluster"]]))
"""
CROWDED = {"sm_count": 2, "registers_per_thread": 255}  # a block an SM, where two are planned


@pytest.fixture
def said(forks: Forks, tmp_path: Path) -> Callable[[dict, dict, dict], list]:
    """The warnings, and what of the device is left to plan with."""

    def run(options: dict, device: dict, refusals: dict) -> list:
        script = tmp_path / "script.py"
        script.write_text(SCRIPT)
        arguments = json.dumps([options, device, refusals])
        emulated = {"BATCHNORM_CUDA_EMULATE": "1"}
        (done,) = forks.run_together([Program((str(script), arguments), emulated)])
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
        return json.loads(done.stdout)

    return run


@pytest.mark.parametrize(
    "scope, error, parts",
    [
        (
            "grid",
            TOO_LARGE,
            ("cooperative grid of 6 blocks", "cudaErrorCooperativeLaunchTooLarge: too many blocks"),
        ),
        ("cluster", CLUSTER_SIZE, ("clusters of 2 blocks", "cudaErrorInvalidClusterSize: ")),
    ],
)
def test_one_warning_says_why(
    said: Callable, scope: str, error: int, parts: tuple[str, ...]
) -> None:
    messages, _, _ = said(FORCED[scope], {}, {KINDS[scope]: error})
    (message,) = messages
    for part in (*parts, "MPS", "two passes", "1.5 times the bytes forward and 1.7 times backward"):
        assert part in message


@pytest.mark.parametrize("scope", KINDS)
def test_a_kernel_that_fits_less_often_than_planned(said: Callable, scope: str) -> None:
    """Its problem takes two passes; the device is what it was."""
    options = {"strategy": "team", "scope": scope, "team_size": 4}
    messages, cooperative, max_cluster = said(options, CROWDED, {})
    (message,) = messages
    assert "holds fewer blocks of a kernel than planned" in message and "two passes" in message
    assert cooperative and max_cluster > 0
