"""The autograd Functions of synchronised batch norm; docs/sync.md derives their formulas.

Every pass has one collective: forward, backward and double backward each gather one small tensor.
The ranks therefore have to run the same passes: if one rank's input requires a gradient, all ranks'
inputs must.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import _mask, ops, sync_ops
from ._composite import per_channel


class Group(NamedTuple):
    """A process group as operators take it."""

    ranks: int
    name: str


class Needs(NamedTuple):
    """Which gradients are wanted."""

    input: bool
    weight: bool
    bias: bool
    residual: bool


def forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    need_mask: bool,
    momentum: float | None,
    eps: float,
    group: Group,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """This rank's output, mean [C], invstd [C] and count [1] of all ranks, and this rank's mask."""
    gathered = sync_ops.gather(sync_ops.sync_statistics(input), *group)
    batch = (input, weight, bias, running_mean, running_var, num_batches_tracked, gathered)
    if residual is None and not relu:
        return *sync_ops.sync_forward(*batch, momentum, eps), None
    return sync_ops.sync_fused_forward(*batch, residual, relu, need_mask, momentum, eps)


class SyncBatchNormFunction(Function):
    """Batch normalisation over the batches of all ranks. Differentiable twice.

    `apply` takes the arguments of `forward` and returns the output. grad_weight and grad_bias are
    this rank's own sums, as DistributedDataParallel expects them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        residual: Tensor | None,
        relu: bool,
        momentum: float | None,
        eps: float,
        ranks: int,
        group_name: str,
    ) -> Tensor:
        output, mean, invstd, count, mask = forward(
            input,
            weight,
            bias,
            running_mean,
            running_var,
            num_batches_tracked,
            residual,
            relu,
            relu and any(ctx.needs_input_grad),
            momentum,
            eps,
            Group(ranks, group_name),
        )
        ctx.save_for_backward(input, weight, mean, invstd, count, mask)
        # Only the dtype of bias takes part in the backward, so it is not saved: an in-place update
        # of bias between forward and backward is no error.
        ctx.bias = bias.detach() if ctx.needs_input_grad[2] else None
        ctx.ranks, ctx.group_name = ranks, group_name
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        _check_one_by_one(grad_output)
        input, weight, mean, invstd, count, mask = ctx.saved_tensors
        needs = Needs(*ctx.needs_input_grad[:3], ctx.needs_input_grad[6])
        group = Group(ctx.ranks, ctx.group_name)
        arguments = (input, weight, ctx.bias, mean, invstd, count, needs, group)
        recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if mask is not None and not recorded:
            *grads, grad_residual = fused_backward(grad_output, mask, *arguments)
        else:
            if mask is not None:
                grad_output = _mask.masked(grad_output, mask, input)
            grad_residual = grad_output if needs.residual else None
            if recorded:
                grads = SyncBatchNormBackward.apply(grad_output, *arguments)
            else:
                grads, _, _ = backward(grad_output, *arguments)
        # The running statistics and their counter; relu and the settings after it.
        return *grads, *(None,) * 3, grad_residual, *(None,) * 5


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    count: Tensor,
    needs: Needs,
    group: Group,
) -> tuple[tuple[Tensor | None, Tensor | None, Tensor | None], Tensor, Tensor | None]:
    """The gradients that are needed, and the sums [2, C] of this rank and of all ranks.

    The latter are None, and no rank is asked, where grad_input is not needed.
    """
    sums, grad_weight, grad_bias = sync_ops.sync_backward_reduce(
        grad_output, input, weight, bias, mean, invstd, needs.weight, needs.bias
    )
    if not needs.input:
        return (None, grad_weight, grad_bias), sums, None
    totals = sync_ops.sync_sum(sync_ops.gather(sums, *group))
    grad_input = sync_ops.sync_backward_elementwise(
        grad_output, input, weight, mean, invstd, totals, count
    )
    return (grad_input, grad_weight, grad_bias), sums, totals


