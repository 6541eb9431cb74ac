"""The parts of synchronised batch norm as composites of torch operators, for CPU tensors.

Stand-ins for the kernels of the same names (sync_ops.py says what each returns), by the same
formulas: docs/sync.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _composite, _mask
from .ops import as_dense

_SUM_BITS = 62  # of a term and of the sum; as in csrc/kernels/merge_ranks.cuh
_LEAST_EXPONENT = -900


def sync_statistics(input: Tensor) -> Tensor:
    _composite.check_input(input)
    x = as_dense(input).to(_composite.ACCUMULATE[input.dtype])
    count = x.numel() // max(x.shape[1], 1)
    reduced = [0, *range(2, x.dim())]
    mean = x.sum(reduced, keepdim=True) / max(count, 1)
    m2 = (x - mean).square().sum(reduced)
    bits = torch.tensor([count], device=x.device).view(x.dtype)
    return torch.cat([bits, mean.flatten(), m2])


def sync_forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    gathered: Tensor,
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *results, _ = sync_fused_forward(
        input,
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked,
        gathered,
        None,
        False,
        False,
        momentum,
        eps,
    )
    return tuple(results)


def sync_fused_forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    gathered: Tensor,
    residual: Tensor | None,
    relu: bool,
    need_mask: bool,
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    _composite.check_arguments(input, weight, bias, running_mean, running_var, True, eps)
    _composite.check_residual(residual, input)
    _composite.check_counter(num_batches_tracked, input)
    acc = _composite.ACCUMULATE[input.dtype]
    _check_gathered(gathered, 2 * input.shape[1] + torch.int64.itemsize // acc.itemsize, acc)
    count, mean, var = _merge(gathered, input.shape[1])
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if running_mean is not None:
        learn = count >= 2  # fewer values have no variance to learn from
        factor = 1 / num_batches_tracked.double() if momentum is None else momentum
        unbiased = var * count / (count - 1).clamp_min(1)
        for running, statistic in ((running_mean, mean), (running_var, unbiased)):
            updated = _composite.updated(running, statistic.to(acc), factor)
            running.copy_(torch.where(learn, updated, running))
    mean, invstd = mean.to(acc), (var.to(acc) + eps).rsqrt()
    dense = as_dense(input)
    centred = dense.to(acc) - _composite.per_channel(mean, dense)
    output = _composite.transform(dense, centred, invstd, weight, bias, residual, relu)
    mask = _mask.pack(output, input) if need_mask else None
    return output, mean, invstd, count, mask


def sync_backward_reduce(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    grad, xhat = _grad_and_xhat(grad_output, input, mean, invstd)
    reduced = [0, *range(2, input.dim())]
    sums = torch.stack([grad.sum(reduced), (grad * xhat).sum(reduced)])
    grad_weight = sums[1].to(weight.dtype, copy=True) if need_weight else None
    grad_bias = sums[0].to(bias.dtype, copy=True) if need_bias else None
    return sums, grad_weight, grad_bias


def sync_sum(gathered: Tensor) -> Tensor:
    return _sum_over_ranks(gathered.double()).to(gathered.dtype)


def sync_backward_elementwise(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    sums: Tensor,
    count: Tensor,
) -> Tensor:
    grad, xhat = _grad_and_xhat(grad_output, input, mean, invstd)
    mean_dy, mean_dy_xhat = (_composite.per_channel(s, input) for s in sums / count)
    scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
    grad_input = (grad - mean_dy - xhat * mean_dy_xhat) * _composite.per_channel(scale, input)
    return _composite.with_strides_of(as_dense(input), grad_input.to(input.dtype))


def sync_fused_backward_reduce(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    mask: Tensor,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    grad = _mask.masked(grad_output, mask, input)
    return sync_backward_reduce(grad, input, weight, bias, mean, invstd, need_weight, need_bias)


def sync_fused_backward_elementwise(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    sums: Tensor,
    count: Tensor,
    mask: Tensor,
    need_input: bool,
    need_residual: bool,
) -> tuple[Tensor | None, Tensor | None]:
    grad = _mask.masked(grad_output, mask, input)
    grad_input = None
    if need_input:
        grad_input = sync_backward_elementwise(grad, input, weight, mean, invstd, sums, count)
    grad_residual = _composite.with_strides_of(as_dense(input), grad) if need_residual else None
    return grad_input, grad_residual


def _check_gathered(gathered: Tensor, values: int, dtype: torch.dtype) -> None:
    if gathered.dtype != dtype:
        raise TypeError(
            f"batch_norm: expected gathered to have dtype {dtype}, got {gathered.dtype}"
        )
    if gathered.dim() != 2 or gathered.shape[0] == 0 or gathered.shape[1] != values:
        raise ValueError(
            f"batch_norm: expected gathered to hold one row of {values} values a rank, "
            f"got shape {list(gathered.shape)}"
        )


def _grad_and_xhat(
    grad_output: Tensor, input: Tensor, mean: Tensor, invstd: Tensor
) -> tuple[Tensor, Tensor]:
    centred = input.to(mean.dtype) - _composite.per_channel(mean, input)
    return grad_output.to(mean.dtype), centred * _composite.per_channel(invstd, input)


def _merge(gathered: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Count [1], mean [C] and biased variance [C] of all ranks, the latter two in float64."""
    moments = gathered[:, -2 * channels :].double()
    counts = gathered[:, : -2 * channels].contiguous().view(torch.int64)
    means, m2s = moments.split(channels, 1)
    count = counts.sum(0)
    divisor = count.clamp_min(1)
    mean = _sum_over_ranks(counts * means) / divisor
    between = torch.where(counts > 0, counts * (means - mean).square(), 0.0)
    return count, mean, _sum_over_ranks(m2s + between) / divisor


def _sum_over_ranks(terms: Tensor) -> Tensor:
    """Sum over the first dimension in fixed point, which no order of the terms can change.

    The unit is a power of two that only the largest magnitude decides; the terms, rounded to whole
    units, then add up as integers. Of terms that are not finite only those count.
    """
    finite = terms.isfinite()
    special = torch.where(finite, 0.0, terms).sum(0)
    special = torch.where(special.isnan(), torch.nan, special)  # one NaN for all
    terms = torch.where(finite, terms, 0.0)
    exponent = torch.frexp(terms.abs().amax(0)).exponent.clamp_min(_LEAST_EXPONENT)
    unit = _SUM_BITS - len(terms).bit_length() - exponent
    one = torch.ones_like(special)
    total = (terms * torch.ldexp(one, unit)).round().to(torch.int64).sum(0)
    return torch.where(special == 0, total * torch.ldexp(one, -unit), special)
