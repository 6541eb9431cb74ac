"""A pass over one rank or several: where these gather of each other, and which operators run."""

from __future__ import annotations

import torch
from torch import Tensor

from . import composite, operators
from .calls import Backward, DoubleBackward, Forward, Statistics, SumRanks
from .layout import batched_by_autograd
from .ranks import gather


def forward(call: Forward) -> tuple[Tensor | None, ...]:
    """As `Normalized`. Over several ranks each tells the others its count, mean and M2, which all
    merge.
    """
    fused = call.relu or call.residual is not None
    if call.group is not None:
        row = gather(operators.sync_statistics.run(Statistics(call.input)), *call.group)
        operator = operators.sync_fused_forward if fused else operators.sync_forward
        results = operator.run(call._replace(gathered=row))
        return results if fused else (*results, None)
    if fused:
        *results, mask = operators.fused_forward.run(call)
        return *results, None, mask
    return operators.forward.run(call)


def backward(call: Backward) -> tuple[Tensor | None, ...]:
    """As `Gradients`, the first three alone where nothing is fused. Over several ranks each tells
    the others its sums; gradients of parameters are its own.
    """
    if call.group is not None:
        return _backward_of_ranks(call)
    if call.mask is not None:
        return operators.fused_backward.run(call)
    if not call.need_residual:
        return operators.backward.run(call)
    grads = (None, None, None)
    if call.need_input or call.need_weight or call.need_bias:
        grads = operators.backward.run(call)
    return *grads, call.grad_output


def _backward_of_ranks(call: Backward) -> tuple[Tensor | None, ...]:
    _check_one_by_one(call.grad_output)
    fused = call.mask is not None
    reduce = operators.sync_fused_backward_reduce if fused else operators.sync_backward_reduce
    sums, grad_weight, grad_bias = reduce.run(call)
    if call.need_input:  # else no rank asks the others
        sums = _total(sums, call)
    call = call._replace(sums=sums)
    grad_input = None
    grad_residual = call.grad_output if call.need_residual else None
    if fused and (call.need_input or call.need_residual):
        grad_input, grad_residual = operators.sync_fused_backward_elementwise.run(call)
    elif call.need_input:
        grad_input = operators.sync_backward_elementwise.run(call)
    return grad_input, grad_weight, grad_bias, grad_residual


def double_backward(call: DoubleBackward) -> tuple[Tensor | None, ...]:
    """As `DoubleGradients`. Over several ranks by torch operators: no kernel waits for others."""
    if call.group is not None:
        _check_one_by_one(*call[:4])
        return composite.double_backward(call, lambda own: _total(own, call))
    return operators.double_backward.run(call)


def _total(own: Tensor, call: Backward | DoubleBackward) -> Tensor:
    """The sums of all ranks."""
    return operators.sync_sum.run(SumRanks(gather(own, *call.group)))


def _check_one_by_one(*grads: Tensor | None) -> None:
    """A collective gathers what one gradient needs; the ranks need not have as many."""
    if not torch.compiler.is_compiling() and any(map(batched_by_autograd, grads)):
        raise RuntimeError(
            "SyncBatchNorm: expected one gradient at a time, got several at once from "
            "is_grads_batched=True (or vectorize=True): ask for one after the other"
        )
