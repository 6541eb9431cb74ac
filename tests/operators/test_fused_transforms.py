"""Fused batch norm under torch.func's transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fused
import pytest
import torch
from cases import (
    Parameters,
)
from conftest import Backend
from fused import CHANNELS, every_form, extras, small_tensors
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap

import batchnorm_cuda

operators = torch.ops.batchnorm_cuda


def per_example(call: Callable, form: str) -> Callable:
    """Training mode without running statistics, of one example."""

    def function(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        return call(x, Parameters(weight, None, None, None), True, **extras(form, residual))

    return function


@every_form
@pytest.mark.parametrize("in_dims", [(0, 0, None), (0, None, None), (None, 0, None)], ids=str)
def test_vmap(backend: Backend, form: str, in_dims: tuple) -> None:
    given = [
        t if dim == 0 or index == 2 else t[0]
        for index, (t, dim) in enumerate(zip(small_tensors(backend, 2), in_dims, strict=True))
    ]
    results = [vmap(per_example(f, form), in_dims)(*given) for f in (fused.ours, fused.torchs)]
    torch.testing.assert_close(*results)


@every_form
def test_gradients_under_transforms(backend: Backend, form: str) -> None:
    """grad, vmap of grad, grad of grad, and jvp, as of torch's operators."""

    def results(call: Callable) -> list[Any]:
        function = per_example(call, form)

        def loss(*arguments: Tensor) -> Tensor:
            return function(*arguments).pow(3).sum()

        def penalty(*arguments: Tensor) -> Tensor:
            return grad(loss)(*arguments).square().sum()

        one, several = small_tensors(backend), small_tensors(backend, 2)
        tangents = small_tensors(backend)
        return [
            grad(loss, (0, 1, 2))(*one),
            grad(penalty, (0, 1, 2))(*one),
            vmap(grad(loss, (0, 1)), (0, 0, None))(*several),
            jvp(function, one, tangents),
        ]

    outcomes = []
    for call in (fused.ours, fused.torchs):
        torch.manual_seed(0)
        outcomes.append(results(call))
    torch.testing.assert_close(*outcomes)


def test_refused_residual_under_transforms(backend: Backend) -> None:
    x, residual, weight = small_tensors(backend, 2)
    function = per_example(fused.ours, "residual and relu")
    with pytest.raises(ValueError, match="expected residual to have shape"):
        vmap(function, (0, 0, None))(x, residual[:, :1], weight)


def test_functional_call_updates_what_it_is_given(backend: Backend) -> None:
    module = batchnorm_cuda.BatchNorm1d(CHANNELS, activation="relu").to(
        backend.device, torch.float64
    )
    state = {name: value.detach().clone() for name, value in module.state_dict().items()}
    x, residual, _ = small_tensors(backend)

    def loss(weight: Tensor, state: dict[str, Tensor]) -> Tensor:
        return functional_call(module, {**state, "weight": weight}, (x, residual)).sum()

    got = grad(loss)(state["weight"], state)
    output = module(x, residual)
    (expected,) = torch.autograd.grad(output.sum(), module.weight)
    torch.testing.assert_close(got, expected)