def fused_backward(
    grad_output: Tensor,
    mask: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    count: Tensor,
    needs: Needs,
    group: Group,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """`backward` through a ReLU: the gradients that are needed, that of residual as the last."""
    sums, grad_weight, grad_bias = sync_ops.sync_fused_backward_reduce(
        grad_output, input, weight, bias, mean, invstd, mask, needs.weight, needs.bias
    )
    if needs.input:
        sums = sync_ops.sync_sum(sync_ops.gather(sums, *group))
    grad_input, grad_residual = None, None
    if needs.input or needs.residual:
        grad_input, grad_residual = sync_ops.sync_fused_backward_elementwise(
            grad_output,
            input,
            weight,
            mean,
            invstd,
            sums,
            count,
            mask,
            needs.input,
            needs.residual,
        )
    return grad_input, grad_weight, grad_bias, grad_residual


class SyncBatchNormBackward(Function):
    """The backward pass as a Function of grad_output, input and weight. Differentiable once."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        count: Tensor,
        needs: Needs,
        group: Group,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        grads, sums, totals = backward(
            grad_output, input, weight, bias, mean, invstd, count, needs, group
        )
        ctx.save_for_backward(grad_output, input, weight, mean, invstd, count, sums, totals)
        ctx.group = group
        return grads

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, v: Tensor | None, alpha: Tensor | None, beta: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        _check_one_by_one(v, alpha, beta)
        grad_output, input, weight, mean, invstd, count, sums, totals = ctx.saved_tensors
        g, xhat = grad_output.to(mean.dtype), _xhat(input, mean, invstd)
        alpha = torch.zeros_like(mean) if alpha is None else alpha.to(mean.dtype)
        beta = torch.zeros_like(mean) if beta is None else beta.to(mean.dtype)
        if v is None:  # grad_input was not asked for: no rank's part concerns another
            grad_grad = per_channel(alpha, g) * xhat + per_channel(beta, g)
            return grad_grad.to(grad_output.dtype), *(None,) * 8
        v = v.to(mean.dtype)
        own = _sums(v, g, xhat)
        outer = torch.cat([own, alpha * sums])
        means = sync_ops.sync_sum(sync_ops.gather(outer, *ctx.group)) / count
        w = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
        coefficients = _coefficients(w * invstd, invstd, alpha, beta, totals / count, means)
        grad_grad, grad_input = _elementwise(v, g, xhat, *coefficients)
        grad_weight = None
        if ctx.needs_input_grad[2]:
            mean_g, p = totals / count
            grad_weight = invstd * (own[2] - mean_g * own[0] - p * own[1])
            grad_weight = grad_weight.to(weight.dtype)
        grads = grad_grad.to(grad_output.dtype), grad_input.to(input.dtype), grad_weight
        return *grads, *(None,) * 6


def _check_one_by_one(*grads: Tensor | None) -> None:
    """A collective gathers what one gradient needs; the ranks need not have as many."""
    if torch.compiler.is_compiling():
        return
    if any(map(ops.batched_by_autograd, grads)):
        raise RuntimeError(
            "SyncBatchNorm: expected one gradient at a time, got several at once from "
            "is_grads_batched=True (or vectorize=True): ask for one after the other"
        )


def _xhat(input: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    return (input.to(mean.dtype) - per_channel(mean, input)) * per_channel(invstd, input)


def _sums(v: Tensor, g: Tensor, xhat: Tensor) -> Tensor:
    """This rank's sums [3, C] of v, v xhat and v g."""
    reduced = [0, *range(2, v.dim())]
    return torch.stack([v.sum(reduced), (v * xhat).sum(reduced), (v * g).sum(reduced)])


def _coefficients(
    scale: Tensor, invstd: Tensor, alpha: Tensor, beta: Tensor, first: Tensor, second: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What v, g, xhat and 1 are multiplied by, [C] each: for the gradients of g and of x.

    `scale` is weight times invstd. `first` [2, C] are the means of g and g xhat over all ranks,
    `second` [5, C] those of v, v xhat, v g, alpha g and alpha g xhat.
    """
    mean_g, p = first
    mean_v, r, mean_vg, mean_u, mean_u_xhat = second
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


def _elementwise(
    v: Tensor, g: Tensor, xhat: Tensor, of_g: tuple[Tensor, ...], of_x: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """The gradients of g and of x from their coefficients."""
    grads = []
    for coefficients in (of_g, of_x):
        a, b, d, e = (per_channel(k, v) for k in coefficients)
        grads.append(a * v + b * g + d * xhat + e)
    return grads[0], grads[1]
