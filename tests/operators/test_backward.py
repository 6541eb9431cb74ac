"""Gradients against the reference, and which of them are computed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import harness
import pytest
import torch
import torch.nn.functional as F
from cases import (
    CHANNELLESS_SHAPES,
    EMPTY_SHAPES,
    FEW_CASES,
    Case,
    fill,
    fill_gradient,
    fill_parameters,
)
from conftest import Backend
from parametrisations import both_modes, every_case, every_dtype, few_cases
from torch import Tensor

from batchnorm_cuda import BatchNormFunction, batch_norm
from batchnorm_cuda._ops import operators as ops


@every_dtype
@both_modes
@every_case
def test_matches_reference(
    backend: Backend, case: Case, training: bool, dtype: torch.dtype
) -> None:
    x = fill(case, dtype, backend.device)
    dy = fill_gradient(x, dtype)
    parameters = fill_parameters(case.channels, dtype, backend.device)

    results = harness.backward(batch_norm, x, parameters, dy, training)

    assert {grad.dtype for grad in results.values()} == {dtype}
    expected = harness.reference_backward(dy, x, parameters, training)
    torchs = harness.backward(F.batch_norm, x, parameters, dy, training)
    harness.assert_matches(results, expected, x, torchs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@both_modes
@few_cases
def test_float32_parameters(
    backend: Backend, case: Case, dtype: torch.dtype, training: bool
) -> None:
    """The gradient of a float32 parameter is float32, unrounded."""
    x = fill(case, dtype, backend.device)
    dy = fill_gradient(x, dtype)
    parameters = fill_parameters(case.channels, torch.float32, backend.device)

    results = harness.backward(batch_norm, x, parameters, dy, training)

    dtypes = {name: grad.dtype for name, grad in results.items()}
    single = torch.float32
    assert dtypes == {"grad_input": dtype, "grad_weight": single, "grad_bias": single}
    harness.assert_matches(results, harness.reference_backward(dy, x, parameters, training), x)


@pytest.mark.parametrize(
    "given",
    [{"weight": False}, {"bias": False}, {"weight": False, "bias": False}],
    ids=["no weight", "no bias", "no affine"],
)
@both_modes
def test_absent_parameters(backend: Backend, training: bool, given: dict[str, bool]) -> None:
    x = fill(FEW_CASES[1], torch.bfloat16, backend.device)
    dy = fill_gradient(x, x.dtype)
    parameters = fill_parameters(x.shape[1], x.dtype, backend.device, **given)
    results = harness.backward(batch_norm, x, parameters, dy, training)
    harness.assert_matches(results, harness.reference_backward(dy, x, parameters, training), x)


@both_modes
@few_cases
def test_requires_grad_subsets(
    backend: Backend, plan_options: Callable, case: Case, training: bool
) -> None:
    """Each gradient is the same whichever others are wanted, and is absent when it is not.

    To the bit within a strategy: a team sums in another order than two passes, and is chosen only
    where grad_input is wanted.
    """
    plan_options({"strategy": "two_pass"})
    x = fill(case, torch.float32, backend.device)
    dy = fill_gradient(x, x.dtype)
    parameters = fill_parameters(case.channels, x.dtype, backend.device)
    everything = list(harness.backward(batch_norm, x, parameters, dy, training).values())
    for wanted in product([False, True], repeat=3):
        copy = parameters.clone()
        tensors = [x.detach(), copy.weight, copy.bias]
        for tensor, flag in zip(tensors, wanted, strict=True):
            tensor.requires_grad_(flag)
        output = harness.call(batch_norm, tensors[0], copy, training)
        assert output.requires_grad == any(wanted)
        if any(wanted):
            output.backward(dy)
        for tensor, flag, full in zip(tensors, wanted, everything, strict=True):
            assert (tensor.grad is not None) == flag
            assert not flag or torch.equal(tensor.grad, full)


@pytest.mark.parametrize("wanted", list(product([False, True], repeat=3))[1:], ids=str)
def test_only_wanted_gradients_are_computed(
    kernels: Backend, wanted: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """autograd drops what nobody wants; the kernels are not to spend time on it."""
    asked = harness.asked(monkeypatch, ops.backward)
    x = fill(FEW_CASES[0], torch.float32, kernels.device)
    parameters = fill_parameters(x.shape[1], x.dtype, kernels.device)
    for tensor, flag in zip([x, parameters.weight, parameters.bias], wanted, strict=True):
        tensor.requires_grad_(flag)
    output = harness.call(batch_norm, x, parameters, True).sum()
    with harness.Looking():  # else Python takes no part in it
        output.backward()
    assert asked == [wanted]


@pytest.mark.parametrize("by_function", [False, True])
def test_no_gradient_at_all(kernels: Backend, by_function: bool) -> None:
    """What stands behind gives None: so do we, as torch does."""

    class Without(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    x = fill(FEW_CASES[0], torch.float32, kernels.device).requires_grad_()
    if by_function:
        y = BatchNormFunction.apply(x, None, None, None, None, None, True, 0.1, 1e-5)
    else:
        y = batch_norm(x, None, None, training=True)
    Without.apply(y).sum().backward()
    assert x.grad is None


def test_two_forwards_before_one_backward(backend: Backend) -> None:
    """Each forward keeps statistics of its own."""
    case = FEW_CASES[1]
    parameters = fill_parameters(case.channels, torch.float32, backend.device)
    inputs = [fill(case, torch.float32, backend.device) for _ in range(2)]
    dy = fill_gradient(inputs[0], torch.float32)
    leaves = [x.requires_grad_() for x in inputs]
    outputs = [harness.call(batch_norm, x, parameters, True) for x in leaves]
    for x, output in zip(leaves, outputs, strict=True):
        (grad,) = torch.autograd.grad(output, x, dy)
        expected = harness.reference_backward(dy, x, parameters, True)
        harness.assert_matches({"grad_input": grad}, expected, x)


def test_eval_backward_after_running_statistics_moved(backend: Backend) -> None:
    """The backward of an eval forward uses the statistics that forward used."""
    x = fill(FEW_CASES[1], torch.float32, backend.device).requires_grad_()
    dy = fill_gradient(x, x.dtype)
    parameters = fill_parameters(x.shape[1], x.dtype, backend.device)
    before = parameters.clone()
    weight = parameters.weight.requires_grad_()
    output = harness.call(batch_norm, x, parameters, False)
    with torch.no_grad():
        harness.call(batch_norm, x, parameters, True)
    grads = torch.autograd.grad(output, [x, weight], dy)
    expected = harness.reference_backward(dy, x, before, False)
    harness.assert_matches(
        dict(zip(["grad_input", "grad_weight"], grads, strict=True)), expected, x
    )


def test_expanded_gradient(backend: Backend) -> None:
    """sum().backward() sends one value expanded to the output's shape."""
    x = fill(FEW_CASES[1], torch.float32, backend.device).requires_grad_()
    parameters = fill_parameters(x.shape[1], x.dtype, backend.device)
    weight = parameters.weight.requires_grad_()
    harness.call(batch_norm, x, parameters, False).sum().backward()
    ones = torch.ones_like(x)
    expected = harness.reference_backward(ones, x, parameters, False)
    harness.assert_matches({"grad_input": x.grad, "grad_weight": weight.grad}, expected, x)


