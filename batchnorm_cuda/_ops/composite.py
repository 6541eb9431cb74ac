"""Batch norm as a composite of torch operators: CPU tensors, and any device without kernels.

The semantics of the kernels, so that code written for the GPU runs on a laptop: statistics and sums
in float32 (float64 for float64), parameters in the input's dtype or float32, the input's memory
format kept, and the same errors. Each function stands in for the extension's of a pass, takes its
record and returns its results; autograd differentiates `forward`, as often as wanted. The formulas
are those of docs/math.md and docs/sync.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import activations
from .calls import (
    Backward,
    DoubleBackward,
    DoubleGradients,
    Forward,
    Gradients,
    Normalized,
    Statistics,
    SumRanks,
)
from .checks import check_forward, check_input
from .layout import ACCUMULATE, all_but_channels, as_dense, per_channel, placed, with_strides_of
from .ranks import merge_ranks, sum_over_ranks


def batch_norm(call: Forward) -> Tensor:
    """The output alone, with a gradient in the input's strides, whatever those of grad_output."""
    dense, output, _, _ = _normalized(call)
    if not torch.compiler.is_compiling() and output.grad_fn is not None:
        # A compiler chooses strides by itself, and traces no hook that looks at them. The hook is
        # the node's, because a tensor with hooks warns when it is saved, and holds no tensor.
        place = dense.shape, dense.stride()
        output.grad_fn.register_prehook(lambda grads: (placed(*place, grads[0]), *grads[1:]))
    return output


def forward(call: Forward) -> Normalized:
    _, output, moments, invstd = _normalized(call)
    mask = activations.mask_of(call, output) if call.need_mask else None
    return Normalized(output, moments.mean.flatten(), invstd.flatten(), moments.count, mask)


class _Moments(NamedTuple):
    """What to normalise by, in the dtype of statistics: (1, C, 1, ...), and the centred input."""

    centred: Tensor
    mean: Tensor
    var: Tensor  # biased
    count: Tensor | None  # of all ranks


def _normalized(call: Forward) -> tuple[Tensor, Tensor, _Moments, Tensor]:
    """The input made dense, the output, and what it was normalised by, invstd as the last."""
    traced = is_traced_by_jit()
    if not traced:
        check_forward(call)
    dense = call.input if traced else as_dense(call.input)
    x = dense.to(ACCUMULATE[dense.dtype])
    moments = _own(call, x) if call.gathered is None else _merged(call, x)
    invstd = (moments.var + call.eps).rsqrt()
    output = _transform(call, dense, moments.centred, invstd)
    return dense, output if traced else with_strides_of(dense, output), moments, invstd


