"""Batch norm in float64, from its definition.

Written apart from the kernels and from F.batch_norm: the backward walks the chain rule through the
variance and the mean, the kernels evaluate what that collapses to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # the benchmark takes this file alone
    from cases import Parameters


def channel_rows(x: Tensor) -> Tensor:
    """(N, C, *) as [C, count] in float64 on the CPU."""
    return x.detach().cpu().double().transpose(0, 1).reshape(x.shape[1], -1)


def restore(rows: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of channel_rows for the given shape."""
    channels_first = (shape[1], shape[0], *shape[2:])
    return rows.reshape(channels_first).transpose(0, 1)


def vector(v: Tensor | None, c: int, default: float) -> Tensor:
    if v is None:
        return torch.full((c, 1), default, dtype=torch.float64)
    return v.detach().cpu().double().reshape(c, 1)


@dataclass
class Forward:
    """Results of the forward pass, and the magnitudes its rounding errors are measured in."""

    output: Tensor
    save_mean: Tensor  # [C]
    save_invstd: Tensor  # [C]
    running_mean: Tensor | None
    running_var: Tensor | None
    scales: dict[str, Tensor]


@dataclass
class Backward:
    grad_input: Tensor
    grad_weight: Tensor  # [C]
    grad_bias: Tensor  # [C]
    scales: dict[str, Tensor]


def statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each row, [C, 1]."""
    count = rows.shape[1]
    mean = rows.sum(1, keepdim=True) / count
    return mean, (rows - mean).pow(2).sum(1, keepdim=True) / count


def used_statistics(rows: Tensor, p: Parameters, training: bool) -> tuple[Tensor, Tensor]:
    """What is normalised by: of the batch, or in eval mode the running ones."""
    if training:
        return statistics(rows)
    c = rows.shape[0]
    return vector(p.running_mean, c, 0), vector(p.running_var, c, 0)


def forward(x: Tensor, p: Parameters, training: bool, momentum: float, eps: float) -> Forward:
    rows = channel_rows(x)
    c, count = rows.shape
    w, b = vector(p.weight, c, 1.0), vector(p.bias, c, 0.0)
    mean, var = used_statistics(rows, p, training)
    new_mean = new_var = None
    if training and p.running_mean is not None:
        unbiased = var * count / (count - 1)
        new_mean = (1 - momentum) * vector(p.running_mean, c, 0) + momentum * mean
        new_var = (1 - momentum) * vector(p.running_var, c, 0) + momentum * unbiased
        new_mean, new_var = new_mean.flatten(), new_var.flatten()
    std = (var + eps).sqrt()
    xhat = (rows - mean) / std
    # In units of the accumulation dtype's roundoff: x - mean is off by the roundoff of the mean,
    # which weighs largest|x|/std after the division.
    condition = rows.abs().amax(1, keepdim=True).maximum(mean.abs()) / std
    peak = xhat.abs().amax(1, keepdim=True)
    output_scale = w.abs() * (condition + peak) + b.abs()
    scales = {
        "output": restore(output_scale.expand_as(rows), x.shape),
        "save_mean": rows.abs().amax(1),
        "save_invstd": 1 / std.flatten() * (1 + condition.flatten() / count**0.5),
    }
    if new_mean is not None:
        scales["running_mean"] = rows.abs().amax(1) + vector(p.running_mean, c, 0).abs().flatten()
        scales["running_var"] = new_var * (1 + condition.flatten() / count**0.5)
    output = restore(xhat * w + b, x.shape)
    return Forward(output, mean.flatten(), 1 / std.flatten(), new_mean, new_var, scales)


def backward(dy: Tensor, x: Tensor, p: Parameters, training: bool, eps: float) -> Backward:
    rows, grads = channel_rows(x), channel_rows(dy)
    c, count = rows.shape
    w = vector(p.weight, c, 1.0)
    mean, var = used_statistics(rows, p, training)
    std = (var + eps).sqrt()
    centred = rows - mean
    xhat = centred / std
    dxhat = grads * w
    grad_input = dxhat / std
    if training:
        dvar = (dxhat * centred).sum(1, keepdim=True) * -0.5 / std**3
        dmean = -dxhat.sum(1, keepdim=True) / std - 2 * dvar * centred.sum(1, keepdim=True) / count
        grad_input = grad_input + dvar * 2 * centred / count + dmean / count
    grad_weight, grad_bias = (grads * xhat).sum(1), grads.sum(1)

    condition = (rows.abs().amax(1, keepdim=True).maximum(mean.abs()) / std).flatten()
    # Rounding errors of independent terms add up as a random walk, sqrt(count) of them, those of
    # the partial sums in proportion to the sum; an error of the mean shifts every xhat alike.
    walk = count**0.5
    weight_scale = walk * (grads * xhat).pow(2).mean(1).sqrt()
    weight_scale = weight_scale + grad_weight.abs() + condition * grad_bias.abs()
    bias_scale = walk * grads.pow(2).mean(1).sqrt() + grad_bias.abs()
    input_scale = grads.abs().amax(1)
    if training:
        peak = xhat.abs().amax(1) + condition
        input_scale = input_scale + (bias_scale + peak * weight_scale) / count
        input_scale = input_scale + condition * grad_weight.abs() / count
    input_scale = (input_scale.view(c, 1) * w.abs() / std).expand_as(rows)
    scales = {
        "grad_input": restore(input_scale, x.shape),
        "grad_weight": weight_scale,
        "grad_bias": bias_scale,
    }
    return Backward(restore(grad_input, x.shape), grad_weight, grad_bias, scales)


@dataclass
class DoubleBackward:
    """Gradients of v·grad_input + a·grad_weight + b·grad_bias, and the magnitudes of the terms."""

    grad_grad_output: Tensor
    double_grad_input: Tensor
    double_grad_weight: Tensor
    scales: dict[str, Tensor]


def double_backward(
    grad_grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    dy: Tensor,
    x: Tensor,
    p: Parameters,
    training: bool,
    eps: float,
) -> DoubleBackward:
    """By autograd, twice through the definition. grad_grads: v, a and b; None is zero."""
    rows = channel_rows(x).requires_grad_()
    c = rows.shape[0]
    grads = channel_rows(dy).requires_grad_()
    w = vector(p.weight, c, 1.0).requires_grad_()
    shift = torch.zeros(c, 1, dtype=torch.float64, requires_grad=True)
    mean, var = used_statistics(rows, p, training)
    xhat = (rows - mean) / (var + eps).sqrt()
    first = torch.autograd.grad(xhat * w + shift, (rows, w, shift), grads, create_graph=True)
    v = torch.zeros_like(rows) if grad_grads[0] is None else channel_rows(grad_grads[0])
    a, b = (vector(given, c, 0.0) for given in grad_grads[1:])
    phi = sum((one * other).sum() for one, other in zip(first, (v, a, b), strict=True))
    second = torch.autograd.grad(
        phi, (grads, rows, w), allow_unused=True, materialize_grads=True, retain_graph=True
    )
    scales = _double_backward_scales(
        rows.detach(), grads.detach(), v, w.detach(), a, b, mean.detach(), var.detach() + eps
    )
    return DoubleBackward(
        restore(second[0], x.shape),
        restore(second[1], x.shape),
        second[2].flatten(),
        {
            name: restore(s.expand_as(rows), x.shape)
            for name, s in scales.items()
            if "weight" not in name
        }
        | {"double_grad_weight": scales["double_grad_weight"].flatten()},
    )


def _double_backward_scales(
    x: Tensor, g: Tensor, v: Tensor, w: Tensor, a: Tensor, b: Tensor, mean: Tensor, var: Tensor
) -> dict[str, Tensor]:
    """As in `backward`: means by random walks of their terms, times what multiplies them."""
    count = x.shape[1]
    s = var.rsqrt()
    xhat = (x - mean) * s
    condition = x.abs().amax(1, keepdim=True).maximum(mean.abs()) * s

    def average(terms: Tensor) -> Tensor:
        walk = terms.pow(2).mean(1, keepdim=True).sqrt() / count**0.5
        return walk + terms.mean(1, keepdim=True).abs()

    def size(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the values, of their mean and of their mean product with xhat."""
        mean_size = average(values)
        return (
            values.abs().amax(1, keepdim=True),
            mean_size,
            average(values * xhat) + condition * mean_size,
        )

    peak = xhat.abs().amax(1, keepdim=True) + condition
    (g_peak, g_mean, g_xhat), (v_peak, v_mean, v_xhat) = size(g), size(v)
    product = average(v * g) + v_mean * g_mean + v_xhat * g_xhat
    g_part, v_part = g_peak + g_mean + peak * g_xhat, v_peak + v_mean + peak * v_xhat
    of_v = s * s * w.abs() * (product * peak + v_xhat * g_part + g_xhat * v_part)
    return {
        "grad_grad_output": w.abs() * s * v_part + a.abs() * peak + b.abs(),
        "double_grad_input": of_v + a.abs() * s * g_part,
        "double_grad_weight": s * count * product,
    }