def test_weight_changed_before_backward(backend: Backend) -> None:
    """An in-place update of what the backward reads is an error, not a wrong gradient."""
    x = fill(FEW_CASES[0], torch.float32, backend.device).requires_grad_()
    parameters = fill_parameters(x.shape[1], x.dtype, backend.device)
    output = harness.call(batch_norm, x, parameters, True)
    parameters.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_bias_changed_before_backward(backend: Backend) -> None:
    """The gradient does not depend on bias, so updating it is allowed, as in torch."""
    x = fill(FEW_CASES[0], torch.float32, backend.device).requires_grad_()
    parameters = fill_parameters(x.shape[1], x.dtype, backend.device)
    bias = parameters.bias.requires_grad_()
    output = harness.call(batch_norm, x, parameters, True)
    with torch.no_grad():
        bias.add_(1)
    output.sum().backward()
    assert torch.equal(bias.grad, torch.full_like(bias, x.numel() / x.shape[1]))


@pytest.mark.parametrize("shape", EMPTY_SHAPES + CHANNELLESS_SHAPES, ids=str)
@both_modes
def test_empty(backend: Backend, shape: tuple[int, ...], training: bool) -> None:
    """Sums over nothing are zero, as in torch."""
    x = torch.empty(shape, device=backend.device, requires_grad=True)
    parameters = fill_parameters(shape[1], x.dtype, backend.device)
    weight, bias = parameters.weight.requires_grad_(), parameters.bias.requires_grad_()
    harness.call(batch_norm, x, parameters, training).sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(bias.grad, torch.zeros_like(bias))


def test_running_statistics_get_no_gradient(backend: Backend) -> None:
    x = fill(FEW_CASES[0], torch.float32, backend.device).requires_grad_()
    parameters = fill_parameters(x.shape[1], x.dtype, backend.device)
    harness.call(batch_norm, x, parameters, True).sum().backward()
    assert not parameters.running_mean.requires_grad
    assert parameters.running_mean.grad is None
