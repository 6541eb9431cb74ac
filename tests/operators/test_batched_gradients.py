"""torch.autograd.grad(..., is_grads_batched=True), and torch.autograd.functional over it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import channels_last, contiguous
from conftest import Backend
from parametrisations import both_modes
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

import batchnorm_cuda
from batchnorm_cuda._ops import operators as ops

B, C = 4, 3


def leaves(backend: Backend, shape: tuple[int, ...], place: Callable = contiguous) -> list[Tensor]:
    """x, weight and bias, in the dtype that hides no error."""
    tensors = [place(torch.randn(shape)), torch.rand(C) + 0.5, torch.randn(C)]
    return [tensor.to(backend.device, torch.float64).requires_grad_() for tensor in tensors]


def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool) -> Tensor:
    statistics = torch.full((2, C), 0.7, dtype=x.dtype, device=x.device)
    running = (None, None) if training else statistics
    return batchnorm_cuda.batch_norm(x, *running, weight, bias, training)


@both_modes
@pytest.mark.parametrize(
    ("shape", "place"),
    [((5, C), contiguous), ((2, C, 4, 3), contiguous), ((2, C, 4, 3), channels_last)],
    ids=["no length", "contiguous", "channels last"],
)
@pytest.mark.parametrize("wanted", [(0, 1, 2), (0,), (2,)], ids=str)
def test_batched_like_one_by_one(
    backend: Backend, shape: tuple[int, ...], place: Callable, training: bool, wanted: tuple
) -> None:
    tensors = leaves(backend, shape, place)
    output = normalise(*tensors, training)
    inputs = [tensors[index] for index in wanted]
    dys = torch.randn(B, *shape, dtype=torch.float64).to(output)
    got = torch.autograd.grad(output, inputs, dys, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(output, inputs, dy, retain_graph=True) for dy in dys]
    torch.testing.assert_close(list(got), [torch.stack(g) for g in zip(*one_by_one, strict=True)])


@both_modes
def test_batched_through_the_double_backward(backend: Backend, training: bool) -> None:
    """Of the gradient that another gradient gave, in all of its variables."""
    x, weight, bias = leaves(backend, (2, C, 5))
    dy = torch.randn(2, C, 5, dtype=torch.float64).to(x).requires_grad_()
    output = normalise(x, weight, bias, training)
    firsts = torch.autograd.grad(output, (x, weight), dy, create_graph=True)
    wanted = (x, weight, dy)
    ups = [torch.randn(B, *first.shape, dtype=torch.float64).to(x) for first in firsts]
    settings = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    got = torch.autograd.grad(firsts, wanted, ups, is_grads_batched=True, **settings)
    rows = [
        torch.autograd.grad(firsts, wanted, [up[i] for up in ups], **settings) for i in range(B)
    ]
    torch.testing.assert_close(list(got), [torch.stack(g) for g in zip(*rows, strict=True)])


@both_modes
def test_jacobian_and_hessian(backend: Backend, training: bool) -> None:
    x, weight, bias = (tensor.detach() for tensor in leaves(backend, (3, C, 2)))

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return normalise(x, weight, bias, training)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return function(x, weight).pow(3).sum()

    for derivative, of in ((jacobian, function), (hessian, loss)):
        results = [derivative(of, (x, weight), vectorize=vectorize) for vectorize in (True, False)]
        torch.testing.assert_close(*results)


def test_other_errors_stay_what_they_are(kernels: Backend) -> None:
    """What is raised for tensors that are not batched is not taken for it."""
    x = torch.randn(4, C).to(kernels.device)
    statistics = torch.zeros(C, device="meta"), torch.ones(C).to(x)
    flags = (True, True, False, False)
    with pytest.raises(RuntimeError, match="expected save_mean to be on"):
        ops.backward(x, x, None, None, *statistics, *flags)
    with pytest.raises(RuntimeError, match="expected save_mean to be on"):
        ops.double_backward(x, None, None, x, x, None, *statistics, *flags)
