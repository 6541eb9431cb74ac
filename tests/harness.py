"""Runs one problem through ours, through torch's F.batch_norm, and compares with the reference."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from itertools import compress
from typing import Any, ClassVar

import pytest
import reference
import torch
import torch.nn.functional as F
from cases import Parameters
from conftest import Backend
from tolerances import assert_no_worse_than_torch, assert_unbiased, assert_within
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from batchnorm_cuda import batch_norm
from batchnorm_cuda._ops import operators as ops

MOMENTUM = 0.3
EPS = 1e-5
# Of two values of a channel both are normalised to nearly 1: their roundings are no random sample.
FEWEST_INDEPENDENT = 8


def forward(backend: Backend, x: Tensor, p: Parameters, training: bool) -> dict[str, Tensor]:
    """All that a forward pass computes, by name; updates the running statistics in `p`."""
    results = {}
    if backend.has_kernels:
        args = (x, p.weight, p.bias, p.running_mean, p.running_var, None, training, MOMENTUM, EPS)
        output, results["save_mean"], results["save_invstd"] = ops.forward(*args)
    else:
        output = call(batch_norm, x, p, training)
    results["output"] = output
    if training and p.running_mean is not None:
        results |= {"running_mean": p.running_mean, "running_var": p.running_var}
    return results


def watch(
    monkeypatch: pytest.MonkeyPatch, operator: ops.Operator, look: Callable[..., None]
) -> None:
    """`look` is called with the operator's arguments before it runs, for the rest of the test."""
    run = operator.run

    def watched(call: tuple) -> object:
        look(*(getattr(call, field) for field in operator.fields))
        return run(call)

    monkeypatch.setattr(operator, "run", watched)


class Looking(TorchDispatchMode):
    """Sees all operators, and leaves them as they are."""

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return operator(*args, **(kwargs or {}))


def asked(monkeypatch: pytest.MonkeyPatch, operator: ops.Operator) -> list[tuple[bool, ...]]:
    """What each call of a backward pass says is needed of it: grows for the rest of the test."""
    calls = []
    needs = [field.startswith("need_") for field in operator.fields]
    watch(monkeypatch, operator, lambda *call: calls.append(tuple(compress(call, needs))))
    return calls


def torch_forward(x: Tensor, p: Parameters, training: bool) -> dict[str, Tensor]:
    results = {"output": call(F.batch_norm, x, p, training)}
    if training and p.running_mean is not None:
        results |= {"running_mean": p.running_mean, "running_var": p.running_var}
    return results


def as_taken_by(function: Callable, tensor: Tensor) -> Tensor:
    """On a 16-byte boundary for torch's own batch norm on a GPU: cuDNN's channels-last kernels end
    in "misaligned address" elsewhere (float32, with PyTorch 2.11 on an H200).
    """
    misaligned = tensor.is_cuda and tensor.data_ptr() % 16 != 0
    return tensor.clone() if function is F.batch_norm and misaligned else tensor


def call(function: Callable, x: Tensor, p: Parameters, training: bool) -> Tensor:
    x = as_taken_by(function, x)
    return function(x, p.running_mean, p.running_var, p.weight, p.bias, training, MOMENTUM, EPS)


def backward(
    function: Callable, x: Tensor, p: Parameters, dy: Tensor, training: bool
) -> dict[str, Tensor]:
    """The gradients of all that is there, by name; running statistics are updated in a copy."""
    leaf = x.detach().requires_grad_()
    copy = p.clone()
    wanted = {"grad_input": leaf}
    for name, parameter in (("grad_weight", copy.weight), ("grad_bias", copy.bias)):
        if parameter is not None:
            wanted[name] = parameter.requires_grad_()
    output = call(function, leaf, copy, training)
    grads = torch.autograd.grad(output, wanted.values(), as_taken_by(function, dy))
    return dict(zip(wanted, grads, strict=True))


def double_backward(
    function: Callable,
    x: Tensor,
    p: Parameters,
    dy: Tensor,
    grad_grads: tuple[Tensor, Tensor | None, Tensor | None],
    training: bool,
) -> dict[str, Tensor]:
    """The gradients of what `backward` returns, by name, through autograd."""
    leaf, copy, dy = x.detach().requires_grad_(), p.clone(), dy.detach().requires_grad_()
    given = zip((leaf, copy.weight, copy.bias), grad_grads, strict=True)
    leaves = [(t.requires_grad_(), grad) for t, grad in given if t is not None and grad is not None]
    output = call(function, leaf, copy, training)
    first = torch.autograd.grad(output, [t for t, _ in leaves], dy, create_graph=True)
    wanted = {"grad_grad_output": dy, "double_grad_input": leaf}
    if copy.weight is not None and copy.weight.requires_grad:
        wanted["double_grad_weight"] = copy.weight
    second = torch.autograd.grad(first, wanted.values(), [grad for _, grad in leaves])
    return dict(zip(wanted, second, strict=True))


def reference_double_backward(
    grad_grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    dy: Tensor,
    x: Tensor,
    p: Parameters,
    training: bool,
) -> reference.DoubleBackward:
    return reference.double_backward(grad_grads, dy, x, p, training, EPS)


def reference_forward(x: Tensor, p: Parameters, training: bool) -> reference.Forward:
    return reference.forward(x, p, training, MOMENTUM, EPS)


def reference_backward(dy: Tensor, x: Tensor, p: Parameters, training: bool) -> reference.Backward:
    return reference.backward(dy, x, p, training, EPS)


def assert_matches(
    results: dict[str, Tensor],
    expected: reference.Forward | reference.Backward | reference.DoubleBackward,
    input: Tensor,
    torchs: dict[str, Tensor] | None = None,
) -> None:
    """Each result against the reference, and where torch computed it, against torch's error."""
    for name, got in results.items():
        want, scale = getattr(expected, name), expected.scales[name]
        assert_within(name, got, want, scale, input.dtype)
        if input.numel() >= FEWEST_INDEPENDENT * input.shape[1]:
            assert_unbiased(name, got, want, scale, input.dtype)
        if torchs is not None and name in torchs:
            assert_no_worse_than_torch(name, got, torchs[name], want, scale, input.dtype)


def with_pickled(graph: torch.fx.GraphModule) -> list[torch.fx.GraphModule]:
    """The graph, and as it is when written and read again. PyTorch 2.11 cannot write it: it takes a
    global that is a string for an object with a name.
    """
    if torch.__version__.startswith("2.11."):
        return [graph]
    return [graph, pickle.loads(pickle.dumps(graph))]


class Seen(Tensor):
    """Records the functions that are called with it."""

    calls: ClassVar[list[Callable]] = []

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: Any = None):
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})