def _own(call: Forward, x: Tensor) -> _Moments:
    """Of this batch, by which running statistics are updated, or the running ones."""
    if not call.training:
        mean, var = (per_channel(v.to(x.dtype), x) for v in (call.running_mean, call.running_var))
        return _Moments(x - mean, mean, var, None)
    reduced = all_but_channels(x)
    # Statistics of nothing are 0; they are not used, but take part in gradients.
    count = max(x.numel() // max(x.shape[1], 1), 1)
    # A sum of large values rounds; what is left beyond it does not, and is nothing where all values
    # are equal.
    about = x.detach().sum(reduced, keepdim=True) / count
    shifted = x - about
    beyond = shifted.sum(reduced, keepdim=True) / count
    centred = shifted - beyond
    mean = about + beyond
    var = centred.square().sum(reduced, keepdim=True) / count
    if call.num_batches_tracked is not None:
        call.num_batches_tracked.add_(1)
    if call.running_mean is not None and x.numel() > 0:
        factor = _factor(call, x.dtype)
        _update(call.running_mean, mean, factor)
        _update(call.running_var, var * (count / (count - 1)), factor)
    return _Moments(centred, mean, var, None)


def _merged(call: Forward, x: Tensor) -> _Moments:
    """Of all ranks' batches, from what was gathered of them."""
    count, mean, var = merge_ranks(call.gathered, x.shape[1])
    if call.num_batches_tracked is not None:
        call.num_batches_tracked.add_(1)
    if call.running_mean is not None:
        learn = count >= 2  # fewer values have no variance to learn from
        factor = _factor(call, torch.float64)
        unbiased = var * count / (count - 1).clamp_min(1)
        for running, statistic in ((call.running_mean, mean), (call.running_var, unbiased)):
            updated = _updated(running, statistic.to(x.dtype), factor)
            running.copy_(torch.where(learn, updated, running))
    mean, var = (per_channel(value.to(x.dtype), x) for value in (mean, var))
    return _Moments(x - mean, mean, var, count)


def _factor(call: Forward, dtype: torch.dtype) -> float | Tensor:
    if call.momentum is not None:
        return call.momentum
    return 1 / call.num_batches_tracked.to(dtype)


def _update(running: Tensor, statistic: Tensor, factor: float | Tensor) -> None:
    # detach, not no_grad: a mode would become a region of its own in an exported graph.
    running.copy_(_updated(running, statistic.detach().flatten(), factor))


def _updated(running: Tensor, statistic: Tensor, factor: float | Tensor) -> Tensor:
    """The running statistic after a batch, in the dtype of `statistic`."""
    return running.to(statistic.dtype) * (1 - factor) + factor * statistic


def _transform(call: Forward, dense: Tensor, centred: Tensor, invstd: Tensor) -> Tensor:
    """centred * invstd * weight + bias + residual, rounded once to the dtype of the input.

    The activation comes last: what a ReLU rounds to zero has no gradient.
    """
    scale = invstd
    if call.weight is not None:
        scale = scale * per_channel(call.weight.to(invstd.dtype), dense)
    output = centred * scale
    if call.bias is not None:
        output = output + per_channel(call.bias.to(invstd.dtype), dense)
    if call.residual is not None:
        output = output + call.residual.to(invstd.dtype)
    return activations.rounded(call, output, dense.dtype)


def is_traced_by_jit() -> bool:
    """Sizes are tensors there, and what is decided by them holds for the traced input only."""
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


# ---- what the ranks gather of each other


def statistics(call: Statistics) -> Tensor:
    check_input(call.input)
    x = as_dense(call.input).to(ACCUMULATE[call.input.dtype])
    count = x.numel() // max(x.shape[1], 1)
    reduced = all_but_channels(x)
    mean = x.sum(reduced, keepdim=True) / max(count, 1)
    m2 = (x - mean).square().sum(reduced)
    bits = torch.tensor([count], device=x.device).view(x.dtype)
    return torch.cat([bits, mean.flatten(), m2])


def sum_ranks(call: SumRanks) -> Tensor:
    return sum_over_ranks(call.gathered.double()).to(call.gathered.dtype)


# ---- gradients


class Sums(NamedTuple):
    """`backward_reduce`'s results; gradients None where not needed."""

    sums: Tensor  # [2, C]: of dy and of dy * xhat
    grad_weight: Tensor | None
    grad_bias: Tensor | None


def backward_reduce(call: Backward) -> Sums:
    """This rank's sums, of dy and of dy times xhat, and its grad_weight and grad_bias."""
    grad, xhat = _grad_and_xhat(call)
    reduced = all_but_channels(call.input)
    sums = torch.stack([grad.sum(reduced), (grad * xhat).sum(reduced)])
    grad_weight = sums[1].to(call.weight.dtype, copy=True) if call.need_weight else None
    grad_bias = sums[0].to(call.bias.dtype, copy=True) if call.need_bias else None
    return Sums(sums, grad_weight, grad_bias)


def backward(call: Backward) -> Gradients:
    """All gradients; `call.sums` and `call.count`, if given, are those of all ranks."""
    grad_weight = grad_bias = grad_input = grad_residual = None
    sums, count = call.sums, call.count
    if sums is None:
        sums, grad_weight, grad_bias = backward_reduce(call)
        count = max(call.input.numel() // max(call.input.shape[1], 1), 1)
    if call.need_input:
        grad, xhat = _grad_and_xhat(call)
        if call.training:
            mean_dy, mean_dy_xhat = (per_channel(s, call.input) for s in sums / count)
            grad = grad - mean_dy - xhat * mean_dy_xhat
        scale = call.save_invstd
        if call.weight is not None:
            scale = scale * call.weight.to(scale.dtype)
        grad_input = (grad * per_channel(scale, call.input)).to(call.input.dtype)
        grad_input = with_strides_of(as_dense(call.input), grad_input)
    if call.need_residual:
        grad_residual = with_strides_of(as_dense(call.input), activations.before(call))
    return Gradients(grad_input, grad_weight, grad_bias, grad_residual)


def _grad_and_xhat(call: Backward) -> tuple[Tensor, Tensor]:
    return activations.before(call).to(call.save_mean.dtype), xhat_of(call)


def xhat_of(call: Backward | DoubleBackward) -> Tensor:
    """The normalised input, before weight and bias."""
    centred = call.input.to(call.save_mean.dtype) - per_channel(call.save_mean, call.input)
    return centred * per_channel(call.save_invstd, call.input)


# ---- gradients of gradients


def double_backward(
    call: DoubleBackward, total: Callable[[Tensor], Tensor] = lambda own: own
) -> DoubleGradients:
    """`total` sums over the ranks, if there are several; docs/sync.md derives the coefficients."""
    xhat = xhat_of(call)
    v, g = (_or_zeros(like, xhat) for like in (call.grad_grad_input, call.grad_output))
    alpha, beta = (
        _or_zeros(vector, call.save_mean) for vector in (call.grad_grad_weight, call.grad_grad_bias)
    )
    invstd = call.save_invstd
    scale = invstd if call.weight is None else call.weight.to(invstd.dtype) * invstd
    own = _second_sums(v, g, xhat, alpha)
    means = torch.zeros_like(own)
    # Else no value depends on another's, and no rank asks the others.
    if call.training and (call.need_input or call.grad_grad_input is not None):
        count = call.count
        if count is None:
            count = max(xhat.numel() // max(xhat.shape[1], 1), 1)
        means = total(own) / count
    of_g, of_x = _coefficients(scale, invstd, alpha, beta, means)
    grad_grad_output = grad_input = grad_weight = None
    dense = as_dense(call.input)
    if call.need_grad_output:
        grad_grad_output = with_strides_of(dense, _combined(of_g, v, g, xhat, call.input.dtype))
    if call.need_input:
        grad_input = with_strides_of(dense, _combined(of_x, v, g, xhat, call.input.dtype))
    if call.need_weight:
        _, _, sum_v, sum_v_xhat, sum_vg, *_ = own
        mean_g, mean_g_xhat, *_ = means
        grad_weight = invstd * (sum_vg - mean_g * sum_v - mean_g_xhat * sum_v_xhat)
        grad_weight = grad_weight.to(call.weight.dtype)
    return DoubleGradients(grad_grad_output, grad_input, grad_weight)


def _or_zeros(given: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if given is None else given.to(like.dtype)


def _second_sums(v: Tensor, g: Tensor, xhat: Tensor, alpha: Tensor) -> Tensor:
    """This rank's sums [7, C] of g, g xhat, v, v xhat, v g, alpha g and alpha g xhat."""
    terms = torch.stack([g, g * xhat, v, v * xhat, v * g])
    sums = terms.sum([1, *range(3, terms.dim())])
    return torch.cat([sums, alpha * sums[:2]])


def _coefficients(
    scale: Tensor, invstd: Tensor, alpha: Tensor, beta: Tensor, means: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What v, g, xhat and 1 are multiplied by, [C] each: for the gradients of g and of x.

    `scale` is weight times invstd; `means` are those of `_second_sums` over all ranks.
    """
    mean_g, p, mean_v, r, mean_vg, mean_u, mean_u_xhat = means
    c = mean_vg - mean_v * mean_g - r * p
    slope = scale * invstd
    of_g = (scale, torch.zeros_like(scale), alpha - scale * r, beta - scale * mean_v)
    of_x = (
        -slope * p,
        invstd * alpha - slope * r,
        slope * (2 * r * p - c) - invstd * mean_u_xhat,
        slope * (r * mean_g + p * mean_v) - invstd * mean_u,
    )
    return of_g, of_x


def _combined(
    coefficients: tuple[Tensor, ...], v: Tensor, g: Tensor, xhat: Tensor, dtype: torch.dtype
) -> Tensor:
    a, b, d, e = (per_channel(each, v) for each in coefficients)
    return (a * v + b * g + d * xhat + e).to(dtype)
