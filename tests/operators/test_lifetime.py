"""What a result keeps alive, and that a result can be saved: over all ways of a call."""

from __future__ import annotations

import gc
import io
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from conftest import Backend
from torch import Tensor

import batchnorm_cuda

FORMS = [(activation, residual) for activation in (None, "relu") for residual in (False, True)]


@pytest.fixture(params=FORMS, ids=lambda form: f"{form[0]}, residual={form[1]}")
def call(request: pytest.FixtureRequest, backend: Backend) -> Callable[[Tensor, bool], Tensor]:
    activation, residual = request.param
    module = batchnorm_cuda.BatchNorm2d(3, device=backend.device, activation=activation)

    def forward(x: Tensor, training: bool) -> Tensor:
        return module.train(training)(x, residual=torch.ones_like(x) if residual else None)

    return forward


def intermediate(device: torch.device | str) -> Tensor:
    return torch.randn(4, 3, 5, 5, device=device, requires_grad=True) * 2


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_the_input_goes_with_the_backward(
    call: Callable[[Tensor, bool], Tensor], backend: Backend, training: bool
) -> None:
    x = intermediate(backend.device)
    seen = weakref.ref(x)
    output = call(x, training)
    del x
    output.sum().backward()
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_a_result_is_saved_without_a_warning(
    call: Callable[[Tensor, bool], Tensor], backend: Backend, training: bool
) -> None:
    output = call(intermediate(backend.device), training)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.save(output, io.BytesIO())
