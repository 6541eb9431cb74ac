"""What follows a batch norm when it is fused: forms, reference, and a run of ours or torch's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import harness
import pytest
import reference
import torch
import torch.nn.functional as F
from cases import Parameters
from conftest import Backend
from torch import Tensor

from batchnorm_cuda import batch_norm

CHANNELS = 5  # of small_tensors
# Residual and ReLU: whether there is each.
FORMS = {"residual and relu": (True, True), "relu": (False, True), "residual": (True, False)}
every_form = pytest.mark.parametrize("form", FORMS)


def extras(form: str, residual: Tensor) -> dict[str, object]:
    """The keyword arguments of a form."""
    added, relu = FORMS[form]
    given = {"residual": residual} if added else {}
    return given | ({"activation": "relu"} if relu else {})


def ours(x: Tensor, p: Parameters, training: bool, **fused: object) -> Tensor:
    return harness.call(lambda *arguments: batch_norm(*arguments, **fused), x, p, training)


def torchs(
    x: Tensor,
    p: Parameters,
    training: bool,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    output = harness.call(F.batch_norm, x, p, training)
    output = output if residual is None else output + residual
    return output if activation is None else output.relu()


def run(
    function: Callable,
    x: Tensor,
    p: Parameters,
    training: bool,
    form: str,
    residual: Tensor,
    dy: Tensor,
) -> dict[str, Tensor]:
    """Output, running statistics and all gradients, by name; the arguments stay as they are."""
    leaf, added, copy = x.detach().requires_grad_(), residual.detach().requires_grad_(), p.clone()
    wanted = {"grad_input": leaf}
    for name, parameter in (("grad_weight", copy.weight), ("grad_bias", copy.bias)):
        if parameter is not None:
            wanted[name] = parameter.requires_grad_()
    if FORMS[form][0]:
        wanted["grad_residual"] = added
    output = function(leaf, copy, training, **extras(form, added))
    grads = torch.autograd.grad(output, wanted.values(), dy)
    results = {"output": output.detach(), **dict(zip(wanted, grads, strict=True))}
    if training and copy.running_mean is not None:
        results |= {"running_mean": copy.running_mean, "running_var": copy.running_var}
    return results


def reference_forward(
    x: Tensor, p: Parameters, training: bool, form: str, residual: Tensor
) -> reference.Forward:
    added, relu = FORMS[form]
    expected = harness.reference_forward(x, p, training)
    output, scale = expected.output, expected.scales["output"]
    if added:
        values = residual.detach().cpu().double()
        output, scale = output + values, scale + values.abs()
    if relu:
        output = output.clamp_min(0)
    return replace(expected, output=output, scales=expected.scales | {"output": scale})


def through_relu(dy: Tensor, output: Tensor, form: str) -> Tensor:
    """The gradient of what the ReLU was applied to, from the output that it gave."""
    return torch.where(output <= 0, 0, dy) if FORMS[form][1] else dy


def small_tensors(backend: Backend, *batch: int) -> tuple[Tensor, ...]:
    """x, residual, weight in float64; the first two with batch dimensions in front."""
    shapes = ((*batch, 3, CHANNELS, 4), (*batch, 3, CHANNELS, 4), (CHANNELS,))
    return tuple(torch.randn(s, dtype=torch.float64).to(backend.device) for s in shapes)
