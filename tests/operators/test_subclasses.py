"""Subclasses with __torch_dispatch__ and no memory of their own: operators see them first."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import Backend
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map

from batchnorm_cuda import batch_norm
from batchnorm_cuda._ops import operators as ops
from batchnorm_cuda._ops.mask import mask_bytes

C = 5


class Wrapped(Tensor):
    """Hands every operator on to the tensor that it holds, and records its name."""

    calls: list[str]

    @staticmethod
    def __new__(cls, held: Tensor, calls: list[str]) -> Wrapped:
        self = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=held.device
        )
        self.held, self.calls = held, calls
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        wrapped = next(arg for arg in args if isinstance(arg, Wrapped))
        if func is torch.ops.aten.detach.default:
            return Wrapped(wrapped.held.detach(), wrapped.calls)
        wrapped.calls.append(func.__name__)
        return func(*tree_map(lambda x: x.held if isinstance(x, Wrapped) else x, args))


@pytest.fixture
def tensors(kernels: Backend) -> tuple[Tensor, ...]:
    """input, another of its shape, mean and invstd."""
    x, other = (torch.randn(2, C, 4, 3, device=kernels.device) for _ in range(2))
    return x, other, torch.zeros(C, device=x.device), torch.ones(C, device=x.device)


def seen(call: Any, arguments: tuple, place: int) -> list[str]:
    """The operators of a call with one argument wrapped, whose results are those without."""
    calls: list[str] = []
    held = (*arguments[:place], Wrapped(arguments[place], calls), *arguments[place + 1 :])
    torch.testing.assert_close(call(*held), call(*arguments), rtol=0, atol=0)
    return calls


def test_forward(tensors: tuple[Tensor, ...]) -> None:
    arguments = (tensors[0], None, None, None, None, None, True, 0.1, 1e-5)
    assert seen(ops.forward, arguments, 0) == ["forward.default"]


@pytest.mark.parametrize("place", range(1, 6))
def test_parameters_beside_a_plain_input_are_refused(
    tensors: tuple[Tensor, ...], place: int
) -> None:
    """Only activations choose the way; a wrapped parameter must not pass for one not given."""
    x, _, zeros, ones = tensors
    counter = torch.zeros((), dtype=torch.int64, device=x.device)
    arguments = [x, ones, zeros, zeros.clone(), ones.clone(), counter, True, 0.1, 1e-5]
    arguments[place] = Wrapped(arguments[place], [])
    name = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"][place - 1]
    with pytest.raises(TypeError, match=f"expected {name} to have memory of its own"):
        ops.forward(*arguments)
    assert counter == 0


@pytest.mark.parametrize("place", [0, 1], ids=["grad_output", "input"])
def test_backward(tensors: tuple[Tensor, ...], place: int) -> None:
    x, dy, mean, invstd = tensors
    arguments = (dy, x, None, None, mean, invstd, True, True, False, False)
    assert seen(ops.backward, arguments, place) == ["backward.default"]


@pytest.mark.parametrize("place", [0, 3, 4], ids=["grad_grad_input", "grad_output", "input"])
def test_double_backward(tensors: tuple[Tensor, ...], place: int) -> None:
    x, dy, mean, invstd = tensors
    arguments = (dy, None, None, dy, x, None, mean, invstd, True, True, True, False)
    assert seen(ops.double_backward, arguments, place) == ["double_backward.default"]


@pytest.mark.parametrize("place", [0, 6], ids=["input", "residual"])
def test_fused_forward(tensors: tuple[Tensor, ...], place: int) -> None:
    x, residual, *_ = tensors
    arguments = (x, None, None, None, None, None, residual, True, True, True, 0.1, 1e-5)
    assert seen(ops.fused_forward, arguments, place) == ["fused_forward.default"]


@pytest.mark.parametrize("place", [0, 1], ids=["grad_output", "input"])
def test_fused_backward(tensors: tuple[Tensor, ...], place: int) -> None:
    x, dy, mean, invstd = tensors
    mask = torch.full((mask_bytes(x.numel(), x.dtype),), 255, dtype=torch.uint8)
    arguments = (dy, x, None, None, mean, invstd, mask, True, True, False, False, True)
    assert seen(ops.fused_backward, arguments, place) == ["fused_backward.default"]


def test_what_a_hook_made_of_a_saved_tensor(tensors: tuple[Tensor, ...]) -> None:
    """A backward whose saved input is a subclass goes by the operators, too."""
    x, dy, *_ = tensors
    calls: list[str] = []

    def unpack(held: Tensor) -> Tensor:
        return Wrapped(held.detach(), calls) if held.shape == x.shape else held

    grads = []
    for hooks in (saved_tensors_hooks(lambda held: held, unpack), nullcontext()):
        leaf = x.clone().requires_grad_()
        with hooks:
            y = batch_norm(leaf, None, None, training=True)
        grads.append(torch.autograd.grad(y, leaf, dy)[0])
    assert calls == ["backward.default"]
    assert torch.equal(*grads)
