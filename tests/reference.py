"""Batch norm in float64, from its definition.

Written apart from the kernels and from F.batch_norm: the backward walks the chain rule through the
variance and the mean, the kernels evaluate what that collapses to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Forward:
    rows = channel_rows(x)
    c, count = rows.shape
    w, b = vector(weight, c, 1.0), vector(bias, c, 0.0)
    new_mean = new_var = None
    if training:
        mean, var = statistics(rows)
        if running_mean is not None:
            unbiased = var * count / (count - 1)
            new_mean = (1 - momentum) * vector(running_mean, c, 0) + momentum * mean
            new_var = (1 - momentum) * vector(running_var, c, 0) + momentum * unbiased
            new_mean, new_var = new_mean.flatten(), new_var.flatten()
    else:
        mean, var = vector(running_mean, c, 0), vector(running_var, c, 0)
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
        scales["running_mean"] = rows.abs().amax(1) + vector(running_mean, c, 0).abs().flatten()
        scales["running_var"] = new_var * (1 + condition.flatten() / count**0.5)
    output = restore(xhat * w + b, x.shape)
    return Forward(output, mean.flatten(), 1 / std.flatten(), new_mean, new_var, scales)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
) -> Backward:
    rows, grads = channel_rows(x), channel_rows(dy)
    c, count = rows.shape
    w = vector(weight, c, 1.0)
    if training:
        mean, var = statistics(rows)
    else:
        mean, var = vector(running_mean, c, 0), vector(running_var, c, 0)
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
