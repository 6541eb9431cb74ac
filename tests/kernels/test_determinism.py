"""The same bits, whatever the order of blocks and the width of an index; close for any split."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import harness
import pytest
import torch
from cases import FEW_CASES, Case, channels_last, fill, fill_gradient, fill_parameters
from conftest import Backend
from torch import Tensor

from batchnorm_cuda import batch_norm

CASES = [
    *FEW_CASES,
    Case((2, 3, 56, 56), "channels are split over blocks"),
    Case((1, 32, 40, 40), "rows are split over blocks", channels_last),
]
SPLIT_CASES = CASES[-2:]

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


@pytest.fixture
def run(kernels: Backend) -> Callable[..., dict[str, Tensor]]:
    """All results of a case, from the same values at every call."""

    def compute(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        torch.manual_seed(2)
        x = fill(case, dtype, kernels.device)
        dy = fill_gradient(x, dtype)
        parameters = fill_parameters(case.channels, dtype, kernels.device)
        gradients = harness.backward(batch_norm, x, parameters, dy, True)
        return harness.forward(kernels, x, parameters, True) | gradients

    return compute


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float"])
def test_two_runs(run: Callable, case: Case, dtype: torch.dtype) -> None:
    assert_same_bits(run(case, dtype), run(case, dtype))


@every_case
def test_order_of_blocks(run: Callable, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulation runs blocks in an order drawn from the seed; a GPU chooses its own."""
    monkeypatch.setenv("BATCHNORM_CUDA_EMULATE_SEED", "1")
    first = run(case)
    for seed in ("2", "77", "123456"):
        monkeypatch.setenv("BATCHNORM_CUDA_EMULATE_SEED", seed)
        assert_same_bits(first, run(case))


@every_case
def test_index_width(run: Callable, plan_options: Callable, case: Case) -> None:
    """64-bit offsets, which only huge tensors need, compute the same."""
    plan_options({"strategy": "two_pass"})
    first = run(case)
    plan_options({"strategy": "two_pass", "index_bits": 64})
    assert_same_bits(first, run(case))


@pytest.mark.parametrize("splits", [1, 2, 7])
@pytest.mark.parametrize("case", SPLIT_CASES, ids=lambda case: case.id)
def test_splits(run: Callable, plan_options: Callable, case: Case, splits: int) -> None:
    """Any number of blocks to a channel is as right as the planner's own choice."""
    plan_options({"strategy": "two_pass", "splits": splits})
    results = run(case)
    torch.manual_seed(2)
    x = fill(case, torch.float32, results["output"].device)
    dy = fill_gradient(x, x.dtype)
    parameters = fill_parameters(case.channels, x.dtype, x.device)
    forward = harness.reference_forward(x, parameters, True)
    backward = harness.reference_backward(dy, x, parameters, True)
    gradients = {name: results.pop(name) for name in list(results) if name.startswith("grad")}
    harness.assert_matches(results, forward, x)
    harness.assert_matches(gradients, backward, x)


def test_forced_options_take_effect(extension: ModuleType) -> None:
    """The two tests above are empty unless the plan obeys."""

    def reduce(**options: int) -> dict:
        problem = ("forward_training", 2, 4, 3136, "float32", {})
        return extension.make_plan(*problem, {"strategy": "two_pass", **options})["reduce"]

    assert reduce()["index_bits"] == 32
    assert reduce(index_bits=64)["index_bits"] == 64
    assert reduce()["splits"] != 7
    assert reduce(splits=7)["splits"] == 7
